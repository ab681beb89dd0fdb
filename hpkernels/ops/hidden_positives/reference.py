"""Plain PyTorch specification of `hidden_positives`, and the same in blocks of rows.

P_ij = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not symmetric
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.backends import Availability
from hpkernels.ops._blocks import row_blocks
from hpkernels.ops.hidden_positives.bits import pack_bits, words_of, words_per_row


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def positives(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation as a (N, N) bool matrix: dense, the specification."""
    features = features.to(threshold.dtype)
    # Only the products above the diagonal are used: a library may round <f_i, f_j> and <f_j, f_i> differently.
    products = (features @ features.T).triu(diagonal=1)
    limit = torch.minimum(threshold[:, None], threshold) if symmetric else threshold[:, None]
    above = (products + products.T) > limit
    return above.fill_diagonal_(False)


def forward(features: Tensor, threshold: Tensor, symmetric: bool = True) -> Tensor:
    """The relation bit-packed, (N, ceil(N / 32)) int32, without any N x N tensor."""
    features, anchors = features.to(threshold.dtype), len(features)
    bits = threshold.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
    # Each row is compared with itself and those below, so that every pair is decided once, and written twice.
    for rows in row_blocks(features, (2 * threshold.element_size() + 4) * anchors, multiple=32):
        below = slice(rows.start, anchors)
        products = features[rows] @ features[below].T
        if symmetric:
            above = mirrored = (products > torch.minimum(threshold[rows, None], threshold[below])).triu(diagonal=1)
        else:
            above = (products > threshold[rows, None]).triu(diagonal=1)
            mirrored = (products > threshold[below]).triu(diagonal=1)
        count = rows.stop - rows.start
        above[:, :count] |= mirrored[:, :count].T.clone()
        bits[rows, rows.start // 32 :] = pack_bits(above)
        bits[rows.stop :, words_of(rows)] = pack_bits(mirrored[:, count:].T)
    return bits
