"""Triton kernels of `masked_topk`: the products of a tile of queries and a tile of references never leave registers.

The pool is split over programs when there are few queries; PyTorch combines what the parts found. More than `MOST_KEPT`
values of a row do not fit in registers: blocks of rows then take the steps of the reference, and so do gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._triton import aligned_rows, supports
from hpkernels.ops._triton_functions import comparable_products
from hpkernels.ops.masked_topk import reference
from hpkernels.ops.masked_topk.reference import backward

__all__ = ["backward", "forward", "supports"]

MOST_KEPT = 128
_PROGRAMS = 1024  # a few for each multiprocessor of the largest GPUs
_LEAST_TILES = 2  # of a program: otherwise combining the parts takes longer than they do

_NAN_BITS = tl.constexpr(0x7FC00000)
_LAST_INDEX = tl.constexpr(0x7FFFFFFF)
_NOTHING_FOUND = tl.constexpr(~0x7F800000 << 32)  # the key of -inf, but for its index
_LEAST_KEY, _GREATEST_KEY = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def _allowed_products(
    query, rows, query_stride, query_step, queries, pool, columns, pool_stride, pool_step, references, dim,
    mask, mask_stride, mask_step, query_group, pool_group, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<query_i, pool_m> of a tile, float32; -inf where m may not be chosen. Beyond the last is the last again."""
    products = comparable_products(
        query, rows, query_stride, query_step, queries, pool, columns, pool_stride, pool_step, references,
        dim, PRECISION, BLOCK_D,
    )  # fmt: skip
    rows, columns = tl.minimum(rows, queries - 1), tl.minimum(columns, references - 1)
    if query_group is not None:
        own, other = tl.load(query_group + rows)[:, None], tl.load(pool_group + columns)[None, :]
        products = tl.where((own != other) | (own < 0), products, float("-inf"))
    if mask is not None:
        at = mask + rows.to(tl.int64)[:, None] * mask_stride + columns.to(tl.int64)[None, :] * mask_step
        products = tl.where(tl.load(at), products, float("-inf"))
    return products


