"""What must be the same for a run to go on: the settings of the method, and the training images."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import WHILE_TRAINING, Config
from training.config_file import flat
from training.data import SegmentationData
from training.runtime import parallel

# Keys that may change: how long, where and how a run is computed, logged and scored, but not what it learns. The images
# decide whether their number is another one.
_FREE = (
    *("output", "device", "backend", "epochs", "steps", "log_every", "checkpoint_every"),
    *(
        "rank_timeout",
        "data.root",
        "data.train_images",
        "data.val_images",
        "data.workers",
        "backbone.cache_dir",
        "quirks.preset",
    ),
    *(f"evaluation.{name}" for name in ("size", "flip", "window", "stride", "match", "crf", "knn")),
    *WHILE_TRAINING,
)
# Those of them by which `quirks.select_on_labels` chooses the best state.
_CHOOSING = (
    *("checkpoint_every", "data.val_images"),
    *(f"evaluation.{name}" for name in ("size", "flip", "window", "stride")),
)
_OF_A_RANK = ("output", "device", "data.root", "data.workers", "backbone.cache_dir")  # each rank may have its own
_ELSE = "choose another `output`, or start anew with --fresh"


def check_same(config: Config, saved: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that a checkpoint has; keys that it lacks had their default.

    Raises:
        ValueError: they differ.
    """
    own = flat(config.model_dump())
    before = flat(Config(steps=1).model_dump()) | flat(saved)
    free = set(_FREE) - set(_CHOOSING if config.quirks.select_on_labels else ())
    if not {own["backbone.cache"], before["backbone.cache"]} & {"disk"}:  # where features are rounded to float16
        free |= {"backbone.cache"}
    differing = [key for key, value in before.items() if key not in free and own.get(key) != value]
    if differing:
        raise ValueError(f"{config.output} holds a run that differs in {', '.join(differing)}; {_ELSE}")


def check_agreement(config: Config, images: dict[str, Any], saved: dict[str, Any] | None) -> None:
    """Refuse ranks, perhaps on several machines, that would not take the same steps, or of which one had nothing to do.

    Args:
        config: of the run.
        images: `identity` of the training images.
        saved: the checkpoint to go on from, or None.

    Raises:
        ValueError: they are such.
    """
    ranks = parallel.ranks_of()
    for key, rows in (("batch_size", config.batch_size), ("pool.size", config.pool.size)):
        if rows < ranks:
            raise ValueError(f"config: `{key}` must be at least the {ranks} ranks, got {rows}")
    settings = {key: value for key, value in flat(config.model_dump()).items() if key not in _OF_A_RANK}
    done = saved["state"]["step"] if saved else 0
    parallel.agree("train", **settings, **{"training images": fingerprint(images), "steps done": done})


def identity(data: SegmentationData) -> dict[str, Any]:
    """What tells the images of a data set from others, wherever they lie: names, and sizes of files in bytes.

    An image that is made on the spot has the checksum of its pixels in the place of a size.
    """
    rows = [[data.name(index), _mark(data, index), _bytes(data.label_file(index))] for index in range(len(data))]
    packed = zlib.compress(json.dumps(rows).encode())
    return {"number": len(data), "files": torch.from_numpy(np.frombuffer(packed, np.uint8).copy())}


def fingerprint(images: dict[str, Any]) -> str:
    """The SHA-256 of the `identity` of images, as 64 hexadecimal digits."""
    return hashlib.sha256(_text(images)).hexdigest()


def check_images(config: Config, now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse to go on with other images: the batches and pools of a step are indices into them.

    Args:
        config: of the run.
        now: `identity` of the images.
        saved: what the checkpoint holds; older ones have names alone, or nothing.

    Raises:
        ValueError: an image is new, is gone, or it or its label has another size.
    """
    before = saved.get("images", now)
    rows = _rows(now)
    if "files" in before:
        what = _first_difference(_rows(before), rows)
    else:
        names = "\n".join(name for name, *_ in rows)
        same = before["names"] == hashlib.sha256(names.encode()).hexdigest()
        what = None if same else "their names are others"
    if what is not None:
        raise ValueError(
            f"{config.output} holds a run on {before['number']} training images, and the {now['number']} of now are not"
            f" the same: {what}; {_ELSE}"
        )


def _first_difference(before: list[list[Any]], now: list[list[Any]]) -> str | None:
    old, new = ({name: sizes for name, *sizes in rows} for rows in (before, now))
    for name, *sizes in now:
        if name not in old:
            return f"{name} is new"
        for what, size, had in zip((name, f"the label of {name}"), sizes, old[name], strict=True):
            if size != had:
                return f"{what} has {_shown(size)}, and had {_shown(had)}"
    gone = [name for name in old if name not in new]
    if gone:
        return f"{gone[0]} is gone"
    return None if before == now else "their order is another"


def _shown(size: int | str | None) -> str:
    return "no file" if size is None else f"{size} bytes" if isinstance(size, int) else size


def _mark(data: SegmentationData, index: int) -> int | str:
    size = _bytes(data.file(index))
    return f"pixels of checksum {zlib.crc32(data.image(index).numpy()):08x}" if size is None else size


def _bytes(file: Path | None) -> int | None:
    return None if file is None else os.stat(file).st_size


def _rows(images: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = json.loads(_text(images))
    return rows


def _text(images: dict[str, Any]) -> bytes:
    return zlib.decompress(images["files"].numpy().tobytes())
