"""The measured part of docs/benchmarks.md: for each device and op a plot and a short table."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.pages import plotted, presentation
from benchmarks.results import Environment, Row, read_folder

BEGIN, END = "<!-- begin measured tables -->", "<!-- end measured tables -->"

_RATES = {
    "images_per_second": lambda value: f"{presentation.amount(value)} images/s",
    "tflops": presentation.flop_rate,
    "of_mm": lambda value: f"{value:.0%} of `mm`",
    "of_roofline": lambda value: f"{value:.0%} of the roofline",
}
"""Columns that some rows have, and how a table says them."""


class _Line(NamedTuple):
    """A line of a table: what was measured of one call at one size."""

    call: str
    anchors: int
    ours: Row | None
    other: Row | None
    rival: Row | None


def write_tables(page: Path, results: Path) -> None:
    """Replace what stands between the page's two comments by the plots and tables of every device.

    Raises:
        ValueError: the page has not both comments, in this order.
    """
    replace_between(page, BEGIN, END, measured(page.parent, results))


def replace_between(page: Path, begin: str, end: str, lines: str) -> None:
    """Replace what stands between two comments of a page.

    Raises:
        ValueError: the page has not both, in this order.
    """
    text = page.read_text()
    first, last = text.find(begin), text.find(end)
    if not 0 <= first < last:
        raise ValueError(f"{page} must have the lines {begin} and {end}")
    page.write_text(text[: first + len(begin)] + "\n" + lines + text[last:])


def measured(folder_of_page: Path, results: Path) -> str:
    """The sections of all devices, with links that are relative to a page in `folder_of_page`."""
    lines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if rows := read_folder(folder):
            lines += _device(rows, Path(os.path.relpath(folder, folder_of_page)))
    return "\n".join(lines)


def _device(rows: list[Row], folder: Path) -> list[str]:
    of_all = f"Instructions: {rows[0].instructions}. {versions_and_dates(rows)}"
    lines = ["", f"### {presentation.machine(rows[0])}", "", of_all, ""]
    drawn = {plotted.file_name(shown[0]): shown for shown in plotted.selected(rows)}
    timed = [row for row in rows if row.median_ms is not None]
    for op in dict.fromkeys(row.op for row in timed):
        lines += [f"#### {op}", ""]
        for name, shown in drawn.items():
            if shown[0].op == op:
                lines += [f"![{plotted.summary(shown)}]({(folder / name).as_posix()})", ""]
        for dtype in dict.fromkeys(row.dtype for row in timed if row.op == op):
            own = [row for row in rows if (row.op, row.dtype) == (op, dtype)]
            lines += [f"{dtype}; [quartiles and all providers]({(folder / op).as_posix()}.csv)", "", *_table(own), ""]
    return lines


def versions_and_dates(rows: Sequence[Environment]) -> str:
    """With what, when and at which commits rows were measured, in two sentences."""
    commits: dict[str, set[str]] = {}
    for row in rows:
        commits.setdefault(row.date[:10], set()).add(row.commit)
    runs = (f"{date} at commit{'s' * (len(of) > 1)} {', '.join(sorted(of))}" for date, of in sorted(commits.items()))
    versions = sorted({f"hpkernels {row.hpkernels}, PyTorch {row.torch}, Python {row.python}" for row in rows})
    return f"{'; '.join(versions)}. Measured {'; '.join(runs)}."


def _table(rows: list[Row]) -> list[str]:
    pairs = dict.fromkeys((row.call, row.anchors) for row in sorted(rows, key=_place))
    lines = [line for line in (_line(rows, *pair) for pair in pairs) if line.ours or line.other]
    columns = [
        ("call", "---", [line.call for line in lines]),
        ("N", "--:", [presentation.count(line.anchors) for line in lines]),
        _providers("hpkernels", [line.ours for line in lines]),
        _providers("against", [line.other for line in lines]),
        ("faster", "--:", [_ratio(line, "median_ms") for line in lines]),
        ("less memory", "--:", [_ratio(line, "peak_mib") for line in lines]),
        _providers("fastest other", [line.rival for line in lines]),
        ("rate", "---", [_rates(line.ours) for line in lines]),
    ]
    filled = [column for column in columns if any(column[2])]
    table = [[name for name, _, _ in filled], [rule for _, rule, _ in filled]]
    table += [list(cells) for cells in zip(*(cells for _, _, cells in filled), strict=True)]
    return [f"| {' | '.join(cells)} |" for cells in table]


def _place(row: Row) -> tuple[str, float, str, int]:
    """Where a table has a row: k=8 is before k=32."""
    name, _, value = row.call.partition("=")
    return name, float(value) if re.fullmatch(r"[\d.]+", value) else 0.0, value, row.anchors


def _line(rows: list[Row], call: str, anchors: int) -> _Line:
    of_call = [row for row in rows if row.call == call]
    here = [row for row in of_call if row.anchors == anchors]
    timed = sorted((row for row in here if row.median_ms is not None), key=lambda row: row.median_ms)
    ours = next((row for row in timed if presentation.is_best_of_ours(row.provider)), None)
    other = next((row for row in here if row.provider == presentation.yardstick(of_call)), None)
    if other is None or not _cell(other):
        other = presentation.at(here, presentation.yardstick(here), anchors)
    rivals = (row for row in timed if not presentation.is_ours(row.provider) and row is not other)
    return _Line(call, anchors, ours, other, next(rivals, None))


def _providers(title: str, rows: list[Row | None]) -> tuple[str, str, list[str]]:
    """A column of times and memory. If all are of one provider its name is in the title and not in the cells."""
    names = {row.provider for row in rows if row is not None}
    if len(names) == 1:
        return f"`{names.pop()}`", "---", [_cell(row) for row in rows]
    cells = [f"`{row.provider}` {_cell(row)}" if row is not None and _cell(row) else "" for row in rows]
    return title, "---", cells


def _cell(row: Row | None) -> str:
    """Time and memory; why there is none, if memory is the reason."""
    if row is None:
        return ""
    if row.median_ms is None:
        return row.note if row.note.startswith("does not fit") else ""
    peak = "" if row.peak_mib is None else f", {presentation.memory(row.peak_mib)}"
    once = ", one run" if row.repetitions == 1 else ""
    return presentation.duration(row.median_ms) + peak + once


def _ratio(line: _Line, column: str) -> str:
    if line.ours is None or line.other is None or line.other.median_ms is None:
        return ""
    ours, other = getattr(line.ours, column), getattr(line.other, column)
    return presentation.times(other / ours) if ours and other else ""


def _rates(row: Row | None) -> str:
    values = ((getattr(row, name, None), say) for name, say in _RATES.items())
    return ", ".join(say(value) for value, say in values if value is not None)
