"""Frozen features of pixels: in one piece, or window by window for images larger than a backbone was trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import hpkernels
from training.backbones.base import Backbone, PatchFeatures


class Features(NamedTuple):
    """What the frozen backbone says about B images of H x W patches."""

    tokens: Tensor  # (B, G, Df) float32
    weights: Tensor  # (B, 9, H, W) float32, for local propagation; empty where they were not asked for


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """What ``backbone.precision`` is on a device."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


class Windows(NamedTuple):
    """Square windows over an image, in pixels; both multiples of the patch size."""

    side: int
    stride: int


def fitted_size(
    photograph: tuple[int, int], size: tuple[int, int], windows: Windows | None, patch: int
) -> tuple[int, int]:
    """Height and width that the whole of a photograph is segmented at.

    Without windows `size`. Windows keep the shape of the photograph, up to the rounding to patches: its shorter side
    becomes that of `size`, and its longer side at most eight times that, so that memory is bounded.
    """
    if windows is None:
        return size
    short = min(size)
    height, width = (
        max(patch, round(min(short * side / min(photograph), 8 * short) / patch) * patch) for side in photograph
    )
    return height, width


@torch.no_grad()
def features_of(
    backbone: Backbone,
    pixels: Tensor,
    *,
    weights: bool = True,
    windows: Windows | None = None,
    backend: str = "auto",
    precision: torch.dtype = torch.float32,
) -> Features:
    """Features of images (B, 3, h, w) in [0, 1]; where windows overlap, the mean of theirs."""
    if windows is None or max(pixels.shape[2:]) <= windows.side:
        return _whole(backbone, pixels, weights, backend, precision)
    patch = backbone.patch_size
    height, width = backbone.grid(tuple(pixels.shape[2:]))
    total: dict[str, Tensor] = {}
    count = pixels.new_zeros(height, width)
    for top in _starts(pixels.shape[2], windows):
        for left in _starts(pixels.shape[3], windows):
            cut = pixels[:, :, top : top + windows.side, left : left + windows.side]
            found = _whole(backbone, cut, weights, backend, precision)
            grid = backbone.grid(tuple(cut.shape[2:]))
            inside = (slice(top // patch, top // patch + grid[0]), slice(left // patch, left // patch + grid[1]))
            count[inside] += 1
            for name, part in {"tokens": found.tokens.mT.unflatten(2, grid), "weights": found.weights}.items():
                if part.numel():
                    if name not in total:
                        total[name] = part.new_zeros(len(part), part.shape[1], height, width)
                    total[name][:, :, inside[0], inside[1]] += part
    tokens = (total["tokens"] / count).flatten(2).mT
    return Features(tokens, total["weights"] / count if weights else tokens.new_empty(0))


def _starts(length: int, windows: Windows) -> list[int]:
    """Where windows begin along a side; the last one ends with the image."""
    last = max(0, length - windows.side)
    return [*range(0, last, windows.stride), last]


def patch_features(backbone: Backbone, normalised: Tensor, precision: torch.dtype) -> PatchFeatures:
    """What the backbone says about normalised images (B, 3, h, w), computed in a precision; tokens float32."""
    with torch.autocast(normalised.device.type, precision, enabled=precision != torch.float32):
        found = backbone(normalised)
    return found._replace(tokens=found.tokens.float())


def _whole(backbone: Backbone, pixels: Tensor, weights: bool, backend: str, precision: torch.dtype) -> Features:
    tokens, query, key = patch_features(backbone, backbone.normalize(pixels), precision)
    if not weights:
        return Features(tokens, tokens.new_empty(0))
    grid = backbone.grid(tuple(pixels.shape[2:]))
    local = hpkernels.local_propagation_weights(query, key, grid, prefix_tokens=backbone.prefix_tokens, backend=backend)
    return Features(tokens, local.float())
