"""The photometric view of the consistency term: colours change, geometry does not."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from training.parallel import Share

# Strengths of the published recipe, each image drawn by itself.
_JITTER = v2.Compose(
    [
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=5)], p=0.5),
    ]
)


def photometric(images: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """A randomly recoloured, perhaps blurred copy of images (B, 3, h, w) in [0, 1], or of a share of a batch.

    Brightness, contrast and saturation each clip their result to [0, 1], as in the published code: of normalised images
    that cuts off most of the signal.
    """
    seeds = torch.randint(2**62, (share.rows if share else len(images),), generator=generator)
    return torch.stack(
        [_jittered(*one) for one in zip(images, (share.of(seeds) if share else seeds).tolist(), strict=True)]
    )


def _jittered(image: Tensor, seed: int) -> Tensor:
    # torchvision draws from the global generator only; `fork_rng` leaves that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _JITTER(image)
