"""What all custom ops share: kernels run in full precision, a second differentiation is refused, rows are aligned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes that GPUs load at a time at most, from addresses that are multiples of it."""


def full_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Run `kernel`, whose first argument is a tensor, with autocast switched off.

    Under autocast the products inside an op would be rounded to half precision, and rounding similarities to bfloat16
    changes about a tenth of the positives.
    """

    @functools.wraps(kernel)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *args, **kwargs)

    return run


def refuse_double_backward(name: str, backward_op: Any) -> None:
    """Make differentiating through `backward_op`, the gradient of op `name`, a clear error."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise double_backward_error(name)

    backward_op.register_autograd(backward)


def double_backward_error(name: str) -> RuntimeError:
    """What differentiating the gradient of op `name` ends with."""
    return RuntimeError(
        f"{name}: double backward is not supported: its gradient is not differentiable "
        "(drop create_graph=True, or use the functions of its reference module under plain autograd)"
    )


def aligned_rows(matrix: Tensor, multiple: int) -> Tensor:
    """A matrix (R, D) whose rows can be loaded 16 bytes at a time and have a multiple of so many elements.

    The matrix itself where it is so already, else a copy, with zeros after each row, which change no product.
    """
    matrix = matrix.detach()
    (rows, dim), (stride, step) = matrix.shape, matrix.stride()
    padded = -(-dim // multiple) * multiple
    starts_aligned = matrix.data_ptr() % ALIGNMENT == 0 and stride % multiple == 0 and stride >= dim
    if padded == dim and step == 1 and starts_aligned:
        return matrix
    copy = matrix.new_zeros((rows, padded))
    copy[:, :dim] = matrix
    return copy
