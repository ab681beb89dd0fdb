"""Frozen features of a data set: kept in memory or on disk, or computed each time they are asked for.

The un-augmented view of an image never changes, and neither do its local-propagation weights, which depend on the
frozen backbone only. So both can be kept; pool renewal then needs the head alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.backbones.base import Backbone
from training.data import SegmentationData
from training.data.loading import Ahead, Decoded, decode
from training.features.cache import CHUNK, hash_of, open_cache
from training.features.inference import Features, Windows, features_of, patch_features
from training.features.views import Photometric, photometric, photometric_parameters
from training.runtime.clock import Clock
from training.runtime.parallel import Share

_HELD_LABELS = 2**30  # bytes of decoded labels that stay in memory, where features do not need the images


@dataclass
class _Recent:
    """What is known of a batch of images that was asked for."""

    images: Tensor  # (B,)
    pixels: Tensor | None = None  # (B, 3, h, w) uint8
    labels: Tensor | None = None  # (B, h, w) int16
    features: Features | None = None
    decoded: set[str] = field(default_factory=set)  # "pixels", and "labels" even if there are none

    def add(self, found: Decoded, pixels: bool, labels: bool) -> None:
        """Take what was decoded."""
        if pixels:
            self.pixels = found.pixels
            self.decoded.add("pixels")
        if labels:
            self.labels = found.labels
            self.decoded.add("labels")


class FeatureBank:
    """The features of all images of a data set, by image index.

    Args:
        data: the images.
        backbone: frozen; its features are moved to `device` float32.
        size: height and width of the images in pixels.
        cache: where the features of the un-augmented view are kept: "none", in "memory", or on "disk", float16.
        views: how many photometric views of each image to keep in the same place, or in memory; 0: make a new one each
            time.
        jitter_after_normalization: apply the photometric jitter to normalised images, as the published code does.
        seed: of the kept views.
        backend: of the local-propagation weights.
        precision: that the backbone computes in.
        workers: processes that decode images ahead of their use.
        windows: for images larger than these; None: in one piece.
        cache_dir: the folder of caches on disk.
        identity: what makes the backbone, besides its weights, for the cache on disk.

    Attributes:
        clock: times the parts of a step.
    """

    def __init__(
        self,
        data: SegmentationData,
        backbone: Backbone,
        size: tuple[int, int],
        *,
        cache: str,
        views: int,
        jitter_after_normalization: bool,
        seed: int,
        device: torch.device,
        backend: str,
        precision: torch.dtype = torch.float32,
        workers: int = 0,
        windows: Windows | None = None,
        cache_dir: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.data = data
        self.backbone = backbone
        self.grid = backbone.grid(size)
        self.jitter_after_normalization = jitter_after_normalization
        self.device = device
        self.backend = backend
        self.precision = precision
        self.workers = workers
        self.windows = windows
        self.clock = Clock(device)
        self._checked = precision == torch.float32  # half precision may overflow: the first features are looked at
        self._coming: Ahead | None = None
        self._recent: deque[_Recent] = deque(maxlen=2)  # STEGO's loss asks for other images in between
        where = cache_dir if cache == "disk" else None
        about = None if where is None else self._identity(identity or {})
        self._kept: Features | None = None
        self._views: list[Tensor] = []
        if cache != "none":
            self._kept = self._keep_features(where, about)
        self._views = [self._keep_view(view, seed, where, about) for view in range(views)]
        hold = cache != "none" and 2 * len(data) * data.size[0] * data.size[1] <= _HELD_LABELS
        self._labels = torch.empty(len(data), *data.size, dtype=torch.int16) if hold else None
        self._has_label = torch.zeros(len(data), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def anchors_per_image(self) -> int:
        """G = H * W."""
        return self.grid[0] * self.grid[1]

    def batches(self, size: int = CHUNK) -> Iterator[Tensor]:
        """The indices of all images, `size` at a time, decoded ahead."""
        batches = torch.arange(len(self.data)).split(size)
        with self.ahead(batches, views=False):
            yield from batches

    @contextmanager
    def ahead(self, batches: Iterable[Tensor], *, views: bool, labels: bool = True) -> Iterator[None]:
        """Decode batches of images ahead of their use inside the block, by the workers if there are any.

        Whatever is asked for inside the block, its result is the same.

        Args:
            batches: the indices (B,) of the images that will be asked for, in this order.
            views: photometric views of them will be.
            labels: their labels will be.
        """
        pixels = self._kept is None or (views and not self._views)
        labels = labels and self._labels is None
        if not self.workers or not (pixels or labels):
            yield
            return
        pin = self.device.type == "cuda"
        coming = Ahead(self.data, batches, self.workers, pixels=pixels, labels=labels, pin=pin)
        before, self._coming = self._coming, coming
        try:
            yield
        finally:
            self._coming = before
            coming.close()

    def labels(self, images: Tensor) -> Tensor | None:
        """Labels (B, h, w) int64 of the images with these indices, -1 where unknown; None for a set without labels."""
        with self.clock.part("data"):
            if self._labels is None:
                labels = self._decoded(images, labels=True).labels
            else:
                images = images.cpu()
                new = images[~self._has_label[images]].unique()
                if len(new):
                    found = decode(self.data, new, pixels=False, labels=True).labels
                    if found is None:
                        return None
                    self._labels[new] = found
                    self._has_label[new] = True
                labels = self._labels[images]
            return None if labels is None else labels.to(self.device, non_blocking=True).long()

    def get(self, images: Tensor) -> Features:
        """Features of the un-augmented view of the images with these indices (B,)."""
        if self._kept is not None:
            with self.clock.part("data"):
                return Features(*(self._of(kept, images) for kept in self._kept))
        pixels = self._pixels(images)
        batch = self._recall(images)
        if batch.features is None:
            batch.features = self._compute(pixels)
        return batch.features

    def mirrored_tokens(self, images: Tensor) -> Tensor:
        """Tokens (B, G, Df) of the images with these indices (B,), mirrored left to right."""
        return self._compute(self._pixels(images).flip(3), weights=False).tokens

    def photometric_tokens(self, images: Tensor, generator: torch.Generator, share: Share) -> Tensor:
        """Tokens (b, G, Df) of a photometric view of a share of images.

        Args:
            images: indices (B,), of the whole batch: what happens to an image depends on its place in it.
            generator: on the CPU.
            share: the b images whose tokens are returned.
        """
        if self._views:
            chosen = torch.randint(len(self._views), (), generator=generator)
            with self.clock.part("data"):
                return self._of(self._views[chosen], share.of(images))
        with self.clock.part("views"):
            parameters = photometric_parameters(len(images), generator)
        return self._tokens_of_view(share.of(images), parameters[share.first : share.stop])

    def patches(self, images: Tensor, positions: Tensor) -> Tensor:
        """The token (M, Df) at one patch position (M,) of each of the images (M,), which may repeat."""
        if self._kept is not None:
            tokens = self._kept.tokens
            return tokens[images.to(tokens.device), positions.to(tokens.device)].to(self.device).float()
        found = torch.empty(len(images), self.backbone.features_dim, device=self.device)
        different, place = images.unique(return_inverse=True)
        chunks = different.split(CHUNK)
        with self.ahead(chunks, views=False, labels=False):
            for number, some in enumerate(chunks):
                tokens = self._compute(self._pixels(some), weights=False).tokens
                rows = (place // CHUNK == number).nonzero()[:, 0]
                found[rows] = tokens[(place[rows] % CHUNK).to(self.device), positions[rows].to(self.device)]
        return found

    def _of(self, kept: Tensor, images: Tensor) -> Tensor:
        return kept[images.to(kept.device)].to(self.device).float()  # half as much to copy, where it is float16

    def _pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1]."""
        with self.clock.part("data"):
            return self._decoded(images, pixels=True).pixels.to(self.device, non_blocking=True).float() / 255

    def _decoded(self, images: Tensor, *, pixels: bool = False, labels: bool = False) -> _Recent:
        """A batch with what is asked for, and with what was decoded along with it."""
        batch = self._recall(images)
        wanted = {name for name, asked in (("pixels", pixels), ("labels", labels)) if asked}
        if self._coming is not None and wanted - batch.decoded:
            found = self._coming.take(images)
            if found is not None:
                batch.add(found, self._coming.pixels, self._coming.labels)
        wanted -= batch.decoded
        if wanted:
            pixels, labels = "pixels" in wanted, "labels" in wanted
            batch.add(decode(self.data, images, pixels=pixels, labels=labels), pixels, labels)
        return batch

    def _recall(self, images: Tensor) -> _Recent:
        for batch in self._recent:
            if torch.equal(batch.images, images):
                return batch
        self._recent.append(_Recent(images))
        return self._recent[-1]

    def _compute(self, images: Tensor, weights: bool = True) -> Features:
        with self.clock.part("backbone"):
            found = features_of(
                self.backbone,
                images,
                weights=weights,
                windows=self.windows,
                backend=self.backend,
                precision=self.precision,
            )
        if not (self._checked or found.tokens.isfinite().all()):
            raise ValueError(
                "config: `backbone.precision` must be bfloat16 or float32, as features are beyond float16 or not finite"
            )
        self._checked = True
        return found

    @torch.no_grad()
    def _tokens_of_view(self, images: Tensor, parameters: Photometric) -> Tensor:
        pixels = self._pixels(images)
        with self.clock.part("views"):
            if self.jitter_after_normalization:
                pixels = photometric(self.backbone.normalize(pixels), parameters)
            else:
                pixels = self.backbone.normalize(photometric(pixels, parameters))
        with self.clock.part("backbone"):
            return patch_features(self.backbone, pixels, self.precision).tokens

    def _keep_features(self, where: Path | None, about: dict[str, Any] | None) -> Features:
        def compute(batches: Iterable[Tensor]) -> Iterator[Features]:
            for images in self._through(batches, "features"):
                yield self._compute(self._pixels(images))

        if where is None:
            parts = compute(torch.arange(len(self.data)).split(CHUNK))
            return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        arrays = {"tokens": (self.anchors_per_image, self.backbone.features_dim), "weights": (9, *self.grid)}
        return Features(*open_cache(where, about, len(self.data), arrays, compute, "features"))

    def _keep_view(self, view: int, seed: int, where: Path | None, about: dict[str, Any] | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed + view)
        chunks = torch.arange(len(self.data)).split(CHUNK)
        parameters = [photometric_parameters(len(images), generator) for images in chunks]

        def compute(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor]]:
            for images in self._through(batches, "photometric views"):
                yield (self._tokens_of_view(images, parameters[int(images[0]) // CHUNK]),)

        if where is None:
            return torch.cat([tokens for (tokens,) in compute(chunks)])
        about = about | {"view": seed + view, "jitter_after_normalization": self.jitter_after_normalization}
        arrays = {"tokens": (self.anchors_per_image, self.backbone.features_dim)}
        return open_cache(where, about, len(self.data), arrays, compute, "photometric views")[0]

    def _through(self, batches: Iterable[Tensor], what: str) -> Iterator[Tensor]:
        with self.ahead(batches, views=True, labels=False):
            yield from tqdm(batches, desc=what, unit="chunk", leave=False)

    def _identity(self, backbone: dict[str, Any]) -> dict[str, Any]:
        """All that decides the features of the images."""
        return {
            "data": self.data.identity(),
            "windows": self.windows,
            "backbone": backbone | {"weights": hash_of(self.backbone), "precision": str(self.precision)},
        }
