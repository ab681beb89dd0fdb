"""CUDA kernels of `local_propagation`: the stencil and its transpose; the weights are those of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cuda as supports
from hpkernels.ops import _checks as check
from hpkernels.ops.local_propagation.reference import weights_forward

__all__ = ["apply_backward", "apply_forward", "supports", "weights_forward"]


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    return _stencil(torch.ops.hpkernels_cuda.local_propagation_apply, code, weights)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch gathers the gradients of the patches whose windows hold it."""
    return _stencil(torch.ops.hpkernels_cuda.local_propagation_apply_backward, grad, weights)


def _stencil(kernel, maps: Tensor, weights: Tensor) -> Tensor:
    (accumulate,) = check.accumulation(maps.dtype)
    result = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    kernel(maps.contiguous(), weights.to(accumulate).contiguous(), result)
    return result
