"""Plain PyTorch specification of `masked_topk`: the (N, M) products, masked, sorted; and the same in blocks of queries.

values_i, indices_i = top-k over {m allowed} of <query_i, pool_m>
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import Availability
from hpkernels.ops import _checks as check
from hpkernels.ops._blocks import row_blocks


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def top_products(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    pool_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (N, k) and indices (N, k): dense, the specification; differentiable with respect to query and pool."""
    (accumulate,) = check.accumulation(query.dtype)
    products = query.to(accumulate) @ pool.to(accumulate).T
    excluded = torch.zeros_like(products, dtype=torch.bool) if mask is None else ~mask
    if query_group is not None:
        excluded = excluded | ((query_group[:, None] == pool_group) & (query_group >= 0)[:, None])
    products = products.masked_fill(excluded, -torch.inf)
    if k == 1:
        values, indices = products.max(dim=1, keepdim=True)  # the first of equal maxima
    else:
        values, indices = products.sort(dim=1, descending=True, stable=True)  # stable: ties keep index order
        values, indices = values[:, :k], indices[:, :k]
    return values.contiguous(), indices.masked_fill(values == -torch.inf, -1)


def forward(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    pool_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (N, k) and indices (N, k)."""
    (accumulate,) = check.accumulation(query.dtype)
    pool = pool.to(accumulate)  # once for all blocks
    values = query.new_empty((len(query), k), dtype=accumulate)
    indices = torch.empty_like(values, dtype=torch.int64)
    of_query = values.element_size() * query.shape[1]  # a copy in that dtype
    for rows in row_blocks(query, (4 * values.element_size() + 20) * len(pool) + of_query):
        own_mask, own_group = (None if given is None else given[rows] for given in (mask, query_group))
        values[rows], indices[rows] = top_products(query[rows], pool, k, own_mask, own_group, pool_group)
    return values, indices


def backward(grad_values: Tensor, indices: Tensor, query: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and pool: each value is one inner product, so its gradient is the other factor."""
    grad_query = query.new_empty(query.shape)
    grad_pool = grad_values.new_zeros(pool.shape)
    for rows in row_blocks(query, 4 * grad_values.element_size() * indices.shape[1] * pool.shape[1]):
        named = indices[rows].clamp(min=0)
        weights = grad_values[rows].masked_fill(indices[rows] < 0, 0)[..., None]
        grad_query[rows] = (weights * pool[named]).sum(dim=1).to(query.dtype)
        _add(grad_pool, named.flatten(), (weights * query[rows, None]).flatten(0, 1))
    return grad_query, grad_pool.to(pool.dtype)


def _add(total: Tensor, rows: Tensor, summands: Tensor) -> None:
    """Add each of `summands` to one of the `rows` of `total`, in a fixed order."""
    # On CUDA only index_put_ has one; on the CPU only index_add_, as threads race in index_put_.
    if total.device.type == "cpu":
        total.index_add_(0, rows, summands)
    else:
        total.index_put_((rows,), summands, accumulate=True)
