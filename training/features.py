"""Frozen features of a data set: computed once and kept in memory, or computed each time they are asked for.

The un-augmented view of an image never changes, and neither do its local-propagation weights, which depend on the
frozen backbone only. So both can be kept; pool renewal then needs the head alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from training.backbones.base import Backbone
from training.data import SegmentationData
from training.inference import Features, Windows, features_of
from training.parallel import Share
from training.views import photometric

_CHUNK = 32  # images that go through the backbone at a time
_LOADER_THREADS = 8  # decoding releases the interpreter lock


class FeatureBank:
    """The features of all images of a data set, by image index.

    Args:
        data: the images.
        backbone: frozen; its features are moved to `device` float32.
        size: height and width of the images in pixels.
        cache: keep the features of the un-augmented view in memory.
        views: how many photometric views of each image to keep in memory; 0: make a new one each time.
        jitter_after_normalization: apply the photometric jitter to normalised images, as the published code does.
        seed: of the kept views.
        backend: of the local-propagation weights.
        windows: for images larger than these; None: in one piece.
    """

    def __init__(
        self,
        data: SegmentationData,
        backbone: Backbone,
        size: tuple[int, int],
        *,
        cache: bool,
        views: int,
        jitter_after_normalization: bool,
        seed: int,
        device: torch.device,
        backend: str,
        windows: Windows | None = None,
    ) -> None:
        self.data = data
        self.backbone = backbone
        self.grid = backbone.grid(size)
        self.jitter_after_normalization = jitter_after_normalization
        self.device = device
        self.backend = backend
        self.windows = windows
        self._cached = self._compute_all() if cache else None
        self._views = [self._compute_views(torch.Generator().manual_seed(seed + view)) for view in range(views)]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def anchors_per_image(self) -> int:
        """G = H * W."""
        return self.grid[0] * self.grid[1]

    def labels(self, images: Tensor) -> Tensor | None:
        """Labels (B, h, w) int64 of the images with these indices, -1 where unknown; None for a set without labels."""
        labels = [self.data.label(index) for index in images.tolist()]
        return None if labels[0] is None else torch.stack(labels).to(self.device)

    def batches(self, size: int = _CHUNK) -> Iterator[Tensor]:
        """The indices of all images, `size` at a time."""
        yield from torch.arange(len(self.data)).split(size)

    def get(self, images: Tensor) -> Features:
        """Features of the un-augmented view of the images with these indices (B,)."""
        if self._cached is not None:
            tokens, weights = self._cached
            images = images.to(tokens.device)
            return Features(tokens[images], weights[images])
        return self._compute(self._load(images))

    def mirrored_tokens(self, images: Tensor) -> Tensor:
        """Tokens (B, G, Df) of the images with these indices (B,), mirrored left to right."""
        return self._compute(self._load(images).flip(3), weights=False).tokens

    def photometric_tokens(self, images: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
        """Tokens (B, G, Df) of a photometric view of the images with these indices (B,), which may be a share."""
        if self._views:
            chosen = torch.randint(len(self._views), (), generator=generator)
            tokens = self._views[chosen]
            return tokens[images.to(tokens.device)]
        return self._tokens_of_view(images, generator, share)

    def patches(self, images: Tensor, positions: Tensor) -> Tensor:
        """The token (M, Df) at one patch position (M,) of each of the images (M,), which may repeat."""
        if self._cached is not None:
            tokens = self._cached.tokens
            return tokens[images.to(tokens.device), positions.to(tokens.device)]
        chunks = zip(images.split(_CHUNK), positions.split(_CHUNK), strict=True)
        return torch.cat([self._patches_of_chunk(some, at) for some, at in chunks])

    def _patches_of_chunk(self, images: Tensor, positions: Tensor) -> Tensor:
        tokens = self._compute(self._load(images), weights=False).tokens
        return tokens[torch.arange(len(images), device=tokens.device), positions.to(tokens.device)]

    def _load(self, images: Tensor) -> Tensor:
        with ThreadPoolExecutor(_LOADER_THREADS) as pool:
            pixels = torch.stack(list(pool.map(self.data.image, images.tolist())))
        return pixels.to(self.device).float() / 255

    def _compute(self, images: Tensor, weights: bool = True) -> Features:
        return features_of(self.backbone, images, weights=weights, windows=self.windows, backend=self.backend)

    @torch.no_grad()
    def _tokens_of_view(self, images: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
        pixels = self._load(images)
        if self.jitter_after_normalization:
            pixels = photometric(self.backbone.normalize(pixels), generator, share)
        else:
            pixels = self.backbone.normalize(photometric(pixels, generator, share))
        return self.backbone(pixels).tokens.float()

    def _chunks(self, what: str) -> Iterable[Tensor]:
        return tqdm(list(self.batches()), desc=what, unit="chunk", leave=False)

    def _compute_all(self) -> Features:
        parts = [self._compute(self._load(images)) for images in self._chunks("features")]
        return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _compute_views(self, generator: torch.Generator) -> Tensor:
        return torch.cat([self._tokens_of_view(images, generator) for images in self._chunks("photometric views")])
