"""Checkpoints: written whole or not at all, and read without running code that a file may hold."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

FORMAT = "hpkernels training checkpoint 1"
BACKBONE = "backbone.pt"
"""The frozen weights, which the checkpoints beside it name by their SHA-256."""


def save(path: str | Path, contents: dict[str, Any]) -> None:
    """Write `contents` so that `path` holds either what it held before or all of it, even after a power cut.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    with written_whole(path) as file:
        torch.save({"format": FORMAT} | contents, file)


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to inside the ``with`` block, which takes the place of `path` when the block ends well.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the message names the file, and what was
            written so far is removed.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch.save puts a RuntimeError of its own on top
            cause = cause.__context__
        if cause is None or not isinstance(error, Exception):
            raise
        raise OSError(f"{path} cannot be written: {cause.strerror or cause}") from error


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU.

    Raises:
        ValueError: the file is not there, is damaged, needs code to be unpickled, or is something else.
    """
    contents = load_tensors(path)
    if contents.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is not a checkpoint of this training loop (format {FORMAT!r})")
    return contents


def write_backbone(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write the frozen weights to `folder` unless they are there; returns their SHA-256 as 64 hexadecimal digits.

    Raises:
        OSError: they cannot be written.
    """
    sha256 = _sha256(tensors)
    try:
        there = _sha256(load(folder / BACKBONE)["backbone"])
    except (ValueError, KeyError):
        there = None
    if there != sha256:
        save(folder / BACKBONE, {"backbone": tensors})
    return sha256


def read_backbone(path: str | Path, sha256: str) -> dict[str, Tensor]:
    """The frozen weights of the checkpoint at `path`, from the file beside it.

    Raises:
        ValueError: it is not there, cannot be read, or holds other weights.
    """
    beside = Path(path).with_name(BACKBONE)
    if not beside.is_file():
        raise ValueError(
            f"checkpoint: {path} needs the {BACKBONE} that was written beside it, and there is none: copy it along"
        )
    tensors: dict[str, Tensor] = load(beside).get("backbone", {})
    if _sha256(tensors) != sha256:
        raise ValueError(
            f"checkpoint: {beside} holds other weights than {path} was trained with: copy the {BACKBONE} of its run"
        )
    return tensors


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values, onto the CPU.

    Raises:
        ValueError: the file is not there, is damaged, needs code to be unpickled, or holds no dictionary.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint: there is no file {path}")
    try:
        contents = load_plain(path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"checkpoint: {path} must hold a dictionary, got {type(contents).__name__}")
    return contents


def load_plain(path: str | Path) -> Any:
    """What a file of tensors and plain values holds, onto the CPU.

    Of objects only the ``argparse.Namespace`` is read, in which many training scripts keep their options.

    Raises:
        ValueError: the file is damaged, is something else, or needs code to be unpickled.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with advice of a page, for a file that is damaged or foreign
        raise ValueError(f"{path} cannot be read as plain tensors: {_why(error)}") from error


def _why(error: Exception) -> str:
    """The reason of `torch.load` in a few words."""
    needed = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and needed:
        return f"it needs code, {needed[1]}, to be unpickled"
    if isinstance(error, PermissionError):
        return "it may not be read"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return "it is damaged, cut off, or something else"
