"""CUDA kernels of `hidden_positives`: tiles of products on and right of the diagonal, packed in both directions.

Between anchors and keys all tiles, packed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._bits import words_per_row
from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops._kernels import ALIGNMENT

__all__ = ["between", "forward", "supports"]

_THRESHOLDS_TOGETHER = 256  # kThresholdsTogether of csrc/hidden_positives/hidden_positives.h


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    anchors = features.shape[0]
    bits = features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    torch.ops.hpkernels_cuda.hidden_positives(aligned_rows(features), _padded(threshold), symmetric, bits)
    return bits


def between(
    features: Tensor, keys: Tensor, threshold: Tensor, key_threshold: Tensor, either: bool, first: int | None
) -> Tensor:
    """The relation of anchors and keys bit-packed, (N, ceil(K / 32)) int32."""
    anchors = features.shape[0]
    bits = features.new_empty((anchors, words_per_row(keys.shape[0])), dtype=torch.int32)
    own = -anchors if first is None else first  # then no anchor is a key
    rows, thresholds = (aligned_rows(features), aligned_rows(keys)), (_padded(threshold), _padded(key_threshold))
    torch.ops.hpkernels_cuda.hidden_positives_between(*rows, *thresholds, either, own, bits)
    return bits


def _padded(threshold: Tensor) -> Tensor:
    """Thresholds as the kernels load them: aligned, and NaN beyond the last, which no product is greater than."""
    missing = -threshold.shape[0] % _THRESHOLDS_TOGETHER
    if missing or threshold.data_ptr() % ALIGNMENT:
        threshold = torch.nn.functional.pad(threshold, (0, missing), value=torch.nan)
    return threshold.detach().contiguous()
