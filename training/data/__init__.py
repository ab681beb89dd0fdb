"""Where images and labels come from: see ``docs/data.md``."""

from __future__ import annotations

import os
from pathlib import Path

from training.config import Config, DataConfig
from training.data.base import SegmentationData
from training.data.batches import batch_of_step, steps_per_epoch
from training.data.cityscapes import CITYSCAPES27
from training.data.coco import COCO27
from training.data.crops import find_crops
from training.data.folder import FolderData
from training.data.frame import IGNORE, Frame, load_image, resized
from training.data.pairs import DataSet, paired
from training.data.potsdam import POTSDAM3
from training.data.procedural import CLASSES as PROCEDURAL_CLASSES
from training.data.procedural import ProceduralData

__all__ = [
    "DATA_SETS",
    "IGNORE",
    "FolderData",
    "SegmentationData",
    "batch_of_step",
    "class_names",
    "image_size",
    "load_image",
    "open_data",
    "resized",
    "root_of",
    "steps_per_epoch",
]

DATA_SETS: dict[str, DataSet] = {"coco27": COCO27, "cityscapes27": CITYSCAPES27, "potsdam3": POTSDAM3}
"""The public data sets, by their ``data.name``."""


def open_data(config: Config, split: str) -> SegmentationData:
    """The "train" or "val" images of a configuration.

    Raises:
        ValueError: the configuration does not fit the data, or a part of it is missing or broken.
    """
    data = config.data
    _check(data)
    limit = data.train_images if split == "train" else data.val_images
    frame = Frame(image_size(config, split), data.fit == "crop", config.quirks.nearest_resize)
    if data.name == "procedural":
        # The images are the same for every seed of the run, as photographs would be.
        return ProceduralData(limit or 64, frame.size, seed=0 if split == "train" else 1)
    root = root_of(data)
    if data.name in DATA_SETS:
        found = DATA_SETS[data.name]
        if data.crops == "five" and split == "train":
            return paired(*find_crops(found, root), frame, limit)
        return paired(found, found.find(root, split), frame, limit)
    if split == "val" and not (root / "imgs" / "val").is_dir():
        split = "train"  # with no images set aside, the training images are segmented
    return FolderData(root, split, frame.size, data.classes, limit, crop=frame.crop, nearest=frame.nearest)


def image_size(config: Config, split: str) -> tuple[int, int]:
    """Height and width that the images of a split are brought to."""
    return config.data.size if split == "train" else config.evaluation.size or config.data.size


def class_names(data: DataConfig) -> tuple[str, ...]:
    """The classes of the data of a configuration, in label order."""
    if data.name in DATA_SETS:
        return DATA_SETS[data.name].classes
    return PROCEDURAL_CLASSES if data.name == "procedural" else data.classes


def root_of(data: DataConfig) -> Path:
    """The folder of the data.

    Raises:
        ValueError: there is none.
    """
    if data.root is None:
        what = "the photographs, or their imgs/" if data.name == "folder" else f"the data set {data.name}"
        raise ValueError(f"config: `data.root` must be the folder that holds {what}, got None")
    root = Path(os.path.expanduser(data.root))
    if data.name in DATA_SETS and not root.is_dir():
        raise DATA_SETS[data.name].missing(f"`data.root` {root} is not {'a folder' if root.exists() else 'there'}")
    return root


def _check(data: DataConfig) -> None:
    if data.name in DATA_SETS and data.classes:
        raise ValueError(
            f"config: `data.classes` must be [] with data.name={data.name}, which names its own, got"
            f" {list(data.classes)}"
        )
    if data.name not in DATA_SETS and data.crops != "none":
        raise ValueError(
            f"config: `data.crops` must be none with data.name={data.name}, got {data.crops}: crops are made of"
            f" {', '.join(DATA_SETS)}"
        )
