from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.cases import DTYPES, OPS, Case
from benchmarks.gpu import gpu_check, prove
from benchmarks.gpu.gpu_check import Sizes, Step
from benchmarks.providers import provider
from benchmarks.results import Row
from hpkernels import _native, backends, examination
from hpkernels.ops import _triton


def python(name, code, seconds=60.0, needs=None):
    return Step(name, (sys.executable, "-c", code), seconds, needs)


def run(tmp_path, *planned, minutes=1.0):
    lines = []
    passed = gpu_check.check(tmp_path, minutes, lambda output: [(step,) for step in planned], lines.append)
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
    own = dict(op="masked_topk", call="k=1", images=1, height=1, width=1)
    rows = [
        Row(**own, dtype="float16", anchors=784, provider="triton", median_ms=1.0),
        Row(**own, dtype="float16", anchors=3136, provider="published", median_ms=10.0),
        Row(**own, dtype="float16", anchors=3136, provider="torch-topk", median_ms=6.0),
        Row(**own, dtype="float16", anchors=3136, provider="cuda", median_ms=2.0),
        Row(**own, dtype="float16", anchors=3136, provider="triton", median_ms=3.0),
        Row(**own, dtype="float32", anchors=3136, provider="compiled", median_ms=5.0),
        Row(**own, dtype="float32", anchors=3136, provider="cuda", note="not timed: wrong"),
    ]
    results.write(tmp_path / "results", rows)
    lines = []
    assert gpu_check.check(tmp_path, 1.0, lambda output: [], lines.append)
    assert [line.split() for line in lines] == [
        ["median", "ms", "N", "cuda", "triton", "published", "fastest", "known"],
        ["masked_topk", "k=1", "float16", "784", "-", "1.000", "-", "-"],
        ["masked_topk", "k=1", "float16", "3136", "2.000", "3.000", "10.000", "6.000", "torch-topk", "3.00", "x"],
        ["masked_topk", "k=1", "float32", "3136", "-", "-", "-", "5.000", "compiled"],
    ]


def test_a_step_that_is_cut_off_leaves_no_process(tmp_path):
    started = tmp_path / "started"
    grandchild = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    for seconds in (1, 10, 100):  # the first in which a machine, however busy, has started both
        assert run(tmp_path, python("one", child, seconds=seconds), minutes=5.0) == (False, [["one", "out"]])
        if started.exists() and started.read_text():
            break
    process = Path("/proc") / started.read_text() / "stat"
    with suppress(OSError):  # once it is gone
        while process.read_text().rpartition(")")[2].split()[0] not in "ZX":  # killed, and not yet waited for
            time.sleep(0.01)


def test_a_step_that_cannot_be_taken_says_why(tmp_path):
    step = Step("one", ("no-such-program",), 5, missing="needs pytest")
    lines = []
    assert gpu_check.check(tmp_path, 1.0, lambda output: [(step,)], lines.append)
    assert lines[0].split(maxsplit=1)[1].startswith("left out: needs pytest")


def test_a_step_that_is_only_told_counts_for_nothing(tmp_path):
    step = replace(python("one", "exit(1)"), only_told=True)
    assert run(tmp_path, step) == (True, [["one", "failed"]])
    told = {step.name for together in gpu_check.steps(tmp_path) for step in together if step.only_told}
    assert told == {"racecheck-cuda-1"}  # which does not know TMA's barriers; that of the other engine counts


def test_steps_of_a_group_are_taken_at_once(tmp_path):
    """Each waits for a file that the other writes."""
    wait = """import time, pathlib
pathlib.Path({own!r}).touch()
while not pathlib.Path({other!r}).exists():
    time.sleep(0.05)
"""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    together = python("one", wait.format(own=one, other=two)), python("two", wait.format(own=two, other=one))
    lines = []
    assert gpu_check.check(tmp_path, 1.0, lambda output: [together], lines.append)
    assert [line.split()[:2] for line in lines] == [["one", "passed"], ["two", "passed"]]


def test_words_of_steps_that_succeeded(tmp_path):
    words = {"one": ("right",), "two": ("wrong",)}
    last = Step("three", (sys.executable, "-c", "import sys; print(sys.argv[1:])"), 60, words=words)
    run(tmp_path, python("one", "pass"), python("two", "exit(1)"), last)
    assert (tmp_path / "three.log").read_text().endswith("['right']\n")


def test_variables_of_a_step(tmp_path, monkeypatch):
    """Those that the caller has set are kept."""
    monkeypatch.setenv("CHOSEN", "by the caller")
    code = "import os; print(os.environ['CHOSEN'], os.environ['OTHER'])"
    step = Step("one", (sys.executable, "-c", code), 60, environment={"CHOSEN": "no", "OTHER": "of the step"})
    assert run(tmp_path, step)[0]
    assert (tmp_path / "one.log").read_text().endswith("by the caller of the step\n")


