"""Time and peak memory against the number of anchors, on logarithmic axes, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.results import Row

# The palette of Okabe and Ito, which all kinds of colour vision tell apart; providers have their own marker besides.
_STYLES = {
    "reference": ("#000000", "o"),
    "cpu": ("#D55E00", "s"),
    "published": ("#0072B2", "^"),
    "compiled": ("#56B4E9", "v"),
    "triton": ("#009E73", "D"),
    "cuda": ("#CC79A7", "P"),
}
_PEER_STYLES = (("#E69F00", "X"), ("#F0E442", "*"), ("#999999", "<"))


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw each call of each op that was measured at more than one size; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    by_call: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.median_ms is not None:
            by_call.setdefault((row.op, row.call, row.dtype), []).append(row)
    return [
        _draw(op, call, dtype, measured, folder)
        for (op, call, dtype), measured in by_call.items()
        if len({row.anchors for row in measured}) > 1
    ]


def _draw(op: str, call: str, dtype: str, rows: list[Row], folder: Path) -> Path:
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, style in _styles({row.provider for row in rows}).items():
        own = sorted((row for row in rows if row.provider == name), key=lambda row: row.anchors)
        anchors = [row.anchors for row in own]
        medians = [row.median_ms for row in own]
        below = [row.median_ms - row.q1_ms for row in own]
        above = [row.q3_ms - row.median_ms for row in own]
        time_axes.errorbar(anchors, medians, yerr=(below, above), capsize=2, label=name, **style)
        # A call that takes no memory of its own has no place on a logarithmic axis.
        memory = [(row.anchors, row.peak_mib) for row in own if row.peak_mib]
        if memory:
            memory_axes.plot(*zip(*memory, strict=True), label=name, **style)
    for axes, label in ((time_axes, "time (ms), median and quartiles"), (memory_axes, "peak memory (MiB)")):
        axes.set(xscale="log", yscale="log", xlabel="anchors N", ylabel=label)
        axes.grid(which="both", color="#DDDDDD", linewidth=0.5)
    time_axes.legend(fontsize="small")
    figure.suptitle(f"{op}, {call}, {dtype}: {rows[0].device}, {rows[0].threads} threads", fontsize="medium")
    suffix = "" if dtype == "float32" else f"-{dtype}"
    path = folder / f"{op}-{call.replace('=', '').replace('+', '-')}{suffix}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _styles(names: set[str]) -> dict[str, dict[str, str]]:
    peers = dict(zip(sorted(names - set(_STYLES)), _PEER_STYLES, strict=False))
    return {
        name: {"color": color, "marker": marker} for name, (color, marker) in (_STYLES | peers).items() if name in names
    }
