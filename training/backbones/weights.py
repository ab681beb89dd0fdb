"""Weight files of ViTs, in the layouts in which their authors publish them, as state dicts of timm's ViTs.

| files of                | weights under               | other names than timm's                            |
|-------------------------|-----------------------------|----------------------------------------------------|
| facebookresearch/dino   | nothing, or ``teacher``     |                                                    |
| bytedance/ibot          | ``state_dict``, ``teacher`` | ``masked_embed``, left out                         |
| alinlab/SelfPatch       | ``teacher``                 | the final norm in the head; no class token         |
| facebookresearch/mae    | ``model``                   | decoder and ``mask_token``, left out               |
| facebookresearch/msn    | ``target_encoder``          | ``fc``, left out                                   |
| facebookresearch/dinov2 | nothing, or ``teacher``     | ``register_tokens``, ``w12``; blocks in chunks     |
| facebookresearch/dinov3 | nothing, or ``teacher``     | ``storage_tokens``, ``ls1.gamma``, masked ``bias`` |
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from training.runtime.checkpoint import load_plain

_WRAPPERS = ("teacher", "target_encoder", "student", "state_dict", "model", "encoder")  # the first that is there
_PREFIXES = ("module.", "backbone.", "encoder.")
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")  # of blocks that were trained in groups


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weight file, without the wrappers and prefixes that training scripts add.

    Raises:
        ValueError: the file is not there, needs code to be unpickled, or holds no state dict.
    """
    if not Path(path).is_file():
        raise ValueError(f"backbone: `backbone.weights`: there is no weight file {path}")
    try:
        state = load_plain(path)
    except ValueError as error:
        raise ValueError(f"backbone: `backbone.weights`: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if isinstance(state, dict):
        state = {_bare(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not state or not isinstance(state, dict):
        raise ValueError(f"backbone: `backbone.weights`: {path} holds no state dict")
    return state


def load_weights(vit: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load `state` into `vit`; entries of heads are left out, and every parameter of the ViT must be there.

    SelfPatch keeps the final LayerNorm in its head, or leaves it out; it then stays without scale and shift.

    Raises:
        ValueError: something is missing or has another shape; the message says what.
    """
    own = vit.state_dict()
    problem = _patch_problem(own, state) or _bias_problem(own, state)
    if problem is None:
        state = _renamed(vit, state)
        optional = set() if "cls_token" in state else {"norm.weight", "norm.bias"}
        missing = sorted(own.keys() - state.keys() - optional)
        shapes = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        more = sorted(_body(state) - _body(own))
        if missing:
            problem = f"lacks {missing[0]}"
            if "cls_token" in missing:
                problem += " (SelfPatch weights need `backbone.class_token=false`)"
        elif shapes:
            problem = _shape_problem(own, state, shapes[0])
        elif more:
            problem = f"has {more[0]} beyond it"
        if problem is not None:
            problem += f" ({len(missing) + len(shapes) + len(more)} entries)"
    if problem is not None:
        raise ValueError(f"backbone: {path} does not fit the ViT: it {problem}")
    vit.load_state_dict({name: state.get(name, value) for name, value in own.items()})


def _renamed(vit: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under timm's names, by timm's own converter, with position embeddings of the size that `vit` has."""
    state = {_CHUNK.sub("blocks.", name): value for name, value in state.items()}
    if "cls_token" not in state and "head.norm.weight" in state:
        state |= {f"norm.{name}": state[f"head.norm.{name}"] for name in ("weight", "bias")}
    if "storage_tokens" in state and not any(name.endswith(".q_bias") for name in vit.state_dict()):
        # _bias_problem has seen to it that the biases are zero; the converter prints a line for each.
        state = {name: value for name, value in state.items() if not name.endswith(".qkv.bias")}
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return convert(state, vit)
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError):
        return state  # what is wrong with it is told by comparing the names and shapes


def _patch_problem(own: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """timm would stretch the weights of other patches; they are those of another ViT."""
    name = "patch_embed.proj.weight"
    if name in state and state[name].shape != own[name].shape:
        return _shape_problem(own, state, name)
    return None


def _bias_problem(own: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """DINOv3 files have attention biases, which some are zero and timm's plain names leave out."""
    if "storage_tokens" not in state or any(name.endswith(".q_bias") for name in own):
        return None
    for name, bias in state.items():
        query, _, value = bias.chunk(3) if name.endswith(".qkv.bias") else (torch.zeros(1),) * 3  # keys have no bias
        if query.any() or value.any():
            return f"has {name}, which is not zero: choose the name with _dinov3_qkvb"
    return None


def _body(state: dict[str, Tensor]) -> set[str]:
    """The names of a state dict that are of the ViT itself, whose lack would change what it computes."""
    return {name for name in state if re.match(r"blocks\.|reg_token|pos_embed|cls_token", name)}


def _shape_problem(own: dict[str, Tensor], state: dict[str, Tensor], name: str) -> str:
    return f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
