"""Any timm vision transformer as a frozen backbone, from downloaded or local weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones.base import Backbone, PatchFeatures

_WRAPPERS = ("teacher", "student", "state_dict", "model")  # keys under which training scripts keep the weights
_PREFIXES = ("module.", "backbone.", "encoder.")


class TimmViT(Backbone):
    """A timm ViT: patch tokens after the final LayerNorm, query and key of the last block.

    Args:
        name: timm name, for example ``vit_small_patch8_224.dino``.
        pretrained: download timm's weights.
        weights: a local file instead: DINO, timm or SelfPatch layout, perhaps inside a training checkpoint.
        class_token: whether the ViT has one; SelfPatch trains without.

    Raises:
        ValueError: timm does not know `name`, it is not a ViT, or the weights do not fit it.
    """

    def __init__(
        self, name: str, pretrained: bool = False, weights: str | None = None, class_token: bool = True
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            nearest = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5]) or "see timm.list_models('vit*')"
            raise ValueError(f"backbone: timm has no model {name!r}; near it: {nearest}")
        options = {} if class_token else {"class_token": False, "global_pool": "avg"}
        try:
            self.vit = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **options)
            self.vit.blocks[-1].attn.fused_attn = True  # so that query and key can be read where they meet
        except (AttributeError, TypeError) as error:
            raise ValueError(f"backbone: {name!r} is not a plain ViT: {error}") from error
        if not class_token:
            # timm moves the final LayerNorm behind the average when there is no class token.
            self.vit.norm, self.vit.fc_norm = nn.LayerNorm(self.vit.embed_dim, eps=1e-6), nn.Identity()
        if weights is not None:
            load_weights(self.vit, read_weights(weights), weights)
        if not isinstance(self.vit.patch_embed, PatchEmbed):
            kind = type(self.vit.patch_embed).__name__
            raise ValueError(f"backbone: {name!r} is not a plain ViT: its patches are made by a {kind}")
        self.features_dim = self.vit.embed_dim
        self.patch_size = self.vit.patch_embed.patch_size[0]
        self.prefix_tokens = self.vit.num_prefix_tokens
        self._mean = torch.tensor(self.vit.pretrained_cfg["mean"])[:, None, None]
        self._std = torch.tensor(self.vit.pretrained_cfg["std"])[:, None, None]
        self.requires_grad_(False).eval()
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, 2 * self.patch_size, 3 * self.patch_size))
        except (RuntimeError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"backbone: {name!r} is not a plain ViT: its attention cannot be read: {error}") from error

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of the images that the ViT was trained on."""
        return (images - self._mean.to(images)) / self._std.to(images)

    def forward(self, images: Tensor) -> PatchFeatures:
        """Patch features of normalised images (B, 3, h, w)."""
        with _attended() as calls:
            tokens = self.vit.forward_features(images)
        query, key, scale = calls[-1]
        if query.shape != key.shape or query.shape[2] != tokens.shape[1]:
            raise RuntimeError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, tokens {tuple(tokens.shape)}")
        # The propagation op divides by sqrt(d), which is not every ViT's scale.
        query = query * (scale * math.sqrt(query.shape[-1]))
        return PatchFeatures(tokens[:, self.prefix_tokens :], query, key)


@contextmanager
def _attended() -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Query, key and scale of each attention inside the block, with all that the model does to them before they meet:
    biases, norms, rotary embeddings."""
    calls: list[tuple[Tensor, Tensor, float]] = []
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        scale = options.get("scale")
        calls.append((query, key, query.shape[-1] ** -0.5 if scale is None else scale))
        return original(query, key, *rest, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weight file, without the wrappers and prefixes that training scripts add.

    Raises:
        ValueError: the file is not there, needs code to be unpickled, or holds no state dict.
    """
    if not Path(path).is_file():
        raise ValueError(f"backbone: there is no weight file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"backbone: {path} cannot be read as plain tensors: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"backbone: {path} holds no state dict")
    return {_bare(name): value for name, value in state.items()}


def load_weights(vit: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load `state` into `vit`; entries of heads are left out, and every parameter of the ViT must be there.

    SelfPatch keeps the final LayerNorm in its head, or leaves it out; it then stays without scale and shift.
    """
    own = vit.state_dict()
    if "cls_token" not in state and "head.norm.weight" in state:
        state |= {f"norm.{name}": state[f"head.norm.{name}"] for name in ("weight", "bias")}
    optional = set() if "cls_token" in state else {"norm.weight", "norm.bias"}
    missing = sorted(own.keys() - state.keys() - optional)
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or shapes:
        problem = f"lacks {missing[0]}" if missing else _shape_problem(own, state, min(shapes))
        if "cls_token" in missing:
            problem += " (SelfPatch weights need `backbone.class_token=false`)"
        raise ValueError(f"backbone: {path} does not fit the ViT: it {problem} ({len(missing) + len(shapes)} entries)")
    vit.load_state_dict({name: state.get(name, value) for name, value in own.items()})


def _shape_problem(own: dict[str, Tensor], state: dict[str, Tensor], name: str) -> str:
    return f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
