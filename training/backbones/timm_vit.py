"""Any timm vision transformer as a frozen backbone, from downloaded or local weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones.base import Backbone, PatchFeatures
from training.checkpoint import load_plain

_WRAPPERS = ("teacher", "student", "state_dict", "model")  # keys under which training scripts keep the weights
_PATIENCE = 10  # seconds for the Hub to answer
_PREFIXES = ("module.", "backbone.", "encoder.")


class TimmViT(Backbone):
    """A timm ViT: patch tokens after the final LayerNorm, query and key of the last block.

    Args:
        name: timm name, for example ``vit_small_patch8_224.dino``.
        pretrained: download timm's weights.
        weights: a local file, for which nothing is downloaded: DINO, timm or SelfPatch layout, perhaps inside a
            training checkpoint.
        class_token: whether the ViT has one; SelfPatch trains without.

    Raises:
        ValueError: timm does not know `name`, it is not a ViT, or the weights do not fit it.
    """

    def __init__(
        self, name: str, pretrained: bool = False, weights: str | None = None, class_token: bool = True
    ) -> None:
        super().__init__()
        _check_name(name)
        options = {} if class_token else {"class_token": False, "global_pool": "avg"}
        download = pretrained and weights is None  # a local file stands for what would be downloaded
        if download:
            _check_download(name)
        try:
            self.vit = timm.create_model(name, pretrained=download, num_classes=0, dynamic_img_size=True, **options)
            self.vit.blocks[-1].attn.fused_attn = True  # so that query and key can be read where they meet
        except (AttributeError, TypeError) as error:
            raise ValueError(f"backbone: `backbone.name`: {name!r} is not a plain ViT") from error
        except (OSError, RuntimeError) as error:
            if download:
                raise _no_download(name) from error
            raise
        if not class_token:
            # timm moves the final LayerNorm behind the average when there is no class token.
            self.vit.norm, self.vit.fc_norm = nn.LayerNorm(self.vit.embed_dim, eps=1e-6), nn.Identity()
        if weights is not None:
            load_weights(self.vit, read_weights(weights), weights)
        if not isinstance(self.vit.patch_embed, PatchEmbed):
            kind = type(self.vit.patch_embed).__name__
            raise ValueError(
                f"backbone: `backbone.name`: {name!r} is not a plain ViT: its patches are made by a {kind}"
            )
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
            raise ValueError(
                f"backbone: `backbone.name`: {name!r} is not a plain ViT: its attention cannot be read"
            ) from error

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


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, with those that are near."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.7)
        # A name with a tag is told with a tag, as the weights are half of what was asked for.
        near = [_with_tag(model, tag) for model in near]
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models('vit*')"
        raise ValueError(f"backbone: `backbone.name`: timm has no model {name!r}; {hint}")
    tags = _tags(architecture)
    if tag and tag not in tags:
        there = f"there are {', '.join(tags)}" if tags else "it has none"
        raise ValueError(f"backbone: `backbone.name`: timm has no weights {tag!r} for {architecture}; {there}")


def _tags(architecture: str) -> list[str]:
    """The tags of the weights that timm has for an architecture."""
    names = timm.list_pretrained(f"{architecture}.*")
    return [name.partition(".")[2] for name in names]


def _with_tag(architecture: str, tag: str) -> str:
    near = difflib.get_close_matches(tag, _tags(architecture), n=1) if tag else []
    return f"{architecture}.{near[0]}" if near else architecture


def _check_download(name: str) -> None:
    """Ask for the weights once, where they are not in the cache: the download itself tries for a minute.

    Raises:
        ValueError: the Hub cannot be reached.
    """
    settings = timm.get_pretrained_cfg(name)
    source = settings.hf_hub_id if settings is not None else None
    if not source or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    files = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(source, file), str) for file in files):
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(source, files[0]), timeout=_PATIENCE)
    except huggingface_hub.errors.HfHubHTTPError:
        return  # the Hub answers; whatever it says, the download says better
    except Exception as error:  # the exceptions of its HTTP client, which differ by version
        raise _no_download(name) from error


def _no_download(name: str) -> ValueError:
    return ValueError(
        f"backbone: `backbone.pretrained`: the weights of {name!r} cannot be downloaded from the Hugging Face Hub; with"
        " a weight file at hand set `backbone.weights` to it instead"
    )


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
        raise ValueError(f"backbone: `backbone.weights`: there is no weight file {path}")
    try:
        state = load_plain(path)
    except ValueError as error:
        raise ValueError(f"backbone: `backbone.weights`: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"backbone: `backbone.weights`: {path} holds no state dict")
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
