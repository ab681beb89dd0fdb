"""The measured part of docs/distributed.md: for each device and size a table of calls and of ways to compute them."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.distributed import CALLS, WAYS, DistributedRow, read
from benchmarks.pages import presentation
from benchmarks.pages.tables import replace_between, versions_and_dates
from benchmarks.results import DISTRIBUTED

BEGIN, END = "<!-- begin measured processes -->", "<!-- end measured processes -->"

_CALLS = {
    "keys": "anchors against keys",
    "both": "both directions",
    "own": "anchors that are their own keys",
}
"""What a table says for a call."""


def write_table(page: Path, results: Path) -> None:
    """Replace what stands between the page's two comments by the tables of every device.

    Raises:
        ValueError: the page has not both comments, in this order.
    """
    replace_between(page, BEGIN, END, measured(page.parent, results))


def measured(folder_of_page: Path, results: Path) -> str:
    """The tables of all devices, with links that are relative to a page in `folder_of_page`."""
    lines: list[str] = []
    for file in sorted(results.glob(f"*/{DISTRIBUTED}")):
        rows = read(file)
        for sizes in dict.fromkeys((row.anchors, row.dim, row.ranks) for row in rows):
            own = [row for row in rows if (row.anchors, row.dim, row.ranks) == sizes]
            lines += ["", *_table(own, Path(os.path.relpath(file, folder_of_page)).as_posix())]
    return "\n".join([*(lines or ["", "No results are committed yet."]), "", ""])


def _table(rows: list[DistributedRow], link: str) -> list[str]:
    """A table of one size on one device."""
    first = rows[0]
    sizes = f"N = K = {presentation.count(first.anchors)}, D {first.dim}, {first.ranks} ranks"
    commands = ", ".join(f"`{command}`" for command in sorted({row.command for row in rows}))
    by_place = {(row.call, row.way): row for row in rows}
    ways = [way for way in WAYS if any(row.way == way for row in rows)]
    return [
        f"{sizes}, on {presentation.machine(first)}, {first.instructions}, by {commands}."
        f" {versions_and_dates(rows)} [Quartiles]({link}).",
        "",
        f"| | {' | '.join(ways)} |",
        "|---" * (len(ways) + 1) + "|",
        *(
            f"| {_CALLS[call]} | {' | '.join(_cell(by_place.get((call, way))) for way in ways)} |"
            for call in CALLS
            if any(row.call == call for row in rows)
        ),
    ]


def _cell(row: DistributedRow | None) -> str:
    if row is None:
        return ""
    peak = "" if row.peak_mib is None else f", {presentation.memory(row.peak_mib)}"
    return presentation.duration(row.median_ms) + peak
