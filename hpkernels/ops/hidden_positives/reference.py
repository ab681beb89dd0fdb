"""Plain PyTorch specification of `hidden_positives`, and the same in tiles of pairs.

P_ij = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not symmetric
P_ij = <f_i, k_j> > max(r_i, s_j), between anchors and keys
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpkernels._native import Availability
from hpkernels.ops._bits import pack_bits, words_of, words_per_row
from hpkernels.ops._blocks import blocks, workspace_of

_LARGEST_TILE = 1024  # anchors on a side; larger products take no less time


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def positives(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation as a (N, N) bool matrix: dense, the specification."""
    products = _mirrored(features.to(threshold.dtype) @ features.to(threshold.dtype).T)
    above = products > (_limit(threshold, threshold, True) if symmetric else threshold[:, None])
    return above.fill_diagonal_(False)


def positives_between(features: Tensor, keys: Tensor, threshold: Tensor, key_threshold: Tensor) -> Tensor:
    """The relation of anchors and keys as a (N, K) bool matrix: dense, the specification."""
    products = features.to(threshold.dtype) @ keys.to(threshold.dtype).T
    return products > _limit(threshold, key_threshold, False)


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32, without any N x N tensor."""
    features, anchors = features.to(threshold.dtype), len(features)
    bits = threshold.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    # Tiles on and above the diagonal, so that every pair is decided once, and written twice.
    size = _tile(threshold)
    for rows in blocks(slice(0, anchors), size):
        for columns in blocks(slice(rows.start, anchors), size):
            products = features[rows] @ features[columns].T
            of_rows, of_columns = threshold[rows], threshold[columns]
            above = products > (_limit(of_rows, of_columns, True) if symmetric else of_rows[:, None])
            mirrored = (above if symmetric else products > of_columns).T
            if rows == columns:
                above = above.triu(diagonal=1) | mirrored.tril(diagonal=-1)
            else:
                bits[columns, words_of(rows)] = pack_bits(mirrored)
            bits[rows, words_of(columns)] = pack_bits(above)
    return bits


def between(
    features: Tensor, keys: Tensor, threshold: Tensor, key_threshold: Tensor, either: bool, first: int | None
) -> Tensor:
    """The relation of anchors and keys bit-packed, (N, ceil(K / 32)) int32, without any N x K tensor."""
    features, keys = features.to(threshold.dtype), keys.to(threshold.dtype)
    if first is not None:
        return _rows_of_square(keys, threshold, key_threshold, either, slice(first, first + len(features)))
    bits = threshold.new_empty((len(features), words_per_row(len(keys))), dtype=torch.int32)
    size = _tile(threshold)
    for rows in blocks(slice(0, len(features)), size):
        for columns in blocks(slice(0, len(keys)), size):
            products = features[rows] @ keys[columns].T
            above = products > _limit(threshold[rows], key_threshold[columns], either)
            bits[rows, words_of(columns)] = pack_bits(above)
    return bits


def _rows_of_square(keys: Tensor, threshold: Tensor, key_threshold: Tensor, either: bool, own: slice) -> Tensor:
    """The rows `own` of the relation of `keys` with themselves.

    How a library rounds a product may depend on the tile that it is in, so these are the tiles of `forward`.
    """
    anchors, size = len(keys), _tile(threshold)
    bits = threshold.new_empty((own.stop - own.start, words_per_row(anchors)), dtype=torch.int32)
    for rows in blocks(slice(own.start // size * size, anchors), size):
        taken = slice(max(rows.start, own.start), min(rows.stop, own.stop))
        if taken.start >= taken.stop:
            break
        inside, here = (slice(taken.start - at, taken.stop - at) for at in (rows.start, own.start))
        for columns in blocks(slice(0, anchors), size):
            products = _tile_products(keys, rows, columns)[inside]
            above = products > _limit(threshold[here], key_threshold[columns], either)
            if rows == columns:
                above.diagonal(inside.start).fill_(False)
            bits[here, words_of(columns)] = pack_bits(above)
    return bits


def _tile(threshold: Tensor) -> int:
    """Anchors on a side of a tile of products, whose temporaries fit the workspace; a multiple of those of a word."""
    pairs = workspace_of(threshold) // (2 * threshold.element_size() + 4)
    return min(_LARGEST_TILE, max(1, math.isqrt(pairs) // 32) * 32)


def _tile_products(features: Tensor, rows: slice, columns: slice) -> Tensor:
    """Products of two blocks of anchors. Those of the block above the diagonal are those of the block below."""
    if rows.start > columns.start:
        return (features[columns] @ features[rows].T).T
    products = features[rows] @ features[columns].T
    return _mirrored(products) if rows == columns else products


def _mirrored(products: Tensor) -> Tensor:
    """What is above the diagonal of a tile, on both sides: a library may round <f_i, f_j> and <f_j, f_i> differently.

    The tile itself is changed.
    """
    above = products.triu_(diagonal=1)
    return above + above.T


def _limit(threshold: Tensor, key_threshold: Tensor, either: bool) -> Tensor:
    """What a product must exceed, (N, K): one of the two thresholds or both. NaN if either is."""
    return (torch.minimum if either else torch.maximum)(threshold[:, None], key_threshold)
