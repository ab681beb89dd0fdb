"""How clusters become a segmentation: the k-means centres of features and of codes, and the classes of clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.evaluation.kmeans import kmeans
from training.features.bank import FeatureBank
from training.model import SegmentationHead

_IMAGES = 2000  # images that k-means sees at most ...
_VECTORS = 100_000  # ... and about how many patches
_RESTARTS = 5


class Clusterings(nn.Module):
    """k-means centres after training, and to which class each cluster was matched on the labelled images.

    Attributes:
        features: (C, Df) centres of the frozen features: the baseline.
        codes: (C, D) centres of the head's codes.
        assignments: (3, C) int64, the class of each cluster of `features`, of `codes` and of the cluster probe,
            negative for a cluster left without a class; the identity until there were labels to match with.
        fitted: () bool, whether `features` and `codes` hold centres; zeros until then.
        matched: (3,) bool, which rows of `assignments` were matched on labelled images.
    """

    def __init__(self, features_dim: int, dim: int, clusters: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(clusters, features_dim))
        self.register_buffer("codes", torch.zeros(clusters, dim))
        self.register_buffer("assignments", torch.arange(clusters).repeat(3, 1))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("matched", torch.zeros(3, dtype=torch.bool))

    @torch.no_grad()
    def fit(self, bank: FeatureBank, head: SegmentationHead, seed: int) -> None:
        """Cluster patches of the training images, the same ones before and after the head."""
        tokens = _sample(bank, seed)
        clusters = len(self.features)
        self.features.copy_(kmeans(tokens, clusters, seed=seed, restarts=_RESTARTS))
        codes = head.eval()(tokens[:, None])[:, 0]
        self.codes.copy_(kmeans(codes, clusters, seed=seed, restarts=_RESTARTS))
        self.fitted.fill_(True)
        self.matched.fill_(False)  # whatever was matched before were other clusters

    def forget(self) -> None:
        """Take what is here for neither fitted nor matched: the head is about to change."""
        self.fitted.fill_(False)
        self.matched.fill_(False)

    def set_assignment(self, row: int, assignment: Tensor) -> None:
        """Keep the class (C,) int64 of each cluster of one row of `assignments`."""
        self.assignments[row] = assignment.to(self.assignments.device)
        self.matched[row] = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Checkpoints of before there were flags: centres are zeros until they are fitted, and all rows are matched in
        # one go, when not one of them is likely to remain the identity.
        if f"{prefix}codes" in state_dict and f"{prefix}fitted" not in state_dict:
            assignments = state_dict[f"{prefix}assignments"]
            fitted = state_dict[f"{prefix}codes"].any()
            moved = (assignments != torch.arange(assignments.shape[1])).any()
            state_dict[f"{prefix}fitted"] = fitted
            state_dict[f"{prefix}matched"] = (fitted & moved).expand(3)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_clusters(clusters: int, images: int, patches: int) -> None:
    """Refuse to look for more clusters than k-means gets patches to find them among.

    Raises:
        ValueError: there are too few patches.
    """
    seen = min(images, _IMAGES)
    vectors = seen * min(patches, -(-_VECTORS // seen))
    if clusters > vectors:
        raise ValueError(f"config: `data.clusters` must be at most the {vectors} patches to cluster, got {clusters}")


def _sample(bank: FeatureBank, seed: int) -> Tensor:
    """Tokens (n, Df) of random patches of random images; of all patches where they are not too many."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randperm(len(bank), generator=generator)[:_IMAGES]
    patches = min(bank.anchors_per_image, -(-_VECTORS // len(images)))
    chosen = []
    for some in images.split(32):
        positions = torch.rand(len(some), bank.anchors_per_image, generator=generator).topk(patches).indices
        chosen.append(bank.get(some).tokens.take_along_dim(positions[:, :, None].to(bank.device), dim=1).flatten(0, 1))
    return torch.cat(chosen)
