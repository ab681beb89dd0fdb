"""Triton kernels and functions that find the pairs of a tile: equal labels, bits of a mask or of lists, listed weights.

What a problem has not is None, and its code is left out when a kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import bits_of, low_bits, words_from


@triton.jit
def equal_labels(anchor_ids, key_ids, labels, anchor, key, are_anchors, are_keys, anchors, keys):
    """Whether a label of an anchor, of halves (labels, 2, N), is that of a key, of (labels, 2, K)."""
    at_anchors, at_keys = anchor_ids + anchor, key_ids + key
    found = one_label(at_anchors, at_keys, are_anchors, are_keys, anchors, keys)
    for _ in range(1, labels):
        at_anchors += 2 * anchors
        at_keys += 2 * keys
        found |= one_label(at_anchors, at_keys, are_anchors, are_keys, anchors, keys)
    return found


@triton.jit
def one_label(at_anchors, at_keys, are_anchors, are_keys, anchors, keys):
    """Whether both halves of numbers are equal; those of anchors or keys that do not exist differ from all."""
    low = tl.load(at_anchors, mask=are_anchors, other=-1)[:, None] ^ tl.load(at_keys, mask=are_keys, other=-2)[None, :]
    of_anchors = tl.load(at_anchors + anchors, mask=are_anchors, other=-1)
    high = of_anchors[:, None] ^ tl.load(at_keys + keys, mask=are_keys, other=-2)[None, :]
    return (low | high) == 0


@triton.jit
def related(
    anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    row, column, start, rows, columns, first_row, first_column, anchors, keys,
):  # fmt: skip
    """Whether the pairs of a tile are in a relation, by labels or bits; never beyond the end of the tile."""
    found = tl.zeros((row.shape[0], column.shape[0]), tl.int1)
    if anchor_ids is not None:
        anchor, key = first_row + row, first_column + column
        found = equal_labels(anchor_ids, key_ids, labels, anchor, key, row < rows, column < columns, anchors, keys)
    if words is not None:
        COUNT: tl.constexpr = column.shape[0] // 32
        of_rows = tl.where(row < rows, first_word_row + row, -1)
        word = words_from(words, of_rows, word_stride, 32 * first_word + start, COUNT)
        word &= low_bits(columns - start - 32 * tl.arange(0, COUNT))[None, :]
        found |= bits_of(word)
    return found


@triton.jit
def pairs_of(
    weights, anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
    excluded_anchor_ids, excluded_key_ids, excluded_labels,
    excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
    row, column, start, rows, columns, first_row, first_column, anchors, keys, own,
    OWN: tl.constexpr, TRIANGLE: tl.constexpr, DECOUPLED: tl.constexpr, EXCLUDE_POSITIVES: tl.constexpr,
):  # fmt: skip
    """Of pairs of a tile, whose columns begin at `start`: which are positives, W, and Den.

    There are no positives beyond the end of the tile, but Den may be so: the logits there are as good as -inf. No
    condition that holds for all pairs is computed for each.
    """
    positive = related(
        anchor_ids, key_ids, labels, words, word_stride, first_word_row, first_word,
        row, column, start, rows, columns, first_row, first_column, anchors, keys,
    )  # fmt: skip
    weight = tl.where(positive, 1.0, 0.0)
    if weights is not None:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        listed = tl.load(weights + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
        weight = tl.maximum(weight, listed, propagate_nan=tl.PropagateNan.ALL)
        positive = weight != 0
    taking_part = tl.full((row.shape[0], column.shape[0]), True, tl.int1)
    if OWN:
        of_rows, of_columns = (first_row + row + own)[:, None], (first_column + column)[None, :]
        taking_part = of_columns > of_rows if TRIANGLE else of_columns != of_rows
    if (excluded_anchor_ids is not None) or (excluded_words is not None):
        excluded = related(
            excluded_anchor_ids, excluded_key_ids, excluded_labels,
            excluded_words, excluded_word_stride, excluded_first_word_row, excluded_first_word,
            row, column, start, rows, columns, first_row, first_column, anchors, keys,
        )  # fmt: skip
        taking_part &= excluded == 0 if EXCLUDE_POSITIVES else (excluded == 0) | positive
    positive &= taking_part
    denominator = taking_part
    if DECOUPLED:
        denominator &= positive == 0
    return positive, tl.where(positive, weight, 0.0), denominator


@triton.jit(do_not_specialize=["pairs", "first_row", "first_column", "columns", "words"])
def tile_list_kernel(
    indices, offsets, weights, found, pairs, first_row, first_column, columns, words, BLOCK_PAIRS: tl.constexpr
):  # fmt: skip
    """Bits of found (R, words) = the pairs of a tile that are listed; with weights found (R, C) = the greatest.

    Grid (R,). Bytes: reads 8 or 12 a listed pair of the rows; an atomic operation each, whose order does not matter.
    """
    row = tl.program_id(0)
    begin = tl.maximum(tl.load(offsets + first_row + row), 0)
    end = tl.minimum(tl.load(offsets + first_row + row + 1), pairs)
    for start in range(begin, end, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS)
        column = tl.load(indices + pair, mask=pair < end, other=-1) - first_column
        inside = (column >= 0) & (column < columns)
        if weights is None:
            bit = tl.full((), 1, tl.int32) << (column & 31).to(tl.int32)
            tl.atomic_or(found + row.to(tl.int64) * words + (column >> 5), bit, mask=inside, sem="relaxed")
        else:  # the bits of numbers that are at least 0 are in the order of the numbers
            bits = tl.load(weights + pair, mask=pair < end, other=0)
            tl.atomic_max(found + row.to(tl.int64) * columns + column, bits, mask=inside, sem="relaxed")
