"""Time and peak memory against the number of anchors, as SVG files that suit light and dark pages.

A file has the colours of a light page in its elements, and a style sheet that replaces them where the page is dark:
pictures of a page follow its colour scheme. It has a background of its own, so that it can be read on any page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pages import presentation
from benchmarks.pages.plotted import Gap, description, file_name, gap_of, selected, where
from benchmarks.pages.presentation import NBSP
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 800, 404
_SUBJECTS = {
    "masked_topk": "The best match of each patch in a pool",
    "hidden_positives": "Which patches are positives of which",
    "local_propagation": "Mixing each patch with its neighbours",
    "multi_positive_contrastive": "Contrastive loss of labelled patches",
    "contrastive": "SupCon loss of a labelled batch",
    "ghp_contrastive": "The whole loss of Hidden Positives",
    "training_step": "A training step",
}
_NAMES = {
    "published": "the published way",
    "compiled": "torch.compile",
    "torch-dense": "plain PyTorch",
    "torch-topk": "plain PyTorch",
    "torch-matmul": "plain PyTorch",
    "torch-bmm": "plain PyTorch",
    "reference": "reference",
}

# Colour on a light page: on a dark one. From the palette of Okabe and Ito, which all kinds of colour vision tell apart,
# darkened and lightened until text of that colour is easy to read; lines have their own marker besides.
_PAPER, _INK, _MUTED, _GRID = "#ffffff", "#1f2328", "#59636e", "#e3e7eb"
_OURS, _SECOND, _YARDSTICK, _COMPILED, _PEER, _OTHER = "#0068a8", "#007a58", "#b84a00", "#a3407f", "#6b5b00", "#4d4d7a"
DARK = {
    _PAPER: "#0d1117",
    _INK: "#f0f6fc",
    _MUTED: "#9da7b3",
    _GRID: "#2b323b",
    _OURS: "#62bcf2",
    _SECOND: "#35c79b",
    _YARDSTICK: "#ff9a5c",
    _COMPILED: "#e39ac8",
    _PEER: "#d9c54a",
    _OTHER: "#b0b0e0",
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw each op that was measured at more than one size, a file for each dtype; returns the files."""
    written = []
    for drawn in selected(rows):
        path = folder / file_name(drawn[0])
        path.write_text(_draw(drawn))
        written.append(path)
    return written


def _draw(rows: list[Row]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "hpkernels",  # the same rows give the same file
        "font.size": 13,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor=_PAPER)
        subject = _SUBJECTS.get(rows[0].op, rows[0].op)
        _text(figure, 20, 30, subject, size=19, weight="bold")
        _text(figure, 20, 52, f"{rows[0].op}, {rows[0].call.replace('+', ' + ')} · {where(rows)}", color=_MUTED)
        _key(figure, rows)
        for left, column in ((74, "median_ms"), (474, "peak_mib")):
            _panel(figure, left, rows, column)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _finished(file.getvalue(), subject, description(rows))


def _text(figure: Figure, x: float, y: float, text: str, **style: str | float) -> None:
    figure.text(x / WIDTH, 1 - y / HEIGHT, text, **style)


def _panel(figure: Figure, left: float, rows: list[Row], column: str) -> None:
    """Lines of one column, and above them by how much ours is less."""
    width, top, height = 282, 146, 206
    axes = figure.add_axes(
        (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT), facecolor="none"
    )
    axes.set(xscale="log", yscale="log")
    points = [row for row in rows if getattr(row, column)]  # nothing has no place on a logarithmic axis
    _lines(axes, points, column)
    _axes(axes, points, column)
    gap = gap_of(rows, column)
    what, less, more = ("Time", "faster", "slower") if column == "median_ms" else ("Memory", "less", "more")
    than = "of a call; less is better"
    if gap is not None:
        ratio = getattr(gap.other, column) / getattr(gap.ours, column)
        factor = presentation.times(max(ratio, 1 / ratio))
        what += f": {factor} {less if ratio >= 1 else more}"
        than = f"than {_name(gap.other.provider)}, at N = {presentation.count(gap.ours.anchors)}"
        _arrow(axes, gap, column, factor)
    _text(figure, left - 54, 116, what, size=16, weight="bold")
    _text(figure, left - 54, 134, than, color=_MUTED, size=12)


def _lines(axes: Axes, rows: list[Row], column: str) -> None:
    for name, (color, marker) in _styles(rows).items():
        own = sorted((row for row in rows if row.provider == name), key=lambda row: row.anchors)
        x, y = [row.anchors for row in own], [getattr(row, column) for row in own]
        ours = presentation.is_ours(name)
        axes.plot(x, y, color=color, marker=marker, markersize=7, linewidth=3 if ours else 1.8, zorder=4 if ours else 3)
        if column == "median_ms":
            axes.vlines(x, [row.q1_ms for row in own], [row.q3_ms for row in own], color=color, linewidth=1.5)


