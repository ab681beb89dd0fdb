"""``manifest.jsonl``: what `training.predict` did, a line for each photograph, from which it also goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.data.photographs import MARK, display_name
from training.runtime.checkpoint import written_whole

NAME = "manifest.jsonl"


class Manifest:
    """The manifest in the folder `out`, whose first line says how, and every other what was done with a photograph.

    Lines are appended as photographs are done, so that a run which was killed goes on. What an earlier run did counts
    if its settings are the same; else all is done anew.

    Args:
        out: the folder.
        settings: all that predictions depend on.
        about: what else to say in the first line.
        images: the names of all photographs, in order.

    Raises:
        ValueError: a file of that name is there which no run has written.
        OSError: it cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], about: dict[str, Any], images: Sequence[str]) -> None:
        self.file = out / NAME
        self._head = {"program": MARK, "settings": settings} | about
        self._entries: dict[str, dict[str, Any]] = {}
        earlier = self._earlier() if os.path.lexists(self.file) else {}
        self._index = {image: index for index, image in enumerate(images)}
        self._entries = {image: earlier[image] for image in images if image in earlier}
        self.write()

    def done(self, image: str, file: Path, paths: Mapping[str, Path]) -> bool:
        """Whether the pictures at `paths` are there, and are of the photograph `file` as it is now."""
        entry = self._entries.get(image)
        try:
            return entry is not None and entry["outputs"] == self._sizes(paths) and entry | _identity(file) == entry
        except OSError:
            return False

    def add(self, image: str, file: Path, paths: Mapping[str, Path], entry: Mapping[str, Any]) -> None:
        """Keep that the pictures at `paths` were made of the photograph `file`; `entry` has more about them."""
        whole = {"image": image, "index": self._index[image]} | _identity(file) | {"outputs": self._sizes(paths)}
        self._entries[image] = whole | dict(entry)
        with open(self.file, "ab") as lines:
            lines.write(_line(self._entries[image]))

    def entries(self) -> list[dict[str, Any]]:
        """All lines but the first, in the order of the photographs."""
        found = [self._entries[image] for image in self._index if image in self._entries]
        return [entry | {"index": self._index[entry["image"]]} for entry in found]

    def write(self) -> None:
        """Write the whole manifest, in order.

        Raises:
            OSError: it cannot be written.
        """
        with written_whole(self.file) as file:
            file.writelines(_line(entry) for entry in (self._head, *self.entries()))

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """What an earlier run with the same settings did; the last line for a photograph counts."""
        lines = list(filter(None, map(_parsed, self.file.read_bytes().splitlines()))) if self.file.is_file() else []
        if not lines or lines[0].get("program") != MARK:
            raise ValueError(
                f"{display_name(self.file)} is there already and is not of predictions: choose another --out"
            )
        same = lines[0].get("settings") == json.loads(json.dumps(self._head["settings"]))
        return {entry["image"]: entry for entry in lines[1:]} if same else {}

    def _sizes(self, paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Name and size of each picture."""
        return {
            kind: {"file": display_name(path.relative_to(self.file.parent).as_posix()), "bytes": path.stat().st_size}
            for kind, path in paths.items()
        }


def sha256(file: Path) -> str:
    """The hash of a file."""
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        for block in iter(lambda: opened.read(2**20), b""):
            found.update(block)
    return found.hexdigest()


def _identity(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The last line is cut off where the program was killed."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and ("program" in entry or {"image", "outputs"} <= entry.keys()) else None
