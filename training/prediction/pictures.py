"""What `training.predict` writes: where each picture goes, which of the files there are its own, and the pictures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from training.data.photographs import MARK, display_name, is_prediction, list_images, natural, real, visible_files
from training.prediction.photograph import Prediction
from training.prediction.pseudo_labels import IGNORED, label_map, panoptic
from training.report.figures import class_palette
from training.runtime.checkpoint import written_whole

OUTPUTS = {
    "classes": "{}.png",
    "overlay": "{}_overlay.jpg",
    "confidence": "{}_confidence.png",
    "labels": "labels/{}.png",
    "cityscapes": "gtFine/{}_gtFine_labelIds.png",
    "coco": "panoptic/{}.png",
}
"""The kinds of pictures, and the names that they have for a photograph of the stem {}."""

_NAMES = "classes.json"
_JPEG_SIDE = 65_500  # pixels: the limit of libjpeg


def outputs(images: Path, out: Path, kinds: Sequence[str] = ("classes", "overlay")) -> dict[Path, dict[str, Path]]:
    """The pictures of each kind that each photograph of `images`, a folder or one file, gets in `out`.

    They are in folders as the photographs are, in natural order (frame_2 before frame_10); photographs that differ in
    their extension alone keep it.

    Raises:
        ValueError: there are no photographs, or something would be overwritten that is not an earlier prediction.
    """
    images = images.absolute()
    whole = images.parent if images.is_file() else images
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {display_name(out)}")
    if real(out) == real(images):
        raise ValueError(f"--out must be another folder than --images, got {display_name(out)}")
    files = [images] if images.is_file() else sorted(list_images(images), key=natural)
    folded = _folded if _folds_case(out) else str
    names = [file.relative_to(whole) for file in files]
    stems = Counter(folded(name.with_suffix("")) for name in names)

    def short(name: Path) -> Path:
        return name.with_suffix("") if stems[folded(name.with_suffix(""))] == 1 else name

    # A name with its extension may be the stem of another photograph (a.jpg, a.png and a.jpg.jpg): then all keep it.
    plain = max(Counter(folded(short(name)) for name in names).values()) == 1
    planned: dict[Path, dict[str, Path]] = {}
    source: dict[str, Path] = {}
    for file, name in zip(files, names, strict=True):
        stem = str(short(name) if plain else name)
        planned[file] = {kind: out / OUTPUTS[kind].format(_bare(stem, kind)) for kind in kinds}
        for path in planned[file].values():
            other = source.setdefault(folded(path), file)
            if other != file:
                raise ValueError(
                    f"{display_name(other)} and {display_name(file)} would both be written to {display_name(path)}"
                )
    photographs = {real(file) for file in files}
    for path in (path for paths in planned.values() for path in paths.values()):
        if real(path) in photographs or (os.path.lexists(path) and not is_prediction(path)):
            raise ValueError(f"{display_name(path)} is there already and is no prediction: choose another --out")
    return planned


def _bare(stem: str, kind: str) -> str:
    """The name that Cityscapes gives the labels of its photographs."""
    return stem.removesuffix("_leftImg8bit") if kind == "cityscapes" else stem


def _folded(name: Path) -> str:
    """`name` as file systems see it that do not tell upper from lower case."""
    return str(name).casefold()


def _folds_case(folder: Path) -> bool:
    """Whether the file system of `folder`, or of the folder it will be made in, does not tell upper from lower case."""
    for parent in (real(folder), *real(folder).parents):
        other = parent.with_name(parent.name.swapcase()) if parent.name else parent
        if parent.exists() and other != parent:
            return other.exists() and other.samefile(parent)
    return False


def check_jpeg(size: tuple[int, int]) -> None:
    """Refuse an overlay, a JPEG, that is too large to be one.

    Args:
        size: width and height.

    Raises:
        ValueError: it is.
    """
    if max(size) > _JPEG_SIDE:
        raise ValueError(
            f"an overlay is a JPEG, which has at most {_JPEG_SIDE} pixels on a side, and this one would have"
            f" {size[0]} x {size[1]}: choose --write without overlay"
        )


def write_names(out: Path, names: list[str]) -> None:
    """Write what each value of the class maps is.

    Raises:
        ValueError: a file of that name is there, says something else, and lies beside no prediction.
    """
    file, text = out / _NAMES, json.dumps(dict(enumerate(names)), indent=2, ensure_ascii=False)
    if os.path.lexists(file):
        same = file.is_file() and file.read_bytes() == text.encode()
        if not same and not (file.is_file() and any(is_prediction(path) for path in visible_files(out))):
            raise ValueError(f"{display_name(file)} is there already and is not of predictions: choose another --out")
    file.write_text(text, encoding="utf-8")


class Writer:
    """Writes the pictures of predictions, and says what is in them.

    Args:
        names: of the values of class maps.
        legend: name the colours below each overlay.
        ids: the id of each class in each kind of pseudo-labels; values of class maps beyond these have none.
        things: the classes of which COCO's panoptic format gets a segment for each connected part.
        least: pseudo-labels leave out pixels whose confidence, in [0, 1], is less.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        legend: bool = False,
        ids: Mapping[str, Mapping[str, int | None]] | None = None,
        things: Sequence[str] = (),
        least: float = 0.0,
    ) -> None:
        self.names, self.ids, self.least = names, ids or {}, least
        self.legend = names if legend else None
        self.things = [self.ids["coco"][name] for name in things]

    def write(self, photograph: Image.Image, found: Prediction, paths: Mapping[str, Path]) -> dict[str, Any]:
        """Write the picture of each kind in `paths`; for the manifest, what is in them.

        Raises:
            OSError: one cannot be written.
            ValueError: an overlay with its legend is larger than a JPEG can be.
        """
        classes, confidence = found.classes.numpy(), found.confidence.numpy()
        indexed = class_picture(classes, len(self.names))
        counts = dict(zip(self.names, indexed.histogram(), strict=False))
        about: dict[str, Any] = {
            "width": photograph.width,
            "height": photograph.height,
            "mean_confidence": round(float(confidence.mean()) / 255, 4),
            "share": {name: round(count / classes.size, 6) for name, count in counts.items() if count},
        }
        for kind, path in paths.items():
            if kind == "classes":
                picture = indexed
            elif kind == "overlay":
                picture = overlay(photograph, indexed, self.legend)
                check_jpeg(picture.size)  # with a legend it is taller than the photograph
            elif kind == "confidence":
                picture = Image.fromarray(confidence)
            else:
                labels = label_map(classes, confidence, list(self.ids[kind].values()), IGNORED[kind], self.least)
                ignored = np.count_nonzero(labels == IGNORED[kind]) / labels.size
                about.setdefault("ignored", {})[kind] = round(ignored, 6)
                if kind == "coco":
                    picture, about["segments"] = panoptic(labels, self.things)
                else:
                    picture = Image.fromarray(labels)
            _write(path, picture)
        return about


