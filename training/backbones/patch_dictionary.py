"""A backbone without downloaded weights: whitened image patches coded by a k-means dictionary, with local context."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones.base import Backbone, PatchFeatures
from training.backbones.local import similarity_as_attention

_SCALES = (1, 2)  # windows are cut from the image and from the image at half its size
_WINDOW = 6  # pixels a side of one window
_ATOMS = 96  # dictionary entries of one scale
_CONTEXT = (1, 3, 7)  # sides, in patches, of the neighbourhoods that descriptors are averaged over
_CONTRAST_FLOOR = 4e-4  # added to a window's variance, so that noise in flat windows is not amplified
_WHITENING_FLOOR = 0.1  # added to the eigenvalues of windows of unit variance
_WHITENING = 0.5  # exponent of the final PCA whitening: 0 keeps the variances, 1 makes them equal
_LEARNING_IMAGES = 160  # images to learn from, drawn from all
_LEARNING_WINDOWS = 40_000  # windows to learn a dictionary from
_LEARNING_STRIDE = 5  # pixels between them; odd, so that they meet patches at every offset
_KMEANS_ROUNDS = 12
_LEAST_SPREAD = 1e-6  # standard deviation of a descriptor; less is rounding
_CHUNK = 16  # images coded at a time while learning


class PatchDictionary(Backbone):
    """Single-layer features in the manner of Coates and Ng (2012), one descriptor a patch.

    Small windows at two scales are normalised in contrast, ZCA-whitened and coded by their distance to the atoms of a
    dictionary (``max(0, mean distance - distance)``). Codes are averaged over each patch and joined by its colour and
    texture statistics; averages over the surrounding patches give context. A partially whitening PCA reduces all that
    to ``features_dim``. Nothing uses a label.

    Args:
        features_dim: Df.
        patch_size: pixels a side of one patch, at least 4.
        seed: of the choice of images and windows to learn from.

    Raises:
        ValueError: ``features_dim`` exceeds the length of the descriptors, or the patch is too small.
    """

    prefix_tokens = 0

    def __init__(self, features_dim: int, patch_size: int, seed: int = 0) -> None:
        super().__init__()
        if patch_size < 4:
            raise ValueError(f"PatchDictionary: `patch_size` must be at least 4, got {patch_size}")
        descriptor_dim = len(_CONTEXT) * (len(_SCALES) * _ATOMS + _STATISTICS)
        if not 1 <= features_dim <= descriptor_dim:
            raise ValueError(f"PatchDictionary: `features_dim` must be in 1..{descriptor_dim}, got {features_dim}")
        self.features_dim = features_dim
        self.patch_size = patch_size
        self.seed = seed
        self.dictionaries = nn.ModuleList(WindowDictionary() for _ in _SCALES)
        self.register_buffer("mean", torch.zeros(descriptor_dim))
        self.register_buffer("scale", torch.ones(descriptor_dim))
        self.register_buffer("components", torch.zeros(descriptor_dim, features_dim))

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] as they are."""
        return images

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        """Learn the dictionaries and the final PCA from unlabelled images (3, h, w) of one size.

        Raises:
            ValueError: no patch differs from another.
        """
        images = torch.stack(_reservoir(images, _LEARNING_IMAGES, random.Random(self.seed))).to(self.mean.device)
        generator = torch.Generator().manual_seed(self.seed)
        for scale, dictionary in zip(_SCALES, self.dictionaries, strict=True):
            windows = dictionary.windows(_shrink(images, scale), _LEARNING_STRIDE).flatten(0, 1)
            dictionary.fit(_draw_rows(windows, _LEARNING_WINDOWS, generator), generator)
        self._fit_projection(torch.cat([self._descriptors(some).flatten(0, 1) for some in images.split(_CHUNK)]))

    def forward(self, images: Tensor) -> PatchFeatures:
        """Patch features of images (B, 3, h, w) in [0, 1]; the attention is that of similar descriptors."""
        tokens = ((self._descriptors(images) - self.mean) * self.scale) @ self.components
        attention = similarity_as_attention(tokens, centre=False)  # the PCA has centred them over all images
        return PatchFeatures(tokens, attention, attention)

    def _fit_projection(self, descriptors: Tensor) -> None:
        self.mean.copy_(descriptors.mean(dim=0))
        spread = descriptors.std(dim=0)
        if spread.max() <= _LEAST_SPREAD:
            raise ValueError(
                "PatchDictionary: the training images must differ from one single colour, or there is nothing to learn"
            )
        self.scale.copy_(1 / spread.clamp(min=_LEAST_SPREAD))
        standardised = (descriptors - self.mean) * self.scale
        eigenvalues, eigenvectors = torch.linalg.eigh(standardised.T @ standardised / len(standardised))
        leading = eigenvalues.flip(0)[: self.features_dim].clamp(min=1e-6)
        components = eigenvectors.flip(1)[:, : self.features_dim] * leading ** (-_WHITENING / 2)
        # A mean square of 1 a feature suits the head's learning rate, whatever the whitening.
        self.components.copy_(components / (leading ** (1 - _WHITENING)).mean().sqrt())

    def _descriptors(self, images: Tensor) -> Tensor:
        """Descriptors (B, G, descriptor_dim) before the PCA."""
        grid = self.grid(tuple(images.shape[2:]))
        images = images[:, :, : grid[0] * self.patch_size, : grid[1] * self.patch_size]
        maps = [_statistics(images, grid)]
        for scale, dictionary in zip(_SCALES, self.dictionaries, strict=True):
            stride = max(1, self.patch_size // (4 * scale))
            maps.append(F.adaptive_avg_pool2d(dictionary(_shrink(images, scale), stride), grid))
        cell = torch.cat(maps, dim=1)
        context = [F.avg_pool2d(cell, side, 1, side // 2, count_include_pad=False) for side in _CONTEXT]
        return torch.cat(context, dim=1).flatten(2).mT


class WindowDictionary(nn.Module):
    """A whitening of windows of ``_WINDOW`` pixels a side, and ``_ATOMS`` k-means centres of whitened windows."""

    def __init__(self) -> None:
        super().__init__()
        dim = 3 * _WINDOW**2
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.zeros(dim, dim))
        self.register_buffer("atoms", torch.zeros(_ATOMS, dim))

    def windows(self, images: Tensor, stride: int) -> Tensor:
        """Windows of normalised contrast (B, positions, 3 * _WINDOW**2), centred on every `stride`-th pixel."""
        before, after = (_WINDOW - 1) // 2, _WINDOW // 2
        padded = F.pad(images, (before, after, before, after), mode="replicate")
        windows = F.unfold(padded, _WINDOW, stride=stride).mT
        windows = windows - windows.mean(dim=-1, keepdim=True)
        return windows / (windows.square().mean(dim=-1, keepdim=True) + _CONTRAST_FLOOR).sqrt()

    def fit(self, windows: Tensor, generator: torch.Generator) -> None:
        """Learn from windows (n, 3 * _WINDOW**2)."""
        self.mean.copy_(windows.mean(dim=0))
        centred = windows - self.mean
        eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        self.whitening.copy_((vectors / (eigenvalues.clamp(min=0) + _WHITENING_FLOOR).sqrt()) @ vectors.T)
        self.atoms.copy_(_kmeans(centred @ self.whitening, _ATOMS, generator))

    def forward(self, images: Tensor, stride: int) -> Tensor:
        """Codes (B, _ATOMS, h / stride, w / stride) of images (B, 3, h, w)."""
        windows = (self.windows(images, stride) - self.mean) @ self.whitening
        distance = torch.cdist(windows, self.atoms, compute_mode="use_mm_for_euclid_dist")
        codes = F.relu(distance.mean(dim=-1, keepdim=True) - distance)
        return codes.mT.unflatten(2, (-(-images.shape[2] // stride), -(-images.shape[3] // stride)))


def _statistics(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colour and texture of each patch, (B, _STATISTICS, H, W)."""
    red, green, blue = images.unbind(dim=1)
    brightness = images.mean(dim=1)
    colours = torch.stack((brightness, red - green, (red + green) / 2 - blue), dim=1)
    chroma = colours[:, 1:] / (brightness[:, None] + 0.1)
    vertical = F.pad(brightness[:, 2:] - brightness[:, :-2], (0, 0, 1, 1))
    horizontal = F.pad(brightness[:, :, 2:] - brightness[:, :, :-2], (1, 1))
    edges = torch.stack(
        (vertical.abs(), horizontal.abs(), (vertical + horizontal).abs(), (vertical - horizontal).abs()), 1
    )
    mean = F.adaptive_avg_pool2d(torch.cat((colours, chroma, edges.sqrt()), dim=1), grid)
    square = F.adaptive_avg_pool2d(colours.square(), grid)
    spread = (square - mean[:, :3].square()).clamp(min=1e-6).sqrt()
    return torch.cat((mean, (mean[:, :1] + 0.05).log(), spread, (spread[:, :1] + 0.01).log()), dim=1)


_STATISTICS = 14  # channels of _statistics


def _shrink(images: Tensor, scale: int) -> Tensor:
    return images if scale == 1 else F.avg_pool2d(images, scale)


def _draw_rows(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (number,), generator=generator).to(rows.device)]


def _reservoir(items: Iterable[Tensor], size: int, randomness: random.Random) -> list[Tensor]:
    """`size` items, each as likely as any other (fewer if there are fewer)."""
    kept: list[Tensor] = []
    for index, item in enumerate(items):
        if index < size:
            kept.append(item)
        elif (place := randomness.randrange(index + 1)) < size:
            kept[place] = item
    return kept


def _kmeans(rows: Tensor, centres: int, generator: torch.Generator) -> Tensor:
    """Centres (centres, dim) by Lloyd's algorithm from random rows; an empty cluster takes a random row."""
    means = rows[torch.randperm(len(rows), generator=generator)[:centres].to(rows.device)]
    for _ in range(_KMEANS_ROUNDS):
        nearest = (means.square().sum(dim=1) / 2 - rows @ means.T).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=centres)[:, None]
        sums = torch.zeros_like(means).index_add_(0, nearest, rows)
        spare = rows[torch.randint(len(rows), (centres,), generator=generator).to(rows.device)]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), spare)
    return means
