"""Potsdam-3: tiles of the ISPRS aerial photographs of Potsdam, with six classes merged into three.

Ji et al. ("Invariant Information Clustering", ICCV 2019) cut each photograph of 6000 x 6000 pixels into 15 x 15 tiles,
halved them to 200 x 200, and drew 855 of the 5400 labelled ones for validation. STEGO and others use their tiles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.pairs import VOID, DataSet, Found, Pair, below, first_folder, id_table, read_list
from training.data.photographs import display_name, opened

CLASSES = ("roads and cars", "buildings and clutter", "vegetation and trees")

# The colours of the ISPRS labels in the order of the ids in tiles, and which of the three classes each belongs to.
COLOURS: dict[str, tuple[tuple[int, int, int], int]] = {
    "impervious surfaces": ((255, 255, 255), 0),
    "building": ((0, 0, 255), 1),
    "low vegetation": ((0, 255, 255), 2),
    "tree": ((0, 255, 0), 2),
    "car": ((255, 255, 0), 0),
    "clutter": ((255, 0, 0), 1),
}

LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}
IMAGES, LABELS = "2_Ortho_RGB", ("5_Labels_for_participants", "5_Labels_all")
TILE = 400  # pixels a side that a tile covers, of which it keeps every second
VALIDATION_SHARE = 855 / 5400
TOLERANCE = 16  # of a colour: one of the published labels has yellows with a red of 252

# The photographs whose labels ISPRS published at first: the labelled tiles are theirs, whichever labels are there.
LABELLED = frozenset(
    [f"{row}_{column}" for row in range(2, 6) for column in range(10, 13)]
    + [f"{row}_{column}" for row in (6, 7) for column in range(7, 13)]
)


def _find(root: Path, split: str) -> Found:
    base = below(root, "potsdam")
    listed = base / LISTS[split]
    if not (base / "imgs").is_dir() or not listed.is_file():
        if photographs_folder(root) is not None:
            raise ValueError(
                f"data: Potsdam-3: the photographs in {photographs_folder(root)} must be cut into tiles first: python"
                f" -m training.prepare --config potsdam3 data.root={root}"
            )
        gone = listed if (base / "imgs").is_dir() else base / "imgs"
        raise POTSDAM3.missing(f"there is no {gone}")
    if not (base / "gt").is_dir():
        raise POTSDAM3.missing(f"there is no {base / 'gt'}")
    names = read_list(POTSDAM3, listed)
    suffix = ".png" if (base / "imgs" / f"{names[0]}.png").is_file() else ".mat"
    pairs = [Pair(name, base / "imgs" / f"{name}{suffix}", base / "gt" / f"{name}{suffix}") for name in names]
    return Found(pairs, f"{suffix} tiles of {LISTS[split]} in {base}")


POTSDAM3 = DataSet(
    title="Potsdam-3",
    published="potsdam",
    classes=CLASSES,
    table=id_table({index: kind for index, (_, kind) in enumerate(COLOURS.values())}, void=[VOID]),
    origin=(
        "either imgs/, gt/ and the lists of STEGO's potsdam.zip (https://github.com/mhamilton723/STEGO), or"
        " 2_Ortho_RGB/ and 5_Labels_for_participants/ of https://www.isprs.org (2D Semantic Labeling, Potsdam), which"
        " training.prepare cuts into tiles, in `data.root` or in its potsdam/"
    ),
    find=_find,
)


def photographs_folder(root: Path) -> Path | None:
    """Where the photographs of ISPRS are, if they are there."""
    return first_folder(root, (IMAGES, f"potsdam/{IMAGES}", f"Potsdam/{IMAGES}"))


def labels_folder(photographs: Path) -> Path:
    """Where the labels beside them are.

    Raises:
        ValueError: nowhere.
    """
    folder = first_folder(photographs.parent, LABELS)
    if folder is None:
        raise POTSDAM3.missing(f"there is neither {' nor '.join(LABELS)} in {photographs.parent}")
    return folder


def halved(photograph: Path) -> np.ndarray:
    """The pixels (h/2, w/2, 3) of a photograph: means of 2 x 2."""
    with opened(photograph) as image:
        _check_side(photograph, image.size)
        return np.array(image.convert("RGB").reduce(2))


def halved_ids(label: Path) -> np.ndarray:
    """The ids (h/2, w/2) uint8 in a label, an image of colours: every second pixel.

    Raises:
        ValueError: a colour is not one of the six, nor the black of borders that some labels leave out.
    """
    with opened(label) as image:
        _check_side(label, image.size)
        pixels = np.array(image.convert("RGB"))[::2, ::2].astype(np.int16)
    bits = pixels > 127
    off = np.abs(pixels - 255 * bits).max(axis=2) > TOLERANCE
    ids = np.full(8, 254, np.uint8)
    ids[0] = VOID
    for index, (colour, _) in enumerate(COLOURS.values()):
        ids[_corner(np.array(colour) > 127)] = index
    result = ids[_corner(bits)]
    wrong = off | (result == 254)
    if wrong.any():
        raise ValueError(
            f"data: label {display_name(label)} has the colour {pixels[wrong][0].tolist()}, which is none of the six of"
            f" ISPRS; it must be got anew: {POTSDAM3.origin}"
        )
    return result


def _corner(bits: np.ndarray) -> np.ndarray:
    """The number of a corner of the cube of colours, of bits (..., 3)."""
    return bits @ np.array([1, 2, 4])


def _check_side(file: Path, size: tuple[int, int]) -> None:
    if any(side % TILE or not side for side in size):
        raise ValueError(
            f"data: {display_name(file)} must have sides that are multiples of {TILE}, as the 6000 x 6000 of ISPRS,"
            f" got {size[0]} x {size[1]}"
        )
