"""Frozen features on disk: computed once, shared by all runs that need the same, and never trusted unchecked.

A cache is a folder whose name is the hash of everything that decides its numbers. It holds one file of float16 values
for each array, image after image, and a list of checksums, one line for each chunk of images, added after its values
were written. Whoever opens a cache compares all chunks with their checksums and computes those that differ or have
none: so what was cut off, damaged or not finished costs no more than its own chunks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hpkernels._version import __version__
from training.runtime.checkpoint import written_whole
from training.runtime.output import prepare_folder

VERSION = 1
"""Of what is computed: raise it with any change of the code that changes features, weights or views."""

CHUNK = 32
"""Images that are computed, and checked, at a time."""

_KEY = "config: `backbone.cache_dir`"
_READERS = 8  # threads; a checksum releases the interpreter lock

Compute = Callable[[Iterable[Tensor]], Iterator[Sequence[Tensor]]]
"""For each batch of image indices (b,) its arrays (b, ...), in the order of their names."""


def default_folder() -> Path:
    """Where caches are unless the configuration says otherwise: ``hpkernels/features`` in the user's cache folder.

    Raises:
        ValueError: there is no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the standard has it
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise ValueError(f"{_KEY} must be a folder, as there is no home folder for caches") from error
    return base / "hpkernels" / "features"


