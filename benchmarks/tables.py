"""Tables of results: Markdown for the documentation, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.results import Row, read_folder

BEGIN, END = "<!-- begin measured tables -->", "<!-- end measured tables -->"


def write_tables(page: Path, results: Path) -> None:
    """Replace what stands between the page's two comments by the tables of every device.

    Raises:
        ValueError: the page has not both comments, in this order.
    """
    tables = [_device_tables(read_folder(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    replace_between(page, BEGIN, END, "\n".join(filter(None, tables)))


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


def _device_tables(rows: list[Row]) -> str:
    if not rows:
        return ""
    first = rows[0]
    lines = [f"### {first.device}, {first.threads} threads, {first.instructions}", ""]
    lines += [
        f"hpkernels {first.hpkernels}, torch {first.torch}, Python {first.python}; "
        + "; ".join(sorted({f"commit {row.commit}, {row.date[:10]}" for row in rows}))
        + ".",
        "",
    ]
    for op, call, dtype in dict.fromkeys((row.op, row.call, row.dtype) for row in rows):
        own = [row for row in rows if (row.op, row.call, row.dtype) == (op, call, dtype)]
        lines += [f"**{op}, {call}, {dtype}**: median ms (quartiles), peak MiB", "", *_table(own), ""]
    return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    sizes = sorted({row.anchors for row in rows})
    cells = {(row.provider, row.anchors): _cell(row) for row in rows}
    names = [name for name in dict.fromkeys(row.provider for row in rows) if any(cells.get((name, n)) for n in sizes)]
    lines = ["| provider | " + " | ".join(f"N = {size}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(cells.get((name, size), "") for size in sizes) + " |" for name in names]


def _cell(row: Row) -> str:
    if row.median_ms is None:
        return row.note if row.note.startswith("does not fit") else ""
    spread = f" ({_short(row.q1_ms)}-{_short(row.q3_ms)})" if row.repetitions > 1 else " (one run)"
    rate = "" if row.images_per_second is None else f", {_short(row.images_per_second)} images/s"
    return _short(row.median_ms) + spread + ("" if row.peak_mib is None else f", {_short(row.peak_mib)} MiB") + rate


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def comparison(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """A line for all that both runs measured; it is "slower" or "faster" only where the quartiles do not overlap."""
    earlier = {row.key: row for row in before if row.median_ms is not None}
    lines = []
    for row in after:
        old = earlier.get(row.key)
        if old is None or row.median_ms is None:
            continue
        verdict = "slower" if row.q1_ms > old.q3_ms else "faster" if row.q3_ms < old.q1_ms else "same"
        name = f"{row.op} {row.call} N={row.anchors} {row.dtype} {row.provider}"
        change = f"{old.median_ms:.4g} -> {row.median_ms:.4g} ms, x{row.median_ms / old.median_ms:.2f}"
        lines.append(f"{name:64} {change}  {verdict}")
    return lines
