"""Plain PyTorch specification of `local_propagation`, in blocks of patches and of images, which do not interact.

l_ij    = mean over heads of <q_i, k_j> / sqrt(d), clamped to the quantiles of row i
T_ij    = sigma * softmax_j(l_ij), 0 where below the row's mean (which is sigma / G, as a softmax row sums to 1) by more
          than rounding, so that a row of equal entries is kept whole
mixed_i = (1 / c_i) * sum over j in window(i) of T_ij code_j
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hpkernels._native import Availability
from hpkernels.ops import _checks as check
from hpkernels.ops._blocks import row_blocks


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def weights_forward(
    query: Tensor,
    key: Tensor,
    height: int,
    width: int,
    sigma: float,
    low: float,
    high: float,
    window: int,
    prefix_tokens: int,
) -> Tensor:
    """T_ij / c_i for the window of each patch, (B, window², H, W)."""
    (accumulate,) = check.accumulation(query.dtype)
    heads, patches = query.shape[1], height * width
    cells, inside = _window_cells(height, width, window, query.device)
    weights = query.new_empty((len(query), window * window, patches), dtype=accumulate)
    for of_image, image_query, image_key in zip(weights, query, key, strict=True):
        q, k = (tokens[:, prefix_tokens:].to(accumulate) for tokens in (image_query, image_key))
        for rows in row_blocks(cells, ((heads + 5) * weights.element_size() + 16) * patches):
            attention = _attention(q[:, rows], k, sigma, low, high).gather(1, cells[rows]).where(inside[rows], 0)
            of_image[:, rows] = (attention / inside[rows].sum(dim=1, keepdim=True)).T
    return weights.view(len(query), window * window, height, width)


def _attention(query: Tensor, key: Tensor, sigma: float, low: float, high: float) -> Tensor:
    """T (rows, G) of some patches of an image, given their queries (heads, rows, d) and all keys (heads, G, d)."""
    patches = key.shape[1]
    logits = (query @ key.mT).mean(dim=0) / math.sqrt(query.shape[-1])
    ordered = logits.sort(dim=1).values
    logits = logits.clamp(_quantile(ordered, low), _quantile(ordered, high))
    attention = logits.softmax(dim=1) * patches  # in units of the row's mean
    return attention.masked_fill(attention < 1 - 8 * torch.finfo(logits.dtype).eps, 0) * (sigma / patches)


def _quantile(ordered: Tensor, quantile: float) -> Tensor:
    """The quantile of each sorted row, by linear interpolation, (G, 1)."""
    position = quantile * (ordered.shape[1] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)[:, None]


def _window_cells(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cells of each patch's window, (G, window²), and which of them are inside the image; others are clamped."""
    radius = window // 2
    offset = torch.arange(-radius, radius + 1, device=device)
    y = torch.arange(height, device=device)[:, None] + offset  # (H, window)
    x = torch.arange(width, device=device)[:, None] + offset  # (W, window)
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    cells = y.clamp(0, height - 1)[:, None, :, None] * width + x.clamp(0, width - 1)[None, :, None, :]
    return cells.flatten(2).flatten(0, 1), inside.flatten(2).flatten(0, 1)


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    (accumulate,) = check.accumulation(code.dtype)
    radius = math.isqrt(weights.shape[1]) // 2
    mixed = torch.empty_like(code, memory_format=torch.contiguous_format)
    for images in _image_blocks(code, radius):
        padded = F.pad(code[images].to(accumulate), (radius,) * 4)
        total = torch.zeros_like(code[images], dtype=accumulate)
        for neighbours, weight in zip(_shifted(padded, radius), weights[images].unbind(1), strict=True):
            total.addcmul_(neighbours, weight[:, None].to(accumulate))
        mixed[images] = total
    return mixed


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch's gradient goes to the cells of its window."""
    (accumulate,) = check.accumulation(grad.dtype)
    radius = math.isqrt(weights.shape[1]) // 2
    result = torch.empty_like(grad, memory_format=torch.contiguous_format)
    for images in _image_blocks(grad, radius):
        own = grad[images].to(accumulate)
        padded = F.pad(torch.zeros_like(own), (radius,) * 4)
        for neighbours, weight in zip(_shifted(padded, radius), weights[images].unbind(1), strict=True):
            neighbours.addcmul_(own, weight[:, None].to(accumulate))
        result[images] = _shifted(padded, radius)[weights.shape[1] // 2]  # the middle cell: each patch itself
    return result


def _image_blocks(code: Tensor, radius: int) -> list[slice]:
    _, dim, height, width = code.shape
    return row_blocks(code, 4 * max(4, code.element_size()) * dim * (height + 2 * radius) * (width + 2 * radius))


def _shifted(padded: Tensor, radius: int) -> list[Tensor]:
    """What each cell of a window sees of padded maps (B, D, H + 2 radius, W + 2 radius): views (B, D, H, W)."""
    height, width = (size - 2 * radius for size in padded.shape[2:])
    cells = itertools.product(range(2 * radius + 1), repeat=2)
    return [padded[:, :, y : y + height, x : x + width] for y, x in cells]
