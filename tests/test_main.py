from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import hpkernels
from hpkernels import __main__ as report
from hpkernels import backends


def run(repository, *arguments, **variables):
    command = [sys.executable, "-m", "hpkernels", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "HPKERNELS_BACKEND"} | variables
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(repository):
    """The report, on a GPU after the self-checks, whose verdicts it reads."""

    def no(constant):
        raise ValueError(f"{constant} is not JSON")

    if torch.cuda.is_available():
        for op in backends.registered_ops():
            for dtype in report.DTYPES:
                backends.select(op, "auto", torch.empty(0, dtype=dtype, device="cuda"))

    return json.loads(run(repository, "--json"), parse_constant=no)


def test_versions_and_machine(told):
    assert told["versions"]["hpkernels"] == hpkernels.__version__
    assert told["versions"]["Python"] == platform.python_version()
    assert told["versions"]["PyTorch"] == str(torch.__version__)
    assert told["versions"]["CUDA of PyTorch"] == (torch.version.cuda or "none")
    assert told["machine"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert (told["machine"]["GPU"] == "none") == (not torch.cuda.is_available())


def test_auto_is_what_select_takes(told):
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    assert {(row["op"], row["device"]) for row in told["auto"]} == {
        (op, device) for op in backends.registered_ops() for device in devices
    }
    for row in told["auto"]:
        for dtype in report.DTYPES:
            tensor = torch.empty(0, dtype=dtype, device=row["device"])
            with backends.use_backend("auto"):
                assert row[report._name(dtype)] == backends.select(row["op"], "auto", tensor)


def test_the_table_says_what_its_columns_are(told):
    lines = report.lines(told)
    head = next(line for line in lines if line.startswith("what auto takes"))
    row = next(line for line in lines if line.startswith("masked_topk"))
    assert head.split()[3:] == ["for", "tensors", "on", *map(report._name, report.DTYPES)]
    columns = [head.index("for tensors on"), *(head.index(report._name(dtype)) for dtype in report.DTYPES)]
    assert all(row[column - 1] == " " != row[column] for column in columns)


def test_each_backend_is_taken_or_not_with_a_reason(told):
    for row in told["auto"]:
        for dtype in map(report._name, report.DTYPES):
            reasons = {
                entry["backend"]
                for entry in told["not_taken"]
                if entry["device"] == row["device"] and dtype in entry["dtypes"] and row["op"] in entry["ops"]
            }
            before = backends.BACKENDS[: backends.BACKENDS.index(row[dtype])]
            assert set(before) <= reasons and row[dtype] not in reasons
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in told["not_taken"])


def test_variables_that_are_set_and_a_backend_that_is_unknown(repository):
    lines = run(repository, HPKERNELS_BACKEND="gpu", OMP_NUM_THREADS="1").splitlines()
    assert any(line.split() == ["HPKERNELS_BACKEND", "gpu"] for line in lines)
    assert any(line.split() == ["OMP_NUM_THREADS", "1"] for line in lines)
    assert any(
        "HPKERNELS_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'gpu'" in line for line in lines
    )


def test_a_reader_that_stops_early(repository):
    command = f"{sys.executable} -m hpkernels | head -n 1"
    done = subprocess.run(command, shell=True, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["hpkernels", hpkernels.__version__] and not done.stderr


def test_a_missing_package_is_no_error(monkeypatch, capsys):
    def version(package):
        raise report.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.importlib.metadata, "version", version)
    report.main([])
    assert any(line.split() == ["Triton", "not", "installed"] for line in capsys.readouterr().out.splitlines())


def test_import_does_not_import_the_compiler(repository):
    code = (
        "import sys, torch; print('torch._dynamo' in sys.modules);"
        "import hpkernels; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert after == before


def test_the_compiler_takes_the_mark_of_constants():
    """hpkernels.backends sets the mark itself, so as not to import the compiler."""
    decorators = (backends._constant_for_dynamo, torch.compiler.assume_constant_result)
    mine, theirs = (decorate(lambda: 0) for decorate in decorators)
    assert vars(mine) == vars(theirs)
