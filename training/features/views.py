"""The photometric view of the consistency term: colours change, geometry does not.

Drawn as torchvision draws it, image by image on the CPU; applied to a whole batch on its device, where torchvision
takes one strength for all images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale

# Strengths of the published recipe, each image drawn by itself.
_JITTER = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
_BLUR = v2.GaussianBlur(kernel_size=5)
_GRAYSCALE, _BLURRED = 0.2, 0.5  # how often


class Photometric(NamedTuple):
    """What is done to each of B images; on the CPU."""

    order: Tensor  # (B, 4) int64, which of the factors comes first to last
    factors: Tensor  # (B, 4) float32, of brightness, contrast, saturation and hue
    grayscale: Tensor  # (B,) bool
    blur: Tensor  # (B,) float32, the deviation in pixels of torchvision's blur; 0: none

    def __getitem__(self, images: slice | Tensor) -> Photometric:  # type: ignore[override]
        """Those of some of the images."""
        return Photometric(*(getattr(self, name)[images] for name in self._fields))


def photometric_parameters(count: int, generator: torch.Generator) -> Photometric:
    """Draw what is done to `count` images, in their order."""
    # torchvision draws from the global generator only; `fork_rng` leaves that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        drawn = [_draw() for _ in range(count)]
    order, factors, grayscale, blur = zip(*drawn, strict=True)
    return Photometric(torch.stack(order), torch.tensor(factors), torch.tensor(grayscale), torch.tensor(blur))


def _draw() -> tuple[Tensor, tuple[float, ...], bool, float]:
    jitter = _JITTER.make_params([])
    factors = tuple(jitter[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue"))
    grayscale = bool(torch.rand(1) < _GRAYSCALE)
    blurred = bool(torch.rand(1) < _BLURRED)
    return jitter["fn_idx"], factors, grayscale, _BLUR.make_params([])["sigma"][0] if blurred else 0.0


def photometric(images: Tensor, parameters: Photometric) -> Tensor:
    """Recoloured, perhaps blurred copies of images (B, 3, h, w) in [0, 1], as torchvision makes them one by one.

    Brightness, contrast and saturation each clip their result to [0, 1], as in the published code: of normalised images
    that cuts off most of the signal.

    Args:
        images: float32, on any device.
        parameters: of the B images.
    """
    images = images.clone()
    for place in range(len(_STEPS)):
        for which, change in enumerate(_STEPS):
            _apply(images, parameters.order[:, place] == which, change, parameters.factors[:, which])
    _apply(images, parameters.grayscale, lambda some, _: rgb_to_grayscale(some, 3), parameters.blur)
    _apply(images, parameters.blur > 0, _blur, parameters.blur)
    return images


def _apply(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], amounts: Tensor) -> None:
    """Change the images (B, 3, h, w) that are `chosen` (B,) in place, each by its amount (B,)."""
    where = chosen.nonzero()[:, 0]
    if len(where):
        amount = amounts[where, None, None, None].to(images.device, non_blocking=True)
        where = where.to(images.device, non_blocking=True)
        images[where] = change(images[where], amount)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_(rgb_to_grayscale(images) * (1 - factor)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV, where a full turn is 1."""
    low, value = torch.aminmax(images, dim=1, keepdim=True)
    spread = value - low
    grey = spread == 0
    red, green, blue = ((value - images) / spread.masked_fill(grey, 1)).split(1, dim=1)
    hue = torch.where(images[:, 1:2] == value, 2 + red - blue, 4 + green - red)
    hue = torch.where(images[:, :1] == value, blue - green, hue)  # in sixths of a turn
    saturation = spread / value.masked_fill(grey, 1)
    turned = (hue / 6 + shift).remainder_(1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    sextant = (offsets + 6 * turned).remainder_(6)
    share = torch.minimum(sextant, 4 - sextant).clamp_(0, 1)  # 0: the channel is the greatest, 1: the least
    return torch.where(share == 0, value, (value * (1 - saturation * share)).clamp_(0, 1))


def _blur(images: Tensor, deviation: Tensor) -> Tensor:
    (side, _), limit = _BLUR.kernel_size, (_BLUR.kernel_size[0] - 1) / 8**0.5
    line = torch.linspace(-limit, limit, side, device=images.device)
    weights = torch.softmax(-(line / deviation[:, 0, 0]).square(), dim=1)  # (B, side)
    kernels = (weights[:, :, None] * weights[:, None]).repeat_interleave(3, dim=0)[:, None]
    padded = F.pad(images, [side // 2] * 4, mode="reflect").flatten(0, 1)
    return F.conv2d(padded[None], kernels, groups=len(padded))[0].view_as(images)


_STEPS = (_brightness, _contrast, _saturation, _hue)
