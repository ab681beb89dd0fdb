"""The reference pools: one random patch of each of M training images, of frozen features and of EMA-head codes."""

from __future__ import annotations

import torch
from torch import Tensor

import hpkernels
from training.features.bank import FeatureBank
from training.model import SegmentationHead, channel_dropout
from training.runtime import parallel


def draw_patches(images: int, patches: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `size` images of `images`, each as often as any other but for one, and a patch position of each.

    Returns:
        image indices (size,) and positions (size,), int64.
    """
    rounds = [torch.randperm(images, generator=generator) for _ in range(-(-size // images))]
    return torch.cat(rounds)[:size], torch.randint(patches, (size,), generator=generator)


class Pools:
    """The task-agnostic pool, filled once, and the task-specific pool, renewed from the EMA head.

    Args:
        size: M.
        features_dim: Df.
        dim: D.
        dropout: channel-dropout rate of both pools and of the EMA head that fills one: 0, or that of the head as
            the published code has it.
    """

    def __init__(self, size: int, features_dim: int, dim: int, dropout: float) -> None:
        self.size = size
        self.dropout = dropout
        self.agnostic = hpkernels.nn.ReferencePool(size, features_dim)
        self.specific = hpkernels.nn.ReferencePool(size, dim)

    def fill_agnostic(self, bank: FeatureBank, generator: torch.Generator) -> None:
        """Fill the task-agnostic pool with features f."""
        self.agnostic.fill(channel_dropout(self._draw(bank, generator), self.dropout)[:, 0])

    @torch.no_grad()
    def renew_specific(self, bank: FeatureBank, ema_head: SegmentationHead, generator: torch.Generator) -> None:
        """Refill the task-specific pool with codes s' of newly drawn patches."""
        with bank.clock.part("pools"):
            codes = ema_head.train(self.dropout > 0)(self._draw(bank, generator))
            self.specific.fill(channel_dropout(codes, self.dropout)[:, 0])

    def _draw(self, bank: FeatureBank, generator: torch.Generator) -> Tensor:
        """Features (M, 1, Df) of newly drawn patches, of which each rank computes its share."""
        images, positions = draw_patches(len(bank), bank.anchors_per_image, self.size, generator)
        share = parallel.share(self.size)
        return parallel.gathered(bank.patches(share.of(images), share.of(positions)))[:, None]
