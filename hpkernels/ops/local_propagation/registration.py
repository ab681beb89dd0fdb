"""`local_propagation` as PyTorch custom ops (the weights, and their application): schemas, dispatch, meta, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _checks as check
from hpkernels.ops import _cuda, _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.local_propagation import cpu, reference

_cuda.register("local_propagation")
_triton.register("local_propagation")
backends.register("local_propagation", "cpu", cpu)
backends.register("local_propagation", "reference", reference)


@torch.library.custom_op(
    "hpkernels::local_propagation_weights",
    mutates_args=(),
    schema="(Tensor query, Tensor key, SymInt height, SymInt width, float sigma, float low, float high, SymInt window,"
    " SymInt prefix_tokens, str backend) -> Tensor weights",
)
@full_precision
def local_propagation_weights(query: Tensor, *arguments: Any) -> Any:
    *options, backend = arguments
    return backends.implementation("local_propagation", backend).weights_forward(query, *options)


@local_propagation_weights.register_fake
def _(
    query: Tensor,
    key: Tensor,
    height: int,
    width: int,
    sigma: float,
    low: float,
    high: float,
    window: int,
    prefix_tokens: int,
    backend: str,
) -> Any:
    (accumulate,) = check.accumulation(query.dtype)
    return query.new_empty((query.shape[0], window * window, height, width), dtype=accumulate)


@torch.library.custom_op(
    "hpkernels::apply_local_propagation",
    mutates_args=(),
    schema="(Tensor code, Tensor weights, str backend) -> Tensor mixed",
)
@full_precision
def apply_local_propagation(code: Tensor, weights: Tensor, backend: str) -> Any:
    return backends.implementation("local_propagation", backend).apply_forward(code, weights)


@apply_local_propagation.register_fake
def _(code: Tensor, weights: Tensor, backend: str) -> Any:
    return code.new_empty(code.shape)


@torch.library.custom_op(
    "hpkernels::apply_local_propagation_backward",
    mutates_args=(),
    schema="(Tensor grad_mixed, Tensor weights, str backend) -> Tensor grad_code",
)
@full_precision
def apply_local_propagation_backward(grad_mixed: Tensor, weights: Tensor, backend: str) -> Any:
    return backends.implementation("local_propagation", backend).apply_backward(grad_mixed, weights)


@apply_local_propagation_backward.register_fake
def _(grad_mixed: Tensor, weights: Tensor, backend: str) -> Any:
    return grad_mixed.new_empty(grad_mixed.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weights, ctx.backend = inputs
    ctx.save_for_backward(weights)


def _backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
    (weights,) = ctx.saved_tensors
    return apply_local_propagation_backward(grad_mixed, weights, ctx.backend), None, None


apply_local_propagation.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("apply_local_propagation", apply_local_propagation_backward)
