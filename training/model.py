"""What is trained: the segmentation head, its moving average, and the projection of the contrastive loss."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.runtime.parallel import Share


class SegmentationHead(nn.Module):
    """``s = W1 drop(f) + W3 relu(W2 drop(f))`` (HP, CVPR 2023; the head of STEGO).

    Args:
        features_dim: Df of the frozen features.
        dim: D of the code.
        dropout: probability of channel dropout on the input, drawn for each of the two paths.
    """

    def __init__(self, features_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1 = nn.Linear(features_dim, dim)
        self.w2 = nn.Linear(features_dim, features_dim)
        self.w3 = nn.Linear(features_dim, dim)

    def forward(self, features: Tensor, share: Share | None = None) -> Tensor:
        """Codes (B, G, D) of frozen features (B, G, Df); of a `share` of a batch, with its part of the dropout."""
        linear = self.w1(channel_dropout(features, self.dropout, self.training, share))
        nonlinear = self.w3(F.relu(self.w2(channel_dropout(features, self.dropout, self.training, share))))
        return linear + nonlinear


class FrozenHead(nn.Module):
    """Codes that are the frozen features: the baseline that nothing but the probes learns on."""

    def forward(self, features: Tensor, share: Share | None = None) -> Tensor:
        """The features (B, G, Df) themselves."""
        return features


class Projection(nn.Module):
    """``z = normalize(Linear(s))``: where the contrastive and the consistency loss act."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, code: Tensor) -> Tensor:
        """L2-normalised rows (..., D) of codes (..., D)."""
        return F.normalize(self.linear(code), dim=-1)


def channel_dropout(features: Tensor, rate: float, training: bool = True, share: Share | None = None) -> Tensor:
    """Drop whole channels of an image, the same for all its patches.

    Args:
        features: (B, G, Df).
        rate: probability of a channel to be dropped.
        training: whether any are.
        share: of a batch, if these are the features of its images alone; channels are drawn for the whole batch.
    """
    if not training or rate == 0:
        return features
    rows = share.rows if share else len(features)
    kept = F.dropout1d(features.new_ones(rows, features.shape[2], 1), rate).mT
    return features * (share.of(kept) if share else kept)


def ema_copy(head: SegmentationHead) -> SegmentationHead:
    """A copy of `head` that takes no gradient and drops nothing: the start of the moving average."""
    return copy.deepcopy(head).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, momentum: float) -> None:
    """``ema = momentum * ema + (1 - momentum) * model``, parameter by parameter."""
    averages = list(ema.parameters())
    if averages:  # frozen codes have none
        get_ema_multi_avg_fn(momentum)(averages, list(model.parameters()), 0)


def to_map(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows of patches (B, H*W, D) as a map (B, D, H, W)."""
    return rows.mT.unflatten(2, grid)


def to_rows(code_map: Tensor) -> Tensor:
    """A map (B, D, H, W) as rows of patches (B, H*W, D)."""
    return code_map.flatten(2).mT


def patch_classes(labels: Tensor | None, grid: tuple[int, int], classes: int) -> Tensor | None:
    """The class (B, H, W) of most pixels of each patch, of labels (B, h, w); -1 where most have none. None without."""
    if labels is None:
        return None
    images, *size = labels.shape
    row, column = (torch.arange(s, device=labels.device) * n // s for s, n in zip(size, grid, strict=True))
    patch = (
        row[:, None] * grid[1] + column + torch.arange(images, device=labels.device)[:, None, None] * grid[0] * grid[1]
    )
    values = classes + 1  # void is one of them
    counts = (
        (patch * values + labels.clamp(min=-1) + 1).flatten().bincount(minlength=images * grid[0] * grid[1] * values)
    )
    return counts.view(images, *grid, values).argmax(dim=3) - 1