@triton.jit
def _greater(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _keys(values, indices):
    """int64 numbers in the order of the values, equal ones by descending index; NaN is the greatest value."""
    bits = tl.where(values == 0, 0, values.to(tl.int32, bitcast=True))  # -0 equals 0
    bits = tl.where(values == values, bits, _NAN_BITS)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers are signed magnitudes
    return (bits.to(tl.int64) << 32) | (_LAST_INDEX - indices)


@triton.jit
def _value(key):
    """The value in a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["queries", "references", "share"])
def masked_topk_top1_fwd_kernel(
    query, query_stride, query_step, queries, pool, pool_stride, pool_step, references, dim,
    mask, mask_stride, mask_step, query_group, pool_group, share,
    values, indices,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """values[i, s], indices[i, s] = max, argmax over {m in part s of the pool, allowed} of <query_i, pool_m>

    Reads each query tile and the part of the pool once a program, the mask once; writes 12 bytes a query and part.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    value = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_N,), -1, tl.int32)
    for start in range(part * share, tl.minimum((part + 1) * share, references), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        products = _allowed_products(
            query, rows, query_stride, query_step, queries, pool, columns, pool_stride, pool_step, references, dim,
            mask, mask_stride, mask_step, query_group, pool_group, PRECISION, BLOCK_D,
        )  # fmt: skip
        greatest = tl.reduce(products, 1, _greater)
        # Of references beyond the last, which are the last again, none is the first.
        first = tl.min(tl.where(products == greatest[:, None], columns[None, :], _LAST_INDEX), axis=1)
        index = tl.where(greatest > value, first, index)
        value = _greater(value, greatest)
    index = tl.where(value > float("-inf"), index, -1)
    at = rows.to(tl.int64) * tl.num_programs(1) + part
    tl.store(values + at, value, mask=rows < queries)
    tl.store(indices + at, index.to(tl.int64), mask=rows < queries)


@triton.jit(do_not_specialize=["queries", "references", "share"])
def masked_topk_fwd_kernel(
    query, query_stride, query_step, queries, pool, pool_stride, pool_step, references, dim,
    mask, mask_stride, mask_step, query_group, pool_group, share,
    keys, k,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """keys[i, s] = the k greatest, in any order, over {m in part s of the pool, allowed} of key(<query_i, pool_m>, m)

    Reads each query tile and the part of the pool once a program, the mask once; writes 8 k bytes a query and part.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    slots = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    # Keys are distinct: each can be found, and replaced, by its value.
    best = tl.where(slots < k, _NOTHING_FOUND + slots, _GREATEST_KEY) + tl.zeros((BLOCK_N, BLOCK_K), tl.int64)
    for start in range(part * share, tl.minimum((part + 1) * share, references), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        products = _allowed_products(
            query, rows, query_stride, query_step, queries, pool, columns, pool_stride, pool_step, references, dim,
            mask, mask_stride, mask_step, query_group, pool_group, PRECISION, BLOCK_D,
        )  # fmt: skip
        products = tl.where((columns < references)[None, :], products, float("-inf"))
        beats = ~(products <= _value(tl.min(best, axis=1))[:, None])  # NaN does; an equal value comes too late
        candidates = tl.where(beats, _keys(products, columns[None, :]), _LEAST_KEY)
        rounds = tl.minimum(tl.max(tl.sum(beats.to(tl.int32), axis=1), axis=0), k)
        for _ in range(rounds):
            candidate = tl.max(candidates, axis=1)[:, None]
            candidates = tl.where(candidates == candidate, _LEAST_KEY, candidates)
            worst = tl.min(best, axis=1)[:, None]
            best = tl.where((best == worst) & (candidate > worst), candidate, best)
    at = (rows.to(tl.int64)[:, None] * tl.num_programs(1) + part) * k + slots
    tl.store(keys + at, best, mask=(rows < queries)[:, None] & (slots < k))


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
    kernel = masked_topk_top1_fwd_kernel if k == 1 else masked_topk_fwd_kernel
    config = {"PRECISION": _triton.comparable_precision(query)} | _triton.configuration(kernel, query)
    if k == 1 and (mask is not None or query_group is not None):  # which take registers
        config |= {name: config[name] // 2 for name in ("BLOCK_N", "BLOCK_M", "num_warps")}
    queries, references = len(query), len(pool)
    parts, share = _split(references, config["BLOCK_M"], triton.cdiv(queries, config["BLOCK_N"]))
    grid = (triton.cdiv(queries, config["BLOCK_N"]), parts)
    inputs = (
        *(query, *query.stride(), queries, pool, *pool.stride(), references, query.shape[1]),
        *(mask, *((0, 0) if mask is None else mask.stride())),
        *(None if group is None else group.contiguous() for group in (query_group, pool_group)),
        share,
    )
    if k == 1:
        values = query.new_empty((queries, parts), dtype=torch.float32)
        indices = torch.empty_like(values, dtype=torch.int64)
        _triton.launch(kernel, grid, *inputs, values, indices, **config)
        if parts > 1:
            values, part = values.max(dim=1, keepdim=True)  # the first of equal maxima
            indices = indices.gather(1, part)
        return values, indices
    keys = query.new_empty((queries, parts * k), dtype=torch.int64)
    _triton.launch(kernel, grid, *inputs, keys, k, BLOCK_K=max(16, triton.next_power_of_2(k)), **config)
    return _values_and_indices(keys.topk(k, dim=1).values)


def _split(count: int, block: int, others: int) -> tuple[int, int]:
    """In how many parts to split `count`, each of `others` programs, and a part's length, a multiple of `block`."""
    tiles = triton.cdiv(count, block)
    wanted = max(1, min(_PROGRAMS // others, tiles // _LEAST_TILES))
    share = triton.cdiv(tiles, wanted) * block
    return triton.cdiv(count, share), share


def _values_and_indices(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `_keys` put together; index -1 with -inf and NaN."""
    bits = (keys >> 32).to(torch.int32)
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, (~keys & 0x7FFFFFFF).masked_fill(~(values > -torch.inf), -1)
