"""From patch tokens to class maps: the four segmentations that a trained run can give of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.kmeans import closeness
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

    Every patch gets a score for each cluster or class; a pixel takes the greatest of the scores interpolated to it. For
    both probes that is the published evaluation, which interpolates codes to pixels first: their scores are linear in
    the code, up to its length, which does not change the order.

    Args:
        tokens: (B, G, Df) frozen features.
        grid: (H, W) of the patches.
        size: (h, w) of the result.

    Returns:
        cluster maps (B, h, w) int64; for "linear" class maps.
    """
    codes = state.head.eval()(tokens)
    code_map = to_map(codes, grid)
    scores = {
        "baseline": to_map(closeness(tokens, state.clusterings.features), grid),
        "kmeans": to_map(closeness(codes, state.clusterings.codes), grid),
        "cluster_probe": state.cluster_probe.similarity(code_map) * code_map.norm(dim=1, keepdim=True),
        "linear": state.linear_probe(code_map),
    }
    return {name: upsample(score, size).argmax(dim=1) for name, score in scores.items()}


def to_classes(state: TrainingState, segmentations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the clusters of `segment` by the classes they were matched to."""
    classes = dict(segmentations)
    for name, assignment in zip(CLUSTERED, state.clusterings.assignments, strict=True):
        classes[name] = assignment[segmentations[name]]
    return classes


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of maps (B, C, H, W) to `size`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
