"""How clusters become a segmentation: the k-means centres of features and of codes, and the classes of clusters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.features import FeatureBank
from training.kmeans import kmeans
from training.model import SegmentationHead

_IMAGES = 2000  # images that k-means sees at most ...
_VECTORS = 100_000  # ... and about how many patches
_RESTARTS = 5


class Clusterings(nn.Module):
    """k-means centres after training, and to which class each cluster was matched on the labelled images.

    Attributes:
        features: (C, Df) centres of the frozen features: the baseline.
        codes: (C, D) centres of the head's codes.
        assignments: (3, C) int64, the class of each cluster of `features`, of `codes` and of the cluster probe; the
            identity until there were labels to match with.
    """

    def __init__(self, features_dim: int, dim: int, clusters: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(clusters, features_dim))
        self.register_buffer("codes", torch.zeros(clusters, dim))
        self.register_buffer("assignments", torch.arange(clusters).repeat(3, 1))

    @torch.no_grad()
    def fit(self, bank: FeatureBank, head: SegmentationHead, seed: int) -> None:
        """Cluster patches of the training images, the same ones before and after the head."""
        tokens = _sample(bank, seed)
        clusters = len(self.features)
        self.features.copy_(kmeans(tokens, clusters, seed=seed, restarts=_RESTARTS))
        codes = head.eval()(tokens[:, None])[:, 0]
        self.codes.copy_(kmeans(codes, clusters, seed=seed, restarts=_RESTARTS))


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
