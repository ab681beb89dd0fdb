"""Frozen features of pixels: in one piece, or window by window for images larger than a backbone was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

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
    photograph: tuple[int, int],
    size: tuple[int, int],
    windows: Windows | None,
    patch: int,
    scale: float | None = None,
) -> tuple[int, int]:
    """Height and width that the whole of a photograph is segmented at.

    With a `scale`, so many times its own, up to the rounding to patches. Else without windows `size`. Windows alone
    keep the shape of the photograph, up to that rounding: its shorter side becomes that of `size`, and its longer side
    at most eight times that, so that memory is bounded.
    """
    if windows is None and scale is None:
        return size
    short = min(size)
    height, width = (
        max(
            patch,
            round((min(short * side / min(photograph), 8 * short) if scale is None else side * scale) / patch) * patch,
        )
        for side in photograph
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
    """Features of images (B, 3, h, w) in [0, 1]; where windows overlap, their mean as `blended_strips` weighs it."""
    if windows is None or max(pixels.shape[2:]) <= windows.side:
        return _whole(backbone, pixels, weights, backend, precision)

    def maps(cut: Tensor) -> Tensor:
        found = _whole(backbone, cut, weights, backend, precision)
        tokens = found.tokens.mT.unflatten(2, backbone.grid(tuple(cut.shape[2:])))
        return torch.cat([tokens, found.weights], dim=1) if weights else tokens

    blended = torch.cat(list(blended_strips(pixels, windows, backbone.patch_size, maps)), dim=2)
    tokens, local = blended.split([backbone.features_dim, blended.shape[1] - backbone.features_dim], dim=1)
    return Features(tokens.flatten(2).mT, local if weights else tokens.new_empty(0))


def blended_strips(
    pixels: Tensor, windows: Windows | None, patch: int, maps: Callable[[Tensor], Tensor], batch: int = 1
) -> Iterator[Tensor]:
    """The map of images, put together from those of their windows, in strips of rows from top to bottom.

    Where windows overlap, a patch is the mean of theirs, weighed by how far it is from the nearest border of each, so
    that no seams show. Only the rows that one row of windows covers are in memory.

    Args:
        pixels: (B, 3, h, w), of any type; its sides are multiples of `patch`.
        windows: None, or larger than the images: one window over the whole.
        patch: pixels a side of one patch.
        maps: gives the map (n, C, H, W) of patches of n windows.
        batch: how many windows of a row `maps` gets at a time.

    Yields:
        (B, C, rows, w / patch); the rows of all strips are h / patch.
    """
    height, width = pixels.shape[2:]
    if windows is None or max(height, width) <= windows.side:
        yield maps(pixels)
        return
    tall, wide = min(windows.side, height), min(windows.side, width)
    ramp = _ramp(tall // patch)[:, None] * _ramp(wide // patch)
    tops, lefts = _starts(height, windows), _starts(width, windows)
    total = weight = None  # of the rows that begin at `top`
    rows = tqdm(tops, desc="windows", unit="row", leave=False, delay=5)
    for top, below in zip(rows, [*tops[1:], height], strict=True):
        for some in (lefts[at : at + batch] for at in range(0, len(lefts), batch)):
            cuts = torch.cat([pixels[:, :, top : top + tall, left : left + wide] for left in some])
            found = maps(cuts)
            if total is None:
                ramp = ramp.to(found)
                total = found.new_zeros(len(pixels), found.shape[1], tall // patch, width // patch)
                weight = found.new_zeros(tall // patch, width // patch)
            for left, part in zip(some, found.split(len(pixels)), strict=True):
                columns = slice(left // patch, (left + wide) // patch)
                total[..., columns] += part * ramp
                weight[:, columns] += ramp
        done = (below - top) // patch
        yield total[:, :, :done] / weight[:done]
        total = F.pad(total[:, :, done:], (0, 0, 0, done))
        weight = F.pad(weight[done:], (0, 0, 0, done))


def _starts(length: int, windows: Windows) -> list[int]:
    """Where windows begin along a side; the last one ends with the image."""
    last = max(0, length - windows.side)
    return [*range(0, last, windows.stride), last]


def _ramp(patches: int) -> Tensor:
    """The weights (patches,) of the patches along a side of a window: 1 at its ends, more towards its middle."""
    at = torch.arange(1, patches + 1)
    return torch.minimum(at, at.flip(0))


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
