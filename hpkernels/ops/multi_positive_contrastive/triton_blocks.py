"""Triton kernels of the loss over tiles of all pairs, or of the pairs of each image, whose logits are never kept.

The formulas are those of ``reference.py``. Forward keeps a row's log-sum with a running maximum, so rows of z may have
any length. Backward forms g_ij + g_ji of a tile from the numbers of both anchors and multiplies it with z at once: no
two programs add to one number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton import load_rows, multiply, products_and_tile, row_products
from hpkernels.ops.multi_positive_contrastive.triton_bits import bits_of, tile_of_words

PARTS = tl.constexpr(5)
"""Numbers of a part of a row: log-sum, counts of A and S, sums of their logits."""


@triton.jit
def scope_of(block, anchors, group, WITHIN: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Where the rows of a block start, and the rows and columns [first, last) that it may hold: all, or of one image.

    Blocks start at multiples of 32, for the sake of the bits, so an image may take one more than it has rows for.
    """
    if WITHIN:
        blocks = tl.cdiv(group + 31, BLOCK_ROWS)
        first = block // blocks * group
        last = first + group
        start = first // 32 * 32 + block % blocks * BLOCK_ROWS
    else:
        first = 0
        last = anchors
        start = block * BLOCK_ROWS
    return start, first, last


@triton.jit
def anchors_from(start, first, last, COUNT: tl.constexpr):
    """COUNT anchors from `start` on; -1 outside of [first, last)."""
    found = start + tl.arange(0, COUNT)
    return tl.where((found >= first) & (found < last), found, -1)


@triton.jit
def positions_of(anchors, group):
    """The patch positions of anchors; -1 for those of -1."""
    return tl.where(anchors >= 0, anchors % group, -1)


@triton.jit
def add_to_log_sum(greatest, total, logits, included):
    """The greatest of each row's included logits so far, and the sum of exp(logit - greatest)."""
    raised = tl.maximum(greatest, tl.max(tl.where(included, logits, float("-inf")), axis=1))
    base = tl.where(raised == float("-inf"), 0.0, raised)
    terms = tl.where(included, tl.exp(logits - base[:, None]), 0.0)
    return raised, total * tl.exp(greatest - base) + tl.sum(terms, axis=1)


@triton.jit
def log_sum_of(greatest, total):
    """log of the sum, -inf if nothing was included."""
    return tl.where(total > 0, greatest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["anchors", "words", "group"])
