"""Make the files that a data set needs before training: its five crops, or the tiles of Potsdam.

python -m training.prepare --config coco27 data.root=DIR
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from training.config import Config
from training.config_file import load_config
from training.data import DATA_SETS, root_of
from training.data.crops import CROPS, RATIO, FiveCrops, crops_folder
from training.data.making import Made, make, written_whole
from training.data.photographs import opened
from training.data.potsdam import (
    LABELLED,
    LISTS,
    POTSDAM3,
    TILE,
    VALIDATION_SHARE,
    halved,
    halved_ids,
    labels_folder,
    photographs_folder,
)
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides


class Tiles(NamedTuple):
    """How to cut one photograph of Potsdam, for `make`."""

    name: str  # row and column of the photograph
    photograph: Path
    label: Path | None
    grid: tuple[int, int]  # how many tiles

    def names(self) -> list[str]:
        """The tiles."""
        return [f"{self.name}_{row}_{column}" for row in range(self.grid[0]) for column in range(self.grid[1])]

    def paths(self) -> list[str]:
        """The files, below the folder of tiles."""
        kinds = ["imgs"] + (["gt"] if self.label is not None else [])
        return [f"{kind}/{name}.png" for kind in kinds for name in self.names()]

    def contents(self) -> Iterator[bytes]:
        """What is in them."""
        yield from self._cut(halved(self.photograph))
        if self.label is not None:
            yield from self._cut(halved_ids(self.label))

    def _cut(self, pixels: np.ndarray) -> Iterator[bytes]:
        if pixels.shape[:2] != (self.grid[0] * TILE // 2, self.grid[1] * TILE // 2):
            raise ValueError(f"data: the label {self.label} must have the size of {self.photograph}")
        for band in np.split(pixels, self.grid[0]):
            for tile in np.split(band, self.grid[1], axis=1):
                buffer = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(tile)).save(buffer, "PNG")
                yield buffer.getvalue()


def make_crops(config: Config, workers: int, quality: int) -> tuple[Path, Made]:
    """The five crops of each training image of a configuration."""
    data, root = DATA_SETS[config.data.name], root_of(config.data)
    found = data.find(root, "train")
    print(f"data: {data.title}, {found.about}: {len(found.pairs)} images")
    tasks = [FiveCrops(data, pair, index, quality) for index, pair in enumerate(found.pairs)]
    folder = crops_folder(data, root)
    about = {"data": config.data.name, "crops": CROPS, "ratio": RATIO, "quality": quality}
    return folder, make(tasks, folder, about, workers, "five crops")


def make_tiles(config: Config, workers: int) -> tuple[Path, Made]:
    """The tiles of the photographs of Potsdam, and the lists of those for training and validation."""
    photographs = photographs_folder(root_of(config.data))
    if photographs is None:
        raise POTSDAM3.missing(f"there are no photographs to cut in {config.data.root}")
    labels, tasks = labels_folder(photographs), []
    for file in sorted(photographs.glob("top_potsdam_*_RGB.tif")):
        name = re.sub("top_potsdam_|_RGB", "", file.stem)
        label = labels / f"top_potsdam_{name}_label.tif" if name in LABELLED else None
        if label is not None and not label.is_file():
            raise POTSDAM3.missing(f"there is no {label}")
        with opened(file) as image:
            grid = (image.height // TILE, image.width // TILE)
        tasks.append(Tiles(name, file, label, grid))
    gone = sorted(LABELLED - {task.name for task in tasks})
    if gone:
        raise POTSDAM3.missing(
            f"{len(gone)} of the {len(LABELLED)} labelled photographs are not there, for example"
            f" {photographs / f'top_potsdam_{gone[0]}_RGB.tif'}"
        )
    folder = root_of(config.data) / "potsdam"
    made = make(tasks, folder, {"data": config.data.name, "tile": TILE}, workers, "tiles")
    labelled = [name for task in tasks if task.label is not None for name in task.names()]
    drawn = np.random.default_rng(0).permutation(len(labelled))[: round(VALIDATION_SHARE * len(labelled))]
    chosen = {labelled[index] for index in drawn}
    lists = {
        LISTS["train"]: [name for name in labelled if name not in chosen],
        LISTS["val"]: [name for name in labelled if name in chosen],
        "unlabelled_train.txt": [name for task in tasks if task.label is None for name in task.names()],
    }
    for name, tiles in lists.items():
        written_whole(folder, name, "".join(f"{tile}\n" for tile in tiles).encode())
    return folder, made


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("prepare", __doc__)
    parser.add_argument("--config", required=True, type=expanded, help="a YAML file, or the name of a preset")
    parser.add_argument("--workers", type=int, default=None, help="processes (as many as there are processors)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files of crops (95; published: 75)")
    add_overrides(parser, "edits of the configuration, such as data.root=DIR; --keys lists all")
    options = parse_with_overrides(parser, arguments)
    with one_sentence("prepare"):
        if options.workers is not None and options.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {options.workers}")
        if not 1 <= options.quality <= 100:
            raise ValueError(f"--quality must be in [1, 100], got {options.quality}")
        config = load_config(options.config, options.overrides)
        workers = options.workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else "1")
        if config.data.name in DATA_SETS and config.data.crops == "five":
            folder, made = make_crops(config, workers, options.quality)
        elif config.data.name == "potsdam3":
            folder, made = make_tiles(config, workers)
        else:
            raise ValueError(
                f"nothing is to be made for data.name={config.data.name} data.crops={config.data.crops}: it is for"
                " data.crops=five, and for the photographs of potsdam3"
            )
        print(f"{folder}: the files of {made.made} images were made, those of {made.kept} were there and are whole")


if __name__ == "__main__":
    main()
