"""The error bounds on the pages of the ops: what is measured now stays below, and the pages say what the files say."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import error_tables, errors, plain, regimes
from benchmarks.cases import Case
from benchmarks.results import ERRORS, RESULTS
from benchmarks.verify import _double

FACTOR = 4.0  # other processors add up in another order
FILES = sorted(RESULTS.glob(f"*/{ERRORS}"))
WITH_KERNELS = [op for op in regimes.OPS if op != "ghp_contrastive"]  # which is made of the others
each_op = pytest.mark.parametrize("op", regimes.OPS)


@pytest.fixture(scope="module")
def stated():
    return {row.key: row for row in errors.read(FILES[0])}


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_stated_bounds_hold(op, stated):
    """Of small problems of one seed, all of which are in the file; half a unit in the last place is no finding."""
    measured = errors.measure(op, {}, quick=True)
    assert measured
    for row in measured:
        bound = FACTOR * max(stated[row.key].error, torch.finfo(torch.float32).eps / 2)
        assert row.error <= bound, f"{row.key}: {row.error:.2g}, stated {stated[row.key].error:.2g}"


@each_op
def test_usual_problems_have_small_errors(op, stated):
    """About the rounding of their dtype."""
    rounding = {"float32": 4e-6, "float16": 3e-3, "bfloat16": 4e-3}
    for row in stated.values():
        if row.op == op and row.regime == regimes.USUAL:
            assert row.error <= rounding[row.dtype], row.key


def test_loss_is_exact_to_float32_in_every_regime(stated):
    losses = [row for row in stated.values() if row.output == "loss"]
    assert losses and max(row.error for row in losses) < 1e-6


@each_op
def test_pages_have_the_tables_of_the_files(op, repository):
    page = (repository / "docs" / f"{op}.md").read_text()
    between = page.split(error_tables.BEGIN + "\n")[1].split(error_tables.END)[0]
    assert between == error_tables.table(op, [errors.read(path) for path in FILES])


@each_op
def test_plain_formulas_are_the_reference(op):
    """In float64, but for the published weights of pairs, which are float32."""
    for call in regimes._CALLS[op]:
        case = Case(op, call, images=2, grid=(5, 6))
        inputs = {name: _double(value) for name, value in regimes.REGIMES[regimes.USUAL].inputs(case, 0).items()}
        exact = errors._results(case, inputs, "reference")
        ours = errors._comparable(plain.outputs_of(op, inputs), inputs)
        assert set(ours) == set(exact)
        for name, value in ours.items():
            torch.testing.assert_close(value, exact[name], rtol=1e-7, atol=1e-9)


def test_a_wrong_row_is_seen(monkeypatch):
    def wrong(outputs):
        outputs["grad_anchors"][7] *= 1.001
        return outputs

    results = errors._results
    monkeypatch.setattr(
        errors,
        "_results",
        lambda case, inputs, backend: (wrong if backend == "cpu" else dict)(results(case, inputs, backend)),
    )
    for row in errors.measure("contrastive", {}, quick=True):
        if (row.output, row.backend, row.regime) == ("grad_anchors", "cpu", regimes.USUAL):
            assert row.error > 9e-4


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.5]], [[3.0, 4.0]], 0.1),
        ([[0.0, 0.0], [1e-4, 0.0]], [[0.0, 0.0], [0.0, 0.0]], 1e-4),  # absolute, where all is 0
        ([[1000.0], [1e-3]], [[1000.0], [0.0]], 1e-3),  # a short row counts as a thousandth of the longest
        ([[math.nan, 0.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]], math.nan),
    ],
)
def test_relative_error(actual, expected, error):
    found = errors._relative(torch.tensor(actual), torch.tensor(expected, dtype=torch.float64))
    assert found == pytest.approx(error, nan_ok=True)


def test_nan_is_the_greatest_error():
    assert math.isnan(errors.greater(math.nan, 1.0)) and math.isnan(errors.greater(1.0, math.nan))
    assert errors.greater(1.0, 2.0) == errors.greater(2.0, 1.0) == 2.0


def test_a_wrong_decision_has_its_distance():
    features = torch.eye(2) * 2.0
    inputs = {"features": features, "threshold": torch.full((2,), 1.0)}
    right, wrong = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[False, True], [False, False]])
    assert errors._margins(right, inputs).tolist() == [0.0, 0.0]
    assert errors._margins(wrong, inputs).tolist() == [0.25, 0.0]  # |0 - 1| / (2 * 2)


def test_files_are_read_as_they_were_written(tmp_path):
    environment = {"device": "a processor", "threads": 2, "date": "2030-01-02T03:04:05+00:00"}
    rows = [
        errors.ErrorRow("contrastive", "loss", "float32", "cpu", "usual", 1.2e-7, None, 5, **environment),
        errors.ErrorRow("contrastive", "loss", "float16", "cpu", "usual", 0.0, math.inf, 5, **environment),
    ]
    errors.write(tmp_path, rows[:1])
    errors.write(tmp_path, rows)
    assert errors.read(tmp_path / ERRORS) == sorted(rows, key=lambda row: row.key)
    with (tmp_path / ERRORS).open() as file:
        assert len(list(csv.reader(file))) == 3


def test_unknown_op(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["errors", "--op", "nonsense"])
    assert stopped.value.code == 2 and "nonsense" in capsys.readouterr().err
