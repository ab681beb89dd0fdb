"""Which images make up the batch of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


def evenly_spread(images: int, chosen: int) -> Tensor:
    """The indices of up to `chosen` of so many images, evenly spread, int64."""
    return torch.from_numpy(np.linspace(0, images - 1, min(images, chosen)).round().astype(np.int64))
