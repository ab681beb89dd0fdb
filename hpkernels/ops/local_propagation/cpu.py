"""CPU kernels of `local_propagation`: one full-width product for the logits of an image, and a stencil over planes.

The mean over heads of <q, k> is the product of the concatenated heads over their number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops import _checks as check

__all__ = ["apply_backward", "apply_forward", "supports", "weights_forward"]


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
    logits = query.new_empty((patches, patches), dtype=accumulate)
    weights = query.new_empty((images, window * window, height, width), dtype=accumulate)
    for image in range(images):
        own_query, own_key = (_heads_joined(tokens[image, :, prefix_tokens:], accumulate) for tokens in (query, key))
        own_query = own_query / (heads * math.sqrt(dim))
        torch.ops.hpkernels_cpu.multiply(own_query, own_key.T, logits, False)
        torch.ops.hpkernels_cpu.local_propagation_weights(logits, sigma, low, high, weights[image : image + 1])
    return weights


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    return _stencil(torch.ops.hpkernels_cpu.local_propagation_apply, code, weights)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch's gradient goes to the cells of its window."""
    return _stencil(torch.ops.hpkernels_cpu.local_propagation_apply_backward, grad, weights)


def _stencil(kernel: Any, maps: Tensor, weights: Tensor) -> Tensor:
    (accumulate,) = check.accumulation(maps.dtype)
    result = torch.empty(maps.shape, dtype=accumulate, device=maps.device)
    kernel(maps.to(accumulate).contiguous(), weights.to(accumulate).contiguous(), result)
    return result.to(maps.dtype)


def _heads_joined(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(heads, G, d) as (G, heads * d)."""
    return tokens.transpose(0, 1).flatten(1).to(dtype)
