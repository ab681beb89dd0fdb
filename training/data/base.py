"""What the training loop asks of a set of images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

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

    def identity(self) -> dict[str, Any]:
        """What tells the pixels of its images from others, wherever they lie; texts, numbers and lists."""

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""

    def label(self, index: int) -> Tensor | None:
        """(h, w) int64 with -1 where no class is known, or None for a set without labels."""


def hash_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 of names and files: of each its size and when it was changed, which move along with it."""
    digest = hashlib.sha256()
    for name, file in files:
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
