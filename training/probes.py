"""The two probes that read classes out of codes; they learn on detached codes and never change them.

Their parameters have the names and shapes of the published checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent: centres move towards the codes nearest to them; needs no labels.

    Args:
        dim: D of the codes.
        classes: C, how many clusters.

    Attributes:
        clusters: (C, D) the centres; only their direction matters.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(classes, dim))

    def similarity(self, code: Tensor) -> Tensor:
        """Cosine (B, C, H, W) of codes (B, D, H, W) with each centre."""
        return torch.einsum("bdhw,cd->bchw", F.normalize(code, dim=1), F.normalize(self.clusters, dim=1))

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Assign each code to its nearest centre.

        Args:
            code: (B, D, H, W).

        Returns:
            the loss, minus the mean cosine with the nearest centre, and the one-hot assignment (B, C, H, W).
        """
        similarity = self.similarity(code)
        onehot = torch.zeros_like(similarity).scatter_(1, similarity.argmax(dim=1, keepdim=True), 1)
        return -(onehot * similarity).sum(dim=1).mean(), onehot

    def log_probabilities(self, code: Tensor, alpha: float) -> Tensor:
        """Soft assignment ``log_softmax(alpha * cosine)`` (B, C, H, W) of codes (B, D, H, W)."""
        return F.log_softmax(alpha * self.similarity(code), dim=1)


class LinearProbe(nn.Conv2d):
    """A linear classifier of codes, trained with labels: logits (B, C, H, W) of codes (B, D, H, W).

    Args:
        dim: D of the codes.
        classes: C.

    Attributes:
        weight: (C, D, 1, 1).
        bias: (C,).
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes, kernel_size=1)

    def loss(self, code: Tensor, labels: Tensor, labelled_pixels: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the labelled pixels; 0 if there are none.

        Args:
            code: (B, D, H, W).
            labels: (B, h, w) integers at the labels' own size; negative: ignored.
            labelled_pixels: 0-d, what the sum is divided by; None: those of `labels`.
        """
        logits = F.interpolate(self(code), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        labelled = labels >= 0
        target = labels.long().where(labelled, -1)
        number = labelled.sum() if labelled_pixels is None else labelled_pixels
        return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / number.clamp(min=1)