def contrastive_blocks_fwd_kernel(
    z, positives, specific, negatives, enabled, parts, scale, anchors, dim, words, group,
    ENABLED_IF: tl.constexpr, WITHIN: tl.constexpr, HAS_SPECIFIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each row over its pairs, l = scale <z_i, z_j>: log sum over Den of exp l; counts of A and S; sums of their l.

    Grid (blocks of rows, splits of the columns); parts (splits, PARTS, N). Does nothing unless enabled == ENABLED_IF.
    FLOPs: 2 D a pair. Bytes: z once for each block of rows, from cache; 2 or 3 bits a pair.
    """
    if tl.load(enabled) != ENABLED_IF:
        return
    row_start, first, last = scope_of(tl.program_id(0), anchors, group, WITHIN, BLOCK_ROWS)
    rows = anchors_from(row_start, first, last, BLOCK_ROWS)
    split = tl.program_id(1)
    column_start = first // 32 * 32
    share = tl.cdiv(tl.cdiv(last - column_start, BLOCK_COLUMNS), tl.num_programs(1)) * BLOCK_COLUMNS
    column_start += split * share
    greatest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    agnostic_count = tl.zeros((BLOCK_ROWS,), tl.float32)
    specific_count = tl.zeros((BLOCK_ROWS,), tl.float32)
    agnostic_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    specific_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(column_start, tl.minimum(column_start + share, last), BLOCK_COLUMNS):
        columns = anchors_from(start, first, last, BLOCK_COLUMNS)
        logits = scale * row_products(z, rows, dim, 1, anchors, z, columns, dim, 1, anchors, dim, PRECISION, BLOCK_D)
        inside = (columns >= 0)[None, :]
        agnostic_words = tile_of_words(positives, rows, words, start, BLOCK_COLUMNS)
        drawn_words = tile_of_words(negatives, positions_of(rows, group), words, start, BLOCK_COLUMNS)
        denominator = inside & (rows[:, None] != columns[None, :]) & bits_of(agnostic_words | drawn_words)
        greatest, total = add_to_log_sum(greatest, total, logits, denominator)
        agnostic = inside & bits_of(agnostic_words)
        agnostic_count += tl.sum(agnostic.to(tl.float32), axis=1)
        agnostic_sum += tl.sum(tl.where(agnostic, logits, 0.0), axis=1)
        if HAS_SPECIFIC:
            task = inside & bits_of(tile_of_words(specific, rows, words, start, BLOCK_COLUMNS))
            specific_count += tl.sum(task.to(tl.float32), axis=1)
            specific_sum += tl.sum(tl.where(task, logits, 0.0), axis=1)
    at = parts + split.to(tl.int64) * PARTS * anchors + rows
    tl.store(at, log_sum_of(greatest, total), mask=rows >= 0)
    tl.store(at + anchors, agnostic_count, mask=rows >= 0)
    tl.store(at + 2 * anchors, specific_count, mask=rows >= 0)
    tl.store(at + 3 * anchors, agnostic_sum, mask=rows >= 0)
    tl.store(at + 4 * anchors, specific_sum, mask=rows >= 0)


@triton.jit
def load_numbers(numbers, anchors, rows):
    """log-denominator, push, pull and specific pull of some rows, from (4, N)."""
    at = numbers + rows
    inside = rows >= 0
    log_denominator = tl.load(at, mask=inside, other=0.0)
    push = tl.load(at + anchors, mask=inside, other=0.0)
    pull = tl.load(at + 2 * anchors, mask=inside, other=0.0)
    return log_denominator, push, pull, tl.load(at + 3 * anchors, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["anchors", "words", "group"])
def contrastive_blocks_bwd_kernel(
    z, positives, specific, negatives, enabled, numbers, grad, scale, anchors, dim, words, group,
    ENABLED_IF: tl.constexpr, WITHIN: tl.constexpr, HAS_SPECIFIC: tl.constexpr, SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """grad_i = sum over the pairs of (g_ij + g_ji) z_j, with the numbers (4, N) of both anchors.

    Grid (blocks of rows, blocks of features). Nothing is done unless enabled == ENABLED_IF. FLOPs: 4 D a pair. Bytes: z
    once for each block of rows if it holds all features, else twice, from cache; 3 to 6 bits a pair; grad, float32,
    once.
    """
    if tl.load(enabled) != ENABLED_IF:
        return
    row_start, first, last = scope_of(tl.program_id(0), anchors, group, WITHIN, BLOCK_ROWS)
    rows = anchors_from(row_start, first, last, BLOCK_ROWS)
    features = tl.program_id(1) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    log_i, push_i, pull_i, specific_i = load_numbers(numbers, anchors, rows)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_GRAD), tl.float32)
    for start in range(first // 32 * 32, last, BLOCK_COLUMNS):
        columns = anchors_from(start, first, last, BLOCK_COLUMNS)
        logits, tile = products_and_tile(z, rows, own, columns, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        logits *= scale
        log_j, push_j, pull_j, specific_j = load_numbers(numbers, anchors, columns)
        inside = (rows >= 0)[:, None] & (columns >= 0)[None, :]
        other = inside & (rows[:, None] != columns[None, :])
        agnostic_words = tile_of_words(positives, rows, words, start, BLOCK_COLUMNS)
        drawn_words = tile_of_words(negatives, positions_of(rows, group), words, start, BLOCK_COLUMNS)
        in_i = other & bits_of(agnostic_words | drawn_words)
        g = tl.where(in_i, push_i[:, None] * tl.exp(logits - log_i[:, None]), 0.0)
        to_j = inside & bits_of(agnostic_words)
        drawn = tl.trans(bits_of(tile_of_words(negatives, positions_of(columns, group), words, row_start, BLOCK_ROWS)))
        if SYMMETRIC:
            in_j = other & (to_j | drawn)
            g -= tl.where(to_j, pull_i[:, None] + pull_j[None, :], 0.0)
        else:
            to_i = inside & tl.trans(bits_of(tile_of_words(positives, columns, words, row_start, BLOCK_ROWS)))
            in_j = other & (to_i | drawn)
            g -= tl.where(to_j, pull_i[:, None], 0.0) + tl.where(to_i, pull_j[None, :], 0.0)
        g += tl.where(in_j, push_j[None, :] * tl.exp(logits - log_j[None, :]), 0.0)
        if HAS_SPECIFIC:
            to_j = inside & bits_of(tile_of_words(specific, rows, words, start, BLOCK_COLUMNS))
            if SYMMETRIC:
                g -= tl.where(to_j, specific_i[:, None] + specific_j[None, :], 0.0)
            else:
                to_i = inside & tl.trans(bits_of(tile_of_words(specific, columns, words, row_start, BLOCK_ROWS)))
                g -= tl.where(to_j, specific_i[:, None], 0.0) + tl.where(to_i, specific_j[None, :], 0.0)
        sums = multiply(g.to(tile.dtype), tile, sums, PRECISION)
    at = grad + rows.to(tl.int64)[:, None] * dim + features[None, :]
    tl.store(at, sums, mask=(rows >= 0)[:, None] & (features < dim)[None, :])
