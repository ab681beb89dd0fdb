"""Pseudo-labels: class maps as the readers of other projects take them, without the pixels that are not sure enough.

- "labels": one byte a pixel, as ``data.name=folder`` reads it; 255 is ignored.
- "cityscapes": the ids of Cityscapes' ``*_gtFine_labelIds.png``; 0 ("unlabeled") is ignored.
- "coco": COCO's panoptic format, a PNG of segments for each photograph, and ``panoptic.json``; black is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from training.data import DATA_SETS
from training.data.pairs import VOID
from training.data.photographs import MARK, display_name
from training.runtime.checkpoint import written_whole

IGNORED = {"labels": VOID, "cityscapes": 0, "coco": VOID}
"""The kinds of pseudo-labels, and what pixels without a label have; in the pictures of COCO that becomes black."""

PANOPTIC = "panoptic.json"

_CITYSCAPES = DATA_SETS["cityscapes27"]


def class_ids(kind: str, names: Sequence[str], own: Mapping[str, int | None] | None = None) -> dict[str, int | None]:
    """The id of each class in the pseudo-labels of a kind; None for one that is left out.

    Args:
        kind: of `IGNORED`.
        names: of the classes.
        own: ids by name. None: for "cityscapes" those of Cityscapes by name, for "labels" the number of a class, for
            "coco" one more, as its ids begin with 1.

    Raises:
        ValueError: `own` does not name these classes, they are not those of Cityscapes or are too many, or ids are
            the same in "coco".
    """
    if own is not None:
        wrong = sorted(own.keys() ^ set(names))
        if wrong:
            raise ValueError(f"--ids must have an id, or null, for each of {', '.join(names)}, got {', '.join(own)}")
        if IGNORED[kind] in own.values():
            raise ValueError(f"--ids must not have {IGNORED[kind]} in {kind}, which is what is ignored there")
        given = [own[name] for name in names if own[name] is not None]
        if kind == "coco" and len(set(given)) < len(given):
            raise ValueError("--ids must be different in coco, where each is a category of one name")
        return {name: own[name] for name in names}
    if len(names) > VOID - 1:
        raise ValueError(f"pseudo-labels have one byte a pixel, enough for {VOID - 1} classes, got {len(names)}")
    if kind != "cityscapes":
        return {name: index + (kind == "coco") for index, name in enumerate(names)}
    known = {
        _CITYSCAPES.classes[index]: id_
        for id_, index in enumerate(_CITYSCAPES.table)
        if index < len(_CITYSCAPES.classes)
    }
    foreign = [name for name in names if name not in known]
    if foreign:
        raise ValueError(f"cityscapes has no classes called {', '.join(foreign)}: give their ids with --ids FILE")
    return {name: known[name] for name in names}


def read_ids(file: Path) -> dict[str, int | None]:
    """A YAML or JSON file of class names and their ids, 0 to 255, or null for a class to leave out.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--ids {display_name(file)} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--ids {display_name(file)} must map class names to ids, got {type(found).__name__}")
    for name, value in found.items():
        if value is not None and (type(value) is not int or not 0 <= value <= 255):
            raise ValueError(f"--ids {display_name(file)} must have ids of 0 to 255, or null, got {name}: {value}")
    return {str(name): value for name, value in found.items()}


def label_map(
    classes: np.ndarray, confidence: np.ndarray, ids: Sequence[int | None], ignored: int, least: float
) -> np.ndarray:
    """The ids (h, w) uint8 of a class map, `ignored` where it has none or its confidence is less than `least`.

    Args:
        classes: (h, w) uint8.
        confidence: (h, w) uint8, in 255ths.
        ids: of the first values of the class map; the others have none.
        ignored: the id of pixels that are not labelled.
        least: in [0, 1].
    """
    table = np.full(256, ignored, np.uint8)
    for value, id_ in enumerate(ids):
        table[value] = ignored if id_ is None else id_
    labels = table[classes]
    labels[confidence < np.ceil(least * 255 - 1e-6)] = ignored  # a limit of n / 255 is met by n, however it was rounded
    return labels


def panoptic(labels: np.ndarray, things: Iterable[int]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """The picture of segments of COCO's panoptic format, and its ``segments_info``.

    A class is one segment; a thing has one for each of its connected parts, which is no more than a guess at objects.

    Args:
        labels: category ids (h, w) uint8, of `label_map` with ``IGNORED["coco"]``.
        things: the ids of things.
    """
    segments = np.zeros(labels.shape, np.int32)
    categories: list[int] = []
    for category in np.flatnonzero(Image.fromarray(labels).histogram()).tolist():
        if category == IGNORED["coco"]:
            continue
        inside = labels == category
        parts, number = ndimage.label(inside) if category in things else (inside, 1)
        segments[inside] = parts[inside].astype(np.int32) + len(categories)
        categories += [category] * number
    info = []
    for number, (category, (rows, columns)) in enumerate(
        zip(categories, ndimage.find_objects(segments), strict=True), 1
    ):
        box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        area = int(np.count_nonzero(segments[rows, columns] == number))
        info.append({"id": number, "category_id": category, "area": area, "bbox": box, "iscrowd": 0})
    bytes_ = segments.astype("<u4").view(np.uint8).reshape(*segments.shape, 4)
    return Image.fromarray(np.ascontiguousarray(bytes_[..., :3])), info  # id = R + 256 G + 65536 B


def check_panoptic(out: Path) -> None:
    """Refuse a folder with a ``panoptic.json`` of something else.

    Raises:
        ValueError: there is one.
    """
    file = out / PANOPTIC
    if os.path.lexists(file) and not (file.is_file() and MARK.encode() in file.read_bytes()[:100]):
        raise ValueError(f"{display_name(file)} is there already and is not of predictions: choose another --out")


def write_panoptic(
    out: Path, entries: Iterable[Mapping[str, Any]], ids: Mapping[str, int | None], things: Sequence[str]
) -> None:
    """Write ``panoptic.json`` of the `entries` of a manifest.

    Raises:
        OSError: it cannot be written.
    """
    images, annotations = [], []
    for entry in entries:
        images.append(
            {key: entry[key] for key in ("width", "height")} | {"id": entry["index"], "file_name": entry["image"]}
        )
        file = entry["outputs"]["coco"]["file"].removeprefix("panoptic/")
        annotations.append({"image_id": entry["index"], "file_name": file, "segments_info": entry["segments"]})
    categories = [
        {"id": id_, "name": name, "supercategory": name, "isthing": int(name in things)}
        for name, id_ in ids.items()
        if id_ is not None
    ]
    contents = {"info": {"description": MARK}, "images": images, "annotations": annotations, "categories": categories}
    with written_whole(out / PANOPTIC) as file_:
        file_.write(json.dumps(contents).encode())
