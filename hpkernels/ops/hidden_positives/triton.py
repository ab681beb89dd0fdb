"""Triton kernels of `hidden_positives`: tiles of products on and above the diagonal, packed in both directions.

Between anchors and keys all tiles, packed once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._bits import words_per_row
from hpkernels.ops._triton import aligned_rows, supports
from hpkernels.ops._triton_functions import comparable_products, multiply

__all__ = ["between", "forward", "supports"]


@triton.jit
def tile_of_rectangle(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a program's tile. The programs that run at a time are those of about GROUP rows."""
    band, inside = program // (GROUP * columns), program % (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    return band * GROUP + inside % height, inside // height


@triton.jit
def tile_of_triangle(program, tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile; below the diagonal or beyond the last column there is none.

    The programs that run at a time are those of about one square of GROUP x GROUP tiles, whose features lie in L2.
    """
    # Rows a and squares - 1 - a of the triangle have squares + 1 squares together, so it folds into a rectangle.
    squares = tl.cdiv(tiles, GROUP)
    square, inside = program // (GROUP * GROUP), program % (GROUP * GROUP)
    fold, at = square // (squares + 1), square % (squares + 1)
    unfolded = at < squares - fold
    row = tl.where(unfolded, fold, squares - 1 - fold)
    column = tl.where(unfolded, fold + at, at - 1)
    return row * GROUP + inside % GROUP, column * GROUP + inside // GROUP


@triton.jit
def _sums(bits):
    """Bytes of 8 columns each of a tile of 0 and 1, float16, by tensor cores: sums of powers of 2 are exact.

    Of numbers up to 257, 256 counts in a second byte above the first. There are at least 16 bytes, and those beyond the
    tile are 0: wgmma takes 8, but Triton may lay out so narrow a factor otherwise than it is read (its issue 10629).
    """
    COUNT: tl.constexpr = bits.shape[1] // 8 if bits.shape[1] >= 128 else 16
    places, word_bytes = tl.arange(0, bits.shape[1])[:, None], tl.arange(0, COUNT)[None, :]
    powers = tl.where(places // 8 == word_bytes, 1 << (places % 8), 0).to(tl.float16)
    return multiply(bits, powers, tl.zeros((bits.shape[0], COUNT), tl.float32), "ieee").to(tl.int32)


@triton.jit
def _words(packed):
    """Words of four bytes each."""
    packed = tl.reshape(packed, (packed.shape[0], packed.shape[1] // 4, 4))
    return tl.sum(packed << (8 * tl.arange(0, 4))[None, None, :], axis=2)


@triton.jit
def _store_words(bits, rows, tile, values, anchors, words, BLOCK_N: tl.constexpr):
    """Put the words of a tile of BLOCK_N columns to bits (anchors, words); `values` may have more."""
    word = tl.arange(0, values.shape[1])
    column = tile * (BLOCK_N // 32) + word
    at = bits + rows.to(tl.int64)[:, None] * words + column[None, :]
    tl.store(at, values, mask=(rows < anchors)[:, None] & ((word < BLOCK_N // 32) & (column < words))[None, :])


@triton.jit(do_not_specialize=["anchors", "words", "tiles"])
def hidden_positives_fwd_kernel(
    features, stride, step, threshold, bits, anchors, dim, words, tiles,
    PRECISION: tl.constexpr, SYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """bits[i, j // 32] bit j % 32 = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not SYMMETRIC

    A program has one tile of pairs i < j, and writes it and its mirror image: N² / 8 bytes in all. Each program reads
    two tiles of features, 2 BLOCK_N D elements.
    """
    row, column = tile_of_triangle(tl.program_id(0), tiles, GROUP)
    if (row > column) | (column >= tiles):
        return
    rows, columns = row * BLOCK_N + tl.arange(0, BLOCK_N), column * BLOCK_N + tl.arange(0, BLOCK_N)
    products = comparable_products(
        features, rows, stride, step, anchors, features, columns, stride, step, anchors, dim, PRECISION, BLOCK_D
    )
    if row == column:
        products = tl.where(rows[:, None] < columns[None, :], products, float("-inf"))
    # No product is greater than NaN, the threshold of the padding.
    of_rows = tl.load(threshold + rows, mask=rows < anchors, other=float("nan"))[:, None]
    of_columns = tl.load(threshold + columns, mask=columns < anchors, other=float("nan"))[None, :]
    if SYMMETRIC:
        above = products > tl.minimum(of_rows, of_columns, propagate_nan=tl.PropagateNan.ALL)
        above = tl.where(above, 1.0, 0.0).to(tl.float16)
        right, left = _words(_sums(above)), _words(_sums(tl.trans(above)))
    else:  # both bits of a pair in one number, whose sums stay apart: a tile for each would take more registers
        products = tl.where((columns < anchors)[None, :], products, float("-inf"))
        of_row, of_column = tl.where(products > of_rows, 1.0, 0.0), tl.where(products > of_columns, 256.0, 0.0)
        both = (of_row + of_column).to(tl.float16)
        right, left = _words(_sums(both) & 255), _words(_sums(tl.trans(both)) >> 8)
    if row == column:  # each holds the half that the other lacks
        right = right | left
        left = right
    _store_words(bits, rows, column, right, anchors, words, BLOCK_N)
    _store_words(bits, columns, row, left, anchors, words, BLOCK_N)


@triton.jit(do_not_specialize=["anchors", "count", "words", "first"])
def hidden_positives_between_fwd_kernel(
    features, stride, step, threshold, keys, key_stride, key_step, key_threshold,
    bits, anchors, count, dim, words, first,
    PRECISION: tl.constexpr, EITHER: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """bits[i, j // 32] bit j % 32 = first + i != j and <f_i, k_j> > max(r_i, s_j), or > min(r_i, s_j) if EITHER

    A program has one tile of anchors and keys: N K / 8 bytes in all are written, and each program reads a tile of each,
    2 BLOCK_N D elements.
    """
    row, column = tile_of_rectangle(tl.program_id(0), tl.cdiv(anchors, BLOCK_N), tl.cdiv(count, BLOCK_N), GROUP)
    rows, columns = row * BLOCK_N + tl.arange(0, BLOCK_N), column * BLOCK_N + tl.arange(0, BLOCK_N)
    products = comparable_products(
        features, rows, stride, step, anchors, keys, columns, key_stride, key_step, count, dim, PRECISION, BLOCK_D
    )
    apart = first + (row - column) * BLOCK_N  # of the tile and the pairs of anchors with themselves
    if (apart > -BLOCK_N) & (apart < BLOCK_N):
        products = tl.where(first + rows[:, None] != columns[None, :], products, float("-inf"))
    # No product is greater than NaN, the threshold of the padding.
    of_rows = tl.load(threshold + rows, mask=rows < anchors, other=float("nan"))[:, None]
    of_columns = tl.load(key_threshold + columns, mask=columns < count, other=float("nan"))[None, :]
    if EITHER:
        limit = tl.minimum(of_rows, of_columns, propagate_nan=tl.PropagateNan.ALL)
    else:
        limit = tl.maximum(of_rows, of_columns, propagate_nan=tl.PropagateNan.ALL)
    found = _words(_sums(tl.where(products > limit, 1.0, 0.0).to(tl.float16)))
    _store_words(bits, rows, column, found, anchors, words, BLOCK_N)


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    features = aligned_rows(features)
    anchors, dim = features.shape
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    config = _triton.configuration(hidden_positives_fwd_kernel, features)
    tiles = triton.cdiv(anchors, config["BLOCK_N"])
    inputs = (features, *features.stride(), threshold.contiguous(), bits, anchors, dim, bits.shape[1], tiles)
    constants = {"PRECISION": _triton.comparable_precision(features), "SYMMETRIC": symmetric} | config
    _triton.launch(hidden_positives_fwd_kernel, (programs(tiles, config["GROUP"]),), *inputs, **constants)
    return bits


def between(
    features: Tensor, keys: Tensor, threshold: Tensor, key_threshold: Tensor, either: bool, first: int | None
) -> Tensor:
    """The relation of anchors and keys bit-packed, (N, ceil(K / 32)) int32."""
    features, keys = aligned_rows(features), aligned_rows(keys)
    (anchors, dim), count = features.shape, keys.shape[0]
    bits = features.new_empty((anchors, words_per_row(count)), dtype=torch.int32)
    config = _triton.configuration(hidden_positives_between_fwd_kernel, features)
    programs = triton.cdiv(anchors, config["BLOCK_N"]) * triton.cdiv(count, config["BLOCK_N"])
    own = -anchors if first is None else first  # then no anchor is a key
    inputs = (features, *features.stride(), threshold.contiguous(), keys, *keys.stride(), key_threshold.contiguous())
    constants = {"PRECISION": _triton.comparable_precision(features), "EITHER": either} | config
    _triton.launch(
        hidden_positives_between_fwd_kernel,
        (programs,),
        *inputs,
        bits,
        anchors,
        count,
        dim,
        bits.shape[1],
        own,
        **constants,
    )
    return bits


def programs(tiles: int, group: int) -> int:
    """How many programs `tile_of_triangle` gives tiles, or none, to."""
    squares = triton.cdiv(tiles, group)
    return squares * (squares + 1) // 2 * group**2
