"""Triton kernels over the anchors alone: what their pairs count, how long their rows are, their numbers in backward."""

from __future__ import annotations

import triton
import triton.language as tl

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
    """weights (N, 4) = sizes of A_i and S_i; what a pair in A and one in S counts: ``reference.anchor_coefficients``.

    state[1], state[2] += the image, if it has a kept anchor.

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
    """square = the bits of the greatest |z_i|^2, in the order of non-negative numbers; those of NaN are above all.

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
    """numbers, shifts, factors = those of ``routes.Kernels.scale_rows``, from the extremes (branches, 4) of rows.

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
