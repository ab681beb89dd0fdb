"""Triton kernels of the positives across images, which are few: an anchor at a time, from the list of its columns."""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops.multi_positive_contrastive.triton_bits import bits_at
from hpkernels.ops.multi_positive_contrastive.triton_blocks import load_numbers


@triton.jit
def logits_of(z, row, columns, scale, dim, BLOCK_D: tl.constexpr):
    """scale <z_row, z_j> of one row with some columns; 0 for columns of -1."""
    products = tl.zeros(columns.shape, tl.float32)
    for start in range(0, dim, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        own = tl.load(z + row.to(tl.int64) * dim + feature, mask=feature < dim, other=0.0).to(tl.float32)
        at = z + columns.to(tl.int64)[:, None] * dim + feature[None, :]
        others = tl.load(at, mask=(columns >= 0)[:, None] & (feature < dim)[None, :], other=0.0)
        products += tl.sum(others.to(tl.float32) * own[None, :], axis=1)
    return scale * products


@triton.jit(do_not_specialize=["anchors", "words", "group"])
def contrastive_pairs_fwd_kernel(
    z, positives, specific, negatives, columns, offsets, enabled, part, scale, anchors, dim, words, group,
    HAS_SPECIFIC: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What `contrastive_blocks_fwd_kernel` computes, over the listed pairs of A and S; part (PARTS, N).

    The denominator takes those of A that are no sampled negatives, which are counted there. Grid (N,). FLOPs: 2 D a
    pair. Bytes: a row of z a pair.
    """
    if tl.load(enabled) == 0:
        return
    row = tl.program_id(0)
    position = row % group
    greatest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    agnostic_count = tl.zeros((), tl.float32)
    specific_count = tl.zeros((), tl.float32)
    agnostic_sum = tl.zeros((), tl.float32)
    specific_sum = tl.zeros((), tl.float32)
    end = tl.load(offsets + row + 1)
    for start in range(tl.load(offsets + row), end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        inside = column >= 0
        logits = logits_of(z, row, column, scale, dim, BLOCK_D)
        agnostic = bits_at(positives, row, words, column, inside)
        denominator = agnostic & (bits_at(negatives, position, words, column, inside) == 0)
        raised = tl.maximum(greatest, tl.max(tl.where(denominator, logits, float("-inf")), axis=0))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(greatest - base) + tl.sum(tl.where(denominator, tl.exp(logits - base), 0.0), axis=0)
        greatest = raised
        agnostic_count += tl.sum(agnostic.to(tl.float32), axis=0)
        agnostic_sum += tl.sum(tl.where(agnostic, logits, 0.0), axis=0)
        if HAS_SPECIFIC:
            task = bits_at(specific, row, words, column, inside)
            specific_count += tl.sum(task.to(tl.float32), axis=0)
            specific_sum += tl.sum(tl.where(task, logits, 0.0), axis=0)
    log_sum = tl.where(total > 0, greatest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(part + row, log_sum)
    tl.store(part + anchors + row, agnostic_count)
    tl.store(part + 2 * anchors + row, specific_count)
    tl.store(part + 3 * anchors + row, agnostic_sum)
    tl.store(part + 4 * anchors + row, specific_sum)


@triton.jit(do_not_specialize=["anchors", "words", "group"])
def contrastive_pairs_bwd_kernel(
    z, positives, specific, negatives, columns, offsets, enabled, numbers, grad, scale, anchors, dim, words, group,
    HAS_SPECIFIC: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_i += sum over the listed pairs, which are symmetric, of (g_ij + g_ji) z_j, without the sampled negatives.

    Grid (N, blocks of features). FLOPs: 4 D a pair. Bytes: a row of z a pair; grad, float32, read and written once.
    """
    if tl.load(enabled) == 0:
        return
    row = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    log_i = tl.load(numbers + row)
    push_i = tl.load(numbers + anchors + row)
    pull_i = tl.load(numbers + 2 * anchors + row)
    specific_i = tl.load(numbers + 3 * anchors + row)
    own = grad + row.to(tl.int64) * dim + feature
    sums = tl.load(own, mask=feature < dim, other=0.0)
    end = tl.load(offsets + row + 1)
    for start in range(tl.load(offsets + row), end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        inside = column >= 0
        logits = logits_of(z, row, column, scale, dim, BLOCK_D)
        log_j, push_j, pull_j, specific_j = load_numbers(numbers, anchors, column)
        agnostic = bits_at(positives, row, words, column, inside)
        in_i = agnostic & (bits_at(negatives, row % group, words, column, inside) == 0)
        in_j = agnostic & (bits_at(negatives, column % group, words, row, inside) == 0)
        g = tl.where(in_i, push_i * tl.exp(logits - log_i), 0.0)
        g += tl.where(in_j, push_j * tl.exp(logits - log_j), 0.0)
        g -= tl.where(agnostic, pull_i + pull_j, 0.0)
        if HAS_SPECIFIC:
            g -= tl.where(bits_at(specific, row, words, column, inside), specific_i + specific_j, 0.0)
        others = z + column.to(tl.int64)[:, None] * dim + feature[None, :]
        tile = tl.load(others, mask=inside[:, None] & (feature < dim)[None, :], other=0.0)
        sums += tl.sum(g[:, None] * tile.to(tl.float32), axis=0)
    tl.store(own, sums, mask=feature < dim)
