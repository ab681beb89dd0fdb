"""CUDA kernels of `local_propagation`: logits on tensor cores, exact quantiles of their rows, a stencil that gathers.

The mean over heads of <q, k> is one product of full width, heads * d, read in place where a token's heads are next to
each other in memory. The logits go to a workspace that stays in the second-level cache, pass by pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hpkernels.ops._cuda import aligned_rows, supports

__all__ = ["apply_backward", "apply_forward", "supports", "weights_forward"]

WORKSPACE_BYTES = 32 << 20
"""What the logits of a pass may take, unless those of a single strip of rows take more."""

STRIP_ROWS = 128
"""Patches whose weights are computed together: each image is cut into such strips, see local_propagation.h."""


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
    images, heads, _, dim = query.shape
    patches = height * width
    pitch = patches + patches % 2  # logits are stored in pairs
    strips = images * math.ceil(patches / STRIP_ROWS)
    passes = math.ceil(strips / max(1, WORKSPACE_BYTES // (4 * STRIP_ROWS * pitch)))
    logits = query.new_empty((math.ceil(strips / passes) * STRIP_ROWS, pitch), dtype=torch.float32)
    weights = query.new_empty((images, window * window, height, width), dtype=torch.float32)
    query, key = _heads_joined(query), _heads_joined(key)
    options = (1 / (heads * math.sqrt(dim)), sigma, low, high)
    for i in range(passes):
        first, last = (strips * end // passes for end in (i, i + 1))
        torch.ops.hpkernels_cuda.local_propagation_weights(
            query, key, prefix_tokens, first, last, *options, logits, weights
        )
    return weights


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    return _stencil(torch.ops.hpkernels_cuda.local_propagation_apply, code, weights)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch gathers the gradients of the patches whose windows hold it."""
    return _stencil(torch.ops.hpkernels_cuda.local_propagation_apply_backward, grad, weights)


def _stencil(kernel: Any, maps: Tensor, weights: Tensor) -> Tensor:
    result = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    kernel(maps.contiguous(), weights.to(torch.float32).contiguous(), result)
    return result


def _heads_joined(tokens: Tensor) -> Tensor:
    """(B, heads, T, d) as (B * T, heads * d): a view of what one matrix of queries, keys and values gives."""
    return aligned_rows(tokens.transpose(1, 2).flatten(2).flatten(0, 1))
