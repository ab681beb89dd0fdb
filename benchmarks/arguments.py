"""Arguments of the commands: counts, and folders of results; refused in one sentence."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks import results
from benchmarks.results import RESULTS, Row


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def check_output(folder: Path, parser: argparse.ArgumentParser) -> None:
    """Make the folder of the results, and refuse one that they could not be written to once they are measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results.read_folder(folder)  # rows of earlier runs, which stay
    except OSError as error:
        parser.error(f"--output must be a folder that can be made, got {folder}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    if not os.access(folder, os.W_OK):
        parser.error(f"--output must be a folder that can be written to, got {folder}")


def existing(folder: Path, parser: argparse.ArgumentParser) -> Path:
    """A folder by its path, or by its name in benchmarks/results."""
    found = next((path for path in (folder, RESULTS / folder) if path.is_dir()), None)
    if found is None:
        parser.error(f"there is no folder {folder}, here or in {RESULTS}")
    return found


def rows_of(folder: Path, ops: list[str] | None, parser: argparse.ArgumentParser) -> list[Row]:
    """The rows of a folder, of some ops (None: all)."""
    try:
        rows = [row for row in results.read_folder(folder) if not ops or row.op in ops]
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"{folder} has no results" + (f" of {', '.join(ops)}" if ops else ""))
    return rows
