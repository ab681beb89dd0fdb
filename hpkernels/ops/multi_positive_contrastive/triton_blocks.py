"""Triton kernels of the loss over tiles of all pairs, or of the pairs of each image, whose logits are never kept.

The formulas are those of ``reference.py``. Forward sums exp(logit - base), where the base is what no logit exceeds if
that is small, else a running maximum, so rows of z may have any length. Backward forms g_ij + g_ji of a tile from the
numbers of both anchors and multiplies it with z at once: no two programs add to one number.

Both passes round a logit before anything is subtracted from it, so that probabilities of long rows still sum to 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import (
    bits_of,
    load_rows,
    low_bits,
    multiply,
    products_and_tile,
    scaled,
    short_exp,
    words_from,
)

MOST_BASE = tl.constexpr(40.0)
"""Up to which a bound of all logits is the base of their log-sum: the least of them is exp(-2 * 40) of it."""


@triton.jit
def does_nothing(state, WITHIN: tl.constexpr):
    """Whether the blocks of all pairs, or of those of each image, are of the route that is not taken."""
    return (tl.load(state) != 0) == WITHIN


@triton.jit
def scope_of(block, anchors, group, own_first, WITHIN: tl.constexpr, PART: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Where the rows of a block start, and the anchors [first, last) that it may hold: all, or of one image.

    Blocks start at multiples of 32, for the sake of the bits, so an image may take one more than it has rows for, and
    so may a PART of the anchors, from `own_first` on.
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
        if PART:
            start += own_first // 32 * 32
    return start, first, last


@triton.jit
def own_rows(rows, own_first, own_count, PART: tl.constexpr):
    """The rows of A and S that anchors `rows` have: the same, or of a PART those from `own_first` on; -1 for none."""
    own = rows
    if PART:
        own -= own_first
        own = tl.where((rows >= 0) & (own >= 0) & (own < own_count), own, -1)
    return own


@triton.jit
def anchors_from(start, first, last, COUNT: tl.constexpr):
    """COUNT anchors from `start` on; -1 outside of [first, last)."""
    found = start + tl.arange(0, COUNT)
    return tl.where((found >= first) & (found < last), found, -1)


@triton.jit
def words_to(bits, words, bits_t, words_t, columns, start, own_first, PART: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words of the relations of `columns` to anchors from `start` on; of a PART only `bits_t` has them."""
    if PART:
        found = words_from(bits_t, columns, words_t, start - own_first // 32 * 32, COUNT)
    else:
        found = words_from(bits, columns, words, start, COUNT)
    return found


@triton.jit
def words_between(first, last, start, COUNT: tl.constexpr):
    """COUNT words from column `start` on, whose columns [first, last) are set."""
    begin = start + 32 * tl.arange(0, COUNT)
    return low_bits(last - begin) & ~low_bits(first - begin)


@triton.jit
def own_words(anchors, start, COUNT: tl.constexpr):
    """COUNT words (anchors, COUNT) from column `start` on, where the column of each anchor itself is set."""
    word = start // 32 + tl.arange(0, COUNT)
    bit = tl.full((), 1, tl.int32) << (anchors & 31)
    return tl.where((anchors >> 5)[:, None] == word[None, :], bit[:, None], 0)


@triton.jit
def drawn_words(negatives, anchors, group, words, start, SAMPLED: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words (anchors, COUNT) of R from column `start` on; if nothing was drawn all columns are negatives."""
    if SAMPLED:
        drawn = words_from(negatives, tl.where(anchors >= 0, anchors % group, -1), words, start, COUNT)
    else:
        drawn = tl.where((anchors >= 0)[:, None], tl.full((1, COUNT), -1, tl.int32), 0)
    return drawn


@triton.jit
def raise_base(base, total, logits, included):
    """The greatest of each row's included logits so far, and the sum of exp(logit - base) for it."""
    raised = tl.maximum(base, tl.max(tl.where(included, logits, float("-inf")), axis=1))
    total *= short_exp(base - tl.where(raised == float("-inf"), 0.0, raised))
    return raised, total


@triton.jit
def sum_of_terms(base, logits, included):
    """The sum of exp(logit - base) over each row's included logits."""
    shift = tl.where(base == float("-inf"), 0.0, base)
    return tl.sum(tl.where(included, short_exp(logits - shift[:, None]), 0.0), axis=1)


@triton.jit
def log_sum_of(base, total):
    """The logarithm of a total of exp(logit - base), -inf if nothing was included."""
    return tl.where(total > 0, base + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def load_numbers(numbers, rows):
    """r, f, pull and specific pull of some rows, from (N, 4); 0 for rows of -1."""
    at = numbers + 4 * rows
    inside = rows >= 0
    base = tl.load(at, mask=inside, other=0.0)
    push = tl.load(at + 1, mask=inside, other=0.0)
    return base, push, tl.load(at + 2, mask=inside, other=0.0), tl.load(at + 3, mask=inside, other=0.0)


@triton.jit
def term_of(difference):
    """exp of a logit less a log-denominator, finite also for pairs that are not in that, whose factor is 0."""
    return short_exp(tl.minimum(difference, 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["anchors", "words", "group", "own_first", "own_count"])
def contrastive_blocks_fwd_kernel(
    z, positives, specific, negatives, state, square, parts, scale, anchors, dim, words, group, own_first, own_count,
    WITHIN: tl.constexpr, HAS_SPECIFIC: tl.constexpr, SAMPLED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr, PART: tl.constexpr = False,
):  # fmt: skip
    """Of each row over its pairs, l = scale <z_i, z_j>: log sum over Den of exp l; sums of l over A and S.

    Grid (blocks of rows, splits of the columns); parts (splits, 3, R). FLOPs: 2 D a pair. Bytes: z once for each block
    of rows, from cache, and the rows again for each tile of columns if they are not WHOLE; 2 or 3 bits a pair.
    """
    if does_nothing(state, WITHIN):
        return
    row_start, first, last = scope_of(tl.program_id(0), anchors, group, own_first, WITHIN, PART, BLOCK_ROWS)
    rows = anchors_from(row_start, first, last, BLOCK_ROWS)
    of_rows = own_rows(rows, own_first, own_count, PART)
    features = tl.arange(0, BLOCK_GRAD)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    split = tl.program_id(1)
    column_start = first // 32 * 32
    share = tl.cdiv(tl.cdiv(last - column_start, BLOCK_COLUMNS), tl.num_programs(1)) * BLOCK_COLUMNS
    column_start += split * share
    bound = scale * tl.load(square)
    running = (bound <= MOST_BASE) == 0  # also if the bound is NaN
    base = tl.zeros((BLOCK_ROWS,), tl.float32) + tl.where(running, float("-inf"), bound)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    agnostic_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    specific_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    COUNT: tl.constexpr = BLOCK_COLUMNS // 32
    for start in range(column_start, tl.minimum(column_start + share, last), BLOCK_COLUMNS):
        columns = anchors_from(start, first, last, BLOCK_COLUMNS)
        inside = words_between(first, last, start, COUNT)[None, :]
        agnostic = words_from(positives, of_rows, words, start, COUNT) & inside
        denominator = agnostic | (drawn_words(negatives, rows, group, words, start, SAMPLED, COUNT) & inside)
        denominator &= ~own_words(rows, start, COUNT)
        if HAS_SPECIFIC:
            task = words_from(specific, of_rows, words, start, COUNT) & inside
        logits, _ = products_and_tile(z, rows, own, columns, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        logits = scaled(logits, scale)
        if running:
            base, total = raise_base(base, total, logits, bits_of(denominator))
        total += sum_of_terms(base, logits, bits_of(denominator))
        agnostic_sum += tl.sum(tl.where(bits_of(agnostic), logits, 0.0), axis=1)
        if HAS_SPECIFIC:
            specific_sum += tl.sum(tl.where(bits_of(task), logits, 0.0), axis=1)
    count = anchors
    if PART:
        count = own_count
    at = parts + split.to(tl.int64) * 3 * count + of_rows
    tl.store(at, log_sum_of(base, total), mask=of_rows >= 0)
    tl.store(at + count, agnostic_sum, mask=of_rows >= 0)
    tl.store(at + 2 * count, specific_sum, mask=of_rows >= 0)


@triton.jit(do_not_specialize=["anchors", "words", "words_t", "group", "own_first", "own_count"])
def contrastive_blocks_bwd_kernel(
    z, positives, specific, negatives, positives_t, specific_t, state, numbers, shift, factor, sums, scale,
    anchors, dim, width, words, words_t, group, own_first, own_count,
    WITHIN: tl.constexpr, HAS_SPECIFIC: tl.constexpr, SAMPLED: tl.constexpr, SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr, PART: tl.constexpr = False,
):  # fmt: skip
    """sums_i = sum over the pairs of (g_ij + g_ji) z_j, with the numbers of both anchors; of all pairs times `factor`.

    Grid (blocks of rows, blocks of features). FLOPs: 4 D a pair. Bytes: z once for each block of rows if it holds all
    features, else twice, from cache; 3 to 6 bits a pair; sums (R, width) once.
    """
    if does_nothing(state, WITHIN):
        return
    row_start, first, last = scope_of(tl.program_id(0), anchors, group, own_first, WITHIN, PART, BLOCK_ROWS)
    rows = anchors_from(row_start, first, last, BLOCK_ROWS)
    of_rows = own_rows(rows, own_first, own_count, PART)
    features = tl.program_id(1) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    base_i, push_i, pull_i, specific_i = load_numbers(numbers, rows)
    shared = tl.load(shift)
    gradient = tl.zeros((BLOCK_ROWS, BLOCK_GRAD), tl.float32)
    COUNT: tl.constexpr = BLOCK_COLUMNS // 32
    ROW_COUNT: tl.constexpr = BLOCK_ROWS // 32
    for start in range(first // 32 * 32, last, BLOCK_COLUMNS):
        columns = anchors_from(start, first, last, BLOCK_COLUMNS)
        inside = words_between(first, last, start, COUNT)[None, :]
        to_j = words_from(positives, of_rows, words, start, COUNT) & inside
        in_i = to_j | (drawn_words(negatives, rows, group, words, start, SAMPLED, COUNT) & inside)
        in_i &= ~own_words(rows, start, COUNT)
        in_j = drawn_words(negatives, columns, group, words, row_start, SAMPLED, ROW_COUNT)
        if not SYMMETRIC:
            to_i = words_to(positives, words, positives_t, words_t, columns, row_start, own_first, PART, ROW_COUNT)
            in_j |= to_i
        in_j &= ~own_words(columns, row_start, ROW_COUNT)
        if HAS_SPECIFIC:
            task_j = words_from(specific, of_rows, words, start, COUNT) & inside
            if not SYMMETRIC:
                task_i = words_to(specific, words, specific_t, words_t, columns, row_start, own_first, PART, ROW_COUNT)
        base_j, push_j, pull_j, specific_j = load_numbers(numbers, columns)
        logits, tile = products_and_tile(z, rows, own, columns, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        logits = scaled(logits, scale)
        are_in_j = tl.trans(bits_of(in_j))
        if SYMMETRIC:
            are_in_j |= bits_of(to_j & in_i)
        from_i = tl.where(bits_of(in_i), push_i[:, None], 0.0)
        from_j = tl.where(are_in_j, push_j[None, :], 0.0)
        if shared == shared:
            g = (from_i + from_j) * term_of(logits - shared)
        else:
            g = from_i * term_of(logits - base_i[:, None]) + from_j * term_of(logits - base_j[None, :])
        if SYMMETRIC:
            g -= tl.where(bits_of(to_j), pull_i[:, None] + pull_j[None, :], 0.0)
        else:
            g -= tl.where(bits_of(to_j), pull_i[:, None], 0.0) + tl.where(tl.trans(bits_of(to_i)), pull_j[None, :], 0.0)
        if HAS_SPECIFIC:
            if SYMMETRIC:
                g -= tl.where(bits_of(task_j), specific_i[:, None] + specific_j[None, :], 0.0)
            else:
                g -= tl.where(bits_of(task_j), specific_i[:, None], 0.0)
                g -= tl.where(tl.trans(bits_of(task_i)), specific_j[None, :], 0.0)
        gradient = multiply(g.to(tile.dtype), tile, gradient, PRECISION)
    if not WITHIN:
        gradient *= tl.load(factor)
    at = sums + of_rows.to(tl.int64)[:, None] * width + features[None, :]
    tl.store(at, gradient.to(sums.dtype.element_ty), mask=(of_rows >= 0)[:, None] & (features < width)[None, :])
