"""Dense CRF (Krähenbühl and Koltun, NIPS 2011): pixels near each other and of one colour should be of one class.

``Q <- softmax(log p + sum_k w_k N_k K_k N_k Q)``, ten times from ``Q = p``, with the kernels ``K_1`` of position and
``K_2`` of position and colour, Gaussian, and ``N_k = (K_k 1)^(-1/2)``. All constants are those of the published code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

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


def refined(name: str, images: Tensor, log_probabilities: Tensor) -> Tensor:
    """Probabilities (B, C, h, w) of classes or clusters at the pixels of images, refined by the CRF called `name`.

    Args:
        name: "pydensecrf", the permutohedral approximation, images in parallel processes; or "exact".
        images: (B, 3, h, w) uint8.
        log_probabilities: (B, C, h, w).
    """
    if name == "exact":
        return torch.stack([exact(*pair) for pair in zip(images, log_probabilities, strict=True)])
    probabilities = log_probabilities.exp().cpu().numpy()
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    jobs: list[Callable] = [delayed(_permutohedral)(*pair) for pair in zip(pixels, probabilities, strict=True)]
    beliefs = Parallel(n_jobs=min(len(jobs), torch.get_num_threads()))(jobs)
    return torch.from_numpy(np.stack(beliefs)).to(log_probabilities.device)


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


def exact(image: Tensor, log_probabilities: Tensor, cells: int = _CELLS) -> Tensor:
    """Probabilities (C, h, w) after mean-field rounds over all pairs, on any device.

    Larger images are averaged to a grid of at most `cells`; what the rounds change there, in log p, is interpolated
    back to all pixels. Positions stay those in pixels of the image.

    Args:
        image: (3, h, w) uint8.
        log_probabilities: (C, h, w).
        cells: memory is two numbers for each pair of them.
    """
    size = log_probabilities.shape[1:]
    shrink = max(1.0, (size[0] * size[1] / cells) ** 0.5)
    grid = (max(1, int(size[0] / shrink)), max(1, int(size[1] / shrink)))
    colours = F.adaptive_avg_pool2d(image.float().to(log_probabilities.device), grid).flatten(1).T
    small = F.adaptive_avg_pool2d(log_probabilities, grid).flatten(1).T  # (n, C)
    small = small.log_softmax(dim=1)
    rows, columns = ((torch.arange(n, device=small.device) + 0.5) * s / n for n, s in zip(grid, size, strict=True))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    weight, position = _SMOOTHNESS
    kernel = weight * _normalised(places / position)
    weight, position, colour = _APPEARANCE
    kernel += weight * _normalised(torch.cat([places / position, colours / colour], dim=1))
    beliefs = small.exp()
    for _ in range(_ROUNDS):
        beliefs = (small + kernel @ beliefs).softmax(dim=1)
    change = (beliefs.clamp(min=1e-12).log() - small).T.unflatten(1, grid)[None]
    wide = F.interpolate(change, size=tuple(size), mode="bilinear", align_corners=False)[0]
    return (log_probabilities + wide).softmax(dim=0)


def _normalised(features: Tensor) -> Tensor:
    """``N K N`` (n, n) of features (n, d) in units of their standard deviations."""
    kernel = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
    scale = kernel.sum(dim=1).rsqrt()
    return kernel.mul_(scale[:, None]).mul_(scale)
