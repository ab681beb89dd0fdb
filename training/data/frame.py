"""How images and labels of any size are brought to the one size that a run works at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.photographs import read_rgb

IGNORE = -1
"""The label of pixels that belong to no class."""


class Frame(NamedTuple):
    """The size of images, and how they get there; labels take the same way, by nearest neighbour."""

    size: tuple[int, int]  # height and width
    crop: bool = False  # keep the aspect: resize until the image covers the size, and cut the centre out; or squash
    nearest: bool = False  # resize images by nearest neighbour too, or bilinearly with antialiasing

    def image(self, photograph: Image.Image) -> Tensor:
        """An RGB photograph as (3, h, w) uint8."""
        resample = Image.Resampling.NEAREST if self.nearest else Image.Resampling.BILINEAR
        return torch.from_numpy(np.array(self._fitted(photograph, resample))).permute(2, 0, 1).contiguous()

    def label(self, label: Image.Image) -> Tensor:
        """The values (h, w) int64 of a label of one byte a pixel."""
        return torch.from_numpy(np.array(self._fitted(label, Image.Resampling.NEAREST))).long()

    def _fitted(self, picture: Image.Image, resample: Image.Resampling) -> Image.Image:
        height, width = self.size
        if not self.crop:
            return picture.resize((width, height), resample)
        # As torchvision's Resize and CenterCrop: for a square, the shorter side becomes the side of the square.
        if height * picture.width >= width * picture.height:
            resized = picture.resize((max(width, height * picture.width // picture.height), height), resample)
        else:
            resized = picture.resize((width, max(height, width * picture.height // picture.width)), resample)
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return resized.crop((left, top, left + width, top + height))


def load_image(file: Path, size: tuple[int, int]) -> Tensor:
    """The photograph as (3, h, w) uint8, squashed to `size` = (height, width)."""
    return resized(read_rgb(file), size)


def resized(photograph: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB photograph as (3, h, w) uint8, squashed to `size` = (height, width)."""
    return Frame(size).image(photograph)
