"""The folder that a run writes to: what may be there before, and what of it is an older run's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from training.config import Config
from training.data.photographs import display_name, real
from training.runtime import checkpoint


def prepare_folder(folder: Path, what: str) -> None:
    """Make `folder`, and make sure that files can be written into it; errors begin with `what`.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        in_the_way = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise ValueError(f"{what} must be a folder, got the file {display_name(in_the_way)}") from error
    except OSError as error:
        raise ValueError(
            f"{what} must be a folder to write to, got {display_name(folder)}: {error.strerror}"
        ) from error


@contextmanager
def output_of_run(config: Config) -> Iterator[None]:
    """Keep the output folder of a run for this process inside the ``with`` block.

    Raises:
        ValueError: it cannot be one, or another process writes into it.
    """
    check_place(config)
    folder = Path(config.output)
    made = not folder.exists()
    prepare_folder(folder, "config: `output`")
    try:
        with locked(folder):
            yield
    finally:
        if made and [path.name for path in folder.iterdir()] == [_LOCK]:  # a run that has not begun leaves nothing
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that a run writes to inside the ``with`` block; the lock of a dead process is none.

    Raises:
        ValueError: another process has it.
    """
    file = folder / _LOCK
    holder = file.read_text(errors="replace") if file.is_file() else ""  # before older versions of filelock empty it
    if holder and not holder.startswith("process "):
        raise ValueError(_not_ours(folder, _LOCK))
    try:
        with FileLock(file, timeout=0):
            now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
            with suppress(OSError):  # on a full disk, of which `check_space` has more to say
                file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}")
            yield
    except Timeout as error:
        raise ValueError(f"{display_name(folder)} is being written by {holder or 'another process'}") from error


def is_of_run(folder: Path) -> bool:
    """Whether a run writes or wrote to the folder."""
    return (folder / _LOCK).is_file()


def check_place(config: Config) -> None:
    """Refuse an output folder in which a run would mix with photographs.

    Raises:
        ValueError: it is such.
    """
    output = real(config.output)
    if config.data.root is not None and config.data.name == "folder":
        root = real(config.data.root)
        if output == root or any(output.is_relative_to(root / kind) for kind in ("imgs", "labels")):
            raise ValueError(f"config: `output` must be another folder than `data.root`, got {config.output}")


def check_space(output: Path, sizes: dict[str, int]) -> None:
    """Refuse a disk that has no place for files of these sizes, in bytes; those that are there give theirs free.

    Raises:
        ValueError: it is too small.
    """
    there = {name: (output / name).stat().st_size for name in sizes if (output / name).is_file()}
    needed = sum(max(0, size - there.get(name, 0)) for name, size in sizes.items())
    needed += sizes["checkpoint.pt"]  # each is written beside the one it replaces
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ValueError(
            f"config: `output` {display_name(output)} is on a disk with {free / 2**20:,.1f} MiB left, and the run needs"
            f" about {needed / 2**20:,.1f} MiB"
        )


def check_output(config: Config, fresh: bool) -> None:
    """Refuse an output folder that `check_place` refuses, or in which a run would overwrite what none has written.

    Args:
        config: of the run.
        fresh: it will not go on from the checkpoint in the folder.

    Raises:
        ValueError: the folder is such.
    """
    check_place(config)
    output = real(config.output)
    for name, is_ours in _OURS.items():
        asked = fresh or name != "checkpoint.pt"  # which is loaded without --fresh, and that says what is wrong with it
        if asked and (output / name).exists() and not is_ours(output / name):
            raise ValueError(_not_ours(output, name))


def _not_ours(output: Path, name: str) -> str:
    shown = display_name(output)
    return f"config: `output` {shown} holds a {name} that no run has written: choose another, or remove the file"


def _is_checkpoint(file: Path) -> bool:
    try:
        checkpoint.load(file)
    except ValueError:
        return False
    return True


def _is_metrics(file: Path) -> bool:
    try:
        return {"baseline", "hp", "config"} <= json.loads(file.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_report(file: Path) -> bool:
    try:
        return "<title>Hidden Positives: " in file.read_text(encoding="utf-8")[:10_000]
    except (OSError, ValueError):
        return False


def _is_log(file: Path) -> bool:
    try:
        first, is_whole, _ = file.read_text(encoding="utf-8").partition("\n")
        if not is_whole:  # killed while it wrote
            return first.startswith('{"step": ') or not first
        return "step" in (line := json.loads(first)) and any(
            key.startswith(("images_per_second", "val/")) for key in line
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


_LOCK = "run.lock"  # held while a run writes; it stays, and says which process wrote last
# What a run writes into its output folder, and whether a file of that name is such.
_OURS = {
    "checkpoint.pt": _is_checkpoint,
    "best.pt": _is_checkpoint,
    checkpoint.BACKBONE: _is_checkpoint,
    "metrics.json": _is_metrics,
    "report.html": _is_report,
    "log.jsonl": _is_log,
}


def remove_partial(output: Path) -> None:
    """Remove what a run that was killed had not finished writing."""
    for name in _OURS:
        (output / f"{name}.partial").unlink(missing_ok=True)


def remove_run(output: Path) -> None:
    """Remove what an older run left in its output folder, and nothing else."""
    for name in _OURS:
        (output / name).unlink(missing_ok=True)
    remove_partial(output)
    for log in (output / "tensorboard").glob("events.out.tfevents.*"):
        log.unlink()
