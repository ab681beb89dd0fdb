"""CUDA kernel of `hidden_positives`: tiles of products on and right of the diagonal, packed in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops.hidden_positives.bits import words_per_row

__all__ = ["forward", "supports"]


def forward(features: Tensor, threshold: Tensor) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    anchors = features.shape[0]
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    torch.ops.hpkernels_cuda.hidden_positives(aligned_rows(features), threshold.detach().contiguous(), bits)
    return bits
