"""Plain PyTorch specification of `masked_topk`: the (N, M) products, masked, sorted.

values_i, indices_i = top-k over {m allowed} of <query_i, pool_m>
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.backends import Availability


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def forward(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    pool_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (N, k) and indices (N, k); differentiable with respect to query and pool."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
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


def forward_by_blocks(
    query: Tensor,
    pool: Tensor,
    k: int,
    mask: Tensor | None,
    query_group: Tensor | None,
    pool_group: Tensor | None,
    products: int,
) -> tuple[Tensor, Tensor]:
    """The same, so many queries at a time that about `products` inner products are held, or one query."""
    rows = max(1, products // len(pool))
    found = []
    for start in range(0, len(query), rows):
        block = slice(start, start + rows)
        of_mask, of_group = (None if given is None else given[block] for given in (mask, query_group))
        found.append(forward(query[block], pool, k, of_mask, of_group, pool_group))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def backward(grad_values: Tensor, indices: Tensor, query: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and pool: each value is one inner product, so its gradient is the other factor."""
    chosen = indices >= 0
    rows = indices.clamp(min=0)
    weights = grad_values.masked_fill(~chosen, 0)[..., None]
    grad_query = (weights * pool[rows]).sum(dim=1)
    grad_pool = weights.new_zeros(pool.shape)
    # index_put_ with accumulate sums in a fixed order on every device; index_add_ does not on CUDA.
    grad_pool.index_put_((rows.flatten(),), (weights * query[:, None]).flatten(0, 1), accumulate=True)
    return grad_query.to(query.dtype), grad_pool.to(pool.dtype)
