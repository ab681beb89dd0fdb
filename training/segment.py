"""From patch tokens to class maps: the four segmentations that a trained run can give of an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.evaluation.kmeans import closeness
from training.model import to_map
from training.state import TrainingState

CLUSTERED = ("baseline", "kmeans", "cluster_probe")
"""Segmentations into clusters, in the order of ``Clusterings.assignments``: k-means on the frozen features, k-means on
the codes, the cluster probe on the codes."""

SEGMENTATIONS = (*CLUSTERED, "linear")
"""All segmentations; the linear probe gives classes."""

_SHARPNESS = 10.0  # of the softmax of cosines
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
    return {name: greatest(patch_scores(state, name, features, codes), size) for name in only}


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
        for _, pixels in _interpolated([of], grid, size):  # features at all pixels are large
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


def patch_scores(state: TrainingState, name: str, features: Tensor, codes: Tensor) -> Tensor:
    """The scores (B, C, H, W) of patches that `segment` interpolates, of maps of features and codes."""
    scores = _scores(state, name, features if name == "baseline" else codes)
    return scores * codes.norm(dim=1, keepdim=True) if name == "cluster_probe" else scores


def score_strips(state: TrainingState, name: str, maps: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """What `decided` takes for the segmentation `name`, of maps of features and codes of strips of patches."""
    for features, codes in maps:
        scores = patch_scores(state, name, features, codes)
        # A cluster probe has a channel more: the cosine of an interpolated code is its score by its length.
        yield torch.cat([scores, codes.norm(dim=1, keepdim=True)], dim=1) if name == "cluster_probe" else scores


def decided(
    scores: Iterable[Tensor], name: str, values: Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What each pixel of one image is, and how sure that is; memory does not grow with the image but for the result.

    The confidence is the probability of the greatest score: the softmax of the logits of the linear probe, or of ten
    times the cosine with each cluster (for k-means: the closeness). Probabilities, as a CRF gives them, stay what they
    are.

    Args:
        scores: (1, C, rows, W) of strips of patches from top to bottom, of `score_strips`; or probabilities.
        name: of the segmentation; "probabilities".
        values: (C,) uint8, what to write for each cluster or class.
        grid: (H, W) of all strips.
        size: (h, w) of the result.

    Returns:
        values (h, w) uint8, and the confidence (h, w) uint8 in 255ths, on the device of `values`.
    """
    result, confidence = (torch.empty(size, dtype=torch.uint8, device=values.device) for _ in range(2))
    for band, pixels in _interpolated(scores, grid, size):
        sharpness: float | Tensor = 1.0 if name == "linear" else _SHARPNESS
        if name == "cluster_probe":
            sharpness = _SHARPNESS / pixels[:, -1:].clamp(min=1e-12)
            pixels = pixels[:, :-1]
        share, where = pixels.max(dim=1, keepdim=True)
        if name != "probabilities":
            share = ((pixels - share) * sharpness).exp_().sum(dim=1, keepdim=True).reciprocal_()
        result[band] = values[where[0, 0]]
        confidence[band] = (share[0, 0] * 255).round_().to(torch.uint8)
    return result, confidence


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
    for band, pixels in _interpolated([scores], tuple(scores.shape[2:]), size):
        result[:, band] = pixels.argmax(dim=1)
    return result


def _interpolated(
    strips: Iterable[Tensor], grid: tuple[int, int], size: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """`upsample` in bands: the rows of each, and the maps (B, C, rows, w) there.

    The maps (B, C, H, W) of the `grid` come in strips of rows from top to bottom, and are let go of.
    """
    height, width = size
    at = ((torch.arange(height) + 0.5) * grid[0] / height - 0.5).clamp(min=0)
    above = at.long().clamp(max=grid[0] - 1)
    below = (above + 1).clamp(max=grid[0] - 1)
    share = (at - above)[:, None]
    held, first, done = None, 0, 0  # the rows that are in memory, the number of the first, and rows of pixels done
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], dim=2)
        ready = int(torch.searchsorted(below, first + held.shape[2]))
        rows = max(1, _BAND_NUMBERS // max(1, held.shape[0] * held.shape[1] * width))
        for top in range(done, ready, rows):
            band = slice(top, min(top + rows, ready))
            low, high = int(above[band.start]), int(below[band.stop - 1])
            # Bilinear interpolation is one of columns after one of rows.
            wide = upsample(held[:, :, low - first : high - first + 1], (high - low + 1, width))
            upper, lower = (rows_of[band].sub(low).to(wide.device) for rows_of in (above, below))
            yield band, wide[:, :, upper].lerp(wide[:, :, lower], share[band].to(wide))
        done = ready
        if done < height:
            passed = min(int(above[done]) - first, held.shape[2])
            held, first = held[:, :, passed:], first + passed


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
    return {name: class_table(state, name)[maps] for name, maps in segmentations.items()}


def class_table(state: TrainingState, name: str) -> Tensor:
    """The value (C,) int64 that each cluster, or class of the linear probe, has in the maps of `to_classes`."""
    if name not in CLUSTERED:
        return torch.arange(state.classes, device=state.device)
    if not is_matched(state, name):
        return torch.arange(state.clusters, device=state.device)
    assignment = state.clusterings.assignments[CLUSTERED.index(name)]
    left = assignment < 0
    return assignment.where(~left, state.classes - 1 + left.cumsum(0))


def is_matched(state: TrainingState, name: str) -> bool:
    """Whether the values of the maps of `to_classes` are classes, and not clusters of unknown class."""
    return name not in CLUSTERED or bool(state.clusterings.matched[CLUSTERED.index(name)])


def map_names(state: TrainingState, name: str, class_names: Sequence[str]) -> list[str]:
    """What each value of the maps of `to_classes` is: a class, an unmatched cluster, or a cluster of unknown class."""
    named = [*class_names, *(f"class {index}" for index in range(len(class_names), state.classes))]
    if name not in CLUSTERED:
        return named
    if not is_matched(state, name):
        return [f"cluster {index}" for index in range(state.clusters)]
    left = int((state.clusterings.assignments[CLUSTERED.index(name)] < 0).sum())
    return named + [f"unmatched cluster {index}" for index in range(1, left + 1)]


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of maps (B, C, H, W) to `size`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
