"""What the training loop asks of a frozen backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn


class PatchFeatures(NamedTuple):
    """What a backbone returns for B images of H x W patches."""

    tokens: Tensor  # (B, H*W, Df), patch tokens after the final LayerNorm, not L2-normalised
    query: Tensor  # (B, heads, prefix_tokens + H*W, d), from which the weights of local propagation are computed: ...
    key: Tensor  # (B, heads, prefix_tokens + H*W, d), ... of an attention, or both the same for similarity of tokens


class Backbone(nn.Module, ABC):
    """A frozen feature extractor: patch tokens, and the query and key that local propagation goes by.

    Attributes:
        features_dim: Df.
        patch_size: pixels a side of one patch.
        prefix_tokens: class and register tokens in front of the patches in `query` and `key`.
    """

    features_dim: int
    patch_size: int
    prefix_tokens: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (H, W) grid of patches for an image of `size` pixels.

        Raises:
            ValueError: the patch size does not divide `size`.
        """
        if min(size) < self.patch_size or any(side % self.patch_size for side in size):
            raise ValueError(
                f"config: `data.size` must be a multiple of the patch size {self.patch_size}, got {size[0]} x {size[1]}"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def fit(self, images: Iterable[Tensor]) -> None:
        """Learn from unlabelled training images (3, h, w) in [0, 1]; most backbones need nothing."""

    @abstractmethod
    def normalize(self, images: Tensor) -> Tensor:
        """Map images (B, 3, h, w) in [0, 1] to what `forward` takes."""

    @abstractmethod
    def forward(self, images: Tensor) -> PatchFeatures:
        """Patch features of normalised images (B, 3, h, w)."""
