"""CPU kernels of `masked_topk`: coarse products of a block of queries with the pool, then a selection."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops import _checks as check
from hpkernels.ops._blocks import blocks
from hpkernels.ops._coarse import CoarseProducts
from hpkernels.ops.masked_topk.reference import backward

__all__ = ["backward", "forward", "supports"]

_TILE = 2**21  # products held at a time
_LEAST_ROWS = 16  # of a block, however large the pool


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
    values = query.new_empty((anchors, k), dtype=accumulate)
    indices = query.new_empty((anchors, k), dtype=torch.int64)
    mask, query_group, pool_group = (
        None if given is None else given.contiguous() for given in (mask, query_group, pool_group)
    )
    rows = min(anchors, max(_LEAST_ROWS, _TILE // references))
    coarse = CoarseProducts(query.detach().to(accumulate), pool.detach().to(accumulate), rows * references)
    for block in blocks(slice(0, anchors), rows):
        tile = coarse.tile(block, slice(None))
        computed = torch.ops.hpkernels_cpu.masked_topk_select(
            tile,
            block.start,
            *(coarse.left.rows, coarse.left.stats, coarse.right.rows, coarse.right.stats),
            *(mask, query_group, pool_group),
            *(values, indices),
        )
        coarse.took(computed - len(tile) * k, tile)
    return values, indices
