"""Discovery of global hidden positives: pairs of anchors more similar than their references."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives import registration
from hpkernels.positive_mask import PositiveMask

__all__ = ["PositiveMask", "hidden_positives"]


def hidden_positives(
    features: Tensor,
    threshold: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_threshold: Tensor | None = None,
    symmetric: bool = True,
    backend: Backend = "auto",
) -> PositiveMask:
    """Find the pairs of anchors that are more similar to each other than one of them is to the reference pool.

    ``P_ij = i != j and <features_i, features_j> > min(threshold_i, threshold_j)`` (HP, CVPR 2023). The
    relation is symmetric. With ``symmetric=False`` only the anchor's own threshold counts:
    ``P_ij = i != j and <features_i, features_j> > threshold_i``.

    With `keys` the pairs are those of anchors and keys, and each threshold that is given must be exceeded:
    ``P_ij = <features_i, keys_j> > threshold_i and <features_i, keys_j> > key_threshold_j``.

    Args:
        features: (N, D) floating-point anchors, L2-normalised for cosine similarity, any strides.
        threshold: (N,) float32 (float64 with float64 features): usually
            ``hpkernels.masked_topk(features, pool).values[:, 0]``. With `keys` it may be None: none for the anchors.
        keys: (K, D) of the dtype of `features`, any strides: a set of their own, of which no pair is left out. None:
            the anchors are compared with each other.
        key_threshold: (K,) of the dtype of `threshold`, for `keys` only; None: none for the keys.
        symmetric: whether a positive of one anchor of a pair is one of the other as well, as published. Between anchors
            and keys it changes nothing: a key has no positives that could be assigned to it.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A bit-packed `PositiveMask` of N x N pairs, whose `symmetric` is the argument's; with `keys` of N x K pairs.

    Raises:
        TypeError, ValueError: an argument is not as described or asks for a gradient: a comparison has none; neither
            threshold is given. On the CPU, outside ``torch.compile``, NaN thresholds and features that are not finite,
            or whose inner products are not, are a ValueError; elsewhere nothing is greater than NaN, and a pair with
            NaN in what it is decided by is no positive.

    Notes:
        Products are accumulated, and compared with the thresholds, in float32 (float64). P_ij and P_ji are decided by
        the same product. Deterministic. Memory: the mask takes N²/8 bytes, N K/8 with `keys`; the reference works on
        tiles of pairs in up to 256 MiB besides.

    Examples:
        >>> import torch, hpkernels
        >>> features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> hpkernels.hidden_positives(features, torch.full((3,), 0.5)).count().tolist()
        [1, 1, 0]
        >>> hpkernels.hidden_positives(features, torch.full((3,), 0.5), keys=features[:2]).count().tolist()
        [2, 2, 0]
    """
    op = "hidden_positives"
    check.tensor(op, "features", features, ("N", "D"))
    (accumulate,) = check.accumulation(features.dtype)
    keys = check.with_autocast(keys, features)
    if keys is not None:
        check.tensor(op, "keys", keys, ("K", features.shape[1]))
        check.same(op, "keys", keys, "features", features)
        if threshold is None and key_threshold is None:
            raise ValueError(f"{op}: `threshold` must be a tensor where `key_threshold` is None, got None")
    elif key_threshold is not None:
        raise ValueError(f"{op}: `key_threshold` must be None where `keys` is, got {type(key_threshold).__name__}")
    if threshold is not None or keys is None:
        check.tensor(op, "threshold", threshold, (features.shape[0],), (accumulate,))
    if key_threshold is not None and keys is not None:
        check.tensor(op, "key_threshold", key_threshold, (keys.shape[0],), (accumulate,))
    check.flag(op, "symmetric", symmetric)
    rows = {"features": features, "keys": keys}
    thresholds = {"threshold": threshold, "key_threshold": key_threshold}
    for name, value in (rows | thresholds).items():
        if value is not None:
            check.same(op, name, value, "features", features, dtype=False)
            check.constant(op, name, value)
            check.finite(op, name, value, infinity=name in thresholds, products=name in rows)
    backend = backends.select(op, backend, features)
    if keys is None:
        bits = registration.hidden_positives(features, threshold, symmetric, backend)
        return PositiveMask(bits, features.shape[0], symmetric=symmetric)
    # Every product that can be compared exceeds a threshold that is not given.
    limits = (
        features.new_full(given.shape[:1], -torch.inf, dtype=accumulate) if limit is None else limit
        for given, limit in ((features, threshold), (keys, key_threshold))
    )
    between = registration.hidden_positives_between(features, keys, *limits, False, None, backend)
    return PositiveMask(between, features.shape[0], keys=keys.shape[0])


def rows_of(
    features: Tensor,
    threshold: Tensor,
    all_features: Tensor,
    all_thresholds: Tensor,
    first: int,
    *,
    symmetric: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Find the rows of `hidden_positives` that one of many devices needs, the same bits, without the other rows.

    Args:
        features: (R, D) the anchors of the rows, which are `all_features` from `first` on.
        threshold: (R,) theirs, as `hidden_positives` takes them.
        all_features: (N, D) the anchors of the relation.
        all_thresholds: (N,) theirs.
        first: the first row, from 0 to N - R.
        symmetric: as `hidden_positives` takes it.
        backend: the same.

    Returns:
        The packed rows, (R, ceil(N / 32)) int32.

    Raises:
        BackendUnavailableError: the backend cannot run. The rest is for the caller to check.
    """
    chosen = backends.select("hidden_positives", backend, features)
    if not symmetric:
        all_thresholds = torch.full_like(all_thresholds, -torch.inf)  # which every product exceeds that can be compared
    bits: Tensor = registration.hidden_positives_between(
        features, all_features, threshold, all_thresholds, symmetric, first, chosen
    )
    return bits
