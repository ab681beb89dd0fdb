"""Data sets that come as pairs of an image and a label: how they are described, read and checked."""

from __future__ import annotations

import functools
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from PIL import Image
from torch import Tensor

from training.data.base import hash_of_files
from training.data.frame import IGNORE, Frame
from training.data.photographs import display_name, opened

VOID = 255
"""The class of pixels that belong to none, in class maps of one byte a pixel."""

_UNKNOWN = 254  # what is no id of the data set
# What scipy raises for a damaged file.
_DAMAGE = (OSError, ValueError, TypeError, LookupError, EOFError, NotImplementedError, zlib.error, struct.error)


class Pair(NamedTuple):
    """An image and its label."""

    name: str
    image: Path
    label: Path


class Found(NamedTuple):
    """What a data set's folder holds of a split."""

    pairs: Sequence[Pair]
    about: str  # in which layout, and which images


class DataSet(NamedTuple):
    """A public data set."""

    title: str
    published: str  # its name in the folders of the published repositories
    classes: tuple[str, ...]
    table: np.ndarray  # (256,) uint8, the class of each id in a label; `id_table` makes it
    origin: str  # where to get it, and how it must lie
    find: Callable[[Path, str], Found]  # the files of a split, "train" or "val", below a root

    def missing(self, what: str) -> ValueError:
        """The error that a part is missing."""
        return ValueError(f"data: {self.title}: {what}; {self.origin}; docs/data.md shows the layouts")


def id_table(classes: Mapping[int, int], void: Iterable[int]) -> np.ndarray:
    """The class of each of the 256 ids, for `DataSet.table`; ids that are named nowhere are errors where they occur."""
    table = np.full(256, _UNKNOWN, np.uint8)
    table[list(void)] = VOID
    for value, index in classes.items():
        table[value] = index
    return table


class PairedData:
    """The images and labels of a data set.

    Args:
        data: the data set.
        pairs: where they are.
        frame: the size they are brought to.
    """

    def __init__(self, data: DataSet, pairs: Sequence[Pair], frame: Frame) -> None:
        self.data = data
        self.pairs = pairs
        self.classes = data.classes
        self.size = frame.size
        self._frame = frame

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """The file name without extension."""
        return display_name(self.pairs[index].name)

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self.pairs[index].image

    def label_file(self, index: int) -> Path:
        """The file of its label."""
        return self.pairs[index].label

    def identity(self) -> dict[str, Any]:
        """What tells the pixels of its images from others, wherever they lie."""
        return {"frame": self._frame._asdict(), "files": hash_of_files((pair.name, pair.image) for pair in self.pairs)}

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""
        return self._frame.image(read_pixels(self.data, self.pairs[index]))

    def label(self, index: int) -> Tensor:
        """(h, w) int64, -1 where no class is known."""
        label = self._frame.label(Image.fromarray(read_classes(self.data, self.pairs[index])))
        return label.where(label != VOID, IGNORE)


def paired(data: DataSet, found: Found, frame: Frame, limit: int | None = None) -> PairedData:
    """The first `limit` images of what was found, whose files must be there; says what it is.

    Raises:
        ValueError: a file is not there.
    """
    pairs = found.pairs[:limit]
    names = functools.cache(_names)
    for kind, files in (("image", (pair.image for pair in pairs)), ("label", (pair.label for pair in pairs))):
        gone = [file for file in files if file.name not in names(file.parent)]
        if gone:
            example = display_name(gone[0])
            raise data.missing(f"{len(gone)} of {len(pairs)} {kind}s are not there, for example {example}")
    print(f"data: {data.title}, {found.about}: {len(pairs)} images", file=sys.stderr)
    return PairedData(data, pairs, frame)


