"""What the training loop asks of a set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor


class SegmentationData(Protocol):
    """A set of images, all of one size, by index."""

    classes: tuple[str, ...]
    size: tuple[int, int]  # height and width of images and labels

    def __len__(self) -> int:
        """How many images."""

    def name(self, index: int) -> str:
        """The file name without extension."""

    def file(self, index: int) -> Path | None:
        """The file of the image, or None for an image that is made on the spot."""

    def label_file(self, index: int) -> Path | None:
        """The file of its label, or None where there is none."""

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""

    def label(self, index: int) -> Tensor | None:
        """(h, w) int64 with -1 where no class is known, or None for a set without labels."""
