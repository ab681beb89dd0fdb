"""Triton kernels of the tiles of `contrastive`: statistics of rows and columns, and g. Formulas: ``reference.py``.

A program of the statistics takes some tiles one after the other and writes what it finds to a place of its own; another
kernel adds these in a fixed order, so that sums have the same bits each time. Rows and columns have a kernel each: in
one, threads would have so few numbers of each row and column that exchanging sums took longer than reading twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import scaled, short_exp
from hpkernels.ops.contrastive.triton_pairs import pairs_of


@triton.jit
def load_logits(products, scale, key_bias, row, column, rows, columns, first_column):
    """Logits (row, column) of products (R, C) that are not scaled yet.

    Beyond their end they are -1e30: of no weight in any sum of exponentials, but finite, so that 0 times it is 0.
    """
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = products + row.to(tl.int64)[:, None] * columns + column[None, :]
    factor = tl.load(scale)
    logits = scaled(tl.load(at, mask=inside, other=-1e30 / factor), factor)
    if key_bias is not None:
        logits += tl.load(key_bias + first_column + column, mask=column < columns, other=0.0)[None, :]
    return logits


@triton.jit
def log_of(values):
    """The logarithm; -inf of 0."""
    return tl.where(values == 0, float("-inf"), tl.log(tl.where(values == 0, 1.0, values)))


@triton.jit
def log_weighted(logits, positive, weights, WEIGHTED: tl.constexpr):
    """l + log W; W is 1 unless pairs are WEIGHTED."""
    if WEIGHTED:
        logits += tl.log(tl.where(positive, weights, 1.0))
    return tl.where(positive, logits, float("-inf"))


@triton.jit
def shift_of(greatest):
    """What to subtract before exp; the log-sum of infinities is what they are."""
    return tl.where(tl.abs(greatest) == float("inf"), 0.0, greatest)


@triton.jit
def add_terms(base, total, values, AXIS: tl.constexpr):
    """The greatest of the values so far, and the sum of exp(value - shift_of(greatest))."""
    raised = tl.maximum(base, tl.max(values, axis=AXIS))
    shift = shift_of(raised)
    total = total * short_exp(base - shift) + tl.sum(short_exp(values - tl.expand_dims(shift, AXIS)), axis=AXIS)
    return raised, total


@triton.jit
def add_statistics(
    base, total, pull_base, pull, mass, count, logits, positive, weights, denominator,
    AXIS: tl.constexpr, INSIDE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Those of rows (axis 1) or columns (axis 0), with a tile more; with INSIDE the pull is a sum of exponentials."""
    base, total = add_terms(base, total, tl.where(denominator, logits, float("-inf")), AXIS)
    if INSIDE:
        pull_base, pull = add_terms(pull_base, pull, log_weighted(logits, positive, weights, WEIGHTED), AXIS)
    else:
        pull += tl.sum(logits * weights, axis=AXIS)
    mass += tl.sum(weights, axis=AXIS)
    if WEIGHTED:
        count += tl.sum(tl.where(positive, 1.0, 0.0), axis=AXIS)
    return base, total, pull_base, pull, mass, count


