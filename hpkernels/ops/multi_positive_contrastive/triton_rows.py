"""Triton kernels that finish what the others leave: the sums of each anchor, with its positives across images.

These are few, so an anchor goes through the list of its columns, one warp an anchor, which keeps whole rows in
registers: each listed row is loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import bits_at, scaled
from hpkernels.ops.multi_positive_contrastive.triton_blocks import (
    load_numbers,
    log_sum_of,
    raise_base,
    sum_of_terms,
)

NAN_BITS = tl.constexpr(0x7FC00000)
GREATEST = tl.constexpr(3.4028234663852886e38)
LEAST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def add_to_log_sum(base, total, values, included):
    """A log-sum (1,) with those of values (V,) that are included."""
    base, total = raise_base(base, total, values[None, :], included[None, :])
    return base, total + sum_of_terms(base, values[None, :], included[None, :])


@triton.jit
def sums_of_parts(parts, count, anchors, row, BLOCK_PARTS: tl.constexpr):
    """What parts (count, 3, N) have of a row: base and total of the log-sum, sums of the logits of A and S."""
    base = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    agnostic_sum, specific_sum = 0.0, 0.0
    for start in range(0, count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        at = parts + part.to(tl.int64) * 3 * anchors + row
        log_sums = tl.load(at, mask=part < count, other=float("-inf"))
        base, total = add_to_log_sum(base, total, log_sums, part < count)
        agnostic_sum += tl.sum(tl.load(at + anchors, mask=part < count, other=0.0), axis=0)
        specific_sum += tl.sum(tl.load(at + 2 * anchors, mask=part < count, other=0.0), axis=0)
    return base, total, agnostic_sum, specific_sum


@triton.jit
def listed_rows(z, columns, at, end, dim, features):
    """The columns of some entries of a list, -1 beyond its end; and their rows of z, in float32."""
    column = tl.load(columns + at, mask=at < end, other=-1)
    rows = z + column.to(tl.int64)[:, None] * dim + features[None, :]
    inside = (column >= 0)[:, None] & (features < dim)[None, :]
    return column, tl.load(rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["anchors", "words", "group", "parts_count", "within_count"])
def contrastive_rows_fwd_kernel(
    z, positives, specific, negatives, columns, ranges, state, weights, square, parts, within, log_sums, rows, losses,
    scale, loss_scale, anchors, dim, words, group, parts_count, within_count,
    HAS_SPECIFIC: tl.constexpr, LISTED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows[i] = (logDen, push, pull, specific pull), losses[i] = what i adds, from the parts of the route taken.

    Without the blocks of all pairs, these and the sampled negatives are completed by the listed pairs of A and S; the
    denominator takes those of A that are no sampled negatives. Grid (N,). FLOPs: 2 D a listed pair. Bytes: a row of z a
    listed pair; the parts.
    """
    row = tl.program_id(0)
    base = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    agnostic_sum, specific_sum = 0.0, 0.0
    if tl.load(state) != 0:
        base, total, agnostic_sum, specific_sum = sums_of_parts(parts, parts_count, anchors, row, 16)
    elif LISTED:
        base, total, agnostic_sum, specific_sum = sums_of_parts(within, within_count, anchors, row, 16)
        sampled = tl.load(log_sums + row + tl.arange(0, 1))
        base, total = add_to_log_sum(base, total, sampled, sampled == sampled)
        features = tl.arange(0, BLOCK_D)
        own = tl.load(z + row.to(tl.int64) * dim + features, mask=features < dim, other=0.0).to(tl.float32)
        end = tl.load(ranges + 2 * row + 1)
        for start in range(tl.load(ranges + 2 * row), end, BLOCK_COLUMNS):
            column, tile = listed_rows(z, columns, start + tl.arange(0, BLOCK_COLUMNS), end, dim, features)
            inside = column >= 0
            logits = scaled(tl.sum(tile * own[None, :], axis=1), scale)
            agnostic = bits_at(positives, row, words, column, inside)
            denominator = agnostic & (bits_at(negatives, row % group, words, column, inside) == 0)
            base, total = add_to_log_sum(base, total, logits, denominator)
            agnostic_sum += tl.sum(tl.where(agnostic, logits, 0.0), axis=0)
            if HAS_SPECIFIC:
                task = bits_at(specific, row, words, column, inside)
                specific_sum += tl.sum(tl.where(task, logits, 0.0), axis=0)
    log_denominator = tl.sum(tl.where(total > 0, log_sum_of(base, total), 0.0), axis=0)
    pull = tl.load(weights + 4 * row + 2) * loss_scale / tl.maximum(tl.load(state + 1), 1).to(tl.float32)
    specific_pull = tl.load(weights + 4 * row + 3) * loss_scale / tl.maximum(tl.load(state + 2), 1).to(tl.float32)
    push = pull * tl.load(weights + 4 * row) + specific_pull * tl.load(weights + 4 * row + 1)
    tl.store(rows + 4 * row, log_denominator)
    tl.store(rows + 4 * row + 1, push)
    tl.store(rows + 4 * row + 2, pull)
    tl.store(rows + 4 * row + 3, specific_pull)
    loss = push * log_denominator - pull * agnostic_sum - specific_pull * specific_sum
    tl.store(losses + row, loss + 0.0 * tl.load(square))


