"""Where images and labels come from, and which images make up the batch of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.config import Config
from training.procedural import ProceduralData

IGNORE = -1
"""The label of pixels that belong to no class."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class SegmentationData(Protocol):
    """A set of images, all of one size, by index."""

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many images."""

    def name(self, index: int) -> str:
        """The file name without extension."""

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""

    def label(self, index: int) -> Tensor | None:
        """(h, w) int64 with -1 where no class is known, or None for a set without labels."""


class FolderData:
    """Photographs in ``root/imgs/split`` and, if there are any, label PNGs of the same stems in ``root/labels/split``.

    Args:
        root: the folder.
        split: "train" or "val".
        size: height and width that images (bilinear) and labels (nearest) are resized to.
        classes: names in label order; greater label values are ignored.
        limit: use the first `limit` images, by name. None: all.

    Raises:
        ValueError: there are no images, or some have a label and some do not.
    """

    def __init__(
        self, root: str | Path, split: str, size: tuple[int, int], classes: tuple[str, ...], limit: int | None = None
    ) -> None:
        self.classes = classes
        self.size = size
        self._files = list_images(Path(root) / "imgs" / split)[:limit]
        labels = [Path(root) / "labels" / split / f"{file.stem}.png" for file in self._files]
        missing = [label for label in labels if not label.is_file()]
        if missing and len(missing) < len(labels):
            raise ValueError(f"data: {len(missing)} of {len(labels)} images have no label, for example {missing[0]}")
        if not missing and not classes:
            raise ValueError(f"data: {labels[0].parent} has labels, so `data.classes` must name their classes")
        self._labels = None if missing else labels

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The file name without extension."""
        return self._files[index].stem

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""
        return load_image(self._files[index], self.size)

    def label(self, index: int) -> Tensor | None:
        """(h, w) int64, or None for a set without labels."""
        if self._labels is None:
            return None
        height, width = self.size
        with Image.open(self._labels[index]) as file:
            if file.mode not in ("L", "P"):
                raise ValueError(f"data: label {self._labels[index]} must have one byte a pixel, got mode {file.mode}")
            label = torch.from_numpy(np.array(file.resize((width, height), Image.Resampling.NEAREST))).long()
        return label.where(label < len(self.classes), IGNORE)


def list_images(folder: Path) -> list[Path]:
    """The JPEG and PNG files of `folder`, by name.

    Raises:
        ValueError: there are none.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"data: there are no {' '.join(IMAGE_SUFFIXES)} files in {folder}")
    return files


def load_image(file: Path, size: tuple[int, int]) -> Tensor:
    """The photograph as (3, h, w) uint8, resized to `size` = (height, width)."""
    height, width = size
    with Image.open(file) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def open_data(config: Config, split: str) -> SegmentationData:
    """The "train" or "val" images of a configuration."""
    data = config.data
    limit = data.train_images if split == "train" else data.val_images
    if data.name == "procedural":
        # The images are the same for every seed of the run, as photographs would be.
        return ProceduralData(limit or 64, data.size, seed=0 if split == "train" else 1)
    if data.root is None:
        raise ValueError("config: `data.root` must be the folder that holds imgs/, got None")
    if split == "val" and not (Path(data.root) / "imgs" / "val").is_dir():
        split = "train"  # with no images set aside, the training images are segmented
    return FolderData(data.root, split, data.size, data.classes, limit)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches of an epoch; the images left over come in another epoch.

    Raises:
        ValueError: there are fewer images than one batch takes.
    """
    if images < batch_size:
        raise ValueError(f"config: `batch_size` must be at most the {images} training images, got {batch_size}")
    return images // batch_size


def batch_of_step(step: int, images: int, batch_size: int, seed: int) -> Tensor:
    """The image indices (batch_size,) of a step: shuffled anew each epoch, a function of (seed, step) alone."""
    epoch, batch = divmod(step, steps_per_epoch(images, batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(images)
    return torch.from_numpy(order[batch * batch_size : (batch + 1) * batch_size])
