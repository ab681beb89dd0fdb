"""CPU kernels of `local_propagation`: one full-width product for the logits of an image, and a stencil over planes.

The mean over heads of <q, k> is the product of the concatenated heads over their number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops import _checks as check

__all__ = ["apply_backward", "apply_forward", "supports", "weights_forward"]

_TILE = 2**22  # logits held at a time


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
    images, heads, _, dim = query.shape
    patches = height * width
    at_a_time = min(images, max(1, _TILE // patches**2))
    logits = query.new_empty((at_a_time, patches, patches), dtype=accumulate)
    weights = query.new_empty((images, window * window, height, width), dtype=accumulate)
    for start in range(0, images, at_a_time):
        some = slice(start, min(start + at_a_time, images))
        own_query = _heads_joined(query[some, :, prefix_tokens:], accumulate) / (heads * math.sqrt(dim))
        own_key = _heads_joined(key[some, :, prefix_tokens:], accumulate)
        tile = torch.bmm(own_query, own_key.mT, out=logits[: some.stop - start])
        torch.ops.hpkernels_cpu.local_propagation_weights(tile, sigma, low, high, weights[some])
    return weights


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    return _stencil(torch.ops.hpkernels_cpu.local_propagation_apply, code, weights)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch's gradient goes to the cells of its window."""
    return _stencil(torch.ops.hpkernels_cpu.local_propagation_apply_backward, grad, weights)


def _stencil(kernel, maps: Tensor, weights: Tensor) -> Tensor:
    (accumulate,) = check.accumulation(maps.dtype)
    result = torch.empty(maps.shape, dtype=accumulate)
    kernel(maps.to(accumulate).contiguous(), weights.to(accumulate).contiguous(), result)
    return result.to(maps.dtype)


def _heads_joined(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, heads, G, d) as (B, G, heads * d)."""
    return tokens.transpose(1, 2).flatten(2).to(dtype)