@triton.jit(do_not_specialize=["words", "group", "first_row"])
def contrastive_rows_bwd_kernel(
    z, positives, specific, negatives, columns, ranges, slot_ranges, state, numbers, staged, factor, sums, out,
    scale, dim, width, words, group, first_row,
    GATHERED: tl.constexpr, LAST: tl.constexpr, HAS_SPECIFIC: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = sums_i with what is GATHERED from staged[slot_ranges[i]].

    In the LAST launch also with (g_ij + g_ji) z_j of the listed pairs, which are symmetric, without the sampled
    negatives, and times `factor`. Grid (rows,). FLOPs: 4 D a listed pair. Bytes: a row of z a listed pair; what is
    staged; sums and out once.
    """
    if tl.load(state) != 0:
        return
    row = first_row + tl.program_id(0)
    features = tl.arange(0, BLOCK_D)
    gradient = tl.load(sums + row.to(tl.int64) * dim + features, mask=features < dim, other=0.0)
    if GATHERED:
        end = tl.load(slot_ranges + 2 * row + 1)
        for start in range(tl.load(slot_ranges + 2 * row), end, BLOCK_COLUMNS):
            slot = start + tl.arange(0, BLOCK_COLUMNS)
            at = staged + slot.to(tl.int64)[:, None] * dim + features[None, :]
            inside = (slot < end)[:, None] & (features < dim)[None, :]
            gradient += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), axis=0)
    if LAST:
        base_i, push_i, pull_i, specific_i = load_numbers(numbers, row)
        own = tl.load(z + row.to(tl.int64) * dim + features, mask=features < dim, other=0.0).to(tl.float32)
        end = tl.load(ranges + 2 * row + 1)
        for start in range(tl.load(ranges + 2 * row), end, BLOCK_COLUMNS):
            column, tile = listed_rows(z, columns, start + tl.arange(0, BLOCK_COLUMNS), end, dim, features)
            inside = column >= 0
            base_j, push_j, pull_j, specific_j = load_numbers(numbers, column)
            agnostic = bits_at(positives, row, words, column, inside)
            in_i = agnostic & (bits_at(negatives, row % group, words, column, inside) == 0)
            in_j = agnostic & (bits_at(negatives, column % group, words, row, inside) == 0)
            logits = scaled(tl.sum(tile * own[None, :], axis=1), scale)
            g = tl.where(in_i, push_i * tl.exp(logits - base_i), 0.0)
            g += tl.where(in_j, push_j * tl.exp(logits - base_j), 0.0)
            g -= tl.where(agnostic, pull_i + pull_j, 0.0)
            if HAS_SPECIFIC:
                g -= tl.where(bits_at(specific, row, words, column, inside), specific_i + specific_j, 0.0)
            gradient += tl.sum(g[:, None] * tile, axis=0)
        gradient *= tl.load(factor)
    at = out + row.to(tl.int64) * width + features
    tl.store(at, gradient.to(out.dtype.element_ty), mask=features < width)
