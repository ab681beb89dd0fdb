"""k nearest neighbours: labelled training patches vote for the class of validation patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hpkernels
from training.evaluation.metrics import SegmentationMetrics
from training.features.bank import FeatureBank
from training.model import patch_classes, to_map
from training.segment import greatest
from training.state import TrainingState

_PATCHES = 20_000  # training patches that may vote, about
_IMAGES = 2000  # from so many images at most


@torch.no_grad()
def knn_scores(
    state: TrainingState, train: FeatureBank, val: FeatureBank, neighbours: int, seed: int, same_images: bool = False
) -> dict[str, dict[str, float]] | None:
    """Accuracy and mIoU in percent where the nearest training patches, by cosine, vote for each validation patch.

    Votes are interpolated to the pixels of the labels, as other scores are.

    Args:
        state: with the head.
        train: whose labelled patches vote; the label of a patch is that of most of its pixels.
        val: the images to score.
        neighbours: how many vote.
        seed: of the choice of training patches.
        same_images: the images of `train` are those of `val`: no patch is voted for by its own image.

    Returns:
        scores of the frozen features, "baseline", and of the codes, "hp"; None without labels in one of the two.
    """
    found = _labelled(state, train, seed)
    classes = len(val.data.classes)
    if found is None or not classes:
        return None
    votes, sources, keys = found
    metrics = {name: SegmentationMetrics(classes) for name in keys}
    for images in tqdm(list(val.batches(8)), desc="neighbours", unit="batch", leave=False):
        labels = val.labels(images)
        if labels is None:
            return None
        for name, rows in _rows(state, val, images).items():
            own = images.to(sources).repeat_interleave(rows.shape[1])
            nearest = hpkernels.masked_topk(
                rows.flatten(0, 1),
                keys[name],
                k=min(neighbours, len(votes)),
                query_group=own if same_images else None,
                pool_group=sources if same_images else None,
                backend=val.backend,
            ).indices
            counts = rows.new_zeros(len(nearest), classes)
            counts.scatter_add_(1, votes[nearest], (nearest >= 0).to(counts))  # -1: fewer than k may vote
            shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).unflatten(0, rows.shape[:2])
            metrics[name].update(greatest(to_map(shares, val.grid), tuple(labels.shape[1:])), labels)
    return {name: metric.scores() for name, metric in metrics.items()}


def _labelled(state: TrainingState, bank: FeatureBank, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """The classes (n,) of random labelled patches, their images (n,), and their features and codes (n, D)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randperm(len(bank), generator=generator)[:_IMAGES]
    each = min(bank.anchors_per_image, -(-_PATCHES // len(images)))
    votes: list[Tensor] = []
    sources: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {"baseline": [], "hp": []}
    for some in images.split(32):
        labels = patch_classes(bank.labels(some), bank.grid, len(bank.data.classes))
        if labels is None:
            return None
        chosen = torch.rand(len(some), bank.anchors_per_image, generator=generator).topk(each).indices.to(bank.device)
        classes = labels.flatten(1).gather(1, chosen)
        known = classes >= 0
        votes.append(classes[known])
        sources.append(some.to(bank.device)[:, None].expand_as(classes)[known])
        for name, rows in _rows(state, bank, some).items():
            kept[name].append(rows.take_along_dim(chosen[:, :, None], dim=1)[known])
    if not sum(len(part) for part in votes):
        return None
    return torch.cat(votes), torch.cat(sources), {name: torch.cat(parts) for name, parts in kept.items()}


def _rows(state: TrainingState, bank: FeatureBank, images: Tensor) -> dict[str, Tensor]:
    """Unit rows (B, G, .) of the frozen features and of the codes."""
    tokens = bank.get(images).tokens
    codes = state.head.eval()(tokens)
    return {"baseline": F.normalize(tokens, dim=-1), "hp": F.normalize(codes, dim=-1)}
