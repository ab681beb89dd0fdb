"""From patch tokens to class maps: the four segmentations that a trained run can give of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

_BAND_NUMBERS = 2**22  # scores at pixels that are in memory at a time


@torch.no_grad()
def segment(
    state: TrainingState,
    tokens: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    only: Sequence[str] = SEGMENTATIONS,
    mirrored: Tensor | None = None,
) -> dict[str, Tensor]:
    """Segment images, at `size` pixels, each way of `only`.

    Every patch gets a score for each cluster or class; a pixel takes the greatest of the scores interpolated to it. For
    both probes that is the published evaluation, which interpolates codes to pixels first: their scores are linear in
    the code, up to its length, which does not change the order.

    Args:
        tokens: (B, G, Df) frozen features.
        grid: (H, W) of the patches.
        size: (h, w) of the result.
        only: names of segmentations.
        mirrored: (B, G, Df) features of the mirrored images, to average features and codes with.

    Returns:
        cluster maps (B, h, w) int64; for "linear" class maps.
    """
    features, codes = feature_maps(state, tokens, grid, mirrored)
    length = codes.norm(dim=1, keepdim=True)
    return {
        name: greatest(
            _scores(state, name, features if name == "baseline" else codes)
            * (length if name == "cluster_probe" else 1),
            size,
        )
        for name in only
    }


@torch.no_grad()
def log_probabilities(
    state: TrainingState,
    tokens: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    name: str,
    mirrored: Tensor | None = None,
) -> Tensor:
    """Log-probabilities (B, C, h, w) of the segmentation `name`, as the CRF takes them; other arguments as `segment`.

    Features and codes are interpolated to pixels first. As published: ``log_softmax`` of the logits of the linear
    probe, and of twice the cosine with each cluster, which are twice the closeness for k-means.
    """
    features, codes = feature_maps(state, tokens, grid, mirrored)
    parts = []
    for of in (features if name == "baseline" else codes).split(1):
        bands = []
        for _, pixels in _interpolated(of, size):  # features at all pixels are large
            scores = _scores(state, name, pixels)
            bands.append((scores if name == "linear" else 2 * scores).log_softmax(dim=1))
        parts.append(torch.cat(bands, dim=2))
    return torch.cat(parts)


def feature_maps(
    state: TrainingState, tokens: Tensor, grid: tuple[int, int], mirrored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maps of features (B, Df, H, W) and of codes (B, D, H, W), averaged with those of the mirrored images."""
    head = state.head.eval()
    maps = to_map(tokens, grid), to_map(head(tokens), grid)
    if mirrored is None:
        return maps
    turned = to_map(mirrored, grid).flip(3), to_map(head(mirrored), grid).flip(3)
    return (maps[0] + turned[0]) / 2, (maps[1] + turned[1]) / 2


def _scores(state: TrainingState, name: str, maps: Tensor) -> Tensor:
    """The score (B, C, H, W) of each cluster or class, of maps of features for the baseline, of codes for the rest."""
    if name == "linear":
        return state.linear_probe(maps)
    if name == "cluster_probe":
        return state.cluster_probe.similarity(maps)
    centres = state.clusterings.features if name == "baseline" else state.clusterings.codes
    return closeness(maps.movedim(1, -1), centres).movedim(-1, 1)


def greatest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of the C scores (B, C, H, W), interpolated to `size` = (h, w), is the greatest at each pixel, (B, h, w).

    Goes through bands of rows, so that memory is bounded whatever the size.
    """
    result = torch.empty((len(scores), *size), dtype=torch.int64, device=scores.device)
    for band, pixels in _interpolated(scores, size):
        result[:, band] = pixels.argmax(dim=1)
    return result


def _interpolated(maps: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """`upsample` in bands: the rows of each, and the maps (B, C, rows, w) there."""
    height, width = size
    # Bilinear interpolation is one of columns after one of rows; that of columns is small as long as rows are few.
    wide = upsample(maps, (maps.shape[2], width))
    at = ((torch.arange(height, device=maps.device) + 0.5) * maps.shape[2] / height - 0.5).clamp(min=0)
    above = at.long().clamp(max=maps.shape[2] - 1)
    below = (above + 1).clamp(max=maps.shape[2] - 1)
    share = (at - above)[:, None].to(maps.dtype)
    rows = max(1, _BAND_NUMBERS // max(1, maps.shape[0] * maps.shape[1] * width))
    for band in torch.arange(height, device=maps.device).split(rows):
        yield band, wide[:, :, above[band]].lerp(wide[:, :, below[band]], share[band])


def why_unusable(state: TrainingState, name: str) -> str | None:
    """Why a state cannot give the segmentation `name`; None if it can."""
    if name in ("baseline", "kmeans") and not state.clusterings.fitted:
        return "the k-means centres are not fitted: finish the run, or use the segmentation cluster_probe"
    if name == "linear" and not state.saw_labels:
        return "the linear probe never saw a label: use another segmentation"
    return None


def check_usable(state: TrainingState, name: str) -> None:
    """Refuse the segmentation `name` if it would come from what was never fitted.

    Raises:
        ValueError: it would.
    """
    reason = why_unusable(state, name)
    if reason is not None:
        raise ValueError(f"segmentation {name}: {reason}")


def to_classes(state: TrainingState, segmentations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the clusters of `segment` by the classes they were matched to; `map_names` names the values.

    Clusters left without a class, because there are more of them, take the values after the last class. Where clusters
    were never matched they keep their numbers.
    """
    classes = dict(segmentations)
    for row, name in enumerate(CLUSTERED):
        if name in segmentations and state.clusterings.matched[row]:
            assignment = state.clusterings.assignments[row]
            left = assignment < 0
            values = assignment.where(~left, state.classes - 1 + left.cumsum(0))
            classes[name] = values[segmentations[name]]
    return classes


def map_names(state: TrainingState, name: str, class_names: Sequence[str]) -> list[str]:
    """What each value of the maps of `to_classes` is: a class, an unmatched cluster, or a cluster of unknown class."""
    named = [*class_names, *(f"class {index}" for index in range(len(class_names), state.classes))]
    if name not in CLUSTERED:
        return named
    row = CLUSTERED.index(name)
    if not state.clusterings.matched[row]:
        return [f"cluster {index}" for index in range(state.clusters)]
    left = int((state.clusterings.assignments[row] < 0).sum())
    return named + [f"unmatched cluster {index}" for index in range(1, left + 1)]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of maps (B, C, H, W) to `size`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
