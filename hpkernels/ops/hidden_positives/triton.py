"""Triton kernel of `hidden_positives`: tiles of products on and above the diagonal, packed in both directions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._triton import aligned_rows, comparable_products, supports
from hpkernels.ops.hidden_positives.bits import words_per_row

__all__ = ["forward", "supports"]


def forward(features: Tensor, threshold: Tensor) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    features = aligned_rows(features)
    anchors, dim = features.shape
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    config = _triton.configuration(hidden_positives_fwd_kernel, features)
    tiles = triton.cdiv(anchors, config["BLOCK_N"])
    inputs = (features, *features.stride(), threshold.contiguous(), bits, anchors, dim, bits.shape[1], tiles)
    constants = {"PRECISION": _triton.comparable_precision(features)} | config
    _triton.launch(hidden_positives_fwd_kernel, (tiles * (tiles + 1) // 2,), *inputs, **constants)
    return bits


@triton.jit(do_not_specialize=["words", "tiles"])
def hidden_positives_fwd_kernel(
    features, stride, step, threshold, bits, anchors, dim, words, tiles,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """bits[i, j // 32] bit j % 32 = i != j and <f_i, f_j> > min(r_i, r_j)

    A program has one tile of pairs i < j, and writes it and its transpose: N² / 8 bytes in all. Each program reads two
    tiles of features, 2 BLOCK_N D elements.
    """
    # Rows a and tiles - 1 - a of the triangle have tiles + 1 tiles together, so it folds into a rectangle.
    fold, at = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    unfolded = at < tiles - fold
    row = tl.where(unfolded, fold, tiles - 1 - fold)
    column = tl.where(unfolded, fold + at, at - 1)
    rows, columns = row * BLOCK_N + tl.arange(0, BLOCK_N), column * BLOCK_N + tl.arange(0, BLOCK_N)
    products = comparable_products(
        features, rows, stride, step, anchors, features, columns, stride, step, anchors, dim, PRECISION, BLOCK_D
    )
    # No product is greater than NaN, the threshold of the padding.
    of_rows = tl.load(threshold + rows, mask=rows < anchors, other=float("nan"))[:, None]
    of_columns = tl.load(threshold + columns, mask=columns < anchors, other=float("nan"))[None, :]
    above = products > tl.minimum(of_rows, of_columns, propagate_nan=tl.PropagateNan.ALL)
    above = (above & (rows[:, None] < columns[None, :])).to(tl.int32)

    places = tl.arange(0, 32)
    right = tl.sum(tl.reshape(above, (BLOCK_N, BLOCK_N // 32, 32)) << places[None, None, :], axis=2)
    left = tl.trans(tl.sum(tl.reshape(above, (BLOCK_N // 32, 32, BLOCK_N)) << places[None, :, None], axis=1))
    if row == column:  # each holds the half that the other lacks
        right = right | left
        left = right
    _store_words(bits, rows, column * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32), right, anchors, words)
    _store_words(bits, columns, row * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32), left, anchors, words)


@triton.jit
def _store_words(bits, rows, columns, values, anchors, words):
    at = bits + rows.to(tl.int64)[:, None] * words + columns[None, :]
    tl.store(at, values, mask=(rows < anchors)[:, None] & (columns < words)[None, :])
