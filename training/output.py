"""The folder that a run writes to: what may be there before, and what of it is an older run's."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from training import checkpoint
from training.config import Config
from training.photographs import display_name, real


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


def check_output(config: Config, fresh: bool) -> None:
    """Refuse an output folder in which a run would mix with photographs, or overwrite what no run has written.

    Args:
        config: of the run.
        fresh: it will not go on from the checkpoint in the folder.

    Raises:
        ValueError: the folder is such.
    """
    output = real(config.output)
    if config.data.root is not None and config.data.name == "folder":
        root = real(config.data.root)
        if output == root or any(output.is_relative_to(root / kind) for kind in ("imgs", "labels")):
            raise ValueError(f"config: `output` must be another folder than `data.root`, got {config.output}")
    for name, is_ours in _OURS.items():
        asked = fresh or name != "checkpoint.pt"  # which is loaded without --fresh, and that says what is wrong with it
        if asked and (output / name).exists() and not is_ours(output / name):
            raise ValueError(
                f"config: `output` {config.output} holds a {name} that no run has written: choose another, or remove"
                " the file"
            )


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
        return {"step", "loss", "images_per_second"} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError):
        return False


# What a run writes into its output folder, and whether a file of that name is such.
_OURS = {
    "checkpoint.pt": _is_checkpoint,
    "best.pt": _is_checkpoint,
    "metrics.json": _is_metrics,
    "report.html": _is_report,
    "log.jsonl": _is_log,
}


def remove_run(output: Path) -> None:
    """Remove what an older run left in its output folder, and nothing else."""
    for name in (*_OURS, "checkpoint.pt.partial"):
        (output / name).unlink(missing_ok=True)
    for log in (output / "tensorboard").glob("events.out.tfevents.*"):
        log.unlink()
