"""Rounding errors of every op against float64, beside those of plain PyTorch in the same dtype.

The error of a row is the Euclidean norm of its difference from what float64 makes of the same inputs, as a share of
the norm of that row, or of a thousandth of the greatest row's if that is more. Of all rows, seeds and sizes the
greatest is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hpkernels
from benchmarks.accuracy import formulas
from benchmarks.accuracy.regimes import problems
from benchmarks.accuracy.verify import _double
from benchmarks.cases import Case, Inputs
from benchmarks.csv_files import read_rows, write_rows
from benchmarks.providers import Outputs, provider
from benchmarks.results import ERRORS, Environment
from hpkernels import backends
from hpkernels.ops._bits import unpack_bits
from hpkernels.testing import row_errors

_SHORTEST = 1e-3  # a row that cancels to less, or underflows, beside the greatest one counts as that long


@dataclass
class ErrorRow(Environment):
    """The greatest error of one output in one regime, and that of plain PyTorch, if it has all operators."""

    op: str
    output: str
    dtype: str
    backend: str
    regime: str
    error: float
    plain: float | None
    rows: int

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured."""
        return self.op, self.output, self.dtype, self.backend, self.regime

    def add(self, error: float, of_plain: float | None, rows: int) -> None:
        """Count the rows of another problem; NaN is greater than all."""
        self.error, self.rows = greater(self.error, error), self.rows + rows
        self.plain = None if of_plain is None or self.plain is None else greater(self.plain, of_plain)

    def rounded(self) -> ErrorRow:
        """With errors of two digits."""
        error, plain = (value if value is None else float(f"{value:.2g}") for value in (self.error, self.plain))
        return replace(self, error=error, plain=plain)


def measure(op: str, environment: dict[str, Any], device: str = "cpu", quick: bool = False) -> list[ErrorRow]:
    """The errors of each output of `op` by dtype, backend and regime; `quick`: of small problems of one seed."""
    found: dict[tuple[str, ...], ErrorRow] = {}
    for case, regime, inputs in problems(op, device, quick):
        # The exact results of the inputs after they have been rounded to the dtype.
        double = {name: _double(value) for name, value in inputs.items()}
        exact = _results(case, double, "reference")
        dense = formulas.outputs_of(op, inputs)
        of_plain = {} if dense is None else _errors(_comparable(dense, inputs), exact)
        for backend in backends.BACKENDS:
            if provider(case, backend).reason_missing(case):
                continue
            for output, error in _errors(_results(case, inputs, backend), exact).items():
                row = ErrorRow(op, output, case.dtype, backend, regime, 0.0, 0.0, 0, **environment)
                found.setdefault(row.key, row).add(error, of_plain.get(output), _count(exact[output]))
    return list(found.values())


def _results(case: Case, inputs: Inputs, backend: str) -> Outputs:
    if case.op == "masked_topk":  # whose providers have no gradients
        return formulas.ranked(inputs, lambda q, p: hpkernels.masked_topk(q, p, inputs["k"], backend=backend).values)
    return _comparable(provider(case, backend).run(inputs), inputs)


def _comparable(outputs: Outputs, inputs: Inputs) -> Outputs:
    """The outputs as rows: of maps (B, D, H, W) one for each patch, of masks what `_margins` says."""
    if "bits" in outputs:
        outputs = {"mask": unpack_bits(outputs["bits"], len(outputs["bits"]))}
    if "mask" in outputs:
        return {"decisions": _margins(outputs["mask"], inputs)}
    return {name: value.movedim(1, 3).flatten(0, 2) if value.dim() == 4 else value for name, value in outputs.items()}


def _margins(mask: Tensor, inputs: Inputs) -> Tensor:
    """How far the pairs of each anchor are from their threshold that are decided otherwise than in float64.

    The furthest of them, as a share of the product of their lengths.
    """
    features, threshold = inputs["features"].double(), inputs["threshold"].double()
    margin = features @ features.T - torch.minimum(threshold[:, None], threshold)
    lengths = features.norm(dim=1)
    wrong = (mask != (margin > 0)).fill_diagonal_(False)
    return (margin.abs() / lengths / lengths[:, None]).where(wrong, 0).amax(dim=1)


def _count(value: Tensor) -> int:
    return len(value) if value.dim() else 1


def _errors(actual: Outputs, exact: Outputs) -> dict[str, float]:
    return {name: _relative(value, exact[name]) for name, value in actual.items()}


def _relative(actual: Tensor, exact: Tensor) -> float:
    lengths = row_errors(exact, torch.zeros_like(exact))
    scale = lengths.clamp(min=_SHORTEST * lengths.max().item())
    return (row_errors(actual, exact) / scale.where(scale > 0, 1)).max().item()


def greater(one: float, other: float) -> float:
    """The greater of two errors; NaN is greater than all."""
    return one if one != one or one >= other else other


def write(folder: Path, rows: Iterable[ErrorRow]) -> None:
    """Write the errors of a device; those of ops that are not measured anew stay."""
    path = folder / ERRORS
    merged = {row.key: row for row in [*(read(path) if path.exists() else []), *rows]}
    write_rows(path, ErrorRow, (merged[key].rounded() for key in sorted(merged)))


def read(path: Path) -> list[ErrorRow]:
    """The rows of a file that `write` has written."""
    return read_rows(path, ErrorRow)
