"""Dense CRF (Krähenbühl and Koltun, NIPS 2011): pixels near each other and of one colour should be of one class.

``Q <- softmax(log p + sum_k w_k N_k K_k N_k Q)``, ten times from ``Q = p``, with the kernels ``K_1`` of position and
``K_2`` of position and colour, Gaussian, and ``N_k = (K_k 1)^(-1/2)``. All constants are those of the published code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor
from torch.nn import functional as F

_ROUNDS = 10
_SMOOTHNESS = 3.0, 1.0  # weight, and standard deviation in pixels
_APPEARANCE = 4.0, 67.0, 3.0  # weight, and standard deviations in pixels and in grey levels of 255
_CELLS = 80 * 80  # the exact sums go over all pairs of at most so many cells


def check_crf(name: str) -> None:
    """Refuse a CRF that is not installed.

    Raises:
        ValueError: it is not.
    """
    if name == "pydensecrf" and importlib.util.find_spec("pydensecrf") is None:
        raise ValueError(
            "config: `evaluation.crf` pydensecrf needs the package pydensecrf2, which is not installed: pip install"
            " pydensecrf2, or evaluation.crf=exact"
        )


def refined(name: str, images: Tensor, log_probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities (B, C, h, w) of classes or clusters at the pixels of images, refined by the CRF called `name`.

    Args:
        name: "pydensecrf", the permutohedral approximation, images in parallel processes; or "exact".
        images: (B, 3, h, w) uint8.
        log_probabilities: (B, C, h, w) of each segmentation.
    """
    if name == "exact":
        beliefs: dict[str, list[Tensor]] = {key: [] for key in log_probabilities}
        for index, image in enumerate(images):
            size = next(iter(log_probabilities.values())).shape[2:]
            pairs = pair_weights(image.to(next(iter(log_probabilities.values())).device), size)
            for key, logs in log_probabilities.items():
                beliefs[key].append(exact(pairs, logs[index]))
        return {key: torch.stack(parts) for key, parts in beliefs.items()}
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    found = {}
    for key, logs in log_probabilities.items():
        jobs: list[Callable] = [
            delayed(_permutohedral)(*pair) for pair in zip(pixels, logs.exp().cpu().numpy(), strict=True)
        ]
        parts = Parallel(n_jobs=min(len(jobs), torch.get_num_threads()))(jobs)
        found[key] = torch.from_numpy(np.stack(parts)).to(logs.device)
    return found


def _permutohedral(image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Probabilities (C, h, w) of one image (h, w, 3) uint8 with probabilities (C, h, w)."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    classes, height, width = probabilities.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    weight, position = _SMOOTHNESS
    field.addPairwiseGaussian(sxy=position, compat=weight)
    weight, position, colour = _APPEARANCE
    field.addPairwiseBilateral(sxy=position, srgb=colour, rgbim=image, compat=weight)
    return np.array(field.inference(_ROUNDS), dtype=np.float32).reshape(classes, height, width)


class Pairs(NamedTuple):
    """The kernels between all cells of a grid over an image."""

    weights: Tensor  # (n, n), the sum of w_k N_k K_k N_k
    grid: tuple[int, int]


def pair_weights(image: Tensor, size: Sequence[int], cells: int = _CELLS) -> Pairs:
    """The kernels of an image (3, h, w) uint8 over a grid of at most `cells`, in positions of `size` pixels.

    Two numbers of memory for each pair of cells.
    """
    shrink = max(1.0, (size[0] * size[1] / cells) ** 0.5)
    grid = (max(1, int(size[0] / shrink)), max(1, int(size[1] / shrink)))
    colours = F.adaptive_avg_pool2d(image.float(), grid).flatten(1).T
    rows, columns = ((torch.arange(n, device=image.device) + 0.5) * s / n for n, s in zip(grid, size, strict=True))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    weight, position = _SMOOTHNESS
    weights = weight * _normalised(places / position)
    weight, position, colour = _APPEARANCE
    weights += weight * _normalised(torch.cat([places / position, colours / colour], dim=1))
    return Pairs(weights, grid)


def exact(pairs: Pairs, log_probabilities: Tensor) -> Tensor:
    """Probabilities (C, h, w) after mean-field rounds over all pairs, of log-probabilities (C, h, w), on any device.

    Where the grid is coarser than the pixels, log p is averaged to it, and what the rounds change in it is interpolated
    back to all pixels.
    """
    small = F.adaptive_avg_pool2d(log_probabilities, pairs.grid).flatten(1).T.log_softmax(dim=1)  # (n, C)
    beliefs = small.exp()
    for _ in range(_ROUNDS):
        beliefs = (small + pairs.weights @ beliefs).softmax(dim=1)
    change = (beliefs.clamp(min=1e-12).log() - small).T.unflatten(1, pairs.grid)[None]
    wide = F.interpolate(change, size=tuple(log_probabilities.shape[1:]), mode="bilinear", align_corners=False)[0]
    return (log_probabilities + wide).softmax(dim=0)


def _normalised(features: Tensor) -> Tensor:
    """``N K N`` (n, n) of features (n, d) in units of their standard deviations."""
    kernel = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
    scale = kernel.sum(dim=1).rsqrt()
    return kernel.mul_(scale[:, None]).mul_(scale)
