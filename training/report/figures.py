"""The pictures of the report and of predictions: pure functions from tensors to PIL images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

IGNORED = (226, 229, 234)  # colour of pixels without a class

# Okabe and Ito's colours, which colour-blind readers can tell apart; without black, too close to dark photographs.
_FIRST_COLOURS = (
    (86, 180, 233),
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (204, 121, 167),
    (230, 159, 0),
)
_SHOWN_SIDE = 480  # pixels of the longer side of photographs in the report at most


def class_palette(classes: int) -> np.ndarray:
    """Colours (classes, 3) uint8, each class's own whatever the number of classes, as distinct as can be."""
    levels = np.arange(0, 256, 17)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    # Neither so dark or light that they merge with text or page, nor grey like ignored pixels.
    usable = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.9) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.1)
    candidates, lab = candidates[usable], lab[usable]
    colours = list(_FIRST_COLOURS[:classes])
    distance = np.min([_distance(lab, colour) for colour in _FIRST_COLOURS], axis=0)
    while len(colours) < classes:
        farthest = candidates[distance.argmax()]
        colours.append(tuple(farthest))
        distance = np.minimum(distance, _distance(lab, farthest))
    return np.array(colours, dtype=np.uint8).reshape(-1, 3)


def _distance(lab: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    return np.linalg.norm(lab - _oklab(np.array([colour])), axis=1)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Colours (N, 3) in 0..255 in OKLab (Björn Ottosson, 2020), where distances are as the eye sees them."""
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def photograph(image: Tensor) -> Image.Image:
    """An image (3, h, w) uint8."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def colour_map(classes: Tensor, palette: np.ndarray) -> Image.Image:
    """A map (h, w) of class numbers in the palette's colours (C, 3) uint8; negative numbers in `IGNORED`."""
    colours = np.vstack([palette, np.array(IGNORED, dtype=np.uint8)])
    index = classes.cpu().numpy()
    index = np.where(index < 0, len(palette), index)
    if len(colours) > 256:
        return Image.fromarray(colours[index])
    picture = Image.fromarray(index.astype(np.uint8), mode="P")
    picture.putpalette(colours.tobytes())
    return picture


def shrunk(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    """A picture at most `_SHOWN_SIDE` pixels a side."""
    factor = min(1, _SHOWN_SIDE / max(picture.size))
    return picture.resize((round(picture.width * factor) or 1, round(picture.height * factor) or 1), resample)


def png_uri(picture: Image.Image) -> str:
    """A picture as a PNG inside a URI, so that a page needs no other file."""
    return _uri(picture, "png", optimize=True)


def jpeg_uri(photograph: Image.Image) -> str:
    """A photograph as a JPEG inside a URI."""
    return _uri(photograph, "jpeg", quality=88, subsampling=0)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
