"""CUDA kernel of `hidden_positives`: tiles of products on and right of the diagonal, packed in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops._kernels import ALIGNMENT
from hpkernels.ops.hidden_positives.bits import words_per_row

__all__ = ["forward", "supports"]

_THRESHOLDS_TOGETHER = 256  # kThresholdsTogether of csrc/hidden_positives/hidden_positives.h


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    anchors = features.shape[0]
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    missing = -anchors % _THRESHOLDS_TOGETHER
    if missing or threshold.data_ptr() % ALIGNMENT:
        threshold = torch.nn.functional.pad(threshold, (0, missing), value=torch.nan)
    threshold = threshold.detach().contiguous()
    torch.ops.hpkernels_cuda.hidden_positives(aligned_rows(features), threshold, symmetric, bits)
    return bits
