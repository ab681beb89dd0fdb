"""Compare finished runs: groups that differ in their configuration, paired by seed.

python -m training.compare runs/hp_s* runs/stego_s* [--against hp] [--metric kmeans.accuracy,kmeans.miou]
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy import stats

from training.evaluation.metrics import to_json
from training.report.group_curves import group_curves
from training.runtime.checkpoint import written_whole
from training.runtime.program import Parser, expanded, one_sentence
from training.trials import (
    BASELINE,
    METRICS,
    SECTIONS,
    Group,
    check_comparable,
    find_runs,
    grouped,
    logged,
    look,
    read_trial,
    shown,
)

_CONFIDENCE = 0.95
_TICKS = (1, 2, 5, 10, 20, 50, 100, 1000)  # between the marks of a plot


class Difference(NamedTuple):
    """The mean of paired differences, and its confidence interval; None with a single pair."""

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    pairs: dict[int, float]  # by seed

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Of what two groups have by seed: their difference at the seeds of both, with a t interval; None without any.

    Example:
        >>> paired_difference({0: 3.0, 1: 4.0, 2: 5.0, 7: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0})[:2]
        (3.0, (0.51586228..., 5.48413771...))
    """
    pairs = {seed: values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())}
    if not pairs:
        return None
    mean, number = float(np.mean([*pairs.values()])), len(pairs)
    if number == 1:
        return Difference(mean, None, None, pairs)
    error = float(np.std([*pairs.values()], ddof=1)) / math.sqrt(number)
    if error == 0:  # the same difference at every seed
        return Difference(mean, (mean, mean), float(mean == 0), pairs)
    half = error * float(stats.t.ppf((1 + _CONFIDENCE) / 2, number - 1))
    return Difference(mean, (mean - half, mean + half), 2 * float(stats.t.sf(abs(mean) / error, number - 1)), pairs)


class Row(NamedTuple):
    """A group, or the baseline of some, as tables show it."""

    name: str
    values: dict[str, dict[int, float]]  # by metric and seed
    reference: dict[str, dict[int, float]]  # what is taken off

    @property
    def seeds(self) -> int:
        """Of how many runs it is."""
        return max((len(of_metric) for of_metric in self.values.values()), default=0)

    def difference(self, metric: str) -> Difference | None:
        """To the reference; None for the reference itself."""
        values, reference = self.values.get(metric, {}), self.reference.get(metric, {})
        return None if values is reference else paired_difference(values, reference)


class Comparison(NamedTuple):
    """Groups, what they are compared with, and what must be known to read that."""

    groups: list[Group]
    against: str
    rows: list[Row]
    settings: dict[str, list[Any]]  # by key, the value of each group, of those keys that differ
    notes: list[str]


def compare(paths: Iterable[str | Path], against: str | None = None, sort: str | None = None) -> Comparison:
    """Read runs, group them by all of their configuration but the seed, and pair the groups by seed.

    Args:
        paths: folders of runs, folders of such folders, ``metrics.json`` files, or patterns of these.
        against: the group that differences are taken to, or "baseline": each its own. None: the first.
        sort: the metric that rows are sorted by, the greatest mean first. None: as they were given.

    Raises:
        ValueError: there is nothing to compare, a file cannot be read, or the runs were scored on different labels.
    """
    folders, unfinished = find_runs(paths)
    groups, settings = grouped([read_trial(folder) for folder in folders])
    check_comparable(groups)
    names = [group.name for group in groups]
    against = names[0] if against is None else against
    if against not in (*names, BASELINE):
        raise ValueError(f"--against must be {BASELINE} or one of {', '.join(names)}, got {against}")
    rows = _rows(groups, against)
    if sort is not None:
        rows.sort(key=lambda row: -np.mean([*row.values[sort].values()] or [-math.inf]))
    return Comparison(groups, against, rows, settings, _notes(groups, against, settings, unfinished))


def _rows(groups: Sequence[Group], against: str) -> list[Row]:
    """The baselines, one for groups whose baselines agree, and the groups."""
    own = [{name: group.baseline(name) for name in METRICS} for group in groups]
    values = [{name: group.values(name) for name in METRICS} for group in groups]
    chosen = None if against == BASELINE else values[[group.name for group in groups].index(against)]
    merged: list[tuple[dict[str, dict[int, float]], list[str]]] = []
    for group, baseline in zip(groups, own, strict=True):
        for known, names in merged:
            if all(_agree(known[name], baseline[name]) for name in METRICS):
                for name in METRICS:
                    known[name] |= baseline[name]
                names.append(group.name)
                break
        else:
            merged.append(({name: dict(of_metric) for name, of_metric in baseline.items()}, [group.name]))
    rows = []
    for known, names in merged:
        title = "k-means of the frozen features" + ("" if len(merged) == 1 else f", of {', '.join(names)}")
        rows.append(Row(title, known, known if chosen is None else chosen))
    for group, of_group, baseline in zip(groups, values, own, strict=True):
        rows.append(Row(group.name, of_group, baseline if chosen is None else chosen))
    return rows


