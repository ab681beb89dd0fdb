"""`hidden_positives` as a PyTorch custom op: schema, dispatch to a backend, meta implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _cuda, _triton
from hpkernels.ops._bits import words_per_row
from hpkernels.ops._kernels import full_precision
from hpkernels.ops.hidden_positives import cpu, reference

_cuda.register("hidden_positives")
_triton.register("hidden_positives")
backends.register("hidden_positives", "cpu", cpu)
backends.register("hidden_positives", "reference", reference)


@torch.library.custom_op(
    "hpkernels::hidden_positives",
    mutates_args=(),
    schema="(Tensor features, Tensor threshold, bool symmetric, str backend) -> Tensor bits",
)
@full_precision
def hidden_positives(features: Tensor, threshold: Tensor, symmetric: bool, backend: str) -> Any:
    return backends.implementation("hidden_positives", backend).forward(features, threshold, symmetric)


@hidden_positives.register_fake
def _(features: Tensor, threshold: Tensor, symmetric: bool, backend: str) -> Any:
    anchors = features.shape[0]
    return features.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)


@torch.library.custom_op(
    "hpkernels::hidden_positives_between",
    mutates_args=(),
    schema="(Tensor features, Tensor keys, Tensor threshold, Tensor key_threshold, bool either, SymInt? first,"
    " str backend) -> Tensor bits",
)
@full_precision
def hidden_positives_between(
    features: Tensor,
    keys: Tensor,
    threshold: Tensor,
    key_threshold: Tensor,
    either: bool,
    first: int | None,
    backend: str,
) -> Any:
    """The relation of anchors `features` (N, D) and `keys` (K, D): a product exceeds both thresholds, or `either`.

    With `first` the anchors are the keys from that one on, and no anchor is its own positive.
    """
    find = backends.implementation("hidden_positives", backend).between
    return find(features, keys, threshold, key_threshold, either, first)


@hidden_positives_between.register_fake
def _(
    features: Tensor,
    keys: Tensor,
    threshold: Tensor,
    key_threshold: Tensor,
    either: bool,
    first: int | None,
    backend: str,
) -> Any:
    return features.new_empty((features.shape[0], words_per_row(keys.shape[0])), dtype=torch.int32)
