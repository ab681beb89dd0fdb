"""Cases that vary one thing: the share of positives, or N until a call does not fit into a memory limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchmarks.cases import Case, cases
from benchmarks.providers import providers
from benchmarks.results import Row

SWEEPS = ("density", "memory")
DENSITIES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
_DENSITY_OPS = ("multi_positive_contrastive", "ghp_contrastive")
_DENSITY_IMAGES = {"cpu": 4, "cuda": 64}
_MEMORY_CALLS = {
    "hidden_positives": "forward",
    "multi_positive_contrastive": "sampled",
    "contrastive": "own",
    "ghp_contrastive": "forward+backward",
}
_MOST_IMAGES = 512  # N = 401 408
_LONGEST = 60.0  # seconds; at twice the N a call would take four times as long


def sweep_cases(
    sweep: str,
    ops: Iterable[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    images: Iterable[int] | None = None,
    memory_limit: float | None = None,
) -> list[Case]:
    """The cases of a sweep for some of its ops (None: all), in order.

    Args:
        sweep: one of `SWEEPS`.
        ops: those to take.
        device: "cpu" or "cuda".
        dtype: of the inputs.
        images: sizes; None: those of the sweep.
        memory_limit: GiB of a call, for the sweep of the memory.

    Raises:
        ValueError: an op that the sweep does not have.
    """
    known = _DENSITY_OPS if sweep == "density" else tuple(_MEMORY_CALLS)
    unknown = [op for op in ops or () if op not in known]
    if unknown:
        raise ValueError(f"--sweep {sweep} must have an op of {', '.join(known)}, got {unknown[0]}")
    sizes = list(images or ())
    if sweep == "density":
        sizes, calls = sizes or [_DENSITY_IMAGES[device]], {op: [f"density={d:g}" for d in DENSITIES] for op in known}
    else:
        doubled = [2**power for power in range(_MOST_IMAGES.bit_length())]
        sizes, calls = sizes or doubled, {op: [call] for op, call in _MEMORY_CALLS.items()}
    grids = {op: cases(op, device=device, dtype=dtype)[0].grid for op in known}
    return [
        Case(op, call, count, grids[op], device, dtype, memory_limit)
        for op in ops or known
        for call in calls[op]
        for count in sizes
    ]


def until_it_ends(
    growing: Iterable[Case], names: Iterable[str] | None, run: Callable[[list[Case], set[str]], Iterator[Row]]
) -> Iterator[Row]:
    """The rows of cases that grow, each provider up to the first that does not fit, fails, or takes too long.

    Args:
        growing: small before large; those of one call follow each other.
        names: of the providers (None: all).
        run: gives the rows of some cases by the providers of some names.
    """
    left: dict[tuple[str, str], set[str]] = {}
    for case in growing:
        able = {entry.name for entry in providers(case) if not entry.reason_missing(case)}
        taking_part = left.setdefault((case.op, case.call), able if names is None else able & set(names))
        for row in run([case], taking_part) if taking_part else ():
            if row.median_ms is None or row.median_ms > 1e3 * _LONGEST:
                taking_part.discard(row.provider)
            yield row


def largest(rows: Iterable[Row]) -> list[str]:
    """Markdown tables of the sweep of the memory: the largest N of each provider, its peak, and why it ended there."""
    by_call: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_call.setdefault((row.op, row.call, row.dtype), {}).setdefault(row.provider, []).append(row)
    lines = []
    for (op, call, dtype), by_provider in by_call.items():
        lines += [
            f"**{op}, {call}, {dtype}**",
            "",
            "| provider | largest N | peak MiB | ends because |",
            "|---|---|---|---|",
        ]
        lines += [_end(name, sorted(own, key=lambda row: row.anchors)) for name, own in by_provider.items()]
        lines.append("")
    return lines


def _end(name: str, rows: list[Row]) -> str:
    fitting, last = [row for row in rows if row.median_ms is not None], rows[-1]
    if not fitting:
        return f"| {name} | none | | N = {last.anchors} {last.note} |"
    best = fitting[-1]
    if last is not best:
        why = f"N = {last.anchors} {last.note}"
    elif best.median_ms > 1e3 * _LONGEST:
        why = f"a call takes {best.median_ms / 1e3:.0f} s"
    else:
        why = "no larger N was tried"
    return f"| {name} | {best.anchors} | {'' if best.peak_mib is None else best.peak_mib} | {why} |"