def hash_of(module: torch.nn.Module) -> str:
    """SHA-256 of all tensors in the `state_dict` of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_cache(
    where: Path, identity: dict[str, Any], images: int, arrays: dict[str, tuple[int, ...]], compute: Compute, what: str
) -> list[Tensor]:
    """Arrays of all images, mapped from the cache in `where`; what is missing there is computed first.

    Args:
        where: the folder of all caches.
        identity: all that decides the numbers, as JSON has it; versions are added.
        images: how many.
        arrays: names, and the shape for one image.
        compute: what fills them.
        what: they are, for messages.

    Returns:
        for each array float16 (images, ...), whose memory is the file: do not write into it.

    Raises:
        ValueError: the folder cannot be written to, its disk has too little space, or a value does not fit float16.
        OSError: it cannot be read or written.
    """
    cache = _Cache(where, identity, images, arrays)
    if cache.is_complete() and not cache.missing():  # without the lock, also where nothing may be written
        return cache.mapped()
    prepare_folder(cache.folder, _KEY)
    lock = FileLock(cache.folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{what}: waiting for another process that computes them", file=sys.stderr)
        lock.acquire()
    try:
        cache.complete(compute, what)
    except OSError as error:
        raise OSError(f"{_KEY} {cache.folder} cannot be written: {error.strerror or error}") from error
    finally:
        lock.release()
    return cache.mapped()


class _Cache:
    def __init__(self, where: Path, identity: dict[str, Any], images: int, arrays: dict[str, tuple[int, ...]]) -> None:
        about = identity | {"images": images, "arrays": arrays, "version": VERSION, "hpkernels": __version__}
        self.about = json.loads(json.dumps(about, sort_keys=True))
        self.folder = where / hashlib.sha256(json.dumps(self.about).encode()).hexdigest()[:32]
        self.shapes = {self.folder / f"{name}.float16": (images, *shape) for name, shape in arrays.items()}
        self.chunks = torch.arange(images).split(CHUNK)

    @property
    def _meta(self) -> Path:
        return self.folder / "meta.json"

    @property
    def _checksums(self) -> Path:
        return self.folder / "checksums"

    def size(self, file: Path) -> int:
        """The bytes of an array."""
        return 2 * torch.Size(self.shapes[file]).numel()

    def is_complete(self) -> bool:
        """Whether it looks so, before the values are read."""
        return (
            self._is_ours()
            and len(self._known()) == len(self.chunks)
            and all(file.is_file() and file.stat().st_size == self.size(file) for file in self.shapes)
        )

    def mapped(self) -> list[Tensor]:
        """The arrays."""
        # Copied where written to, so that the file stays as it is whatever is done to the tensor.
        return [torch.from_numpy(np.memmap(file, np.float16, "c", shape=shape)) for file, shape in self.shapes.items()]

    def missing(self) -> list[int]:
        """The chunks whose values are not what was written; reads all that has a checksum."""
        known, arrays = self._known(), self.mapped()

        def differs(chunk: int) -> bool:
            images = slice(int(self.chunks[chunk][0]), int(self.chunks[chunk][-1]) + 1)
            return known.get(chunk) != [_checksum(array[images]) for array in arrays]

        with ThreadPoolExecutor(_READERS) as readers:
            wrong = readers.map(lambda chunk: chunk not in known or differs(chunk), range(len(self.chunks)))
            return [chunk for chunk, is_wrong in enumerate(wrong) if is_wrong]

    def complete(self, compute: Compute, what: str) -> None:
        """Compute what is missing."""
        if not self._is_ours():
            self._checksums.unlink(missing_ok=True)
            with written_whole(self._meta) as file:
                file.write(json.dumps(self.about, indent=1).encode())
        self._reserve(what)
        missing = self.missing()
        if not missing:  # another process was faster
            return
        if len(missing) < len(self.chunks):
            print(
                f"{what}: {len(missing)} of {len(self.chunks)} parts of {self.folder} are missing or damaged, and are"
                " computed now",
                file=sys.stderr,
            )
        batches = [self.chunks[chunk] for chunk in missing]
        files = [open(path, "r+b") for path in self.shapes]  # noqa: SIM115
        try:
            with open(self._checksums, "a", encoding="ascii") as checksums:
                checksums.write("\n")  # a line may have been cut off
                for chunk, values in zip(missing, compute(batches), strict=True):
                    sums = [self._write(file, chunk, value) for file, value in zip(files, values, strict=True)]
                    checksums.write(f"{chunk} {' '.join(map(str, sums))}\n")
                    checksums.flush()
        finally:
            for file in files:
                file.close()

    def _write(self, file: Any, chunk: int, values: Tensor) -> int:
        half = values.to("cpu", torch.float16)
        if not half.isfinite().all():
            raise ValueError(
                "config: `backbone.cache` must be memory or none, as features are beyond float16, whose greatest value"
                " is 65504, or not finite"
            )
        file.seek(2 * int(self.chunks[chunk][0]) * values[0].numel())
        file.write(half.contiguous().view(torch.uint8).numpy())
        file.flush()
        return _checksum(half)

    def _reserve(self, what: str) -> None:
        """Make the files as long as they will be, in space that is theirs.

        Raises:
            ValueError: the disk has not that much.
        """
        for file in self.shapes:
            file.touch()
        total = sum(map(self.size, self.shapes))
        needed = sum(max(0, self.size(file) - 512 * file.stat().st_blocks) for file in self.shapes)
        free = shutil.disk_usage(self.folder).free
        about = f"{what}: {self.about['images']} images, {_gigabytes(total)}"
        if needed > free:
            raise ValueError(
                f"{_KEY} must have {_gigabytes(needed)} free, got {_gigabytes(free)} in {self.folder} ({about})"
            )
        if needed:
            print(f"{about}, into {self.folder}", file=sys.stderr)
        for file in self.shapes:
            os.truncate(file, self.size(file))
            if hasattr(os, "posix_fallocate") and self.size(file):
                with open(file, "r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, self.size(file))

    def _is_ours(self) -> bool:
        try:
            return json.loads(self._meta.read_text(encoding="utf-8")) == self.about
        except (OSError, ValueError):
            return False

    def _known(self) -> dict[int, list[int]]:
        """The checksums of chunks that were written; a line that was cut off is none."""
        known = {}
        try:
            lines = self._checksums.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return {}
        for line in lines:
            words = line.split()
            if len(words) == 1 + len(self.shapes) and all(word.isdecimal() for word in words):
                known[int(words[0])] = [int(word) for word in words[1:]]
        return known


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().view(torch.uint8).numpy())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
