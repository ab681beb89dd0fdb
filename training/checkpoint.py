"""Checkpoints: written whole or not at all, and read without running code that a file may hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = "hpkernels training checkpoint 1"


def save(path: str | Path, contents: dict[str, Any]) -> None:
    """Write `contents` so that `path` holds either what it held before or all of it, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT} | contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU.

    Raises:
        ValueError: the file is not there, is damaged, needs code to be unpickled, or is something else.
    """
    contents = load_tensors(path)
    if contents.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is not a checkpoint of this training loop (format {FORMAT!r})")
    return contents


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values, onto the CPU.

    Raises:
        ValueError: the file is not there, is damaged, needs code to be unpickled, or holds no dictionary.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint: there is no file {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is damaged or foreign
        raise ValueError(f"checkpoint: {path} cannot be read as plain tensors: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"checkpoint: {path} must hold a dictionary, got {type(contents).__name__}")
    return contents
