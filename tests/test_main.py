from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import hpkernels
from hpkernels import __main__ as report
from hpkernels import backends


@pytest.fixture(scope="module")
def lines(repository):
    command = [sys.executable, "-m", "hpkernels"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()


def test_versions_and_devices(lines):
    rows = dict(line.split(maxsplit=1) for line in lines[:6])
    assert rows["hpkernels"] == hpkernels.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert rows["triton"]
    assert rows["GPU"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    assert rows["CPU"].endswith("threads")


def test_each_op_and_backend_with_its_reason(lines):
    start = next(number for number, line in enumerate(lines) if line.startswith("Backends for float32 tensors on "))
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    assert f" {device_type}," in lines[start]
    for op in backends.registered_ops():
        at = lines.index(f"  {op}", start)
        for line, backend in zip(lines[at + 1 :], backends.BACKENDS, strict=False):
            ok, reason = backends.availability(op, backend, device_type)
            assert line.split(maxsplit=1) == [backend, f"{'available' if ok else 'missing'}: {reason}"]
        assert lines[at + len(backends.BACKENDS)].split()[:2] == ["reference", "available:"]
    assert "  ghp_contrastive" in lines


def test_a_missing_package_is_no_error(monkeypatch, capsys):
    def version(package):
        raise report.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.importlib.metadata, "version", version)
    report.main()
    assert "triton    not installed" in capsys.readouterr().out
