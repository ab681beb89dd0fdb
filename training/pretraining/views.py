"""Two crops of each photograph, and which patch of the one shows what which place of the other shows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.features.views import Photometric, photometric, photometric_parameters

_ASPECT = 4 / 3  # a crop is at most so much wider or higher than the photograph is


class Drawn(NamedTuple):
    """What is drawn for the V = 2B views of B photographs, all first views before all second ones; on the CPU."""

    boxes: Tensor  # (V, 4), left, top, width and height as shares of the photograph
    mirrored: Tensor  # (V,) bool
    colours: Photometric
    hidden: Tensor  # (V, H, W) bool, the patches that the student does not see


def draw_views(
    photographs: int, grid: tuple[int, int], least_scale: float, most_hidden: float, generator: torch.Generator
) -> Drawn:
    """Draw crops, colours and masks of two views of each photograph.

    Args:
        photographs: B.
        grid: H and W, the patches of a view.
        least_scale: the share of the photograph's area that a crop has at least.
        most_hidden: the share of patches that is hidden at most; each view has its own share, uniform from 0 on.
        generator: of the CPU.
    """
    views = 2 * photographs
    area = least_scale + (1 - least_scale) * torch.rand(views, generator=generator)
    aspect = _ASPECT ** (2 * torch.rand(views, generator=generator) - 1)
    sides = torch.stack([area.mul(aspect).sqrt(), area.div(aspect).sqrt()], dim=1).clamp(max=1)
    corners = (1 - sides) * torch.rand(views, 2, generator=generator)
    mirrored = torch.rand(views, generator=generator) < 0.5
    return Drawn(
        torch.cat([corners, sides], dim=1),
        mirrored,
        photometric_parameters(views, generator),
        _hidden(views, grid, most_hidden, generator),
    )


def _hidden(views: int, grid: tuple[int, int], most: float, generator: torch.Generator) -> Tensor:
    """Hide squares of 2 x 2 patches, the ones with the least random numbers: a patch alone is guessed from beside."""
    height, width = ((side + 1) // 2 for side in grid)
    share = most * torch.rand(views, 1, 1, generator=generator)
    chosen = torch.rand(views, height, width, generator=generator) < share
    return chosen.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, : grid[0], : grid[1]]


def render(photographs: Tensor, drawn: Drawn, size: tuple[int, int]) -> Tensor:
    """The views (V, 3, h, w) in [0, 1] of photographs (B, 3, H, W) uint8, on their device."""
    boxes, mirrored = (of_views.to(photographs.device, non_blocking=True) for of_views in drawn[:2])
    # Each pixel is the mean of 2 x 2 samples, so that a crop that is shrunk to half does not alias.
    places = _in_photograph(boxes, mirrored, (2 * size[0], 2 * size[1]))
    sampled = F.grid_sample(
        photographs.repeat(2, 1, 1, 1).float() / 255, 2 * places - 1, padding_mode="border", align_corners=False
    )
    return photometric(F.avg_pool2d(sampled, 2), drawn.colours)


def matches(drawn: Drawn, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each patch of a view lies in the other view of its photograph.

    Returns:
        places (V, H, W, 2), x and y in [-1, 1] as `torch.nn.functional.grid_sample` takes them, and whether the middle
        of the patch is inside the other view, (V, H, W) bool; on the CPU.
    """
    middles = _in_photograph(drawn.boxes, drawn.mirrored, grid)
    boxes, mirrored = (of_views.roll(len(of_views) // 2, 0)[:, None, None] for of_views in drawn[:2])
    places = _mirrored((middles - boxes[..., :2]) / boxes[..., 2:], mirrored)
    return 2 * places - 1, ((places >= 0) & (places <= 1)).all(dim=3)


def _in_photograph(boxes: Tensor, mirrored: Tensor, grid: tuple[int, int]) -> Tensor:
    """The middles (V, H, W, 2) of the cells of a grid over each view, x and y as shares of the photograph."""
    down, across = ((torch.arange(side, device=boxes.device) + 0.5) / side for side in grid)
    middles = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=2).expand(len(boxes), -1, -1, -1)
    boxes = boxes[:, None, None]
    return boxes[..., :2] + boxes[..., 2:] * _mirrored(middles, mirrored[:, None, None])


def _mirrored(places: Tensor, where: Tensor) -> Tensor:
    across, down = places.unbind(dim=3)
    return torch.stack([torch.where(where, 1 - across, across), down], dim=3)
