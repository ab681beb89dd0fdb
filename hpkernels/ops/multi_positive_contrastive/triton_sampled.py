"""Triton kernels of the sampled negatives across images: the anchors at one patch position share theirs.

So their logits are products of B rows, one an image, with the rows that the position's list of columns names. Pairs
within an image are left to the blocks of the images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import load_rows, multiply, products_and_tile, scaled, short_exp
from hpkernels.ops.multi_positive_contrastive.triton_blocks import load_numbers, log_sum_of, raise_base, sum_of_terms


@triton.jit
def rows_at(position, block, images, group, BLOCK_ROWS: tl.constexpr):
    """Anchors at a position in a block of images, -1 beyond the last image; and the first anchor of each image."""
    image = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.where(image < images, image * group + position, -1), image * group


@triton.jit
def are_across(first_of_image, columns, group):
    """Which pairs of images and columns are of two images; columns of -1 are of none."""
    before = columns[None, :] < first_of_image[:, None]
    return (columns >= 0)[None, :] & (before | (columns[None, :] >= first_of_image[:, None] + group))


@triton.jit
def piece_of(columns, ranges, row, first, last, PIECE: tl.constexpr):
    """Where the list of a row, which ascends, has its columns: all, or with PIECE those in [first, last)."""
    start = tl.load(ranges + 2 * row)
    end = tl.load(ranges + 2 * row + 1)
    if PIECE:
        start = first_from(columns, start, end, first)
        end = first_from(columns, start, end, last)
    return start, end


@triton.jit
def first_from(columns, start, end, least):
    """The first place in [start, end) whose column is `least` or more, by bisection."""
    while start < end:
        middle = (start + end) // 2
        if tl.load(columns + middle) < least:
            start = middle + 1
        else:
            end = middle
    return start


@triton.jit(do_not_specialize=["anchors", "group"])
def sampled_rows_fwd_kernel(
    z, columns, ranges, state, log_sums, scale, anchors, dim, group,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """log_sums[i] = log sum over the negatives j of i in other images of exp(scale <z_i, z_j>).

    Grid (positions, blocks of images). FLOPs: 2 D a pair. Bytes: a row of z for each column of each position's list.
    """
    if tl.load(state) != 0:
        return
    position = tl.program_id(0)
    rows, first_of_image = rows_at(position, tl.program_id(1), anchors // group, group, BLOCK_ROWS)
    features = tl.arange(0, BLOCK_GRAD)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    base = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    first, end = piece_of(columns, ranges, position, 0, anchors, False)
    for start in range(first, end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        logits, _ = products_and_tile(z, rows, own, column, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        across = are_across(first_of_image, column, group)
        logits = scaled(logits, scale)
        base, total = raise_base(base, total, logits, across)
        total += sum_of_terms(base, logits, across)
    tl.store(log_sums + rows, log_sum_of(base, total), mask=rows >= 0)


@triton.jit(do_not_specialize=["anchors", "group", "first_column", "last_column"])
def sampled_rows_bwd_kernel(
    z, columns, ranges, state, numbers, sums, scale, anchors, dim, group, first_column, last_column,
    PIECE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """sums_i += sum over the negatives j of i in other images of f_i exp(l_ij - r_i) z_j, j in the piece.

    Grid (positions, blocks of images, blocks of features). FLOPs: 4 D a pair. Bytes: one row of z for each column of
    each position's list, or two if the block has not all features; sums read and written once.
    """
    if tl.load(state) != 0:
        return
    position = tl.program_id(0)
    rows, first_of_image = rows_at(position, tl.program_id(1), anchors // group, group, BLOCK_ROWS)
    features = tl.program_id(2) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    target = sums + rows.to(tl.int64)[:, None] * dim + features[None, :]
    inside = (rows >= 0)[:, None] & (features < dim)[None, :]
    gradient = tl.load(target, mask=inside, other=0.0)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    base, push, _, _ = load_numbers(numbers, rows)
    first, end = piece_of(columns, ranges, position, first_column, last_column, PIECE)
    for start in range(first, end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        products, tile = products_and_tile(z, rows, own, column, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        terms = push[:, None] * short_exp(scaled(products, scale) - base[:, None])
        # Always. Where Triton sees that the second product takes the first, all groups of four warps compute all of it.
        g = terms
        if start < end:
            g = tl.where(are_across(first_of_image, column, group), terms, 0.0)
        gradient = multiply(g.to(tile.dtype), tile, gradient, PRECISION)
    tl.store(target, gradient, mask=inside)


@triton.jit(do_not_specialize=["anchors", "group", "first_column", "last_column"])
def sampled_columns_bwd_kernel(
    z, columns, slots, ranges, state, numbers, staged, scale, anchors, dim, group, first_column, last_column,
    PIECE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """staged[slot of (p, j)] = sum over the images of f_i exp(l_ij - r_i) z_i, i at p, j sampled there, in the piece.

    Grid (positions, blocks of the longest list, blocks of features). FLOPs: 4 D a pair. Bytes: a row of z, or two, for
    each image and block of columns; a row written for each (p, j).
    """
    if tl.load(state) != 0:
        return
    position = tl.program_id(0)
    first, end = piece_of(columns, ranges, position, first_column, last_column, PIECE)
    at = first + tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if first + tl.program_id(1) * BLOCK_COLUMNS >= end:
        return
    features = tl.program_id(2) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    column = tl.load(columns + at, mask=at < end, other=-1)
    own = load_rows(z, column, dim, features, 1, anchors, dim)
    gradient = tl.zeros((BLOCK_COLUMNS, BLOCK_GRAD), tl.float32)
    blocks = tl.cdiv(anchors // group, BLOCK_ROWS)
    for block in range(0, blocks):
        rows, first_of_image = rows_at(position, block, anchors // group, group, BLOCK_ROWS)
        products, tile = products_and_tile(z, column, own, rows, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        base, push, _, _ = load_numbers(numbers, rows)
        terms = push[None, :] * short_exp(scaled(products, scale) - base[None, :])
        g = terms
        if block < blocks:  # as in the kernel above
            g = tl.where(tl.trans(are_across(first_of_image, column, group)) & (rows >= 0)[None, :], terms, 0.0)
        gradient = multiply(g.to(tile.dtype), tile, gradient, PRECISION)
    slot = tl.load(slots + at, mask=at < end, other=0)
    target = staged + slot.to(tl.int64)[:, None] * dim + features[None, :]
    tl.store(target, gradient.to(staged.dtype.element_ty), mask=(at < end)[:, None] & (features < dim)[None, :])