@triton.jit
def store_part(
    parts, part, part_count, of_each, length, base, total, pull_base, pull, mass, count,
    INSIDE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Put statistics to parts (4, part_count, length): log-denominator, pull, mass and count."""
    # Where nothing but what is beyond the end was added, nothing was.
    log_denominator = tl.where(base <= -9e29, float("-inf"), shift_of(base) + log_of(total))
    if INSIDE:
        pull = shift_of(pull_base) + log_of(pull)
    plane = part_count.to(tl.int64) * length
    at, inside = parts + part.to(tl.int64) * length + of_each, of_each < length
    tl.store(at, log_denominator, mask=inside)
    tl.store(at + plane, pull, mask=inside)
    tl.store(at + 2 * plane, mass, mask=inside)
    tl.store(at + 3 * plane, count if WEIGHTED else mass, mask=inside)


@triton.jit
def load_numbers(numbers, of_each, length, AXIS: tl.constexpr):
    """shift, push, pull_shift and pull of rows or columns, from (length, 4), with a dimension more at `AXIS`.

    What has no push has an infinite shift: exp(l - shift), which would be infinite for great l, is 0.
    """
    at, inside = numbers + 4 * of_each.to(tl.int64), of_each < length
    push = tl.load(at + 1, mask=inside, other=0.0)
    shift = tl.where(push == 0, float("inf"), tl.load(at, mask=inside, other=0.0))
    pull_shift = tl.expand_dims(tl.load(at + 2, mask=inside, other=0.0), AXIS)
    pull = tl.expand_dims(tl.load(at + 3, mask=inside, other=0.0), AXIS)
    return tl.expand_dims(shift, AXIS), tl.expand_dims(push, AXIS), pull_shift, pull


@triton.jit
def gradient_of(
    logits, positive, weights, denominator, shift, push, pull_shift, pull, INSIDE: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """g of one direction."""
    grad = tl.where(denominator, push * short_exp(logits - shift), 0.0)
    if INSIDE:  # W exp(l - pull_shift) is at most 1, for it is a share of a sum
        share = log_weighted(logits - pull_shift, positive, weights, WEIGHTED)
        grad -= pull * short_exp(tl.minimum(share, 0.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        grad -= pull * weights
    return grad


@triton.jit(
    do_not_specialize=[
        "word_stride", "first_word_row", "first_word", "excluded_word_stride", "excluded_first_word_row",
        "excluded_first_word", "rows", "anchors", "own", "part_count",
    ]
)  # fmt: skip
def tile_rows_kernel(
    products, scale, key_bias, weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    excluded_anchor_ids, excluded_key_ids, excluded_labels,
    excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
    rows, columns, first_row, first_column, anchors, keys, own,
    parts, part_count,
    OWN: tl.constexpr, TRIANGLE: tl.constexpr, DECOUPLED: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """parts (4, part_count, R) = the statistics of the rows of (R, C) products over STEPS blocks of columns each.

    Grid (blocks of rows times part_count,). Bytes a pair: reads 4, with listed weights 8, and labels or bits, labels
    from cache; writes 16 a row and part.
    """
    WEIGHTED: tl.constexpr = weights is not None
    # Programs that run at a time have the same columns, whose labels are then in L1.
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    part = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    base = total + float("-inf")
    pull_base, pull, mass, count = base, total, total, total
    begin = part * STEPS * BLOCK_COLUMNS
    for start in range(begin, tl.minimum(begin + STEPS * BLOCK_COLUMNS, columns), BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        logits = load_logits(products, scale, key_bias, row, column, rows, columns, first_column)
        positive, weight, denominator = pairs_of(
            weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
            excluded_anchor_ids, excluded_key_ids, excluded_labels,
            excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
            row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
            OWN, TRIANGLE, DECOUPLED, EXCLUDE_POSITIVES,
        )  # fmt: skip
        base, total, pull_base, pull, mass, count = add_statistics(
            base, total, pull_base, pull, mass, count, logits, positive, weight, denominator, 1, INSIDE, WEIGHTED
        )
    store_part(
        parts, part, part_count, row, rows, base, total, pull_base, pull, mass, count, INSIDE, WEIGHTED
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "word_stride", "first_word_row", "first_word", "excluded_word_stride", "excluded_first_word_row",
        "excluded_first_word", "rows", "anchors", "own", "part_count",
    ]
)  # fmt: skip
def tile_columns_kernel(
    products, scale, key_bias, weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    excluded_anchor_ids, excluded_key_ids, excluded_labels,
    excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
    rows, columns, first_row, first_column, anchors, keys, own,
    parts, part_count,
    OWN: tl.constexpr, TRIANGLE: tl.constexpr, DECOUPLED: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """parts (4, part_count, C) = the statistics of the columns of (R, C) products over STEPS blocks of rows each.

    Grid (blocks of columns times part_count,). Bytes a pair: as `tile_rows_kernel`; writes 16 a column and part.
    """
    WEIGHTED: tl.constexpr = weights is not None
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    part, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    base = total + float("-inf")
    pull_base, pull, mass, count = base, total, total, total
    begin = part * STEPS * BLOCK_ROWS
    for row_start in range(begin, tl.minimum(begin + STEPS * BLOCK_ROWS, rows), BLOCK_ROWS):
        row = row_start + tl.arange(0, BLOCK_ROWS)
        logits = load_logits(products, scale, key_bias, row, column, rows, columns, first_column)
        positive, weight, denominator = pairs_of(
            weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
            excluded_anchor_ids, excluded_key_ids, excluded_labels,
            excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
            row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
            OWN, TRIANGLE, DECOUPLED, EXCLUDE_POSITIVES,
        )  # fmt: skip
        base, total, pull_base, pull, mass, count = add_statistics(
            base, total, pull_base, pull, mass, count, logits, positive, weight, denominator, 0, INSIDE, WEIGHTED
        )
    store_part(
        parts, part, part_count, column, columns, base, total, pull_base, pull, mass, count, INSIDE, WEIGHTED
    )  # fmt: skip


@triton.jit(do_not_specialize=["part_count", "length"])
def tile_parts_kernel(
    parts, statistics, part_count, length,
    INSIDE: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
):  # fmt: skip
    """statistics (length, 4) += the sums of parts (4, part_count, length), in order. Bytes: reads the parts once."""
    of_each = tl.program_id(0) * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
    exists = of_each < length
    at = statistics + 4 * of_each.to(tl.int64)
    base = tl.load(at, mask=exists, other=float("-inf"))
    pull = tl.load(at + 1, mask=exists, other=0.0)
    mass = tl.load(at + 2, mask=exists, other=0.0)
    count = tl.load(at + 3, mask=exists, other=0.0)
    total = tl.where(base == float("-inf"), 0.0, short_exp(base - shift_of(base)))  # 1, or NaN
    pull_base = pull
    if INSIDE:
        pull = tl.where(pull_base == float("-inf"), 0.0, short_exp(pull_base - shift_of(pull_base)))
    plane = part_count.to(tl.int64) * length
    for start in range(0, part_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        of_part = parts + part.to(tl.int64)[:, None] * length + of_each[None, :]
        inside = (part < part_count)[:, None] & exists[None, :]
        base, total = add_terms(base, total, tl.load(of_part, mask=inside, other=float("-inf")), 0)
        if INSIDE:
            found = tl.load(of_part + plane, mask=inside, other=float("-inf"))
            pull_base, pull = add_terms(pull_base, pull, found, 0)
        else:
            pull += tl.sum(tl.load(of_part + plane, mask=inside, other=0.0), axis=0)
        mass += tl.sum(tl.load(of_part + 2 * plane, mask=inside, other=0.0), axis=0)
        count += tl.sum(tl.load(of_part + 3 * plane, mask=inside, other=0.0), axis=0)
    tl.store(at, shift_of(base) + log_of(total), mask=exists)
    tl.store(at + 1, shift_of(pull_base) + log_of(pull) if INSIDE else pull, mask=exists)
    tl.store(at + 2, mass, mask=exists)
    tl.store(at + 3, count, mask=exists)


@triton.jit(
    do_not_specialize=[
        "word_stride", "first_word_row", "first_word", "excluded_word_stride", "excluded_first_word_row",
        "excluded_first_word", "rows", "anchors", "own",
    ]
)  # fmt: skip
def tile_gradient_kernel(
    products, scale, key_bias, weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    excluded_anchor_ids, excluded_key_ids, excluded_labels,
    excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
    rows, columns, first_row, first_column, anchors, keys, own,
    row_numbers, column_numbers, grad,
    OWN: tl.constexpr, TRIANGLE: tl.constexpr, DECOUPLED: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad (R, C) = g of the rows and, unless column_numbers is None, of the columns; grad may be the products.

    Grid (tiles,). Bytes a pair: reads 4, with listed weights 8, and labels or bits, labels from cache; writes 2 or 4.
    """
    WEIGHTED: tl.constexpr = weights is not None
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(0) % blocks * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    logits = load_logits(products, scale, key_bias, row, column, rows, columns, first_column)
    positive, weight, denominator = pairs_of(
        weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
        excluded_anchor_ids, excluded_key_ids, excluded_labels,
        excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
        row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
        OWN, TRIANGLE, DECOUPLED, EXCLUDE_POSITIVES,
    )  # fmt: skip
    shift, push, pull_shift, pull = load_numbers(row_numbers, row, rows, 1)
    g = gradient_of(logits, positive, weight, denominator, shift, push, pull_shift, pull, INSIDE, WEIGHTED)
    if column_numbers is not None:
        shift, push, pull_shift, pull = load_numbers(column_numbers, column, columns, 0)
        g += gradient_of(logits, positive, weight, denominator, shift, push, pull_shift, pull, INSIDE, WEIGHTED)
    at = grad + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, g.to(grad.dtype.element_ty), mask=inside)
