"""Finished runs, read from what they left and put into groups that differ in more than their seed."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.config import WHILE_TRAINING
from training.config_file import config_from_dict, flat
from training.runtime.progress import LOG

BASELINE = "baseline"
"""Stands for the frozen features: of each group its own."""

# Keys that say where a run was computed and what was written meanwhile, not what was learnt and scored.
_PLACE = (
    *("output", "device", "backend", "log_every", "checkpoint_every", "data.root", "data.val_images", "data.workers"),
    *("backbone.cache", "backbone.cache_dir", "rank_timeout"),
    *WHILE_TRAINING,
)


class Metric(NamedTuple):
    """A figure of a run: its title, and where in ``metrics.json`` it stands, for the run and for its baseline."""

    title: str
    path: tuple[str, ...]
    baseline: tuple[str, ...] = ()


SECTIONS = {
    "k-means, in percent": {
        "kmeans.accuracy": Metric("accuracy", ("hp", "kmeans", "accuracy"), (BASELINE, "unsupervised", "accuracy")),
        "kmeans.miou": Metric("mIoU", ("hp", "kmeans", "miou"), (BASELINE, "unsupervised", "miou")),
        "kmeans.position": Metric("position score", ("position_score", "kmeans"), ("position_score", BASELINE)),
    },
    "cluster probe, in percent": {
        "cluster_probe.accuracy": Metric("accuracy", ("hp", "cluster_probe", "accuracy")),
        "cluster_probe.miou": Metric("mIoU", ("hp", "cluster_probe", "miou")),
        "cluster_probe.position": Metric("position score", ("position_score", "cluster_probe")),
    },
    "linear probe, which learns from labels, in percent": {
        "linear.accuracy": Metric("accuracy", ("hp", "linear", "accuracy")),
        "linear.miou": Metric("mIoU", ("hp", "linear", "miou")),
    },
    "nearest neighbours, which learn from labels, in percent": {
        "knn.accuracy": Metric("accuracy", ("hp", "knn", "accuracy"), (BASELINE, "knn", "accuracy")),
        "knn.miou": Metric("mIoU", ("hp", "knn", "miou"), (BASELINE, "knn", "miou")),
    },
    "precision of the positives, in percent": {
        f"{kind}.{where}.precision": Metric(f"{kind}, {where}", ("positives", kind, where, "precision"))
        for kind in ("agnostic", "specific")
        for where in ("within", "across")
    },
    "positives of an anchor, within its image and across images": {
        f"{kind}.{where}.number": Metric(f"{kind}, {where}", ("positives", kind, where, "per_anchor"))
        for kind in ("agnostic", "specific")
        for where in ("within", "across")
    },
    "training": {
        "seconds": Metric("seconds", ("run", "training_seconds")),
        "images_per_second": Metric("images/s", ("run", "images_per_second")),
    },
}
METRICS = {name: metric for section in SECTIONS.values() for name, metric in section.items()}


class Trial(NamedTuple):
    """One finished run."""

    folder: Path
    metrics: dict[str, Any]  # metrics.json
    config: dict[str, Any]  # its configuration by dotted key, without what says where it ran


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    trials: dict[int, Trial]  # by seed

    def values(self, metric: str) -> dict[int, float]:
        """A figure of its runs by seed, of those that have it."""
        return self._at(METRICS[metric].path)

    def baseline(self, metric: str) -> dict[int, float]:
        """The same of the frozen features."""
        return self._at(METRICS[metric].baseline)

    def _at(self, path: tuple[str, ...]) -> dict[int, float]:
        found = {seed: look(trial.metrics, path) for seed, trial in self.trials.items()}
        return {seed: value for seed, value in found.items() if isinstance(value, int | float)}


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """The folders of finished runs, each once, and those that hold none, as of a run that has just begun.

    Raises:
        ValueError: a folder is not there, or no run is finished.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for path in map(str, paths):
        found = sorted(map(Path, glob.glob(path))) or [Path(path)]
        for place in found:
            if place.suffix == ".html":  # a page of before, which runs/* also matches
                continue
            place = place.parent if place.name == "metrics.json" else place
            if not place.is_dir():
                raise ValueError(f"{place} must be the folder of a run or hold such folders; it is no folder")
            folders = [place] if _is_run(place) else sorted(filter(_is_run, place.glob("*"))) or [place]
            for folder in folders:
                done = (folder / "metrics.json").is_file()
                (finished if done else unfinished).setdefault(folder.resolve(), folder)
    if not finished:
        where = ", ".join(map(str, unfinished.values())) or "a page"
        raise ValueError(f"no run is finished: no metrics.json in {where}")
    return [*finished.values()], [*unfinished.values()]