def _agree(first: Mapping[int, float], second: Mapping[int, float]) -> bool:
    common = first.keys() & second.keys()
    return bool(common or not (first or second)) and all(first[seed] == second[seed] for seed in common)


def _notes(
    groups: Sequence[Group], against: str, settings: Mapping[str, Sequence[Any]], unfinished: Sequence[Path]
) -> list[str]:
    """What a reader must know."""
    notes = []
    if unfinished:
        notes.append(f"left out, as not finished: {', '.join(map(str, unfinished))}")
    reference = next((group for group in groups if group.name == against), None)
    for group in groups if reference is not None else ():
        alone = [str(seed) for seed in group.trials if seed not in reference.trials]
        if alone:
            notes.append(f"{group.name}: no partner in {against} for seed {', '.join(alone)}, not in the differences")
    scored = [key for key in settings if key.startswith(("data.", "evaluation.")) or key == "quirks.select_on_labels"]
    if scored:
        notes.append(f"groups differ in how they were scored or what they were trained on: {', '.join(scored)}")
    for what, path in {"commits": ("run", "commit"), "devices": ("run", "device")}.items():
        found = dict.fromkeys(str(look(trial.metrics, path)) for group in groups for trial in group.trials.values())
        if len(found) > 1:
            notes.append(f"runs are of different {what}: {', '.join(found)}")
    return notes


def tables(comparison: Comparison, metrics: Sequence[str] = ()) -> list[tuple[str, list[list[str]]]]:
    """Captions and rows of cells, the first of which is the head: one table of `metrics`, or all by subject."""
    sections = {"": list(metrics)} if metrics else {title: list(section) for title, section in SECTIONS.items()}
    result = []
    for caption, names in sections.items():
        rows = [row for row in comparison.rows if any(row.values[name] for name in names)]
        columns = [("", [row.name for row in rows]), ("seeds", [str(row.seeds) for row in rows])]
        for name in names:
            columns.append((METRICS[name].title if caption else name, [spread(row.values[name]) for row in rows]))
            columns.append((f"less {comparison.against}", [interval(row.difference(name)) for row in rows]))
        filled = [[head, *cells] for head, cells in columns if any(cells)]
        if filled:
            result.append((caption, [list(line) for line in zip(*filled, strict=True)]))
    return result


