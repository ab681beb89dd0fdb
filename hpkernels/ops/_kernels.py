"""What all custom ops share: kernels run in full precision, and a second differentiation is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        raise RuntimeError(
            f"{name}: double backward is not supported: its gradient is not differentiable "
            "(drop create_graph=True, or use the functions of its reference module under plain autograd)"
        )

    backward_op.register_autograd(backward)
