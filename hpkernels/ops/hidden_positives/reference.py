"""Plain PyTorch specification of `hidden_positives`.

P_ij = i != j and <f_i, f_j> > min(r_i, r_j)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.backends import Availability
from hpkernels.ops.hidden_positives.bits import pack_bits


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def positives(features: Tensor, threshold: Tensor) -> Tensor:
    """The relation as a (N, N) bool matrix."""
    features = features.to(threshold.dtype)
    # Only the products above the diagonal are used: a library may round <f_i, f_j> and <f_j, f_i> differently, and the
    # relation is symmetric by definition.
    above = (features @ features.T > torch.minimum(threshold[:, None], threshold)).triu(diagonal=1)
    return above | above.T


def forward(features: Tensor, threshold: Tensor) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32."""
    return pack_bits(positives(features, threshold))