def _axes(axes: Axes, rows: list[Row], column: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    sizes = sorted({row.anchors for row in rows})
    low, high = min(getattr(row, column) for row in rows), max(getattr(row, column) for row in rows)
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.set_ylim(low / 1.6, high * 1.5)
    labelled = _apart(sizes)
    axes.xaxis.set(major_locator=FixedLocator(sizes), minor_locator=NullLocator())
    axes.set_xticklabels([presentation.count(size) if size in labelled else "" for size in sizes])
    axes.set_xlabel("anchors N", color=_MUTED, fontsize=12, labelpad=2)
    ticks = _ticks(*axes.get_ylim(), column)
    axes.yaxis.set(major_locator=FixedLocator(list(ticks)), minor_locator=NullLocator())
    axes.set_yticklabels(list(ticks.values()))
    axes.tick_params(labelsize=12, length=0, pad=5)
    axes.tick_params(axis="x", length=4)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.spines[["left", "top", "right"]].set_visible(False)


def _apart(sizes: list[int]) -> list[int]:
    """Those sizes, from the largest down, whose labels do not touch."""
    kept = [sizes[-1]]
    span = sizes[-1] / sizes[0]
    for size in reversed(sizes[:-1]):
        if (kept[-1] / size) ** 6 >= span:
            kept.append(size)
    return kept


def _ticks(low: float, high: float, column: str) -> dict[float, str]:
    """Round values in the unit that reads best, powers of ten if there are some: a place for each on the axis."""
    factors = {1e-3: "µs", 1.0: "ms", 1e3: "s"} if column == "median_ms" else {1.0: "MiB", 1024.0: "GiB"}
    for digits in ((1,), (1, 2, 5)):
        values = [digit * 10**power for power in range(3) for digit in digits]
        places = {f * value: f"{value}{NBSP}{unit}" for f, unit in factors.items() for value in values}
        inside = {place: text for place, text in places.items() if low <= place <= high}
        if len(inside) > 1:
            break
    return inside


def _arrow(axes: Axes, gap: Gap, column: str, factor: str) -> None:
    low, high = sorted(getattr(row, column) for row in gap)
    bottom, top = axes.get_ylim()
    if log(high / low) < 0.2 * log(top / bottom):  # too short to be seen
        return
    x, style = gap.ours.anchors, {"arrowstyle": "<->", "color": _INK, "linewidth": 1.3, "shrinkA": 7, "shrinkB": 7}
    axes.annotate("", (x, low), (x, high), arrowprops=style)
    middle = (x, (low * high) ** 0.5)
    axes.annotate(factor, middle, (8, 0), textcoords="offset points", va="center", weight="bold", size=14)


def _key(figure: Figure, rows: list[Row]) -> None:
    """The markers and names of the lines, in a row."""
    from matplotlib.lines import Line2D

    x, y = 20, 80
    for name, (color, marker) in _styles(rows).items():
        ours = presentation.is_ours(name)
        place = {"transform": figure.transFigure, "color": color}
        ends = [(x / WIDTH, (x + 26) / WIDTH), [1 - (y - 5) / HEIGHT] * 2]
        figure.add_artist(Line2D(*ends, linewidth=3 if ours else 1.8, **place))
        figure.add_artist(Line2D([(x + 13) / WIDTH], ends[1][:1], marker=marker, markersize=8, **place))
        _text(figure, x + 33, y, _name(name), color=color, weight="bold" if ours else "normal", size=14)
        x += 33 + 8.5 * len(_name(name)) + 24


def _name(provider: str) -> str:
    return f"hpkernels, {provider}" if presentation.is_best_of_ours(provider) else _NAMES.get(provider, provider)


def _styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each provider, in the order of their rows."""
    ours, peers = iter(((_OURS, "o"), (_SECOND, "D"))), iter(((_PEER, "v"), (_OTHER, "X")))
    against = presentation.yardstick(rows)
    styles = {}
    for name in dict.fromkeys(row.provider for row in rows):
        if presentation.is_best_of_ours(name):
            styles[name] = next(ours)
        elif name == against:
            styles[name] = (_YARDSTICK, "s")
        else:
            styles[name] = (_COMPILED, "^") if name == "compiled" else next(peers)
    return styles


def _finished(svg: str, title: str, text: str) -> str:
    """A drawing with a title, a description and colours for dark pages, without what nobody needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', rf'\1width="{WIDTH}" height="{HEIGHT}"', svg)
    svg = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)
    rules = "".join(
        f'[style*="{name}: {light}"]{{{name}:{dark} !important}}'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
    )
    head = f"<title>{html.escape(title)}</title>\n<desc>{html.escape(text)}</desc>\n"
    head += f"<style>text{{font-family:{_FONTS} !important}}@media (prefers-color-scheme: dark){{{rules}}}</style>\n"
    end_of_tag = svg.index(">") + 1
    return svg[:end_of_tag] + "\n" + head + svg[end_of_tag:].lstrip()
