"""Image files as people have them: found by name, decoded as every viewer shows them, and named where they are bad."""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

MARK = "hpkernels training.predict"
"""What `training.predict` writes into its pictures, which are never taken for photographs."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice the size is an error, and enough

LARGEST = 2 * Image.MAX_IMAGE_PIXELS
"""Pixels that a photograph may have, unless `allow_pixels` says otherwise."""

_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # what PIL raises


def allow_pixels(number: int) -> None:
    """Read photographs of up to `number` pixels, in this process."""
    Image.MAX_IMAGE_PIXELS = number // 2  # Pillow warns from there on, and refuses from twice as many on


def display_name(path: str | Path) -> str:
    """`path` as text that every file and terminal takes: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def real(path: str | Path) -> Path:
    """`path` without links; ``Path.resolve`` raises where they lead in a circle."""
    return Path(os.path.realpath(path))


def natural(path: Path) -> list[str | int]:
    """The key that sorts ``frame_2`` before ``frame_10``."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", str(path)))]


def list_images(folder: str | Path, besides: Path | None = None) -> list[Path]:
    """The image files of `folder` and of the folders in it, by name.

    Those that begin with a dot are left out, and so are what `training.predict` wrote and, unopened, what is in the
    folder `besides`.

    Raises:
        ValueError: there is no such folder, or it holds no image.
    """
    folder = Path(os.path.expanduser(folder)).absolute()
    if not folder.is_dir():
        kind = "not a folder" if folder.exists() else "not there"
        raise ValueError(f"data: the folder of images {display_name(folder)} is {kind}")
    files = [file for file in visible_files(folder) if file.suffix.lower() in IMAGE_SUFFIXES]
    if besides is not None:
        files = [file for file in files if real(besides) not in real(file).parents]
    photographs = [file for file in files if not is_prediction(file)]
    if not photographs:
        besides = "; what is there was written by training.predict" if files else ""
        raise ValueError(f"data: there are no {' '.join(IMAGE_SUFFIXES)} files in {display_name(folder)}{besides}")
    return photographs


def is_prediction(file: Path) -> bool:
    """Whether `training.predict` wrote `file`."""
    if file.suffix != ".png" and not file.name.endswith("_overlay.jpg"):  # what it writes
        return False
    try:
        with opened(file) as image:
            return image.info.get("Software") == MARK or image.info.get("comment") == MARK.encode()
    except ValueError:
        return False


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, by name, without those that begin with a dot and those in folders that do.

    Links to folders are followed. A link that leads nowhere counts as a file, so that opening it names it.

    Raises:
        OSError: a folder cannot be read.
    """
    found = []
    seen = set()  # a link may lead back to a folder above it

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent) / name for name in files if not name.startswith(".")]
    return sorted(found)


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The image in `file`, whose pixels PIL decodes when they are asked for.

    Raises:
        ValueError: it cannot be read, inside the ``with`` block as well; the message names the file.
    """
    try:
        if os.path.exists(file) and not file.is_file():  # opening a pipe would wait for ever
            raise OSError("it is no file")
        with Image.open(file) as image:
            yield image
    except _DAMAGE as error:
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise ValueError(f"data: the image file {display_name(file)} cannot be read: {reason}") from error


def read_rgb(file: Path) -> Image.Image:
    """The photograph, turned as its EXIF orientation says, with 8 bits of red, green and blue; transparency is dropped.

    Grey levels of 16 bits are divided by 257.

    Raises:
        ValueError: the file cannot be read, or its grey levels have 32 bits, whose range nothing tells.
    """
    with opened(file) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
        if image.mode in ("I", "F") and not deep:
            raise ValueError(f"its grey levels have 32 bits (mode {image.mode}), expected 8 or 16")
        upright = ImageOps.exif_transpose(image)
        if deep:
            upright = Image.fromarray((np.asarray(upright).astype(np.float64) / 257).round().astype(np.uint8))
        return upright.convert("RGB")


def size_of(file: Path) -> tuple[int, int]:
    """Height and width of the photograph as `read_rgb` gives it, from the header of the file.

    Raises:
        ValueError: the file cannot be read.
    """
    with opened(file) as image:
        # The method of PNG files would decode them to look for EXIF data behind the pixels.
        turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
        if turned and image.format == "TIFF":  # Pillow turns these by itself, and by its version sooner or later
            image, turned = ImageOps.exif_transpose(image), False
        width, height = image.size
    return (width, height) if turned else (height, width)
