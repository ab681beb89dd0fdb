"""CUDA kernels of `masked_topk`: the products of a tile of queries and a tile of references never leave registers.

The pool is split over blocks when there are few queries; PyTorch combines what the parts found. A pass over the pool
finds `_MOST_OF_A_PASS` values, and each further pass those below. For more than `MOST_KEPT` values blocks of rows take
the steps of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops.masked_topk import reference

__all__ = ["backward", "forward", "supports"]

MOST_KEPT = 128
_MOST_OF_A_PASS = 16  # kMostTopk of csrc/masked_topk/masked_topk.h
_BLOCKS = 1024  # of the gradient of the pool: a few for each multiprocessor of the largest GPUs
_LEAST_ENTRIES = 256  # of such a block

_kernels = torch.ops.hpkernels_cuda


def forward(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    pool_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (N, k) and indices (N, k)."""
    if k > MOST_KEPT:
        return reference.forward(query, pool, k, mask, query_group, pool_group)
    query, pool = aligned_rows(query), aligned_rows(pool)
    groups = (None if group is None else group.contiguous() for group in (query_group, pool_group))
    inputs = (query, pool, mask, *groups)
    parts = _parts(len(query), len(pool))
    if k == 1 and mask is None and query_group is None:
        values = query.new_empty((len(query), parts), dtype=torch.float32)
        indices = torch.empty_like(values, dtype=torch.int64)
        _kernels.masked_topk_top1(query, pool, values, indices)
        if parts > 1:
            values, part = values.max(dim=1, keepdim=True)  # the first of equal maxima
            indices = indices.gather(1, part)
        return values, indices
    found: list[Tensor] = []
    for first in range(0, k, _MOST_OF_A_PASS):
        below = found[-1][:, -1].contiguous() if found else None
        keys = query.new_empty((len(query), parts, min(_MOST_OF_A_PASS, k - first)), dtype=torch.int64)
        _kernels.masked_topk(*inputs, below, keys)
        found.append(keys[:, 0] if parts == 1 else keys.flatten(1).topk(keys.shape[2], dim=1).values)
    return _values_and_indices(torch.cat(found, dim=1))


def backward(grad_values: Tensor, indices: Tensor, query: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and pool: each value is one inner product, so its gradient is the other factor."""
    references, dim = pool.shape
    query, pool = aligned_rows(query), aligned_rows(pool)
    grad_values, indices = grad_values.contiguous(), indices.contiguous()
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    _kernels.masked_topk_query_backward(pool, indices, grad_values, grad_query)

    # Entries of indices in the order of the references they name, so that each reference sums a range of them.
    named, order = indices.flatten().sort(stable=True)
    first = torch.searchsorted(named, torch.arange(references + 1, device=named.device))
    parts = max(1, min(_BLOCKS // references, len(order) // references // _LEAST_ENTRIES))
    sums = query.new_empty((parts, *pool.shape), dtype=torch.float32)
    _kernels.masked_topk_pool_backward(query, order, first, grad_values, sums)
    grad_pool = sums.sum(dim=0).to(pool.dtype)
    return grad_query[:, :dim].contiguous(), grad_pool[:, :dim].contiguous()


def _parts(queries: int, references: int) -> int:
    """In how many parts the pool is split."""
    return int(_kernels.masked_topk_parts(queries, references))


def _values_and_indices(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `rank_key` of csrc/masked_topk/rank_keys.h put together; index -1 with -inf and NaN."""
    bits = (keys >> 32).to(torch.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, (0x7FFFFFFF - (keys & 0x7FFFFFFF)).masked_fill(~(values > -torch.inf), -1)
