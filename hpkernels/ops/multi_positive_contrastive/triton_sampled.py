"""Triton kernels of the sampled negatives across images: the anchors at one patch position share theirs.

So their logits are products of B rows, one an image, with the rows that the position's list of columns names. Pairs
within an image are left to the blocks of the images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton import load_rows, multiply, products_and_tile, row_products
from hpkernels.ops.multi_positive_contrastive.triton_bits import low_bits, population_count
from hpkernels.ops.multi_positive_contrastive.triton_blocks import add_to_log_sum, load_numbers, log_sum_of


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


@triton.jit(do_not_specialize=["anchors", "group"])
def sampled_rows_fwd_kernel(
    z, columns, offsets, enabled, log_sums, scale, anchors, dim, group,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log_sums[i] = log sum over the negatives j of i in other images of exp(scale <z_i, z_j>).

    Grid (positions, blocks of images). FLOPs: 2 D a pair. Bytes: a row of z for each column of each position's list.
    """
    if tl.load(enabled) == 0:
        return
    position = tl.program_id(0)
    rows, first_of_image = rows_at(position, tl.program_id(1), anchors // group, group, BLOCK_ROWS)
    greatest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    end = tl.load(offsets + position + 1)
    for start in range(tl.load(offsets + position), end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        logits = scale * row_products(z, rows, dim, 1, anchors, z, column, dim, 1, anchors, dim, PRECISION, BLOCK_D)
        greatest, total = add_to_log_sum(greatest, total, logits, are_across(first_of_image, column, group))
    tl.store(log_sums + rows, log_sum_of(greatest, total), mask=rows >= 0)


@triton.jit(do_not_specialize=["anchors", "group"])
def sampled_rows_bwd_kernel(
    z, columns, offsets, enabled, numbers, grad, scale, anchors, dim, group,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """grad_i += sum over the negatives j of i in other images of push_i exp(l_ij - logDen_i) z_j.

    Grid (positions, blocks of images, blocks of features). FLOPs: 4 D a pair. Bytes: one row of z for each column of
    each position's list, or two if the block has not all features; grad, float32, read and written once.
    """
    if tl.load(enabled) == 0:
        return
    position = tl.program_id(0)
    rows, first_of_image = rows_at(position, tl.program_id(1), anchors // group, group, BLOCK_ROWS)
    features = tl.program_id(2) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    own = load_rows(z, rows, dim, features, 1, anchors, dim)
    log_denominator, push, _, _ = load_numbers(numbers, anchors, rows)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_GRAD), tl.float32)
    end = tl.load(offsets + position + 1)
    for start in range(tl.load(offsets + position), end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        logits, tile = products_and_tile(z, rows, own, column, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
        across = are_across(first_of_image, column, group)
        g = tl.where(across, push[:, None] * tl.exp(scale * logits - log_denominator[:, None]), 0.0)
        sums = multiply(g.to(tile.dtype), tile, sums, PRECISION)
    target = grad + rows.to(tl.int64)[:, None] * dim + features[None, :]
    inside = (rows >= 0)[:, None] & (features < dim)[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def bits_below(bits, rows, words, first_word, position):
    """The number of set bits of each row at positions from that of `first_word` on and below `position`."""
    found = tl.zeros(rows.shape, tl.int32)
    for word in range(first_word, position // 32 + 1):
        loaded = tl.load(bits + rows.to(tl.int64) * words + word, mask=rows >= 0, other=0)
        found += population_count(loaded & low_bits(position - 32 * word))
    return found


@triton.jit(do_not_specialize=["anchors", "group", "words", "first_word", "capacity"])
def sampled_columns_bwd_kernel(
    z, columns, offsets, enabled, numbers, positions, slots, staged, scale, anchors, dim, group,
    words, first_word, capacity,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_GRAD: tl.constexpr,
):  # fmt: skip
    """staged[slot of (j, p)] = sum over the images of push_i exp(l_ij - logDen_i) z_i, i at p, j sampled there.

    The slots of a column j follow one another from slots[j] on, in the order of its positions from 32 first_word on,
    which are the set bits of positions[j]. Grid (positions, splits of their lists, blocks of features). FLOPs: 4 D a
    pair. Bytes: a row of z, or two, for each image and block of columns; a row of float32 written for each (p, j).
    """
    if tl.load(enabled) == 0:
        return
    position = 32 * first_word + tl.program_id(0)
    features = tl.program_id(2) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    end = tl.load(offsets + position + 1)
    step = tl.num_programs(1) * BLOCK_COLUMNS
    for start in range(tl.load(offsets + position) + tl.program_id(1) * BLOCK_COLUMNS, end, step):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        column = tl.load(columns + at, mask=at < end, other=-1)
        own = load_rows(z, column, dim, features, 1, anchors, dim)
        sums = tl.zeros((BLOCK_COLUMNS, BLOCK_GRAD), tl.float32)
        for block in range(0, tl.cdiv(anchors // group, BLOCK_ROWS)):
            rows, first_of_image = rows_at(position, block, anchors // group, group, BLOCK_ROWS)
            logits, tile = products_and_tile(z, column, own, rows, features, anchors, dim, WHOLE, PRECISION, BLOCK_D)
            log_denominator, push, _, _ = load_numbers(numbers, anchors, rows)
            across = tl.trans(are_across(first_of_image, column, group)) & (rows >= 0)[None, :]
            g = tl.where(across, push[None, :] * tl.exp(scale * logits - log_denominator[None, :]), 0.0)
            sums = multiply(g.to(tile.dtype), tile, sums, PRECISION)
        slot = tl.load(slots + column, mask=column >= 0, other=capacity)
        slot += bits_below(positions, column, words, first_word, position)
        inside = (slot < capacity)[:, None] & (features < dim)[None, :]
        tl.store(staged + slot.to(tl.int64)[:, None] * dim + features[None, :], sums, mask=inside)


@triton.jit(do_not_specialize=["anchors", "capacity"])
def sampled_gather_bwd_kernel(
    staged, slots, enabled, grad, anchors, dim, capacity, BLOCK_COLUMNS: tl.constexpr, BLOCK_GRAD: tl.constexpr
):
    """grad_j += sum of staged[slots[j] : slots[j + 1]].

    Grid (blocks of columns, blocks of features). Bytes: reads what was staged, reads and writes grad, all float32.
    """
    if tl.load(enabled) == 0:
        return
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    features = tl.program_id(1) * BLOCK_GRAD + tl.arange(0, BLOCK_GRAD)
    first = tl.load(slots + column, mask=column < anchors, other=0)
    end = tl.minimum(tl.load(slots + column + 1, mask=column < anchors, other=0), capacity)
    own = grad + column.to(tl.int64)[:, None] * dim + features[None, :]
    inside = (column < anchors)[:, None] & (features < dim)[None, :]
    sums = tl.load(own, mask=inside, other=0.0)
    for step in range(0, tl.max(end - first, axis=0)):
        slot = first + step
        at = staged + slot.to(tl.int64)[:, None] * dim + features[None, :]
        sums += tl.load(at, mask=inside & (slot < end)[:, None], other=0.0)
    tl.store(own, sums, mask=inside)
