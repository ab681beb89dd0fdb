"""The five crops of each training image: corners and centre, as the published recipe trains on them.

They lie as the published repositories have them, ``cropped/NAME_five_crop_0.5/{img,label}/train/N.{jpg,png}`` below the
root, crops 5 i to 5 i + 4 from image i, labels with 0 for void and class + 1. So their crops are read as well as ours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms.functional import five_crop

from training.data.making import read_manifest
from training.data.pairs import VOID, DataSet, Found, Pair, id_table, read_classes, read_pixels, visible

RATIO = 0.5  # of the sides of a crop to those of the image
CROPS = 5


def crops_folder(data: DataSet, root: Path) -> Path:
    """Where the crops of a data set are, or will be."""
    name = f"{data.published}_five_crop_{RATIO}"
    inside = root / data.published.removesuffix("27") / "cropped" / name  # where HP looks for them
    return inside if inside.is_dir() else root / "cropped" / name


class FiveCrops(NamedTuple):
    """How to make the crops of one image, for `make`."""

    data: DataSet
    pair: Pair
    index: int  # of the image
    quality: int  # of the JPEG files

    @property
    def name(self) -> str:
        """The image."""
        return self.pair.name

    def paths(self) -> list[str]:
        """The files, below the folder of crops."""
        numbers = range(CROPS * self.index, CROPS * (self.index + 1))
        return [path for number in numbers for path in (f"img/train/{number}.jpg", f"label/train/{number}.png")]

    def contents(self) -> Iterator[bytes]:
        """What is in them."""
        photograph, classes = read_pixels(self.data, self.pair), read_classes(self.data, self.pair)
        label = Image.fromarray(np.where(classes == VOID, 0, classes + 1).astype(np.uint8))
        sides = [int(side * RATIO) for side in (photograph.height, photograph.width)]
        for image, own in zip(five_crop(photograph, sides), five_crop(label, sides), strict=True):
            yield _encoded(image, "JPEG", quality=self.quality)
            yield _encoded(own, "PNG")


def find_crops(data: DataSet, root: Path) -> tuple[DataSet, Found]:
    """The training crops of a data set, and the data set with the ids that their labels have.

    Raises:
        ValueError: there are none, or they are not complete.
    """
    folder = crops_folder(data, root)
    command = "python -m training.prepare, with the same configuration, makes the crops"
    if not (folder / "img" / "train").is_dir() or not (folder / "label" / "train").is_dir():
        raise ValueError(f"data: {data.title}: `data.crops=five` needs the crops in {folder}; {command}")
    manifest, complete = read_manifest(folder)
    if manifest is not None and not complete:
        raise ValueError(f"data: {data.title}: the crops in {folder} are not finished; {command}")
    kinds = {"img": "*.jpg", "label": "*.png"}
    counts = [sum(1 for _ in visible(folder / kind / "train", pattern)) for kind, pattern in kinds.items()]
    expected = counts[0] if manifest is None else CROPS * len(manifest["checksums"])
    if counts != [expected, expected] or not expected or expected % CROPS:
        raise ValueError(
            f"data: {data.title}: {folder} holds {counts[0]} crops of images and {counts[1]} of labels, expected"
            f" {expected if manifest else 'the same multiple of 5'} of both; {command}"
        )
    by = "training.prepare" if manifest else "another program"
    shifted = id_table({index + 1: index for index in range(len(data.classes))}, void=[0])
    found = Found(_Numbered(folder, range(expected)), f"five crops of each training image, made by {by}, in {folder}")
    return data._replace(table=shifted, origin=command), found


class _Numbered(Sequence[Pair]):
    """The crops in a folder, by number: a quarter of a million pairs of paths would be hundreds of megabytes."""

    def __init__(self, folder: Path, numbers: range) -> None:
        self._images, self._labels, self._numbers = folder / "img" / "train", folder / "label" / "train", numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        number = self._numbers[index]
        if isinstance(number, range):
            return _Numbered(self._images.parent.parent, number)
        return Pair(str(number), self._images / f"{number}.jpg", self._labels / f"{number}.png")


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