def test_what_matters_most_fits_into_the_time(tmp_path):
    plan = gpu_check.steps(tmp_path)
    most = plan[: next(place for place, together in enumerate(plan) if together[0].name == "ops") + 1]
    right = {f"{kind}-{backend}" for kind in ("exercise", "prove", "verify") for backend in ("cuda", "triton")}
    assert right | {"build", "self-check", "memcheck-cuda"} < {step.name for together in most for step in together}
    assert sum(max(step.seconds for step in together) for together in most) <= 9 * 60


def test_what_is_measured(tmp_path, monkeypatch):
    """Every op over N, dtype, k, density and rate, with both kinds of kernels and what they are compared with."""
    measured, planned = set(), [step for together in gpu_check.steps(tmp_path) for step in together]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "run", lambda cases, *rest: [measured.add((case, *rest[0])) for case in cases][:0])
    monkeypatch.setattr(command.results, "environment", lambda *_: {})
    monkeypatch.setattr(command, "_draw", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    for step in planned:
        if "run" in step.command:
            words = [word for own in step.words.values() for word in own]
            assert command.main([*step.command[step.command.index("run") :], *words]) == 0
    cases = {entry[0] for entry in measured}
    sizes = {(op, n) for op in OPS if op != "contrastive" for n in (12544, 50176)}
    sizes |= {("ghp_contrastive", n) for n in (784, 3136)} | {("contrastive", n) for n in (16384, 65536)}
    assert {(case.op, case.anchors) for case in cases} == sizes
    dtypes = {(op, dtype) for op in OPS for dtype in DTYPES} - {("contrastive", "float16")}
    assert {(case.op, case.dtype) for case in cases} == dtypes
    calls = {"k=1", "k=8", "k=32", "density=0.001", "density=0.1", "rate=0.2", "rate=1", "queue", "dim=768", "clip"}
    assert calls < {case.call for case in cases}
    assert all({"cuda", "triton", "published"} <= set(entry[1:]) for entry in measured)


def test_verification_tells_right_from_wrong(monkeypatch):
    """On the interpreter or the emulator where there is one, on which a tiny case takes seconds."""
    tiny = Case("hidden_positives", "forward", images=2, grid=(2, 3))
    monkeypatch.setattr(gpu_check, "OPS", ["hidden_positives"])
    monkeypatch.setattr(gpu_check, "cases", lambda *_, **__: [tiny])
    lines = []
    assert gpu_check.verify_all("cpu", "reference", lines.append)
    assert lines == ["hidden_positives forward N=12 reference HPKERNELS_SM90=0: right"] * 2
    wrong = replace(provider(tiny, "reference"), run=lambda inputs: {"bits": torch.zeros(12, 1, dtype=torch.int32) - 1})
    monkeypatch.setattr(gpu_check, "provider", lambda *_: wrong)
    assert not gpu_check.verify_all("cpu", "reference", lines.append)
    assert "12 of 12 rows" in lines[-1]
    monkeypatch.setattr(gpu_check, "OPS", [])
    assert not gpu_check.verify_all("cpu", "reference", lines.append)  # nothing is not all


def test_steps_name_real_things(tmp_path, repository):
    for step in (step for together in gpu_check.steps(tmp_path) for step in together):
        for word in step.command:
            if word.startswith("tests/") or word.endswith(".py"):
                assert (repository / word).exists(), word


TINY = Sizes(images=2, grid=(2, 3), dim=7, feature_dim=5, pool_size=9, heads=1, head_dim=5, large_grid=(3, 3))


@pytest.mark.skipif(not _triton.INTERPRETED, reason="kernels are not interpreted here")
def test_exercise_runs_triton_kernels(monkeypatch):
    monkeypatch.setattr(gpu_check, "SMALL", TINY)
    monkeypatch.setattr(gpu_check.backends, "registered_ops", lambda: ["hidden_positives"])
    # Two sizes of features, two dtypes, symmetric or not, and two relations between anchors and keys.
    assert gpu_check.exercise("cpu", "triton") == 16


class Called(TorchDispatchMode):
    """Collects the names of the CUDA kernels that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "hpkernels_cuda":
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not _native.EMULATED, reason="needs the emulated CUDA kernels, which `make test` builds")
def test_exercise_runs_every_cuda_kernel(repository, monkeypatch):
    monkeypatch.setattr(gpu_check, "SMALL", TINY)
    schemas = (repository / "csrc" / "bindings_cuda.cpp").read_text()
    with Called() as called:
        gpu_check.exercise("cpu", "cuda")
    assert called.names == set(re.findall(r'm\.def\("(\w+)\(', schemas))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu-check"])
    assert "PyTorch sees none" in capsys.readouterr().err


SIZES = examination.Sizes(images=3, grid=(3, 4), dim=24, feature_dim=40, pool_size=32, attention=(1, 4, 5, 2, 8))
CPU = torch.device("cpu")
PROVEN = {
    "threads": lambda backend: prove.threads(backend, CPU, SIZES),
    "sampled_rows": lambda backend: prove.sampled_rows(backend, CPU, replace(SIZES, images=6, grid=(4, 5)), 9),
    "uneven": lambda backend: prove.uneven(backend, CPU, 96),
    "dimensions": lambda backend: prove.dimensions(backend, CPU, SIZES),
    "graphs": lambda backend: prove.graphs(backend, CPU, SIZES, imagined),
    "engines": lambda backend: prove.engines(backend, CPU, 96),
    "second_gpu": lambda backend: prove.second_gpu(backend, CPU, SIZES),
}


def imagined(call):
    """As `prove.captured`, without a graph."""
    results = call()
    return results, lambda: [old.copy_(new) for old, new in zip(results, call(), strict=True)]


@pytest.fixture
def change(monkeypatch):
    """``change(op, function, by)``: the reference stands for the CUDA backend, with results of a function changed."""

    def changed(correct, by, *arguments, **options):
        return by(correct(*arguments, **options))

    def enter(op=None, function=None, by=None):
        for of in backends.registered_ops():
            module = SimpleNamespace(**vars(backends.implementation(of, "reference")))
            if of == op:
                setattr(module, function, partial(changed, getattr(module, function), by))
            monkeypatch.setitem(backends._modules, (of, "cuda"), module)

    return enter


def test_every_proof_is_tried_here():
    assert PROVEN.keys() == prove.PROOFS.keys()
    assert next(iter(prove.PROOFS)) == "threads"  # before anything else has used CUDA


@pytest.mark.parametrize("proof", PROVEN)
def test_proofs_of_what_is_right(proof, change):
    change()
    assert PROVEN[proof]("cuda") == []


def last_row(results):
    first = results if isinstance(results, torch.Tensor) else results[0]
    first[-1] += 1 if not first.is_floating_point() else 0.05 * first.abs().max()
    return results


@pytest.mark.parametrize(
    ("proof", "op", "function"),
    [
        ("threads", "local_propagation", "apply_backward"),
        ("sampled_rows", "masked_topk", "forward"),
        ("sampled_rows", "hidden_positives", "forward"),
        ("sampled_rows", "multi_positive_contrastive", "forward"),
        ("sampled_rows", "multi_positive_contrastive", "backward"),
        ("uneven", "multi_positive_contrastive", "backward"),
        ("dimensions", "hidden_positives", "forward"),
        ("second_gpu", "masked_topk", "backward"),
    ],
)
def test_proofs_of_what_is_wrong(proof, op, function, change):
    """One wrong row, the last, which is among the sampled ones."""
    if (op, function) == ("multi_positive_contrastive", "forward"):
        change(op, function, lambda results: (results[0], results[1].index_fill(1, torch.tensor([119]), 0.5)))
    else:
        change(op, function, last_row)
    assert PROVEN[proof]("cuda")


def test_engines_and_graphs_that_differ(change, monkeypatch):
    change("hidden_positives", "forward", lambda bits: bits + int(os.environ["HPKERNELS_SM90"]))
    assert "bits of D = 8, torch.float16 differ between the engines" in PROVEN["engines"]("cuda")
    change()
    stale = lambda call: (call(), lambda: None)  # noqa: E731  # a graph that does not follow its data
    assert prove.graphs("cuda", CPU, SIZES, stale) == [
        f"rate {rate}: a graph replayed with other data differs from a call" for rate in (0.02, 1.0)
    ]


def test_a_proof_that_fails_keeps_none_from_running(monkeypatch):
    def fail(backend, device):
        raise RuntimeError("illegal address")

    monkeypatch.setattr(prove, "PROOFS", {"one": fail, "two": lambda *of: [], "three": lambda *of: ["a row", "a bit"]})
    lines = []
    assert not prove.prove("cuda", CPU, lines.append)
    assert lines == ["cuda one: RuntimeError: illegal address", "cuda two: right", "cuda three: a row; a bit"]


@pytest.mark.parametrize("proof", ["threads", "sampled_rows", "graphs", "engines", "uneven"])
def test_proofs_of_the_emulated_kernels(proof):
    if not _native.EMULATED:
        pytest.skip("needs the emulated CUDA kernels, which `make test` builds")
    assert PROVEN[proof]("cuda") == []