def read_trial(folder: Path) -> Trial:
    """What a finished run left in its folder.

    Raises:
        ValueError: it cannot be read as that.
    """
    file = folder / "metrics.json"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        config = flat(config_from_dict(metrics["config"]).model_dump())
        metrics["run"]["images_per_second"] = (
            metrics["run"]["steps"] * config["batch_size"] / max(metrics["run"]["training_seconds"], 0.1)
        )
        metrics["per_class"]["classes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is not what training.train writes: {why}") from error
    return Trial(folder, metrics, {key: value for key, value in config.items() if key not in _PLACE})


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What the run of a folder logged, by the name of the figure and step; nothing where there is no such log."""
    found: dict[str, dict[int, float]] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        for line in map(json.loads, (folder / LOG).read_text(encoding="utf-8").splitlines()):
            for name, value in line.items():
                if isinstance(value, int | float):
                    found.setdefault(name, {})[line["step"]] = value
    return found


def grouped(trials: Sequence[Trial]) -> tuple[list[Group], dict[str, list[Any]]]:
    """Groups of runs that differ in their seed alone, in the order of the first of each, and what groups differ in.

    A group has the name that the folders of its runs have without their seed ("hp" of ``hp_s0`` and ``hp_s1``); where
    that is not one name, or that of two groups, what its configuration has otherwise than others.

    Raises:
        ValueError: two runs of a group have the same seed.
    """
    same: dict[str, list[Trial]] = {}
    for trial in trials:
        same.setdefault(json.dumps(trial.config | {"seed": None}, default=str), []).append(trial)
    firsts = [of_group[0].config for of_group in same.values()]
    settings = {key: [first[key] for first in firsts] for key in firsts[0] if key != "seed"}
    settings = {key: values for key, values in settings.items() if any(value != values[0] for value in values)}
    names = [_folder_name(of_group) for of_group in same.values()]
    groups = []
    for index, of_group in enumerate(same.values()):
        name = names[index]
        if not name or names.count(name) > 1 or name == BASELINE:
            name = ", ".join(f"{key}={shown(values[index])}" for key, values in settings.items()) or "runs"
        by_seed: dict[int, Trial] = {}
        for trial in of_group:
            other = by_seed.setdefault(trial.config["seed"], trial)
            if other is not trial:
                which = f"{other.folder} and {trial.folder}"
                raise ValueError(f"{which} are the same run of seed {trial.config['seed']}: give one of them")
        groups.append(Group(name, dict(sorted(by_seed.items()))))
    return groups, settings


def check_comparable(groups: Sequence[Group]) -> None:
    """Refuse runs that were not scored on the same labels: as many pixels of each class.

    Raises:
        ValueError: they were not.
    """
    first = next(iter(groups[0].trials.values()))
    for group in groups:
        for trial in group.trials.values():
            for path in (("per_class", "classes"), ("images",), ("run", "scored_images")):
                theirs, ours = look(trial.metrics, path), look(first.metrics, path)
                if theirs != ours:
                    raise ValueError(
                        f"{trial.folder} and {first.folder} do not compare: {path[-1]} {theirs}, not {ours}"
                    )
            if _labelled(trial) != _labelled(first):
                keys = [key for key in first.config if key.startswith(("data.", "evaluation.")) or "resize" in key]
                differ = [key for key in keys if trial.config[key] != first.config[key]]
                told = f"they differ in {', '.join(differ)}" if differ else "the files or the code of the data changed"
                raise ValueError(
                    f"{trial.folder} and {first.folder} do not compare, as they were scored on different labels: {told}"
                )


def _labelled(trial: Trial) -> list[int] | None:
    """How many pixels of each class were scored; None without labels."""
    confusion = look(trial.metrics, ("per_class", "cluster_probe", "confusion"))
    return None if confusion is None else np.sum(confusion, axis=0).tolist()


def shown(value: Any) -> str:
    """A value of the configuration as one writes it on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def look(values: Any, path: Sequence[str]) -> Any:
    """What stands at `path` in nested mappings; None where there is no such place."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if path else None


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("metrics.json", "checkpoint.pt", "tensorboard"))


def _folder_name(trials: Sequence[Trial]) -> str:
    """The name that the folders of some runs have without their seed; nothing if that is not one."""
    names = set()
    for trial in trials:
        folder = trial.folder.resolve()
        name = re.sub(rf"(^|[_\-.]|(?<=[^\d]))(seed|s)?[_\-.=]?0*{trial.config['seed']}$", "", folder.name)
        names.add(name or folder.parent.name)
    return names.pop() if len(names) == 1 else ""