def read_pixels(data: DataSet, pair: Pair) -> Image.Image:
    """The RGB image of a pair, as its pixels are stored: labels do not follow EXIF orientations.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        if pair.image.suffix == ".mat":
            pixels = _matrix(pair.image, "img")
            if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint8:
                raise ValueError(f"data: {display_name(pair.image)} must hold `img` (h, w, 3 or 4) of bytes")
            return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
        with opened(pair.image) as image:
            return image.convert("RGB")
    except ValueError as error:
        raise _again(data, error) from error


def read_classes(data: DataSet, pair: Pair) -> np.ndarray:
    """The class map (h, w) uint8 of the label of a pair, at its own size; `VOID` where no class is known.

    Raises:
        ValueError: the file cannot be read, holds a value that is no id, or has not the size of the image.
    """
    shown = display_name(pair.label)
    try:
        if pair.label.suffix == ".mat":
            ids = _matrix(pair.label, "gt")
            if ids.ndim != 2 or ids.dtype.kind not in "ui":
                raise ValueError(f"data: {shown} must hold `gt` (h, w) of integers")
        else:
            with opened(pair.label) as image:
                if image.mode not in ("L", "P"):
                    raise ValueError(f"it must have one byte a pixel, got mode {image.mode}")
                ids = np.array(image)
        classes = data.table[np.clip(ids, 0, 255)]
        wrong = (classes == _UNKNOWN) | (ids < 0) | (ids > 255)
        if wrong.any():
            known = np.flatnonzero(data.table != _UNKNOWN)
            raise ValueError(
                f"data: label {shown} holds the value {ids[wrong][0]}, which is no id of {data.title}: they are"
                f" {_ranges(known)}"
            )
    except ValueError as error:
        raise _again(data, error) from error
    height, width = _size(data, pair.image)
    if (height, width) != classes.shape:
        raise ValueError(
            f"data: label {shown} must have the size of {display_name(pair.image)}, {width} x {height}, got"
            f" {classes.shape[1]} x {classes.shape[0]}"
        )
    return classes


def first_folder(base: Path, names: Iterable[str]) -> Path | None:
    """The first of the folders `names` in `base` that is there."""
    return next((base / name for name in names if (base / name).is_dir()), None)


def below(root: Path, name: str) -> Path:
    """The folder `name` in `root`, or `root` itself, which may be that folder."""
    return root / name if (root / name).is_dir() else root


def visible(folder: Path, pattern: str) -> Iterator[Path]:
    """The files in `folder` that match, without those that begin with a dot, which some systems leave beside others."""
    return (file for file in folder.glob(pattern) if not file.name.startswith("."))


def read_list(data: DataSet, file: Path) -> list[str]:
    """The names in a list of images, one a line.

    Raises:
        ValueError: it cannot be read, or names nothing.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {data.title}: the list {display_name(file)} cannot be read: {error}") from error
    if not names:
        raise data.missing(f"the list {display_name(file)} names no image")
    return names


def _again(data: DataSet, error: ValueError) -> ValueError:
    return ValueError(f"{error}; it must be got anew: {data.origin}")


def _matrix(file: Path, key: str) -> np.ndarray:
    """An array in a MATLAB file, which scipy reads without running code."""
    try:
        contents = scipy.io.loadmat(file, variable_names=[key])
    except _DAMAGE as error:
        raise ValueError(f"data: the MATLAB file {display_name(file)} cannot be read: {error}") from error
    if key not in contents:
        raise ValueError(f"data: the MATLAB file {display_name(file)} has no `{key}`")
    return contents[key]


def _size(data: DataSet, file: Path) -> tuple[int, int]:
    """Height and width of an image, from the header of its file."""
    try:
        if file.suffix == ".mat":
            return next(shape[:2] for name, shape, _ in scipy.io.whosmat(file) if name == "img")
        with opened(file) as image:
            return image.height, image.width
    except (*_DAMAGE, StopIteration) as error:
        if not isinstance(error, ValueError) or file.suffix == ".mat":
            error = ValueError(f"data: the MATLAB file {display_name(file)} cannot be read: {error}")
        raise _again(data, error) from error


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _ranges(values: np.ndarray) -> str:
    """Sorted numbers as "0 to 5, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
