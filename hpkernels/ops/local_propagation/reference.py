"""Plain PyTorch specification of `local_propagation`.

l_ij    = mean over heads of <q_i, k_j> / sqrt(d), clamped to the quantiles of row i
T_ij    = sigma * softmax_j(l_ij), 0 where below the row's mean (which is sigma / G, as a softmax row sums to 1) by more
          than rounding, so that a row of equal entries is kept whole
mixed_i = (1 / c_i) * sum over j in window(i) of T_ij code_j
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hpkernels.backends import Availability


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
    # One image at a time: the (G, G) logits of a whole batch would be large, and images do not interact.
    images = [
        _image_weights(q, k, height, width, sigma, low, high, window)
        for q, k in zip(query[:, :, prefix_tokens:], key[:, :, prefix_tokens:], strict=True)
    ]
    return torch.stack(images)


def _image_weights(
    query: Tensor, key: Tensor, height: int, width: int, sigma: float, low: float, high: float, window: int
) -> Tensor:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(accumulate), key.to(accumulate)
    logits = (query @ key.mT).mean(dim=0) / math.sqrt(query.shape[-1])
    ordered = logits.sort(dim=1).values
    logits = logits.clamp(_quantile(ordered, low), _quantile(ordered, high))
    attention = logits.softmax(dim=1) * (height * width)  # in units of the row's mean
    attention = attention.masked_fill(attention < 1 - 8 * torch.finfo(accumulate).eps, 0) * (sigma / (height * width))
    return _window_cells(attention, height, width, window)


def _quantile(ordered: Tensor, quantile: float) -> Tensor:
    """The quantile of each sorted row, by linear interpolation, (G, 1)."""
    position = quantile * (ordered.shape[1] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)[:, None]


def _window_cells(attention: Tensor, height: int, width: int, window: int) -> Tensor:
    """Pick the window's cells of each row of (G, G) attention and divide by their number: (window², H, W)."""
    radius = window // 2
    offset = torch.arange(-radius, radius + 1, device=attention.device)
    y = torch.arange(height, device=attention.device)[:, None] + offset  # (H, window)
    x = torch.arange(width, device=attention.device)[:, None] + offset  # (W, window)
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    cell = y.clamp(0, height - 1)[:, None, :, None] * width + x.clamp(0, width - 1)[None, :, None, :]
    inside, cell = inside.flatten(2).flatten(0, 1), cell.flatten(2).flatten(0, 1)  # (G, window²)
    weights = attention.gather(1, cell).where(inside, 0) / inside.sum(dim=1, keepdim=True)
    return weights.T.reshape(window * window, height, width)


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W); differentiable in code."""
    accumulate = torch.float64 if code.dtype == torch.float64 else torch.float32
    (batch, dim, height, width), cells = code.shape, weights.shape[1]
    window = math.isqrt(cells)
    neighbours = F.unfold(code.to(accumulate), window, padding=window // 2).view(batch, dim, cells, height, width)
    return (neighbours * weights[:, None].to(accumulate)).sum(dim=2).to(code.dtype)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch's gradient goes to the cells of its window."""
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    (batch, dim, height, width), cells = grad.shape, weights.shape[1]
    window = math.isqrt(cells)
    neighbours = grad.to(accumulate)[:, :, None] * weights[:, None].to(accumulate)  # (B, D, window², H, W)
    return F.fold(
        neighbours.reshape(batch, dim * cells, height * width), (height, width), window, padding=window // 2
    ).to(grad.dtype)