def spread(values: Mapping[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    mean = f"{np.mean([*values.values()]):.1f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {np.std([*values.values()], ddof=1):.1f}"


def interval(difference: Difference | None) -> str:
    """A difference and its interval, with a star if that leaves out 0."""
    if difference is None:
        return ""
    if difference.interval is None:
        return f"{_signed(difference.mean)} (–)"
    low, high = map(_signed, difference.interval)
    return f"{_signed(difference.mean)} ({low} to {high}){'*' if difference.beyond_chance else ''}"


def legend(comparison: Comparison) -> list[str]:
    """How the tables are to be read."""
    told = "mean ± standard deviation over seeds; differences are paired by seed, with the 95 % interval of a t-test"
    if all(len(group.trials) == 1 for group in comparison.groups):
        told = "a single seed: no interval can be given, and a difference may be chance"
    else:
        told += "; *: the interval leaves out 0, which chance alone does in one of twenty"
    return [told, *comparison.notes]


def as_text(comparison: Comparison, metrics: Sequence[str] = (), *, markdown: bool = False) -> str:
    """The tables for a terminal or in Markdown."""
    blocks = []
    for caption, rows in tables(comparison, metrics):
        if markdown:
            rows = [[cell.replace("*", "\\*").replace("|", "\\|") for cell in row] for row in rows]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            lines.insert(1, "|---" * len(rows[0]) + "|")
            blocks.append("\n".join([f"{caption[:1].upper()}{caption[1:]}:\n", *lines] if caption else lines))
        else:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            padded = [[f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
            blocks.append("\n".join(filter(None, [caption, *("  ".join(row).rstrip() for row in padded)])))
    return "\n\n".join([*blocks, "\n".join(legend(comparison))])


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything, for other programs."""

    def figures(row: Row, name: str) -> dict[str, Any]:
        values, difference = [*row.values[name].values()], row.difference(name)
        return {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "by_seed": row.values[name],
            "difference": None if difference is None else difference._asdict(),
        }

    return {
        "against": comparison.against,
        "rows": {
            row.name: {name: figures(row, name) for name in METRICS if row.values[name]} for row in comparison.rows
        },
        "runs": {
            group.name: {seed: str(trial.folder) for seed, trial in group.trials.items()} for group in comparison.groups
        },
        "settings": comparison.settings,
        "notes": comparison.notes,
    }


def write_page(path: Path, comparison: Comparison, metrics: Sequence[str] = ()) -> None:
    """Write one HTML file that needs no other file, no network and no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "report"),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["shown"] = shown
    html = environment.get_template("compare.html.j2").render(
        comparison=comparison,
        tables=tables(comparison, metrics),
        legend=legend(comparison),
        plots=list(filter(None, (_plot(comparison, name) for name in metrics or ("kmeans.accuracy", "kmeans.miou")))),
        classes=_class_differences(comparison),
        curves=group_curves(
            {group.name: [logged(trial.folder) for trial in group.trials.values()] for group in comparison.groups}
        ),
    )
    with written_whole(path) as file:
        file.write(html.encode())


def _plot(comparison: Comparison, metric: str) -> dict[str, Any] | None:
    """The paired differences of a metric, placed between 0 and 100 from the least to the greatest number."""
    found = [(row.name, row.difference(metric)) for row in comparison.rows]
    shown = [(name, difference) for name, difference in found if difference is not None]
    if not shown:
        return None
    numbers = [0.0, *(number for _, one in shown for number in (*one.pairs.values(), *(one.interval or ())))]
    low, high = min(numbers), max(numbers)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(number: float) -> float:
        return round(100 * (number - low) / (high - low), 2)

    step = next(step for step in _TICKS if (high - low) / step <= 8 or step == _TICKS[-1])
    ticks = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    rows = [
        {
            "name": name,
            "mean": place(one.mean),
            "interval": one.interval and tuple(map(place, one.interval)),
            "dots": [(seed, number, place(number)) for seed, number in one.pairs.items()],
            "text": interval(one),
        }
        for name, one in shown
    ]
    return {"title": _title(metric), "rows": rows, "ticks": [(_signed(tick, 0), place(tick)) for tick in ticks]}


def _class_differences(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[Difference | None]]]] | None:
    """By class and group, the paired difference of the IoU of k-means; None without labels."""
    classes = next(iter(comparison.groups[0].trials.values())).metrics["per_class"]["classes"]

    def iou(group: Group, name: str, index: int) -> dict[int, float]:
        found = {seed: look(trial.metrics, ("per_class", name, "iou")) for seed, trial in group.trials.items()}
        return {seed: of_run[index] for seed, of_run in found.items() if of_run and of_run[index] is not None}

    others = [group for group in comparison.groups if group.name != comparison.against]
    reference = next((group for group in comparison.groups if group.name == comparison.against), None)
    rows = []
    for index, name in enumerate(classes):
        of_class = []
        for group in others:
            taken_off = iou(reference, "kmeans", index) if reference else iou(group, "baseline", index)
            of_class.append(paired_difference(iou(group, "kmeans", index), taken_off))
        rows.append((name, of_class))
    return ([group.name for group in others], rows) if any(any(of_class) for _, of_class in rows) else None


def _title(metric: str) -> str:
    caption = next(caption for caption, section in SECTIONS.items() if metric in section)
    return f"{METRICS[metric].title}, {caption}"


def _signed(number: float, digits: int = 1) -> str:
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text.lstrip("+−")


def _metrics(names: str) -> list[str]:
    """The metrics that are named, with commas between them."""
    chosen = list(filter(None, names.split(",")))
    for name in chosen:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name}{_meant(name, METRICS)}; there are {', '.join(METRICS)}")
    return chosen


def _meant(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("compare", __doc__, epilog=f"metrics: {', '.join(METRICS)}")
    parser.add_argument("runs", nargs="+", help="folders of runs, folders that hold such, or patterns of them")
    parser.add_argument(
        "--against", metavar="GROUP", help=f"what differences are taken to, or {BASELINE}; else the first"
    )
    parser.add_argument("--metric", default="", metavar="NAME,...", help="one table of these, instead of all")
    parser.add_argument("--sort", default="", metavar="NAME", help="the metric to sort rows by, the greatest first")
    parser.add_argument("--page", type=expanded, help="where to write it; else compare.html beside the first run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown instead of text")
    how.add_argument("--json", action="store_true", help="print JSON with the figures of each seed")
    options = parser.parse_intermixed_args(arguments)
    with one_sentence("compare"):
        metrics, sort = _metrics(options.metric), _metrics(options.sort)
        comparison = compare(options.runs, options.against, *sort[:1])
        first = next(iter(comparison.groups[0].trials.values())).folder
        page = options.page or first.parent / "compare.html"
        write_page(page, comparison, metrics)
    print(to_json(as_dict(comparison)) if options.json else as_text(comparison, metrics, markdown=options.markdown))
    print(f"page: {page}", file=sys.stderr)


if __name__ == "__main__":
    main()
