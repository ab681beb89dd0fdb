"""CPU kernels of `hidden_positives`: coarse products of blocks of anchors, thresholded and packed twice.

Products are symmetric, so the blocks on and above the diagonal decide all of the relation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops._blocks import blocks
from hpkernels.ops._coarse import CoarseProducts
from hpkernels.ops.hidden_positives.bits import words_per_row

__all__ = ["forward", "supports"]

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
