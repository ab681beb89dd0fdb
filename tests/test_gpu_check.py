from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_check, results
from benchmarks.gpu_check import Sizes, Step
from benchmarks.results import Row
from hpkernels.ops import _triton


def python(name, code, seconds=60.0, needs=None):
    return Step(name, (sys.executable, "-c", code), seconds, needs)


def run(tmp_path, *planned, minutes=1.0):
    lines = []
    passed = gpu_check.check(tmp_path, minutes, lambda output: list(planned), lines.append)
    return passed, [line.split()[:2] for line in lines]


def test_every_step_is_taken_and_logged(tmp_path):
    passed, lines = run(tmp_path, python("one", "print('hello')"), python("two", "pass", needs="one"))
    assert passed and lines == [["one", "passed"], ["two", "passed"]]
    assert (tmp_path / "one.log").read_text().endswith("hello\n")


def test_a_step_that_fails_stops_only_those_that_need_it(tmp_path):
    planned = python("one", "exit(3)"), python("two", "pass", needs="one"), python("three", "pass")
    passed, lines = run(tmp_path, *planned, Step("four", ("no-such-program",), 5))
    assert not passed
    assert lines == [["one", "failed"], ["two", "left"], ["three", "passed"], ["four", "failed"]]
    assert "no-such-program" in (tmp_path / "four.log").read_text()


def test_time_is_limited(tmp_path):
    slow = python("one", "import time; time.sleep(60)", seconds=0.2)
    assert run(tmp_path, slow) == (False, [["one", "out"]])
    assert run(tmp_path, python("one", "pass"), minutes=0.0) == (False, [["one", "left"]])


def test_results_come_last(tmp_path):
    own = dict(op="masked_topk", call="k=1", images=1, height=1, width=1, dtype="float16")
    rows = [
        Row(**own, anchors=784, provider="triton", median_ms=1.0),
        Row(**own, anchors=3136, provider="published", median_ms=10.0, peak_mib=100.0),
        Row(**own, anchors=3136, provider="triton", median_ms=2.0),
        Row(**own, anchors=3136, provider="faiss", note="missing"),
    ]
    results.write(tmp_path / "results", rows)
    lines = []
    assert gpu_check.check(tmp_path, 1.0, lambda output: [], lines.append)
    assert lines[0] == "masked_topk k=1, N = 3136, float16"
    assert lines[1].split() == ["triton", "2.000", "ms", "5.00", "x", "published"]
    assert lines[2].split() == ["published", "10.000", "ms", "100.0", "MiB", "1.00", "x", "published"]


def test_steps_name_real_things(tmp_path, repository):
    for step in gpu_check.steps(tmp_path):
        for word in step.command:
            if word.startswith("tests/") or word.endswith(".py"):
                assert (repository / word).exists(), word


@pytest.mark.skipif(not _triton.INTERPRETED, reason="kernels are not interpreted here")
def test_exercise_runs_every_kernel(monkeypatch):
    tiny = Sizes(images=2, grid=(2, 3), dim=6, feature_dim=5, pool_size=9, heads=1, head_dim=4, large_grid=(3, 3))
    monkeypatch.setattr(gpu_check, "SMALL", tiny)
    monkeypatch.setattr(gpu_check.backends, "registered_ops", lambda: ["hidden_positives"])
    assert gpu_check.exercise("cpu") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu-check"])
    assert "PyTorch sees none" in capsys.readouterr().err
