"""From patch tokens to class maps: the four segmentations that a trained run can give of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.kmeans import assign
from training.model import to_map
from training.state import TrainingState

CLUSTERED = ("baseline", "kmeans", "cluster_probe")
"""Segmentations into clusters, in the order of ``Clusterings.assignments``: k-means on the frozen features, k-means on
the codes, the cluster probe on the codes."""

SEGMENTATIONS = (*CLUSTERED, "linear")
"""All segmentations; the linear probe gives classes."""


@torch.no_grad()
def segment(state: TrainingState, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """Segment images, at `size` pixels, each way of `SEGMENTATIONS`.

    Args:
        tokens: (B, G, Df) frozen features.
        grid: (H, W) of the patches.
        size: (h, w) of the result; features and codes are interpolated to it, as the published evaluation does.

    Returns:
        cluster maps (B, h, w) int64; for "linear" class maps.
    """
    features = to_map(tokens, grid)
    codes = to_map(state.head.eval()(tokens), grid)
    linear = upsample(state.linear_probe(codes), size).argmax(dim=1)  # interpolating logits or codes is the same
    codes = upsample(codes, size)
    return {
        "baseline": _nearest(upsample(features, size), state.clusterings.features),
        "kmeans": _nearest(codes, state.clusterings.codes),
        "cluster_probe": state.cluster_probe.similarity(codes).argmax(dim=1),
        "linear": linear,
    }


def to_classes(state: TrainingState, segmentations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the clusters of `segment` by the classes they were matched to."""
    classes = dict(segmentations)
    for name, assignment in zip(CLUSTERED, state.clusterings.assignments, strict=True):
        classes[name] = assignment[segmentations[name]]
    return classes


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of maps (B, C, H, W) to `size`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _nearest(maps: Tensor, centres: Tensor) -> Tensor:
    return assign(maps.movedim(1, -1).flatten(0, 2), centres).unflatten(0, (len(maps), *maps.shape[2:]))
