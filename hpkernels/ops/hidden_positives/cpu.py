"""CPU kernels of `hidden_positives`: products of a block of anchors with those after it, thresholded and packed twice.

The relation is symmetric, so half of the products decide all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops.hidden_positives.bits import words_per_row

__all__ = ["forward", "supports"]

_TILE = 2**21  # products held at a time
_WORD = 32


def forward(features: Tensor, threshold: Tensor) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    features, threshold = features.to(threshold.dtype).contiguous(), threshold.contiguous()
    anchors = len(features)
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    rows = max(_WORD, _TILE // anchors // _WORD * _WORD)
    products = features.new_empty(min(rows, anchors) * anchors)
    for start in range(0, anchors, rows):
        block, rest = features[start : start + rows], features[start:]
        tile = torch.mm(block, rest.T, out=products[: len(block) * len(rest)].view(len(block), len(rest)))
        torch.ops.hpkernels_cpu.hidden_positives_pack(tile, threshold, start, bits)
    return bits
