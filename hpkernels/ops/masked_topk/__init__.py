"""Top-k inner products of each query with a pool of references."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.masked_topk import registration


class TopK(NamedTuple):
    """The `k` largest inner products of each query, sorted descending, and the pool rows they belong to."""

    values: Tensor  # (N, k)
    indices: Tensor  # (N, k) int64


def masked_topk(
    query: Tensor,
    pool: Tensor,
    k: int = 1,
    *,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    pool_group: Tensor | None = None,
    backend: Backend = "auto",
) -> TopK:
    """Find the `k` pool rows with the largest inner product with each query.

    ``values[i, t]`` is the t-th largest of ``<query_i, pool_m>`` over the allowed m. With L2-normalised rows this is
    the cosine similarity; with k = 1 it is the threshold of hidden-positive discovery (HP, CVPR 2023).

    Args:
        query: (N, D) floating-point queries, any strides.
        pool: (M, D) references, dtype and device of `query`.
        k: how many to return, 1 <= k <= M.
        mask: (N, M) bool, True where a reference may be chosen. None: everywhere.
        query_group: (N,) int64, given together with `pool_group`: a query and a reference with an equal id >= 0 never
            meet (a patch must not meet its own image). A negative id excludes nothing.
        pool_group: (M,) int64.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        values (N, k), sorted descending, float32 (float64 for float64 inputs), and indices (N, k) int64. Ties go to
        the lowest index. Where fewer than k references are allowed the rest is -inf with index -1.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, a `query` or `pool` that is not finite, or whose inner products are not, is a ValueError;
            elsewhere NaN shows in `values`.

    Notes:
        Under autocast a `pool` of another floating dtype is cast to that of `query`.
        Products of half-precision inputs are accumulated in float32. Gradients reach `query` and `pool` through
        `values`; double backward is refused. Deterministic. Memory: the (N, k) results; the reference works on
        blocks of queries in up to 256 MiB besides.

    Examples:
        >>> import torch, hpkernels
        >>> pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> values, indices = hpkernels.masked_topk(torch.tensor([[0.0, 1.0]]), pool, k=2)
        >>> indices.tolist()
        [[1, 2]]
    """
    op = "masked_topk"
    check.tensor(op, "query", query, ("N", "D"))
    pool = check.with_autocast(pool, query)
    check.tensor(op, "pool", pool, ("M", query.shape[1]))
    check.same(op, "pool", pool, "query", query)
    check.integer(op, "k", k, 1, pool.shape[0])
    if mask is not None:
        check.tensor(op, "mask", mask, (query.shape[0], pool.shape[0]), check.BOOLEAN)
        check.same(op, "mask", mask, "query", query, dtype=False)
    if (query_group is None) != (pool_group is None):
        missing = "query_group" if query_group is None else "pool_group"
        raise ValueError(f"{op}: `{missing}` must be given together with the other group, got None")
    if query_group is not None and pool_group is not None:
        check.tensor(op, "query_group", query_group, (query.shape[0],), check.INTEGER)
        check.tensor(op, "pool_group", pool_group, (pool.shape[0],), check.INTEGER)
        check.same(op, "query_group", query_group, "query", query, dtype=False)
        check.same(op, "pool_group", pool_group, "query", query, dtype=False)
    check.finite(op, "query", query, products=True)
    check.finite(op, "pool", pool, products=True)
    backend = backends.select(op, backend, query)
    return TopK(*registration.masked_topk(query, pool, k, mask, query_group, pool_group, backend))
