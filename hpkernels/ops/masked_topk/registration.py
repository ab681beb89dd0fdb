"""`masked_topk` as a PyTorch custom op: schema, dispatch to a backend, meta implementation, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _cuda, _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.masked_topk import cpu, reference

_cuda.register("masked_topk")
_triton.register("masked_topk")
backends.register("masked_topk", "cpu", cpu)
backends.register("masked_topk", "reference", reference)


@torch.library.custom_op(
    "hpkernels::masked_topk",
    mutates_args=(),
    schema="(Tensor query, Tensor pool, SymInt k, Tensor? mask, Tensor? query_group, Tensor? pool_group, str backend)"
    " -> (Tensor values, Tensor indices)",
)
@full_precision
def masked_topk(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None,
    query_group: Tensor | None,
    pool_group: Tensor | None,
    backend: str,
) -> Any:
    kernels = backends.implementation("masked_topk", backend)
    return kernels.forward(query, pool, k, mask, query_group, pool_group)


@masked_topk.register_fake
def _(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None,
    query_group: Tensor | None,
    pool_group: Tensor | None,
    backend: str,
) -> Any:
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    values = query.new_empty((query.shape[0], k), dtype=accumulate)
    return values, torch.empty_like(values, dtype=torch.int64)


@torch.library.custom_op(
    "hpkernels::masked_topk_backward",
    mutates_args=(),
    schema="(Tensor grad_values, Tensor indices, Tensor query, Tensor pool, str backend)"
    " -> (Tensor grad_query, Tensor grad_pool)",
)
@full_precision
def masked_topk_backward(grad_values: Tensor, indices: Tensor, query: Tensor, pool: Tensor, backend: str) -> Any:
    return backends.implementation("masked_topk", backend).backward(grad_values, indices, query, pool)


@masked_topk_backward.register_fake
def _(grad_values: Tensor, indices: Tensor, query: Tensor, pool: Tensor, backend: str) -> Any:
    return query.new_empty(query.shape), pool.new_empty(pool.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, pool, *_, ctx.backend = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices, query, pool)


def _backward(ctx: Any, grad_values: Tensor, _grad_indices: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_query, grad_pool = masked_topk_backward(grad_values, *ctx.saved_tensors, ctx.backend)
    return grad_query, grad_pool, None, None, None, None, None


masked_topk.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("masked_topk", masked_topk_backward)