def _write(path: Path, picture: Image.Image) -> None:
    """Write a PNG or JPEG whole or not at all, marked as a prediction.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(path) as file:
        if path.suffix == ".jpg":
            picture.save(file, "JPEG", comment=MARK)
        else:
            text = PngInfo()
            text.add_text("Software", MARK)
            picture.save(file, "PNG", pnginfo=text)


def class_picture(classes: np.ndarray, count: int) -> Image.Image:
    """A class map (h, w) uint8 with the colours of `count` classes as its palette."""
    picture = Image.fromarray(classes)
    picture.putpalette(class_palette(count).flatten().tolist())
    return picture


def overlay(photograph: Image.Image, classes: Image.Image, legend: Sequence[str] | None = None) -> Image.Image:
    """The photograph half covered by its class map with palette; below it, if there is one, the legend.

    Args:
        photograph: RGB.
        classes: of its size.
        legend: the names of all classes; those that are there are listed, the largest first.
    """
    picture = Image.blend(photograph, classes.convert("RGB"), 0.5)
    if legend is None:
        return picture
    counts = classes.histogram()
    present = sorted((value for value in range(len(legend)) if counts[value]), key=lambda value: -counts[value])
    palette = np.array(classes.getpalette()).reshape(-1, 3)
    entries = [(legend[value], tuple(palette[value].tolist())) for value in present]
    strip = _legend(entries, picture.width)
    whole = Image.new("RGB", (strip.width, picture.height + strip.height), "white")
    whole.paste(picture, (0, 0))
    whole.paste(strip, (0, picture.height))
    return whole


def _legend(entries: list[tuple[str, tuple[int, ...]]], width: int) -> Image.Image:
    """Names beside squares of their colours, in as many lines as they need, at least `width` pixels wide."""
    size = max(12, width // 60)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)  # comes with matplotlib
    widths = [round(2.5 * size + font.getlength(name)) for name, _ in entries]
    width = max(width, max(widths) + size)
    places, x, y = [], size, size // 2
    for wide in widths:
        if x > size and x + wide > width:
            x, y = size, y + 3 * size // 2
        places.append((x, y))
        x += wide
    strip = Image.new("RGB", (width, y + 2 * size), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline="#5a6478")
        draw.text((x + 3 * size // 2, y + size // 2), name, fill="#12161f", font=font, anchor="lm")
    return strip
