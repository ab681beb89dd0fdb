"""What the kernels are to reach at the paper's size on one H100 or H200, and whether rows that were measured do.

The aims are aims: they say nothing of what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Row, read_folder

ANCHORS, DTYPE = 50176, "float16"
NOT_DONE = 400.0
"""TFLOP/s below which a dense kernel is not done."""
KERNELS = "kernels"
"""The folder, beside the files of the ops, of what ``benchmarks/gpu/kernels.py`` measures."""
GB_IN_MIB = 1e9 / 2**20
_OURS = ("cuda", "triton")

Rows = Sequence[Row]


@dataclass(frozen=True)
class Aim:
    """A number that is to be reached.

    Attributes:
        what: is measured.
        unit: of the numbers.
        aim: the number, and `then` the one after it.
        value: the best of ours in the rows; None: not measured.
        more: whether more is better.
        dense: it is the rate of a dense kernel.
    """

    what: str
    unit: str
    aim: float
    then: float | None
    value: Callable[[Rows], float | None]
    more: bool = False
    dense: bool = False

    def reached(self, number: float) -> bool:
        """Whether a measured number is at least as good."""
        return number >= self.aim if self.more else number <= self.aim


def _of(rows: Rows, op: str, call: str, column: str, providers: Iterable[str] = _OURS) -> list[float]:
    wanted = tuple(providers)
    found = [row for row in rows if (row.op, row.call, row.anchors, row.dtype) == (op, call, ANCHORS, DTYPE)]
    return [value for row in found if row.provider in wanted and (value := getattr(row, column)) is not None]


def _least(op: str, call: str, column: str = "median_ms", unit: float = 1.0) -> Callable[[Rows], float | None]:
    return lambda rows: min((value / unit for value in _of(rows, op, call, column)), default=None)


def _rate(op: str, call: str) -> Callable[[Rows], float | None]:
    return lambda rows: max(_of(rows, op, call, "tflops"), default=None)


def _times_faster(op: str, call: str, *others: str) -> Callable[[Rows], float | None]:
    def ratio(rows: Rows) -> float | None:
        theirs, ours = _of(rows, op, call, "median_ms", others), _of(rows, op, call, "median_ms")
        return min(theirs) / min(ours) if theirs and ours else None

    return ratio


_MATMUL_AND_MAX = ("torch-topk", "compiled", "torch-chunked", "compiled-chunked")

AIMS = (
    Aim("whole loss, rate 0.02, against the published way", "x", 20, None,
        _times_faster("ghp_contrastive", "forward+backward", "published"), more=True),
    Aim("whole loss, rate 0.02", "ms", 8, None, _least("ghp_contrastive", "forward+backward")),
    Aim("whole loss, rate 1", "ms", 24, 16, _least("ghp_contrastive", "rate=1")),
    Aim("discovery, D 384", "TFLOP/s", 600, 690, _rate("hidden_positives", "discovery D=384"), more=True, dense=True),
    Aim("discovery, D 512", "TFLOP/s", 600, 690, _rate("hidden_positives", "discovery D=512"), more=True, dense=True),
    Aim("dense forward, D 512", "TFLOP/s", 600, 690,
        _rate("multi_positive_contrastive", "forward rate=1"), more=True, dense=True),
    Aim("dense backward, D 512", "TFLOP/s", 600, 660,
        _rate("multi_positive_contrastive", "backward rate=1"), more=True, dense=True),
    Aim("top-1, D 384", "TFLOP/s", 550, 600, _rate("masked_topk", "top-1 D=384"), more=True, dense=True),
    Aim("top-1, against product and maximum", "x", 1, None,
        _times_faster("masked_topk", "k=1", *_MATMUL_AND_MAX), more=True),
    Aim("local propagation, forward and backward", "ms", 0.5, 0.15, _least("local_propagation", "whole+backward")),
    Aim("extra memory of the whole loss, rate 0.02", "GB", 1.5, 1,
        _least("ghp_contrastive", "forward+backward", "peak_mib", GB_IN_MIB)),
    Aim("extra memory of the whole loss, rate 1", "GB", 1.5, 1,
        _least("ghp_contrastive", "rate=1", "peak_mib", GB_IN_MIB)),
)  # fmt: skip


BEGIN, END = "<!-- begin aims -->", "<!-- end aims -->"


def table() -> str:
    """The aims as Markdown, for docs/benchmarks.md."""
    lines = ["| what | aim | then |", "|---|---|---|"]
    for aim in AIMS:
        then = "" if aim.then is None else f"{aim.then:g} {aim.unit}"
        bound = "at least" if aim.more else "at most"
        lines.append(f"| {aim.what} | {bound} {aim.aim:g} {aim.unit} | {then} |")
    return "\n".join([*lines, ""])


def read(folder: Path) -> list[Row]:
    """All rows that the aims are compared with, from a folder of results."""
    return [*read_folder(folder), *read_folder(folder / KERNELS)]


def compared(rows: Rows) -> list[str]:
    """A line for each aim: what was measured, and whether that reaches it."""
    lines = [f"{f'aims at N = {ANCHORS}, {DTYPE}':50} {'unit':8} {'aim':>6} {'then':>6} {'measured':>9}"]
    for aim in AIMS:
        number = aim.value(rows)
        then = "" if aim.then is None else f"{aim.then:g}"
        known = f"{aim.what:50} {aim.unit:8} {aim.aim:6g} {then:>6}"
        lines.append(f"{known} {'-' if number is None else f'{number:.4g}':>9}  {_verdict(aim, number)}")
    return lines


def _verdict(aim: Aim, number: float | None) -> str:
    if number is None:
        return "not measured"
    if aim.dense and number < NOT_DONE:
        return f"not done: a dense kernel is to have {NOT_DONE:g} {aim.unit}"
    return "reached" if aim.reached(number) else "not reached"
