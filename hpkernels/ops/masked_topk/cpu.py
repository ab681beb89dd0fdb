"""CPU kernels of `masked_topk`: products of a block of queries with the pool, then a selection that stays in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops import _checks as check
from hpkernels.ops.masked_topk.reference import backward

__all__ = ["backward", "forward", "supports"]

_TILE = 2**20  # products held at a time


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
    anchors, references = len(query), len(pool)
    rows = min(anchors, max(1, _TILE // references))
    transposed = pool.to(accumulate).T
    products = query.new_empty((rows, references), dtype=accumulate)
    values = query.new_empty((anchors, k), dtype=accumulate)
    indices = query.new_empty((anchors, k), dtype=torch.int64)
    mask = None if mask is None else mask.contiguous()
    query_group = None if query_group is None else query_group.contiguous()
    pool_group = None if pool_group is None else pool_group.contiguous()
    for start in range(0, anchors, rows):
        block = slice(start, min(start + rows, anchors))
        tile = torch.mm(query[block].to(accumulate), transposed, out=products[: block.stop - start])
        torch.ops.hpkernels_cpu.masked_topk_select(
            tile,
            None if mask is None else mask[block],
            None if query_group is None else query_group[block],
            pool_group,
            values[block],
            indices[block],
        )
    return values, indices
