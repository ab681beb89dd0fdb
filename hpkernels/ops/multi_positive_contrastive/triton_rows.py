"""Triton kernels of anchors: their weights, and what completes their sums, with the positives across images.

These are few, so an anchor goes through the list of its columns, one warp an anchor, which keeps whole rows in
registers: each listed row is loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops.multi_positive_contrastive.triton_bits import bits_at
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
def masses_of(counts, anchor, inside, specific_weight, JOINT: tl.constexpr, KEEP_SPECIFIC_ONLY: tl.constexpr):
    """Numbers of A and S of some anchors; the mass of each term of the loss, and whether it is kept."""
    agnostic = tl.load(counts + 3 * anchor, mask=inside, other=0).to(tl.float32)
    task = tl.load(counts + 3 * anchor + 1, mask=inside, other=0).to(tl.float32)
    usable = tl.load(counts + 3 * anchor + 2, mask=inside, other=0) > 0
    if JOINT:
        mass = agnostic + specific_weight * task
        kept = agnostic > 0
        if KEEP_SPECIFIC_ONLY:
            kept |= mass > 0
        masses = (agnostic, task, mass, kept & usable, mass, kept & usable)
    else:
        masses = (agnostic, task, agnostic, (agnostic > 0) & usable, task, (task > 0) & usable)
    return masses


@triton.jit(do_not_specialize=["group"])
def contrastive_weigh_kernel(
    counts, specific_weight, weights, state, group,
    JOINT: tl.constexpr, REWEIGHT: tl.constexpr, KEEP_SPECIFIC_ONLY: tl.constexpr, BLOCK_ANCHORS: tl.constexpr,
):  # fmt: skip
    """weights (N, 4) from counts (N, 3), as ``reference.anchor_coefficients``, and the images in state[1], state[2].

    Grid (images,). Bytes: reads the counts, twice; writes the weights.
    """
    weight = tl.load(specific_weight).to(tl.float32)
    first = tl.program_id(0) * group
    agnostic_sum, task_sum, agnostic_kept, task_kept = 0.0, 0.0, 0, 0
    for start in range(0, group, BLOCK_ANCHORS):
        inside = start + tl.arange(0, BLOCK_ANCHORS) < group
        anchor = first + start + tl.arange(0, BLOCK_ANCHORS)
        _, _, of_agnostic, has_agnostic, of_task, has_task = masses_of(
            counts, anchor, inside, weight, JOINT, KEEP_SPECIFIC_ONLY
        )
        agnostic_sum += tl.sum(tl.where(has_agnostic, of_agnostic, 0.0), axis=0)
        task_sum += tl.sum(tl.where(has_task, of_task, 0.0), axis=0)
        agnostic_kept += tl.sum(has_agnostic.to(tl.int32), axis=0)
        task_kept += tl.sum(has_task.to(tl.int32), axis=0)
    tl.atomic_add(state + 1, (agnostic_kept > 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state + 2, (task_kept > 0).to(tl.int64), sem="relaxed")
    for start in range(0, group, BLOCK_ANCHORS):
        inside = start + tl.arange(0, BLOCK_ANCHORS) < group
        anchor = first + start + tl.arange(0, BLOCK_ANCHORS)
        agnostic, task, of_agnostic, has_agnostic, of_task, has_task = masses_of(
            counts, anchor, inside, weight, JOINT, KEEP_SPECIFIC_ONLY
        )
        if REWEIGHT:
            of_agnostic, of_task = agnostic_sum, task_sum
        else:
            of_agnostic, of_task = of_agnostic * agnostic_kept, of_task * task_kept
        at = weights + 4 * anchor
        tl.store(at, agnostic, mask=inside)
        tl.store(at + 1, task, mask=inside)
        tl.store(at + 2, tl.where(has_agnostic, 1 / tl.where(has_agnostic, of_agnostic, 1.0), 0.0), mask=inside)
        tl.store(at + 3, tl.where(has_task, weight / tl.where(has_task, of_task, 1.0), 0.0), mask=inside)


@triton.jit(do_not_specialize=["anchors"])
def contrastive_square_kernel(z, square, anchors, dim, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The bits of the greatest |z_i|^2, whose order is that of non-negative numbers; those of NaN are above all.

    Grid (blocks of rows,). Bytes: reads z.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    flaws = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)  # NaN where z is not finite
    for start in range(0, dim, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        at = z + row.to(tl.int64)[:, None] * dim + feature[None, :]
        loaded = tl.load(at, mask=(row < anchors)[:, None] & (feature < dim)[None, :], other=0.0).to(tl.float32)
        squares += loaded * loaded
        flaws += loaded * 0.0
    greatest = tl.minimum(tl.max(tl.sum(squares, axis=1), axis=0), GREATEST).to(tl.int32, bitcast=True)
    flaw = tl.sum(tl.sum(flaws, axis=1), axis=0)
    tl.atomic_max(square, tl.where(flaw == 0, greatest, NAN_BITS), sem="relaxed")


@triton.jit(do_not_specialize=["anchors"])
def contrastive_scale_kernel(
    rows, least, greatest, grad_losses, numbers, shifts, factors, anchors, inverse_temperature, most_apart, most_pull,
    BRANCHES: tl.constexpr, BLOCK_ANCHORS: tl.constexpr,
):  # fmt: skip
    """Numbers, shifts and factors as ``routes.Kernels.scale_rows`` says, from the extremes (branches, 4) of rows.

    Grid (blocks of anchors, branches). Bytes: reads rows, writes numbers, (branches, N, 4).
    """
    branch = tl.program_id(1)
    shift = tl.load(greatest + 4 * branch)
    shift = tl.where(shift - tl.load(least + 4 * branch) <= most_apart, shift, float("nan"))
    divisor = 4 * LEAST
    for number in tl.static_range(4 * BRANCHES):
        if number % 4 > 0:
            divisor = tl.maximum(divisor, tl.load(greatest + number) / most_pull, propagate_nan=tl.PropagateNan.ALL)
    anchor = tl.program_id(0) * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    inside = anchor < anchors
    at = 4 * (branch.to(tl.int64) * anchors + anchor)
    log_denominator = tl.load(rows + at, mask=inside, other=0.0)
    base = tl.where(shift == shift, shift, log_denominator)
    push = tl.load(rows + at + 1, mask=inside, other=0.0) / divisor
    tl.store(numbers + at, base, mask=inside)
    tl.store(numbers + at + 1, push * tl.exp(base - log_denominator), mask=inside)
    tl.store(numbers + at + 2, tl.load(rows + at + 2, mask=inside, other=0.0) / divisor, mask=inside)
    tl.store(numbers + at + 3, tl.load(rows + at + 3, mask=inside, other=0.0) / divisor, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(shifts + branch, shift)
        tl.store(factors + branch, divisor * tl.load(grad_losses + branch) * inverse_temperature)


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
    """The statistics of each anchor and what it adds to the loss, from the parts of the route that is taken.

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
            logits = scale * tl.sum(tile * own[None, :], axis=1)
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
            logits = scale * tl.sum(tile * own[None, :], axis=1)
            g = tl.where(in_i, push_i * tl.exp(logits - base_i), 0.0)
            g += tl.where(in_j, push_j * tl.exp(logits - base_j), 0.0)
            g -= tl.where(agnostic, pull_i + pull_j, 0.0)
            if HAS_SPECIFIC:
                g -= tl.where(bits_at(specific, row, words, column, inside), specific_i + specific_j, 0.0)
            gradient += tl.sum(g[:, None] * tile, axis=0)
        gradient *= tl.load(factor)
    at = out + row.to(tl.int64) * width + features
    tl.store(at, gradient.to(out.dtype.element_ty), mask=features < width)
