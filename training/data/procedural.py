"""Images with ground truth that are made on the spot, so that training can be tried without a download.

Every image is a mosaic of regions. The class of a region is its texture. Its two colours are drawn in the same way
whatever the class, so that colour alone does not tell classes apart.

The colours make this a problem for Hidden Positives. All lie near one circle of hues, a light tone and a dark one a
little further on. So regions of one texture and nearly one hue recur in other images, and the patches nearest to each
other mostly have the same class. Yet hues differ so much that k-means of the frozen features splits and mixes classes
by colour. Positives link one hue to the next around the circle, which pulls the codes of a texture together. With
colours as unlike as they come, hardly any patch has its like in another image.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from torch import Tensor

CLASSES = ("vertical stripes", "horizontal stripes", "checks", "dots", "grain", "plain")

_CELLS = 4  # regions of an image
# Hue (counted from that of the region), saturation and value of the two colours of a region.
_LIGHT, _DARK = (0.0, 0.35, 0.95), (0.12, 0.6, 0.5)
_BRIGHTNESS = 0.03  # by how much, at most, a colour is lighter or darker than that


class ProceduralData:
    """Mosaics of textures.

    Args:
        images: how many.
        size: height and width in pixels.
        seed: image i depends on (seed, i) only.
    """

    classes = CLASSES

    def __init__(self, images: int, size: tuple[int, int], seed: int) -> None:
        self.size = size
        made = [_mosaic(np.random.default_rng((seed, index)), size) for index in range(images)]
        self._images = [torch.from_numpy(image) for image, _ in made]
        self._labels = [torch.from_numpy(label) for _, label in made]

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """A file name without extension."""
        return f"mosaic_{index:04d}"

    def file(self, index: int) -> None:
        """None: no file holds the image."""

    def label_file(self, index: int) -> None:
        """None, likewise."""

    def identity(self) -> dict[str, Any]:
        """What tells the pixels of its images from others."""
        return {"pixels": hashlib.sha256(b"".join(image.numpy().tobytes() for image in self._images)).hexdigest()}

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""
        return self._images[index]

    def label(self, index: int) -> Tensor:
        """(h, w) int64."""
        return self._labels[index]


def _mosaic(random: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image (3, h, w) uint8 and its label (h, w) int64."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    centres = random.uniform(0, 1, (_CELLS, 2)) * size
    # Nearest centre, with a wavy metric so that borders are not straight lines.
    waves = 0.04 * (height + width) * np.sin(x / width * random.uniform(4, 12) + y / height * random.uniform(4, 12))
    distance = np.hypot(y[None] - centres[:, :1, None] + waves, x[None] - centres[:, 1:, None] - waves)
    cells = distance.argmin(axis=0)

    classes = random.integers(len(CLASSES), size=_CELLS)
    image = np.empty((3, height, width), np.float32)
    for cell, kind in enumerate(classes):
        inside = cells == cell
        first, second = random.permutation(_colours(random))[..., None]
        mix = _texture(CLASSES[kind], y, x, random)[inside]
        image[:, inside] = first * mix + second * (1 - mix)
    image += random.normal(0, 0.02, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), classes[cells].astype(np.int64)


def _colours(random: np.random.Generator) -> np.ndarray:
    """A light and a dark colour (2, 3) in [0, 1], of hues that belong together."""
    tones = np.array([_LIGHT, _DARK]) + [random.uniform(), 0, 0]
    tones[:, 0] %= 1
    return (hsv_to_rgb(tones) + random.uniform(-_BRIGHTNESS, _BRIGHTNESS, (2, 1))).clip(0, 1)


def _texture(kind: str, y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How much of the first of two colours each pixel has, in [0, 1]."""
    period, shift_y, shift_x = random.uniform(5, 7), *random.uniform(0, 2 * np.pi, 2)
    along_x = np.sin(2 * np.pi * x / period + shift_x)
    along_y = np.sin(2 * np.pi * y / period + shift_y)
    if kind == "vertical stripes":
        return (along_x > 0).astype(np.float32)
    if kind == "horizontal stripes":
        return (along_y > 0).astype(np.float32)
    if kind == "checks":
        return (along_x * along_y > 0).astype(np.float32)
    if kind == "dots":
        return (along_x + along_y > 1.2).astype(np.float32)
    if kind == "grain":
        grains = random.uniform(0, 1, (y.shape[0] // 2 + 1, y.shape[1] // 2 + 1)).astype(np.float32)
        return np.kron(grains, np.ones((2, 2), np.float32))[: y.shape[0], : y.shape[1]]
    return np.ones_like(y)
