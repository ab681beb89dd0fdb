"""``python -m benchmarks compare``: a run against a baseline, in lines; the exit status says whether it is worse."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments, baseline, results
from benchmarks.baseline import FASTER, LESS, MORE, SAME, SLOWER, Change, Comparison, identity
from benchmarks.cases import OPS
from benchmarks.pages import presentation
from benchmarks.providers import known_names
from benchmarks.results import Row
from benchmarks.run import WRONG


def add_compare(commands: Any) -> None:
    """Enter the command `compare` into those of ``python -m benchmarks``."""
    command = commands.add_parser(
        "compare", help="compare times and memory of a run with a baseline; 1 if ours are slower or take more"
    )
    command.add_argument("run", type=Path, nargs="?", help="folder of a run (default: measures what the baseline has)")
    command.add_argument(
        "--baseline", type=Path, nargs="?", help="folder of results (default: benchmarks/results/<device>)"
    )
    command.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    for name, default in (("--tolerance", baseline.TOLERANCE), ("--memory-tolerance", baseline.MEMORY_TOLERANCE)):
        command.add_argument(name, type=float, default=default, metavar="SHARE", help="default: %(default)s")
    command.add_argument("--relative-to", metavar="PROVIDER", help="compare times in units of this provider's")
    command.set_defaults(command=_compare)


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for name, share in (("--tolerance", options.tolerance), ("--memory-tolerance", options.memory_tolerance)):
        if not 0 <= share < math.inf:
            parser.error(f"{name} must be a share, 0 or more and finite, got {share}")
    if options.relative_to not in (None, *known_names()):
        parser.error(f"unknown provider {options.relative_to}; known are {', '.join(known_names())}")
    measured = (
        None if options.run is None else arguments.rows_of(arguments.existing(options.run, parser), options.op, parser)
    )
    environment = results.environment("cuda" if torch.cuda.is_available() else "cpu")
    where = vars(measured[0]) if measured else environment
    if options.baseline:
        folder = arguments.existing(options.baseline, parser)
    else:
        folder = baseline.folder_of(where["device"], where["threads"])
        if not folder.is_dir():
            parser.error(f"there is no baseline {folder}: measure one with `run`, or name another with --baseline")
    rows = arguments.rows_of(folder, options.op, parser)
    if measured is None:
        measured = []
        for row in baseline.again(rows, environment):
            print(presentation.line(row), flush=True)
            measured.append(row)
    comparison = baseline.compare(rows, measured, options.tolerance, options.relative_to, options.memory_tolerance)
    if not (comparison.changes or comparison.memory or comparison.lost):
        parser.error(f"{folder} and the run have nothing in common: {baseline.difference(rows, measured)}")
    for line in report(comparison, rows, measured):
        print(line)
    return 1 if comparison.failed else 0


def report(comparison: Comparison, before: list[Row], after: list[Row]) -> Iterator[str]:
    """A comparison in lines: each time, the slower last, memory that changed, what was not compared, and how many."""
    if comparison.relative_to:
        yield f"ratios are of times relative to {comparison.relative_to}"
    order = (SAME, FASTER, SLOWER)
    for change in sorted(comparison.changes, key=lambda change: (order.index(change.verdict), *change.after.key)):
        yield f"{change.verdict:6}  {_name(change.after):64}  {_times(change)}{_drift(change, before, after)}"
    for change in sorted(comparison.memory, key=lambda change: (change.verdict == MORE, *change.after.key)):
        if change.verdict != SAME:
            peaks = f"{change.before.peak_mib:.4g} -> {change.after.peak_mib:.4g} MiB, x{change.ratio:.2f}"
            yield f"{change.verdict:6}  {_name(change.after):64}  {peaks}"
    ops = {row.op for row in after}
    others = [row for row in comparison.not_measured if row.op not in ops]
    if others:
        yield f"in the baseline, of ops that the run does not have ({len(others)})"
    for title, rows in {
        "in the baseline, not measured": [row for row in comparison.not_measured if row.op in ops],
        "measured, not in the baseline": comparison.without_baseline,
        **comparison.not_compared,
    }.items():
        if rows:
            yield "\n        ".join([f"{title} ({len(rows)}):", *map(_name, rows)])
    for row in comparison.lost:
        yield f"lost    {_name(row)}: {row.note.removeprefix(WRONG)}"
    of_time, of_memory = (
        Counter(change.verdict for change in changes) for changes in (comparison.changes, comparison.memory)
    )
    yield f"time: {of_time[FASTER]} faster, {of_time[SAME]} within the tolerance or noise, {of_time[SLOWER]} slower"
    yield f"memory: {of_memory[LESS]} less, {of_memory[SAME]} within the tolerance or noise, {of_memory[MORE]} more"


def _name(row: Row) -> str:
    return f"{row.op} {row.call} N={row.anchors} {row.dtype} {row.provider}"


def _times(change: Change) -> str:
    noise = " (quartiles overlap)" if change.noisy else ""
    return f"{change.before.median_ms:.4g} -> {change.after.median_ms:.4g} ms, x{change.ratio:.2f}{noise}"


def _drift(change: Change, before: list[Row], after: list[Row]) -> str:
    """How many times as long a provider that is not ours took in each of the runs: a machine's drift is in both."""
    row = change.after
    if not presentation.is_ours(row.provider):
        return ""
    here = [[other for other in rows if identity(other)[:-1] == identity(row)[:-1]] for rows in (before, after)]
    peers = [{other.provider for other in rows if other.median_ms is not None} for rows in here]
    name = presentation.yardstick(other for other in here[1] if other.provider in peers[0] & peers[1])
    if name is None or presentation.is_ours(name):
        return ""
    old, new = (presentation.at(rows, name, row.anchors).median_ms for rows in here)
    return f"; {name} x{old / change.before.median_ms:.2f} -> x{new / change.after.median_ms:.2f}"
