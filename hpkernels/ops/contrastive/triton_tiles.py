"""Triton kernels of the tiles of `contrastive`: statistics along rows and columns, and g. The formulas: ``reference.py``.

A program of the statistics takes a few tiles side by side and writes what it finds to places of its own; a second kernel
adds these in a fixed order. So products are read once for both directions, and the sums have the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops.contrastive.triton_pairs import pairs_of
from hpkernels.ops.multi_positive_contrastive.triton_blocks import short_exp, term_of


@triton.jit
def load_logits(products, scale, key_bias, row, column, rows, columns, first_column):
    """Logits (row, column) of products (R, C) that are not scaled yet."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = products + row.to(tl.int64)[:, None] * columns + column[None, :]
    logits = tl.load(at, mask=inside, other=0.0) * tl.load(scale)
    if key_bias is not None:
        logits += tl.load(key_bias + first_column + column, mask=column < columns, other=0.0)[None, :]
    return logits


@triton.jit
def log_of(weights):
    """log W; -inf for none."""
    return tl.where(weights == 0, float("-inf"), tl.log(tl.where(weights == 0, 1.0, weights)))


@triton.jit
def shift_of(greatest):
    """What to subtract before exp; the log-sum of infinities is what they are."""
    return tl.where(tl.abs(greatest) == float("inf"), 0.0, greatest)


@triton.jit
def log_sum_exp(values, AXIS: tl.constexpr):
    """Along an axis; -inf where all are."""
    shift = shift_of(tl.max(values, axis=AXIS))
    return shift + log_of(tl.sum(short_exp(values - tl.expand_dims(shift, AXIS)), axis=AXIS))


@triton.jit
def log_add_exp(one, other):
    """Of two numbers each; -inf if both are."""
    shift = shift_of(tl.maximum(one, other))
    return shift + log_of(short_exp(one - shift) + short_exp(other - shift))


