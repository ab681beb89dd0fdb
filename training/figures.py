"""The pictures of the report and of predictions: pure functions from tensors to PIL images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional as F

IGNORED = (226, 229, 234)  # colour of pixels without a class
ACCENT, HIGHLIGHT = "#2f55d4", "#ff8c1a"

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
_SHOWN_SIZE = 400  # pixels of the longer side that photographs with drawings on them are enlarged to


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
    return Image.fromarray(colours[np.where(index < 0, len(palette), index)])


def patches_overlay(image: Tensor, chosen: Tensor, anchor: tuple[int, int] | None = None) -> Image.Image:
    """An image (3, h, w) with the chosen patches (H, W) bool in colour and outlined, and the rest faded.

    Args:
        image: (3, h, w) uint8.
        chosen: (H, W) bool.
        anchor: (row, column) of a patch to mark, in colour as well.
    """
    if anchor is not None:
        chosen = chosen.clone()
        chosen[anchor] = True
    picture = _enlarged(photograph(image))
    mask = Image.fromarray(chosen.cpu().to(torch.uint8).mul(255).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.6)
    result = Image.composite(picture, faded, mask)
    inside = Image.fromarray(np.pad(np.asarray(mask), 2)).filter(ImageFilter.MinFilter(5))
    inside = inside.crop((2, 2, 2 + mask.width, 2 + mask.height))
    outline = Image.composite(Image.new("L", mask.size), mask, inside)
    result.paste(Image.new("RGB", picture.size, HIGHLIGHT), mask=outline)
    return _marked(result, chosen.shape, anchor, 1) if anchor is not None else result


def anchor_overlay(image: Tensor, grid: tuple[int, int], anchor: tuple[int, int], window: int) -> Image.Image:
    """An image (3, h, w) with one patch of the (H, W) grid and the window around it marked."""
    picture = _marked(_enlarged(photograph(image)), grid, anchor, window, colour="#ffffff")
    return _marked(picture, grid, anchor, 1)


def heat_map(values: Tensor, size: tuple[int, int]) -> Image.Image:
    """Values (H, W) in [0, 1] in the colours of viridis, enlarged patch by patch to (h, w) pixels."""
    colours = matplotlib.colormaps["viridis"](values.cpu().double().numpy(), bytes=True)[..., :3]
    height, width = size
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def kept_fraction(weights: Tensor) -> Tensor:
    """Share (H, W) of each patch's window cells inside the image with a weight (window², H, W) above 0."""
    window = math.isqrt(len(weights))
    ones = torch.ones(1, 1, *weights.shape[1:])
    inside = F.conv2d(ones, torch.ones(1, 1, window, window), padding=window // 2)[0, 0]
    return (weights.cpu() > 0).sum(dim=0) / inside


def curve(steps: Sequence[float], values: Sequence[float]) -> Image.Image:
    """A line over steps."""
    figure = Figure(figsize=(4.6, 2.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color=ACCENT, linewidth=1.6, marker="o" if len(steps) < 3 else None, markersize=4)
    axes.grid(color="#e6e9f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b4bac8")
    axes.tick_params(colors="#5a6478", labelsize=8.5, length=0)
    axes.set_xlabel("step", color="#5a6478", fontsize=8.5)
    axes.margins(x=0.02, y=0.12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Image.open(buffer).convert("RGB")


def data_uri(image: Image.Image) -> str:
    """An image as a PNG inside a URI, so that a page needs no other file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, round(_SHOWN_SIZE / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _marked(
    picture: Image.Image, grid: tuple[int, int], anchor: tuple[int, int], window: int, colour: str = "#ff2d87"
) -> Image.Image:
    """Draw a frame around the window of patches about `anchor`, light inside dark to show on any background."""
    picture = picture.copy()
    radius = window // 2
    (top, bottom), (left, right) = (
        ((max(at - radius, 0)) * size / patches, min(at + radius + 1, patches) * size / patches)
        for at, patches, size in zip(anchor, grid, (picture.height, picture.width), strict=True)
    )
    frame = round(left), round(top), round(right) - 1, round(bottom) - 1
    draw = ImageDraw.Draw(picture)
    draw.rectangle((frame[0] - 2, frame[1] - 2, frame[2] + 2, frame[3] + 2), outline="#12161f", width=5)
    draw.rectangle((frame[0] - 1, frame[1] - 1, frame[2] + 1, frame[3] + 1), outline=colour, width=3)
    return picture
