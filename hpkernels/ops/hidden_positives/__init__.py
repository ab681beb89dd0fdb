"""Discovery of global hidden positives: pairs of anchors more similar than their references."""

from __future__ import annotations

from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives import registration
from hpkernels.ops.hidden_positives.positive_mask import PositiveMask

__all__ = ["PositiveMask", "hidden_positives"]


def hidden_positives(
    features: Tensor, threshold: Tensor, *, symmetric: bool = True, backend: Backend = "auto"
) -> PositiveMask:
    """Find the pairs of anchors that are more similar to each other than one of them is to the reference pool.

    ``P_ij = i != j and <features_i, features_j> > min(threshold_i, threshold_j)`` (HP, CVPR 2023, section 3.2). The
    relation is symmetric. With ``symmetric=False`` only the anchor's own threshold counts:
    ``P_ij = i != j and <features_i, features_j> > threshold_i``.

    Args:
        features: (N, D) floating-point anchors, L2-normalised for cosine similarity, any strides.
        threshold: (N,) float32 (float64 with float64 features): usually
            ``hpkernels.masked_topk(features, pool).values[:, 0]``.
        symmetric: whether a positive of one anchor of a pair is one of the other as well, as published.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A bit-packed `PositiveMask` of N x N pairs, whose `symmetric` is the argument's.

    Raises:
        TypeError, ValueError: an argument is not as described or asks for a gradient: a comparison has none. On the
            CPU, outside ``torch.compile``, NaN thresholds and features that are not finite, or whose inner products
            are not, are a ValueError; elsewhere nothing is greater than NaN, and a pair with NaN in what it is decided
            by is no positive.

    Notes:
        Products are accumulated, and compared with the thresholds, in float32 (float64). P_ij and P_ji are decided by
        the same product. Deterministic. Memory: the mask takes N²/8 bytes; the reference works on blocks of rows in up
        to 256 MiB besides.

    Example:
        >>> import torch, hpkernels
        >>> features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> hpkernels.hidden_positives(features, torch.full((3,), 0.5)).count().tolist()
        [1, 1, 0]
    """
    op = "hidden_positives"
    check.tensor(op, "features", features, ("N", "D"))
    check.tensor(op, "threshold", threshold, (features.shape[0],), check.accumulation(features.dtype))
    check.same(op, "threshold", threshold, "features", features, dtype=False)
    check.flag(op, "symmetric", symmetric)
    check.constant(op, "features", features)
    check.constant(op, "threshold", threshold)
    check.finite(op, "features", features, products=True)
    check.finite(op, "threshold", threshold, infinity=True)
    backend = backends.select(op, backend, features)
    bits = registration.hidden_positives(features, threshold, symmetric, backend)
    return PositiveMask(bits, features.shape[0], symmetric=symmetric)
