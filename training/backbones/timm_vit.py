"""Any timm vision transformer as a frozen backbone, from downloaded or local weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones.base import Backbone, PatchFeatures
from training.backbones.local import similarity_as_attention
from training.backbones.weights import load_weights, read_weights

_PATIENCE = 10  # seconds for the Hub to answer


class TimmViT(Backbone):
    """A timm ViT: patch tokens of a block after the final LayerNorm, and what local propagation goes by.

    Args:
        name: timm name, for example ``vit_small_patch8_224.dino``.
        pretrained: download timm's weights.
        weights: a local file, for which nothing is downloaded, in one of the layouts of `weights.py`.
        class_token: whether the ViT has one; SelfPatch trains without.
        layer: the block, from 1 on, whose tokens are the features; None: the last. Later blocks do not run.
        local_source: what local propagation goes by: "attention", query and key of that block; "tokens", similarity of
            its tokens; "features", similarity of the tokens of block `local_layer`; "auto", by `default_source`.
        local_layer: of "features", from 1 on; None: `layer`.

    Raises:
        ValueError: timm does not know `name`, it is not a ViT, the weights do not fit it, or it has no such layer.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | None = None,
        class_token: bool = True,
        *,
        layer: int | None = None,
        local_source: str = "attention",
        local_layer: int | None = None,
    ) -> None:
        super().__init__()
        _check_name(name)
        options = {} if class_token else {"class_token": False, "global_pool": "avg"}
        download = pretrained and weights is None  # a local file stands for what would be downloaded
        if download:
            _check_download(name)
        try:
            self.vit = timm.create_model(name, pretrained=download, num_classes=0, dynamic_img_size=True, **options)
            depth = len(self.vit.blocks)
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
        self.layer = _block("backbone.layer", layer, depth, name)
        self.local_source = default_source(name, self.vit) if local_source == "auto" else local_source
        self.local_layer = _block("local.layer", local_layer or self.layer, depth, name)
        self.features_dim = self.vit.embed_dim
        self.patch_size = self.vit.patch_embed.patch_size[0]
        self.prefix_tokens = self.vit.num_prefix_tokens if self.local_source == "attention" else 0
        self._mean = torch.tensor(self.vit.pretrained_cfg["mean"])[:, None, None]
        self._std = torch.tensor(self.vit.pretrained_cfg["std"])[:, None, None]
        self.requires_grad_(False).eval()
        try:
            if self.local_source == "attention":  # query and key are read where they meet: in the fused attention
                self.vit.blocks[self.layer - 1].attn.fused_attn = True
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
        if self.local_source == "attention":
            with _attended(self.vit.blocks[self.layer - 1].attn) as calls:
                (tokens,) = self._tokens(images, [self.layer])
            query, key, scale = calls[-1]
            if query.shape != key.shape or query.shape[2] != self.prefix_tokens + tokens.shape[1]:
                raise RuntimeError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, tokens {tuple(tokens.shape)}")
            # The propagation op divides by sqrt(d), which is not every ViT's scale.
            return PatchFeatures(tokens, query * (scale * math.sqrt(query.shape[-1])), key)
        tokens, others = self._tokens(images, [self.layer, self.local_layer])
        alike = similarity_as_attention(others, centre=True)
        return PatchFeatures(tokens, alike, alike)

    def _tokens(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Patch tokens (B, G, Df) after each of these blocks and the final LayerNorm; blocks after them do not run."""
        blocks = sorted({layer - 1 for layer in layers})
        found = self.vit.forward_intermediates(
            images, indices=blocks, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return [found[blocks.index(layer - 1)] for layer in layers]


def default_source(name: str, vit: nn.Module) -> str:
    """What ``local.source=auto`` is for a ViT: docs/backbones.md has the reasons.

    Query and key of DINOv2 and DINOv3 say where a patch is; those of other ViTs with rotary embeddings may.
    """
    rotary = getattr(vit, "rope", None) is not None
    return "tokens" if rotary or "dinov2" in name else "attention"


def _block(key: str, layer: int | None, depth: int, name: str) -> int:
    if layer is not None and layer > depth:
        raise ValueError(f"config: `{key}` must be at most the {depth} blocks of {name}, got {layer}")
    return layer or depth


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
def _attended(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Query, key and scale of one module `attention`, with all that it does to them before they meet: biases, norms,
    rotary embeddings. The attention stays fused, and of the other blocks nothing is kept."""
    calls: list[tuple[Tensor, Tensor, float]] = []
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        scale = options.get("scale")
        calls.append((query, key, query.shape[-1] ** -0.5 if scale is None else scale))
        return original(query, key, *rest, **options)

    def listen(*_: Any) -> None:
        F.scaled_dot_product_attention = spy

    def stop(*_: Any) -> None:
        F.scaled_dot_product_attention = original

    hooks = [attention.register_forward_pre_hook(listen), attention.register_forward_hook(stop)]
    try:
        yield calls
    finally:
        stop()
        for hook in hooks:
            hook.remove()
