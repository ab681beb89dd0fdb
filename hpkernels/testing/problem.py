"""Random problems with the structure of real ones: patches of a few classes, alike within a class and an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CLASSES = 6
_CLASSES_PER_IMAGE = 3
_STYLE, _NOISE = 0.5, 0.8  # length of what is common to an image, and of what is one patch's own, beside a class's 1


@dataclass(frozen=True)
class Problem:
    """The tensors of one training step: L2-normalised rows, anchors ordered image by image, no gradients asked for.

    Attributes:
        z: (N, D) projections.
        features: (N, Df) backbone features.
        pool: (M, Df) task-agnostic reference pool.
        specific: (N, D) outputs of the EMA head.
        specific_pool: (M, D) task-specific reference pool.
        z_mixed: (N, D) projections of the locally propagated codes.
        images: B.
        height: H.
        width: W.
    """

    z: Tensor
    features: Tensor
    pool: Tensor
    specific: Tensor
    specific_pool: Tensor
    z_mixed: Tensor
    images: int
    height: int
    width: int

    @property
    def anchors_per_image(self) -> int:
        """G = H * W."""
        return self.height * self.width


def random_problem(
    seed: int = 0,
    *,
    images: int = 2,
    height: int = 4,
    width: int = 5,
    dim: int = 16,
    feature_dim: int = 24,
    pool_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Make a problem: the same numbers, up to rounding, for the same seed and sizes on every device and in every dtype.

    Args:
        seed: of everything that is random.
        images: B.
        height: H.
        width: W.
        dim: D.
        feature_dim: Df.
        pool_size: M.
        dtype: of all tensors.
        device: of all tensors.

    Returns:
        The problem, with N = images * height * width anchors.

    Examples:
        >>> from hpkernels.testing import random_problem
        >>> problem = random_problem(seed=1, images=3, height=2, width=5, dim=8)
        >>> problem.z.shape, problem.anchors_per_image
        (torch.Size([30, 8]), 10)
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def classes_of(groups: int, members: int) -> Tensor:
        palette = torch.rand(groups, _CLASSES, generator=generator).argsort(dim=1)[:, :_CLASSES_PER_IMAGE]
        return palette.gather(1, torch.randint(_CLASSES_PER_IMAGE, (groups, members), generator=generator))

    def vectors(centres: Tensor, classes: Tensor) -> Tensor:
        size = centres.shape[1]
        style = _STYLE * normalize(normal(len(classes), 1, size), dim=2)
        own = _NOISE * normalize(normal(*classes.shape, size), dim=2)
        return normalize((centres[classes] + style + own).flatten(0, 1), dim=1)

    anchors = classes_of(images, height * width)
    references = classes_of(pool_size, 1)  # each reference is a patch of an image of its own
    centres = {size: normalize(normal(_CLASSES, size), dim=1) for size in (feature_dim, dim)}
    tensors = {
        "features": vectors(centres[feature_dim], anchors),
        "pool": vectors(centres[feature_dim], references),
        "specific": vectors(centres[dim], anchors),
        "specific_pool": vectors(centres[dim], references),
        "z": vectors(centres[dim], anchors),
    }
    tensors["z_mixed"] = normalize(tensors["z"] + _NOISE * normalize(normal(*tensors["z"].shape), dim=1), dim=1)
    tensors = {name: value.to(device, dtype) for name, value in tensors.items()}
    return Problem(**tensors, images=images, height=height, width=width)
