"""What tables, plots and comparisons have in common: which providers a reader needs, in what order, and units."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.results import Environment, Row
from hpkernels import backends

_VARIANTS = ("reference", "cpu-float32")
"""Ours, but nobody's choice where another of ours runs."""
_YARDSTICKS = (
    "published",
    "torch-dense",
    "torch-topk",
    "torch-matmul",
    "torch-bmm",
    "torch-chunked",
    "pytorch-metric-learning",
    "faiss",
    "open_clip",
)
"""What ratios are against: the first of these that was measured."""
NBSP = "\N{NO-BREAK SPACE}"


def is_ours(provider: str) -> bool:
    """Whether a provider is a backend of hpkernels, or a variant of one."""
    return provider in backends.BACKENDS or provider in _VARIANTS


def is_best_of_ours(provider: str) -> bool:
    """Whether a provider is a backend that one would choose."""
    return is_ours(provider) and provider not in _VARIANTS


def yardstick(rows: Iterable[Row]) -> str | None:
    """The provider, not ours, that ratios in a call are against; the reference where there is no other."""
    names = {row.provider for row in rows if row.median_ms is not None}
    return next((name for name in (*_YARDSTICKS, "reference") if name in names), None)


def shown(rows: list[Row], most: int) -> list[str]:
    """The providers that a plot of a call shows: ours, what ratios are against, `compiled`, then the fastest others."""
    timed = [row for row in rows if row.median_ms is not None]
    ours = [name for name in backends.BACKENDS if is_best_of_ours(name) and any(row.provider == name for row in timed)]
    by_time = sorted(timed, key=lambda row: (-row.anchors, row.median_ms))
    peers = [row.provider for row in by_time if not is_ours(row.provider)]
    first = [name for name in (yardstick(timed), "compiled") if any(row.provider == name for row in timed)]
    return list(dict.fromkeys([*ours, *first, *peers]))[:most]


def at(rows: Iterable[Row], provider: str | None, anchors: int) -> Row | None:
    """The row of a provider at a size, if it was timed there."""
    found = (row for row in rows if (row.provider, row.anchors) == (provider, anchors) and row.median_ms is not None)
    return next(found, None)


def machine(row: Environment) -> str:
    """Where a row was measured."""
    threads = "" if row.instructions.startswith("sm_") else f", {row.threads} threads"
    return row.device.replace("(R)", "") + threads


def line(row: Row) -> str:
    """What a run prints of a row."""
    name = f"{row.op} {row.call} N={row.anchors} {row.dtype}"
    if row.median_ms is None:
        result = row.note
    else:
        middle, low, high = map(duration, (row.median_ms, row.q1_ms, row.q3_ms))
        spread = "one run" if row.repetitions == 1 else f"quartiles {low}, {high}"
        peak = "" if row.peak_mib is None else f", peak {memory(row.peak_mib)}"
        rate = "" if row.images_per_second is None else f", {amount(row.images_per_second)} images/s"
        result = f"{middle:>7} ({spread}){peak}{rate}".replace(NBSP, " ")
    return f"{name:48} {row.provider:24} {result}"


def duration(milliseconds: float) -> str:
    """A time in the unit that reads best.

    Example:
        >>> [duration(value).replace(NBSP, " ") for value in (0.0123, 5.678, 123.4, 22052)]
        ['12 µs', '5.7 ms', '123 ms', '22 s']
    """
    for factor, unit in ((1e3, "µs"), (1.0, "ms")):
        if milliseconds * factor < 1000 and (unit == "ms" or milliseconds < 0.1):
            return _two_digits(milliseconds * factor) + NBSP + unit
    return _two_digits(milliseconds / 1e3) + NBSP + "s"


def memory(mib: float) -> str:
    """Memory in the unit that reads best.

    Example:
        >>> [memory(value).replace(NBSP, " ") for value in (0.0, 6.26, 151.2, 3767)]
        ['0 MiB', '6.3 MiB', '151 MiB', '3.7 GiB']
    """
    return _two_digits(mib) + NBSP + "MiB" if mib < 1000 else _two_digits(mib / 1024) + NBSP + "GiB"


def times(ratio: float) -> str:
    """A ratio.

    Example:
        >>> [times(value) for value in (0.714, 1.86, 16.99)]
        ['0.71×', '1.9×', '17×']
    """
    return (f"{ratio:.2f}" if ratio < 0.995 else _two_digits(ratio)) + "×"


def amount(value: float) -> str:
    """A rate.

    Example:
        >>> [amount(value).replace(NBSP, " ") for value in (0.0321, 15.51, 412.3, 21333.3)]
        ['0.032', '16', '412', '21 333']
    """
    return count(round(value)) if value >= 9.95 else _two_digits(value)


def flop_rate(tflops: float) -> str:
    """A rate that is told in TFLOP/s, in a unit that gives it digits.

    Example:
        >>> [flop_rate(value) for value in (0.184, 412.3)]
        ['184 GFLOP/s', '412 TFLOP/s']
    """
    return f"{amount(tflops)} TFLOP/s" if tflops >= 1 else f"{amount(1e3 * tflops)} GFLOP/s"


def count(number: int) -> str:
    """A whole number with its thousands apart.

    Example:
        >>> [count(value).replace(NBSP, " ") for value in (784, 6272, 12544)]
        ['784', '6272', '12 544']
    """
    return f"{number:,}".replace(",", NBSP) if number >= 10_000 else str(number)


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}" if value >= 0.095 else f"{value:.2g}"