@triton.jit
def statistics_along(logits, weights, denominator, AXIS: tl.constexpr, INSIDE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Log-denominator, pull, mass and count of the rows (axis 1) or columns (axis 0) of a tile."""
    log_denominator = log_sum_exp(tl.where(denominator, logits, float("-inf")), AXIS)
    if INSIDE:
        pull = log_sum_exp(logits + log_of(weights), AXIS)
    else:
        pull = tl.sum(logits * weights, axis=AXIS)
    mass = tl.sum(weights, axis=AXIS)
    count = mass
    if WEIGHTED:
        count = tl.sum(tl.where(weights > 0, 1.0, 0.0), axis=AXIS)
    return log_denominator, pull, mass, count


@triton.jit
def store_part(parts, part, part_count, of_each, count, log_denominator, pull, mass, number):
    """Put the statistics of `of_each` to parts (4, part_count, count)."""
    plane = part_count.to(tl.int64) * count
    at, inside = parts + part.to(tl.int64) * count + of_each, of_each < count
    tl.store(at, log_denominator, mask=inside)
    tl.store(at + plane, pull, mask=inside)
    tl.store(at + 2 * plane, mass, mask=inside)
    tl.store(at + 3 * plane, number, mask=inside)


@triton.jit(
    do_not_specialize=[
        "labels", "word_stride", "first_word_row", "first_word",
        "excluded_labels", "excluded_word_stride", "excluded_first_word_row", "excluded_first_word",
        "rows", "first_row", "first_column", "anchors", "keys", "own", "row_part_count", "column_part_count",
    ]
)  # fmt: skip
def tile_statistics_kernel(
    products, scale, key_bias, weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    excluded_anchor_ids, excluded_key_ids, excluded_labels,
    excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
    rows, columns, first_row, first_column, anchors, keys, own,
    row_parts, column_parts, row_part_count, column_part_count,
    OWN: tl.constexpr, TRIANGLE: tl.constexpr, DECOUPLED: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Statistics of the rows of (R, C) products over STEPS blocks of columns, and of these columns over BLOCK_ROWS rows.

    row_parts (4, row_part_count, R); column_parts (4, column_part_count, C), or None. Grid (blocks of rows times splits
    of the columns,). Bytes a pair: reads 4, with listed weights 8, and bits and labels; writes 16 a row and split and, of
    columns, 16 / BLOCK_ROWS.
    """
    split = tl.program_id(0) % row_part_count
    row_block = tl.program_id(0) // row_part_count
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    WEIGHTED: tl.constexpr = weights is not None
    log_denominator = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    pull = tl.full((BLOCK_ROWS,), float("-inf") if INSIDE else 0.0, tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    count = tl.zeros((BLOCK_ROWS,), tl.float32)
    begin = split * STEPS * BLOCK_COLUMNS
    for start in range(begin, tl.minimum(begin + STEPS * BLOCK_COLUMNS, columns), BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        logits = load_logits(products, scale, key_bias, row, column, rows, columns, first_column)
        weight, denominator = pairs_of(
            weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
            excluded_anchor_ids, excluded_key_ids, excluded_labels,
            excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
            row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
            OWN, TRIANGLE, DECOUPLED, EXCLUDE_POSITIVES,
        )  # fmt: skip
        found = statistics_along(logits, weight, denominator, 1, INSIDE, WEIGHTED)
        log_denominator = log_add_exp(log_denominator, found[0])
        pull = log_add_exp(pull, found[1]) if INSIDE else pull + found[1]
        mass += found[2]
        count += found[3]
        if column_parts is not None:
            found = statistics_along(logits, weight, denominator, 0, INSIDE, WEIGHTED)
            store_part(column_parts, row_block, column_part_count, column, columns, *found)
    store_part(row_parts, split, row_part_count, row, rows, log_denominator, pull, mass, count)


@triton.jit(do_not_specialize=["part_count", "count"])
def tile_parts_kernel(
    parts, statistics, part_count, count,
    INSIDE: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """Add parts (4, part_count, count) to the statistics (count, 4). Bytes: reads the parts once."""
    of_each = tl.program_id(0) * BLOCK_COUNT + tl.arange(0, BLOCK_COUNT)
    at = statistics + 4 * of_each.to(tl.int64)
    log_denominator = tl.load(at, mask=of_each < count, other=float("-inf"))
    pull = tl.load(at + 1, mask=of_each < count, other=0.0)
    mass = tl.load(at + 2, mask=of_each < count, other=0.0)
    number = tl.load(at + 3, mask=of_each < count, other=0.0)
    plane = part_count.to(tl.int64) * count
    for start in range(0, part_count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        of_part = parts + part.to(tl.int64)[:, None] * count + of_each[None, :]
        inside = (part < part_count)[:, None] & (of_each < count)[None, :]
        found = log_sum_exp(tl.load(of_part, mask=inside, other=float("-inf")), 0)
        log_denominator = log_add_exp(log_denominator, found)
        if INSIDE:
            found = log_sum_exp(tl.load(of_part + plane, mask=inside, other=float("-inf")), 0)
            pull = log_add_exp(pull, found)
        else:
            pull += tl.sum(tl.load(of_part + plane, mask=inside, other=0.0), axis=0)
        mass += tl.sum(tl.load(of_part + 2 * plane, mask=inside, other=0.0), axis=0)
        number += tl.sum(tl.load(of_part + 3 * plane, mask=inside, other=0.0), axis=0)
    tl.store(at, log_denominator, mask=of_each < count)
    tl.store(at + 1, pull, mask=of_each < count)
    tl.store(at + 2, mass, mask=of_each < count)
    tl.store(at + 3, number, mask=of_each < count)


@triton.jit
def load_numbers(numbers, of_each, count, AXIS: tl.constexpr):
    """shift, push, pull_shift and pull of rows or columns, from (count, 4), with a dimension more at `AXIS`."""
    at, inside = numbers + 4 * of_each.to(tl.int64), of_each < count
    shift = tl.expand_dims(tl.load(at, mask=inside, other=0.0), AXIS)
    push = tl.expand_dims(tl.load(at + 1, mask=inside, other=0.0), AXIS)
    pull_shift = tl.expand_dims(tl.load(at + 2, mask=inside, other=0.0), AXIS)
    return shift, push, pull_shift, tl.expand_dims(tl.load(at + 3, mask=inside, other=0.0), AXIS)


@triton.jit
def gradient_of(logits, weights, denominator, shift, push, pull_shift, pull, INSIDE: tl.constexpr):
    """g of one direction."""
    grad = tl.where(denominator, push * term_of(logits - shift), 0.0)
    if INSIDE:  # W exp(l - pull_shift) is at most 1, for it is a share of a sum
        share = (logits - pull_shift) + log_of(weights)
        grad -= pull * short_exp(tl.where(share > 0, 0.0, share))
    else:
        grad -= pull * weights
    return grad


@triton.jit(
    do_not_specialize=[
        "labels", "word_stride", "first_word_row", "first_word",
        "excluded_labels", "excluded_word_stride", "excluded_first_word_row", "excluded_first_word",
        "rows", "first_row", "first_column", "anchors", "keys", "own",
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

    Grid (tiles,). Bytes a pair: reads 4, with listed weights 8, and bits and labels; writes an element of grad.
    """
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(0) % blocks * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    logits = load_logits(products, scale, key_bias, row, column, rows, columns, first_column)
    weight, denominator = pairs_of(
        weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
        excluded_anchor_ids, excluded_key_ids, excluded_labels,
        excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
        row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
        OWN, TRIANGLE, DECOUPLED, EXCLUDE_POSITIVES,
    )  # fmt: skip
    g = gradient_of(logits, weight, denominator, *load_numbers(row_numbers, row, rows, 1), INSIDE)
    if column_numbers is not None:
        g += gradient_of(logits, weight, denominator, *load_numbers(column_numbers, column, columns, 0), INSIDE)
    at = grad + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, g.to(grad.dtype.element_ty), mask=inside)
