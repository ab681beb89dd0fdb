"""CPU kernels of `hidden_positives`: coarse products of blocks of anchors, thresholded and packed.

Among anchors products are symmetric, so the blocks on and above the diagonal decide all of the relation, and are
packed twice; between anchors and keys all blocks are packed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops._bits import words_per_row
from hpkernels.ops._blocks import blocks
from hpkernels.ops._coarse import CoarseProducts

__all__ = ["between", "forward", "supports"]

_ROWS, _COLUMNS = 256, 2048  # of a block, multiples of the 32 anchors of a word


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    features, threshold = features.detach().to(threshold.dtype).contiguous(), threshold.contiguous()
    anchors = len(features)
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    coarse = CoarseProducts(features, features, _ROWS * _COLUMNS)
    for rows in blocks(slice(0, anchors), _ROWS):
        for columns in blocks(slice(rows.start, anchors), _COLUMNS):
            tile = coarse.tile(rows, columns)
            undecided = torch.ops.hpkernels_cpu.hidden_positives_pack(
                tile, rows.start, columns.start, features, coarse.left.stats, threshold, symmetric, bits
            )
            coarse.took(undecided, tile)
    return bits


def between(
    features: Tensor, keys: Tensor, threshold: Tensor, key_threshold: Tensor, either: bool, first: int | None
) -> Tensor:
    """The relation of anchors and keys bit-packed, (N, ceil(K / 32)) int32."""
    features, keys = (rows.detach().to(threshold.dtype).contiguous() for rows in (features, keys))
    thresholds = threshold.contiguous(), key_threshold.contiguous()
    bits = features.new_empty((len(features), words_per_row(len(keys))), dtype=torch.int32)
    own = -len(features) if first is None else first  # then no anchor is a key
    coarse = CoarseProducts(features, keys, _ROWS * _COLUMNS)
    for rows in blocks(slice(0, len(features)), _ROWS):
        for columns in blocks(slice(0, len(keys)), _COLUMNS):
            tile = coarse.tile(rows, columns)
            stats = coarse.left.stats, coarse.right.stats
            undecided = torch.ops.hpkernels_cpu.hidden_positives_pack_between(
                tile, rows.start, columns.start, features, stats[0], keys, stats[1], *thresholds, either, own, bits
            )
            coarse.took(undecided, tile)
    return bits
