"""Files made from others, in parallel: whole or not at all, resumable after any kill, and verified by checksums.

Every file is written elsewhere and moved to its place, so that one which is there is whole. The manifest is begun
before the first of them, to tell what the folder is for, and gets its checksums after the last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout
from tqdm import tqdm

MANIFEST = "manifest.json"
_AT_WORK = ".unfinished"  # the folder of files that are being written


class Task(Protocol):
    """The files that are made from one source; it is sent to another process."""

    @property
    def name(self) -> str:
        """The source."""

    def paths(self) -> list[str]:
        """Where they go, below the folder of all."""

    def contents(self) -> Iterator[bytes]:
        """What goes into each, in the order of `paths`."""


class Made(NamedTuple):
    """What `make` has done."""

    made: int  # sources whose files were written
    kept: int  # sources whose files were there, and had the checksum they were made with


def make(tasks: Sequence[Task], folder: Path, about: dict[str, Any], workers: int, what: str) -> Made:
    """Make all files that are not there, and those that have changed since.

    Args:
        tasks: with different names.
        folder: that receives the files and the manifest.
        about: what decides the contents of the files; another one in the manifest is refused.
        workers: processes.
        what: the unit of the progress bar.

    Raises:
        ValueError: the folder holds other files, another program is at work in it, or a source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _make(tasks, folder, about, workers, what)
    except Timeout as error:
        raise ValueError(f"data: another program is making files in {folder}") from error
    except BrokenProcessPool as error:
        raise ValueError(
            "data: a process was killed, perhaps for its memory; the same command goes on, --workers 1 needs the least"
        ) from error


def _make(tasks: Sequence[Task], folder: Path, about: dict[str, Any], workers: int, what: str) -> Made:
    names = hashlib.sha256("\n".join(task.name for task in tasks).encode("utf-8", "surrogateescape")).hexdigest()
    about = about | {"sources": len(tasks), "names": names}
    manifest, _ = read_manifest(folder)
    if manifest is None:
        # Files of another program: they would be taken for ours.
        if any((folder / Path(path).parent).exists() for path in tasks[0].paths()):
            raise ValueError(f"data: {folder} holds files that another program made; remove it to make them anew")
        written_whole(folder, MANIFEST, json.dumps({"about": about}).encode())
    elif manifest["about"] != about:
        differing = [key for key, value in about.items() if manifest["about"].get(key) != value]
        other = "of other images" if "names" in differing else f"with another {', '.join(differing) or 'version'}"
        raise ValueError(f"data: {folder} holds files that were made {other}; remove it to make them anew")
    known = (manifest or {}).get("checksums", {})
    for parent in {Path(path).parent for task in tasks for path in task.paths()}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    checksums, made = {}, 0
    work = [(task, folder, known.get(task.name)) for task in tasks]
    bar = tqdm(_done(work, workers), total=len(tasks), desc=what, unit="image")
    for task, (checksum, new) in zip(tasks, bar, strict=True):
        checksums[task.name] = checksum
        made += new
    if checksums != known:
        written_whole(folder, MANIFEST, json.dumps({"about": about, "checksums": checksums}).encode())
    shutil.rmtree(folder / _AT_WORK, ignore_errors=True)  # of a run that was killed
    return Made(made, len(tasks) - made)


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """What a folder was made for, None where no `make` began; and whether all of it was made.

    Raises:
        ValueError: the manifest cannot be read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None, False
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return {"about": manifest["about"]} | manifest, "checksums" in manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {file} is no manifest of training.prepare; remove {folder}") from error


def _done(work: list[tuple[Task, Path, str | None]], workers: int) -> Iterator[tuple[str, bool]]:
    if workers == 1:
        yield from map(_one, work)
        return
    with ProcessPoolExecutor(workers, initializer=_follow_parent) as pool:
        try:
            yield from pool.map(_one, work, chunksize=max(1, min(16, len(work) // (4 * workers))))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error, what is left would all be made first


def _one(work: tuple[Task, Path, str | None]) -> tuple[str, bool]:
    """The checksum over the files of a task, and whether they were made now."""
    task, folder, known = work
    paths = task.paths()
    if all((folder / path).is_file() for path in paths):
        checksum = _checksum((folder / path).read_bytes() for path in paths)
        if known is None or known == checksum:
            return checksum, False
    return _checksum(_written(task, folder)), True


def _written(task: Task, folder: Path) -> Iterator[bytes]:
    for path, content in zip(task.paths(), task.contents(), strict=True):
        written_whole(folder, path, content)
        yield content


def _checksum(contents: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def written_whole(folder: Path, path: str, content: bytes) -> None:
    """Write a file of `folder` so that it is there whole or not at all."""
    beside = folder / _AT_WORK / f"{os.getpid()}"
    beside.parent.mkdir(exist_ok=True)
    beside.write_bytes(content)
    os.replace(beside, folder / path)


def _follow_parent() -> None:
    """Leave when the parent process is killed, and only then: a worker would wait for its next task for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
