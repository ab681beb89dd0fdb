"""A folder of photographs, with labels of the same names if there are any."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from training.data.base import hash_of_files
from training.data.frame import IGNORE, Frame
from training.data.photographs import display_name, list_images, opened, read_rgb, size_of, visible_files

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Formats that keep the value of every pixel."""


class FolderData:
    """Photographs in ``root/imgs/split`` and, if there are any, labels of the same stems in ``root/labels/split``.

    Without folders of splits, all photographs of ``root/imgs``, or of `root` itself, belong to every split.

    Args:
        root: the folder.
        split: "train" or "val".
        size: height and width that images and labels are brought to.
        classes: names in label order; greater label values are ignored.
        limit: use the first `limit` images, by name. None: all.
        crop: shrink and crop the centre (see `Frame`), or squash.
        nearest: resize images by nearest neighbour, as labels are.
        labelled: use labels if there are any; or open none.

    Raises:
        ValueError: there are no images, labels and images do not fit together, or the header of a file is not that of
            an image or of a label.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        size: tuple[int, int],
        classes: tuple[str, ...],
        limit: int | None = None,
        *,
        crop: bool = False,
        nearest: bool = False,
        labelled: bool = True,
    ) -> None:
        self.classes = classes
        self.size = size
        self._frame = Frame(size, crop, nearest)
        root = Path(os.path.expanduser(root)).absolute()
        _check_layout(root)
        folder = _folder(root, "imgs", split)
        labels = _folder(root, "labels", split)
        files = list_images(folder, besides=root / "labels")
        names = [file.relative_to(folder).with_suffix("") for file in files]
        self._files, self._names = files[:limit], names[:limit]
        unused = names[len(self._names) :]
        self._labels = _labels(labels, self._names, self._files, unused) if labelled else None
        if self._labels is not None and not classes:
            raise ValueError(f"data: {display_name(labels)} has labels, so `data.classes` must name their classes")
        self._check_headers(split)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The file name without extension."""
        return display_name(self._names[index])

    def file(self, index: int) -> Path:
        """The file of the image."""
        return self._files[index]

    def label_file(self, index: int) -> Path | None:
        """The file of its label, or None for a set without labels."""
        return None if self._labels is None else self._labels[index]

    def identity(self) -> dict[str, Any]:
        """What tells the pixels of its images from others, wherever they lie."""
        files = ((str(name), file) for name, file in zip(self._names, self._files, strict=True))
        return {"frame": self._frame._asdict(), "files": hash_of_files(files)}

    def image(self, index: int) -> Tensor:
        """(3, h, w) uint8."""
        return self._frame.image(read_rgb(self._files[index]))

    def label(self, index: int) -> Tensor | None:
        """(h, w) int64, or None for a set without labels."""
        if self._labels is None:
            return None
        with opened(self._labels[index]) as file:
            label = self._frame.label(file)
        return label.where(label < len(self.classes), IGNORE)

    def _check_headers(self, split: str) -> None:
        for index, file in enumerate(tqdm(self._files, desc=f"headers of {split}", unit="file", leave=False, delay=2)):
            size = size_of(file)
            if self._labels is not None:
                _check_label(self._labels[index], file, size)


def _check_layout(root: Path) -> None:
    """Refuse folders of splits that would be taken for something else, or overlooked."""
    imgs, labels = root / "imgs", root / "labels"
    for folder in (imgs, labels, *(kind / split for kind in (imgs, labels) for split in ("train", "val"))):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"data: {display_name(folder)} must be a folder")
    if not imgs.is_dir() and (root / "train").is_dir() and (root / "val").is_dir():
        raise ValueError(f"data: {display_name(root)} has train/ and val/: they must be in {display_name(imgs)}")
    if (labels / "val").is_dir() and not (imgs / "val").is_dir() and visible_files(labels / "val"):
        beside = display_name(imgs / "val")
        raise ValueError(f"data: there are labels in {display_name(labels / 'val')}, but no {beside}")


def _folder(root: Path, kind: str, split: str) -> Path:
    """Where the files of a split are: ``root/kind/split``, or one folder for all splits."""
    whole = root / kind
    if any((whole / name).is_dir() for name in ("train", "val")):
        return whole / split
    return root if kind == "imgs" and not whole.is_dir() else whole


def _labels(folder: Path, names: list[Path], images: list[Path], unused: list[Path]) -> list[Path] | None:
    """The label of each image; None where there are no labels. The names `unused` are of images that have no part."""
    found = visible_files(folder) if folder.is_dir() else []
    if not found:
        return None
    by_name: dict[Path, Path] = {}
    for file in found:
        if file.suffix.lower() in LABEL_SUFFIXES:
            name = file.relative_to(folder).with_suffix("")
            if name in by_name:
                raise ValueError(f"data: two labels have one name: {display_name(by_name[name])} and {file.name}")
            by_name[name] = file
    missing = [image for name, image in zip(names, images, strict=True) if name not in by_name]
    if len(missing) == len(images):
        raise ValueError(
            f"data: none of the {len(found)} files in {display_name(folder)} is the label of an image: a label must"
            f" have the name of its image and one of {' '.join(LABEL_SUFFIXES)}, got"
            f" {display_name(found[0].name)} beside {display_name(images[0].name)}"
        )
    if missing:
        raise ValueError(
            f"data: {len(missing)} of {len(images)} images have no label, for example {display_name(missing[0])}"
        )
    left = sorted(by_name.keys() - set(names) - set(unused))
    if left:
        example = display_name(by_name[left[0]])
        print(f"data: {len(left)} labels match no image and are not used, for example {example}", file=sys.stderr)
    shared = {name: image for name, image in zip(names, images, strict=True)}
    for name, image in zip(names, images, strict=True):
        if shared[name] != image:
            raise ValueError(
                f"data: {display_name(image)} and {shared[name].name} have one name, so their label is not known"
            )
    return [by_name[name] for name in names]


def _check_label(label: Path, image: Path, size: tuple[int, int]) -> None:
    with opened(label) as file:
        mode, (width, height) = file.mode, file.size
    if mode not in ("L", "P"):
        raise ValueError(f"data: label {display_name(label)} must have one byte a pixel, got mode {mode}")
    if (height, width) != size:
        raise ValueError(
            f"data: label {display_name(label)} must have the size of {display_name(image.name)}, "
            f"{size[1]} x {size[0]}, got {width} x {height}"
        )
