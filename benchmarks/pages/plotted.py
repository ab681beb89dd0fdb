"""What plots show: which rows of results, and the same in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.pages import presentation
from benchmarks.results import Row

_MOST_LINES = 4
_PLOTTED = {
    "masked_topk": "k=1",
    "local_propagation": "whole+backward",
    "contrastive": "own",
    "training_step": "end-to-end",
}
"""The call of an op that is plotted; else the first that was measured at more than one size."""


class Gap(NamedTuple):
    """Where ours and what it is compared with are farthest along: the largest size at which both were measured."""

    ours: Row
    other: Row


def selected(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each plot: one call of an op in one dtype, by the providers that matter most."""
    calls: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.median_ms is not None:
            calls.setdefault((row.op, row.dtype), {}).setdefault(row.call, []).append(row)
    drawn = []
    for (op, _), by_call in calls.items():
        growing = [call for call, own in by_call.items() if len({row.anchors for row in own}) > 1]
        if not growing:
            continue
        own = by_call[_PLOTTED[op] if _PLOTTED.get(op) in growing else growing[0]]
        names = presentation.shown(own, _MOST_LINES)
        drawn.append(sorted((row for row in own if row.provider in names), key=lambda row: names.index(row.provider)))
    return drawn


def file_name(row: Row) -> str:
    """The name of the plot that shows a row."""
    return row.op + ("" if row.dtype == "float32" else f"-{row.dtype}") + ".svg"


def description(rows: list[Row]) -> str:
    """All that a plot shows, in words: for who cannot see it, and to know whether it shows its CSV file's numbers."""
    lines = [f"{rows[0].op}, {rows[0].call}: {where(rows)}."]
    for row in rows:
        peak = "" if row.peak_mib is None else f", {row.peak_mib:g} MiB"
        lines.append(f"{row.provider}, N = {row.anchors}: {row.q1_ms:g}, {row.median_ms:g}, {row.q3_ms:g} ms{peak}.")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """What a plot shows in a sentence."""
    gap = gap_of(rows, "median_ms")
    if gap is None:
        return f"Time and peak memory of {rows[0].op} against the number of anchors."
    cells = [
        f"{row.provider} takes {presentation.duration(row.median_ms)}"
        + ("" if row.peak_mib is None else f" and {presentation.memory(row.peak_mib)}")
        for row in gap
    ]
    return f"Time and peak memory of {rows[0].op} against N: at {presentation.count(gap.ours.anchors)}, " + ", ".join(
        cells
    )


def where(rows: list[Row]) -> str:
    """On what and when the rows of a plot were measured."""
    dates = sorted({row.date[:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{presentation.machine(rows[0])}, {rows[0].dtype}, {when}"


def gap_of(rows: list[Row], column: str) -> Gap | None:
    """The gap in a column of the rows of a plot; None: no size has both."""
    against = presentation.yardstick(rows)
    for anchors in sorted({row.anchors for row in rows}, reverse=True):
        here = [row for row in rows if row.anchors == anchors and getattr(row, column)]
        ours = [row for row in here if presentation.is_best_of_ours(row.provider)]
        other = presentation.at(here, against, anchors)
        if ours and other is not None:
            return Gap(min(ours, key=lambda row: row.median_ms), other)
    return None
