"""Images and labels by index, decoded in the process or ahead of their use by worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import joblib
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data import SegmentationData

_THREADS = 8  # of a batch that is decoded in the process: decoding releases the interpreter lock
_MOST_WORKERS = 8  # where the configuration leaves it open


class Decoded(NamedTuple):
    """A batch of B images; None for what was not asked for, and for labels that are not there."""

    images: Tensor  # (B,) int64, their indices
    pixels: Tensor | None  # (B, 3, h, w) uint8
    labels: Tensor | None  # (B, h, w) int16, -1 where unknown


def default_workers(device: torch.device) -> int:
    """How many workers feed a device: a GPU leaves the processor to them, and a CPU is busy itself."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun on this machine
    return min(_MOST_WORKERS, max(1, joblib.cpu_count() // processes)) if device.type == "cuda" else 0


def decode(data: SegmentationData, images: Tensor, *, pixels: bool, labels: bool, threads: int = _THREADS) -> Decoded:
    """Read images and their labels now."""
    indices = images.tolist()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(data.image, indices)) if pixels else []
        known = [label for label in pool.map(data.label, indices) if label is not None] if labels else []
    return Decoded(images, torch.stack(found) if found else None, torch.stack(known).short() if known else None)


class Ahead:
    """Batches that `workers` processes decode before they are asked for; they start with the first that is.

    Args:
        data: the images.
        batches: the indices (B,) of each batch, in the order in which they will be asked for.
        workers: how many processes, at least 1.
        pixels: decode images.
        labels: decode labels.
        pin: into memory that a GPU copies from while it computes.
    """

    def __init__(
        self, data: SegmentationData, batches: Iterable[Tensor], workers: int, *, pixels: bool, labels: bool, pin: bool
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self._decoded = _decoded(_Batches(data, pixels, labels), batches, workers, pin)
        self._next: Decoded | None = None

    def take(self, images: Tensor) -> Decoded | None:
        """The next batch, if it is that of these images (B,).

        Raises:
            ValueError: a file cannot be read.
            OSError: a worker was killed.
        """
        if self._next is None:
            found = next(self._decoded, None)
            if isinstance(found, Exception):
                raise found
            self._next = found
        if self._next is None or not torch.equal(self._next.images, images):
            return None
        found, self._next = self._next, None
        return found

    def close(self) -> None:
        """End the workers."""
        self._decoded.close()


class _Batches(Dataset[Decoded | Exception]):
    """Whole batches, so that one task of a worker is one batch."""

    def __init__(self, data: SegmentationData, pixels: bool, labels: bool) -> None:
        self.data, self.pixels, self.labels = data, pixels, labels

    def __getitem__(self, images: Tensor) -> Decoded | Exception:
        try:
            return decode(self.data, images, pixels=self.pixels, labels=self.labels, threads=1)
        except (ValueError, OSError) as error:  # raised where it is asked for: a DataLoader would add its traceback
            return type(error)(*error.args)


def _decoded(
    dataset: _Batches, batches: Iterable[Tensor], workers: int, pin: bool
) -> Generator[Decoded | Exception, None, None]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # the global one is of the step alone
    )
    try:
        yield from loader
    except (RuntimeError, EOFError, OSError) as error:  # as it was between batches, or sent one
        if isinstance(error, RuntimeError) and "worker" not in str(error):
            raise
        raise OSError(
            "a process that decodes images was killed, perhaps for its (shared) memory; `data.workers` sets how many"
            " there are, and 0 does without"
        ) from error


def _as_it_is(batch: Decoded | Exception) -> Decoded | Exception:
    return batch


def _leave_signals(_: int) -> None:
    """The process that trains answers them, and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
