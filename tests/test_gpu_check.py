from __future__ import annotations

import heapq
import importlib.util
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import results
from benchmarks.cases import DTYPES, OPS
from benchmarks.gpu import aims, gpu_check, kernels, plan
from benchmarks.gpu import command as gpu_command
from benchmarks.gpu.gpu_check import Step
from benchmarks.registry import Provider
from benchmarks.results import Row


def python(name, code, seconds=60.0, **options):
    return Step(name, (sys.executable, "-c", code), seconds, **options)


def check(tmp_path, *groups, minutes=1.0, archive=None):
    """Take the steps of one part; whether all passed, the lines of the steps, and those that come after."""
    lines = []
    passed = gpu_check.check(tmp_path, [("one", list(groups))], minutes, "gpu", archive, lines.append)
    names = {step.name for group in groups for step in group}
    of_steps = [line for line in lines if line.split()[:1] and line.split()[0] in names]
    return passed, of_steps, [line for line in lines if line not in of_steps]


def run(tmp_path, *planned, minutes=1.0):
    passed, lines, _ = check(tmp_path, *((step,) for step in planned), minutes=minutes)
    return passed, [line.split()[:2] for line in lines]


def log(tmp_path, name):
    return (tmp_path / "results" / "gpu" / "logs" / "one" / f"{name}.log").read_text()


def test_every_step_is_taken_and_logged(tmp_path):
    passed, lines = run(tmp_path, python("one", "print('hello')"), python("two", "pass"))
    assert passed and lines == [["one", "passed"], ["two", "passed"]]
    assert log(tmp_path, "one").endswith("hello\n")


def test_a_step_that_fails_stops_no_other(tmp_path):
    planned = python("one", "print('it broke'); exit(3)"), python("two", "pass"), Step("three", ("no-such-program",), 5)
    passed, lines, rest = check(tmp_path, *((step,) for step in planned))
    assert not passed
    assert [line.split()[:2] for line in lines] == [["one", "failed"], ["two", "passed"], ["three", "failed"]]
    assert lines[0].endswith("it broke") and "no-such-program" in lines[2]
    assert rest[-1] == "3 steps, not passed: one, three"


def test_time_is_limited(tmp_path):
    slow = python("one", "import time; time.sleep(60)", seconds=0.2)
    assert run(tmp_path, slow) == (False, [["one", "out"]])
    assert run(tmp_path, python("one", "pass"), minutes=0.0) == (False, [["one", "left"]])


def test_what_is_measured_until_the_end_of_its_time_is_no_fault(tmp_path):
    slow = python("one", "import time; print('a row'); time.sleep(60)", seconds=1, measures=True)
    assert run(tmp_path, slow) == (True, [["one", "out"]])


def test_a_step_that_is_cut_off_says_what_it_has(tmp_path):
    """What it has printed, though to a file, and what it says of an interrupt."""
    code = """
try:
    print("begun")
    import time; time.sleep(600)
except KeyboardInterrupt:
    print("found so far")
"""
    for seconds in (1, 10, 100):  # the first in which a machine, however busy, has begun it
        run(tmp_path, python("one", code, seconds=seconds), minutes=5.0)
        if "begun" in log(tmp_path, "one"):
            break
    assert log(tmp_path, "one").endswith("begun\nfound so far\n")


def test_a_step_that_is_cut_off_leaves_no_process(tmp_path, monkeypatch):
    """Though neither takes notice of an interrupt; what was printed is kept."""
    monkeypatch.setattr(gpu_check, "_LAST_WORDS", 0.2)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    started = tmp_path / "started"
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    grandchild = f"{deaf}; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    child = f"{deaf}; print('begun'); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    for seconds in (1, 10, 100):  # the first in which a machine, however busy, has started both
        assert run(tmp_path, python("one", child, seconds=seconds), minutes=5.0) == (False, [["one", "out"]])
        if started.exists() and started.read_text():
            break
    assert log(tmp_path, "one").endswith("begun\n")
    process = Path("/proc") / started.read_text() / "stat"
    end = time.monotonic() + 60
    with suppress(OSError):  # once it is gone
        while process.read_text().rpartition(")")[2].split()[0] not in "ZX":  # killed, and not yet waited for
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_step_that_cannot_be_taken_says_why(tmp_path):
    step = Step("one", ("no-such-program",), 5, missing="needs pytest")
    passed, lines, _ = check(tmp_path, (step,))
    assert passed and lines[0].startswith("one") and "left out" in lines[0] and lines[0].endswith("needs pytest")


def test_a_step_that_is_only_told_counts_for_nothing(tmp_path):
    step = replace(python("one", "exit(1)"), only_told=True)
    assert run(tmp_path, step) == (True, [["one", "failed"]])
    told = {step.name for step in steps("right", tmp_path) if step.only_told}
    assert told == {"racecheck-cuda-hopper"}  # which does not know TMA's barriers; that of the other engine counts


def test_steps_of_a_group_are_taken_at_once(tmp_path):
    """Each waits for a file that the other writes."""
    wait = """import time, pathlib
pathlib.Path({own!r}).touch()
while not pathlib.Path({other!r}).exists():
    time.sleep(0.05)
"""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    together = python("one", wait.format(own=one, other=two)), python("two", wait.format(own=two, other=one))
    assert [line.split()[:2] for line in check(tmp_path, together)[1]] == [["one", "passed"], ["two", "passed"]]


def test_words_of_steps_that_succeeded(tmp_path):
    words = {("one",): ("right",), ("one", "two"): ("wrong",)}
    last = Step("three", (sys.executable, "-c", "import sys; print(sys.argv[1:])"), 60, words=words)
    none = replace(last, name="four", words={("two",): ("wrong",), ("never taken",): ("wrong",)})
    _, lines, _ = check(tmp_path, *((step,) for step in (python("one", "pass"), python("two", "exit(1)"), last, none)))
    assert log(tmp_path, "three").endswith("['right']\n")
    assert "left out" in lines[3] and lines[3].endswith("has not passed: two, never taken")


def test_without_hopper_if_its_kernels_fail(tmp_path, monkeypatch):
    monkeypatch.delenv("HPKERNELS_SM90", raising=False)
    told = "import os; print(os.environ.get('HPKERNELS_SM90'))"
    steps = python("bad", "exit(1)"), python("good", "pass")
    planned = *steps, python("with", told, hopper=("good",)), python("without", told, hopper=("good", "bad"))
    _, lines, _ = check(tmp_path, *((step,) for step in planned))
    assert log(tmp_path, "with").endswith("None\n") and log(tmp_path, "without").endswith("\n0\n")
    assert log(tmp_path, "without").startswith("$ HPKERNELS_SM90=0 ")
    assert lines[3].endswith("with HPKERNELS_SM90=0: bad has not passed")


def test_variables_of_a_step(tmp_path, monkeypatch):
    """Those that the caller has set are kept."""
    monkeypatch.setenv("CHOSEN", "by the caller")
    code = "import os; print(os.environ['CHOSEN'], os.environ['OTHER'])"
    step = Step("one", (sys.executable, "-c", code), 60, environment={"CHOSEN": "no", "OTHER": "of the step"})
    assert run(tmp_path, step)[0]
    assert log(tmp_path, "one").endswith("by the caller of the step\n")


def test_everything_is_in_one_file(tmp_path):
    """After each step, not at the end alone; without itself."""
    archive = tmp_path / "all.tar.gz"
    look = f"import tarfile; print(*tarfile.open({str(archive)!r}).getnames())"
    assert check(tmp_path, (python("one", "pass"),), (python("two", look),), archive=archive)[0]
    assert "./results/gpu/logs/one/one.log" in log(tmp_path, "two")
    with tarfile.open(archive) as file:
        files = {entry.name for entry in file if entry.isfile()}
    logs = {f"./results/gpu/logs/{name}" for name in ("summary.txt", "one/one.log", "one/two.log")}
    assert files == logs


ROW = {"op": "masked_topk", "call": "k=1", "images": 1, "height": 1, "width": 1}


def test_results_come_last(tmp_path):
    rows = [
        Row(**ROW, dtype="float16", anchors=784, provider="triton", median_ms=1.0),
        Row(**ROW, dtype="float16", anchors=3136, provider="published", median_ms=10.0),
        Row(**ROW, dtype="float16", anchors=3136, provider="torch-topk", median_ms=6.0),
        Row(**ROW, dtype="float16", anchors=3136, provider="cuda", median_ms=2.0),
        Row(**ROW, dtype="float16", anchors=3136, provider="triton", median_ms=3.0),
        Row(**ROW, dtype="float32", anchors=3136, provider="compiled", median_ms=5.0),
        Row(**ROW, dtype="float32", anchors=3136, provider="cuda", note="not timed: wrong"),
    ]
    results.write(tmp_path / "results" / "gpu", rows)
    passed, _, lines = check(tmp_path)
    assert passed
    assert [line.split() for line in lines[1:5]] == [
        ["median", "ms", "N", "cuda", "triton", "published", "fastest", "known"],
        ["masked_topk", "k=1", "float16", "784", "-", "1.000", "-", "-"],
        ["masked_topk", "k=1", "float16", "3136", "2.000", "3.000", "10.000", "6.000", "torch-topk", "3.00", "x"],
        ["masked_topk", "k=1", "float32", "3136", "-", "-", "-", "5.000", "compiled"],
    ]
    assert lines[6].startswith("aims at N = 50176") and len(lines) == 7 + len(aims.AIMS)


def measured(op, call, provider, **values):
    size = {"images": 64, "height": 28, "width": 28, "anchors": aims.ANCHORS}
    return Row(op, call, dtype="float16", provider=provider, **(size | values))


def verdicts(*rows):
    """What is measured and said of each aim that has rows."""
    lines = zip(aims.AIMS, aims.compared(rows)[1:], strict=True)
    ends = {aim.what: line[len(f"{aim.what:50} {aim.unit:8}") + 14 :].split(maxsplit=1) for aim, line in lines}
    return {what: tuple(end) for what, end in ends.items() if end[1] != "not measured"}


def test_aims_that_are_not_measured():
    other = measured("ghp_contrastive", "forward+backward", "cuda", median_ms=1.0, anchors=12544)
    failed = measured("ghp_contrastive", "forward+backward", "cuda", note="not timed: wrong")
    theirs = measured("ghp_contrastive", "forward+backward", "published", median_ms=1.0)
    assert verdicts() == verdicts(other, failed, theirs) == {}


def test_aims_are_compared_with_the_best_of_ours():
    loss = "ghp_contrastive", "forward+backward"
    rows = [
        measured(*loss, "published", median_ms=160.0),
        measured(*loss, "cuda", median_ms=7.9, peak_mib=1500.0),
        measured(*loss, "triton", median_ms=9.0, peak_mib=1000.0),
    ]
    assert verdicts(*rows) == {
        "whole loss, rate 0.02, against the published way": ("20.25", "reached"),
        "whole loss, rate 0.02": ("7.9", "reached"),
        "extra memory of the whole loss, rate 0.02": ("1.049", "reached"),
    }
    assert verdicts(*rows[::2]) == {
        "whole loss, rate 0.02, against the published way": ("17.78", "not reached"),
        "whole loss, rate 0.02": ("9", "not reached"),
        "extra memory of the whole loss, rate 0.02": ("1.049", "reached"),
    }


def test_a_dense_kernel_that_is_not_done():
    call = "multi_positive_contrastive", "forward rate=1"
    assert verdicts(measured(*call, "triton", tflops=399.0))["dense forward, D 512"] == (
        "399", "not done: a dense kernel is to have 400 TFLOP/s",
    )  # fmt: skip
    assert verdicts(measured(*call, "triton", tflops=400.0))["dense forward, D 512"] == ("400", "not reached")
    assert verdicts(measured(*call, "triton", tflops=600.0))["dense forward, D 512"] == ("600", "reached")


def test_every_aim_is_measured_by_the_plan(tmp_path, monkeypatch):
    """Rows of all that the part `measure` runs, as if each took a millisecond, leave no aim without a number."""
    some = {"median_ms": 1.0, "tflops": 1.0, "peak_mib": 1.0}
    found = planned("measure", tmp_path, monkeypatch)
    rows = [
        measured(case.op, case.call, name, **some | {"anchors": case.anchors})
        for case, name in found
        if case.dtype == "float16"
    ]
    tiny = kernels.Sizes(images=1, grid=(1, 2), heads=1, head_dim=8, large_grid=(2, 2))
    for row in kernels.rows_of("reference", "float32", "cpu", {}, tiny):
        rows.append(measured(row.op, row.call, "cuda", **some))
    assert all(aim.value(rows) is not None for aim in aims.AIMS)


def test_aims_of_the_page(repository):
    assert aims.table() in (repository / "docs" / "benchmarks.md").read_text(), "python -m benchmarks tables"


def steps(part, folder):
    return [step for together in plan.PARTS[part](folder) for step in together]


def planned(part, folder, monkeypatch):
    """The cases and providers that a part measures by ``python -m benchmarks run``."""
    found = set()

    def take(cases, names, *_, **__):
        found.update((case, name) for case in cases for name in names)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(Provider, "reason_missing", lambda *_: "")
    monkeypatch.setattr(command, "run", take)
    monkeypatch.setattr(command.results, "environment", lambda *_: {})
    monkeypatch.setattr(command, "_draw", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    for step in steps(part, folder):
        if "run" in step.command:
            words = [word for own in step.words.values() for word in own]
            assert command.main([*step.command[step.command.index("run") :], *words]) == 0
    return found


ORDER = {"right": "suite", "measure": "contrastive", "sweeps": "errors"}
"""The last step of each part that its time is planned for; what comes after is taken if limits were too generous."""


@pytest.mark.parametrize(("part", "last"), ORDER.items())
def test_what_matters_most_fits_into_the_time(part, last, tmp_path):
    """On a machine that has what every part begins with; the first part makes it."""
    groups, seconds = plan.PARTS[part](tmp_path), []
    common = 0 if part == "right" else len(plan._common())
    for together in groups[common:]:
        is_last = last in (step.name for step in together)
        if part == "right" and is_last:  # which takes the rest
            break
        free = [0.0] * gpu_check._AT_ONCE
        for step in together:
            heapq.heapreplace(free, free[0] + step.seconds)
        seconds.append(max(free))
        if is_last:
            break
    assert is_last and sum(seconds) <= 60 * gpu_command.MINUTES - 30


def test_what_is_proved(tmp_path):
    names = {step.name for step in steps("right", tmp_path)}
    backends = ("cuda", "triton")
    kinds = {f"prove-{backend}-{proof}" for backend in backends for proof in ("goldens", "sampled_rows", "repeats")}
    kinds |= {f"verify-{backend}-{op}" for backend in backends for op in OPS} - {"verify-cuda-contrastive"}
    kinds |= {f"{tool}-cuda{engine}" for tool in ("memcheck", "initcheck") for engine in ("", "-hopper")}
    assert kinds | {"build", "report", "self-check", "suite", "racecheck-cuda"} < names


@pytest.mark.parametrize("part", plan.PARTS)
def test_no_step_is_of_kernels_that_there_are_none_of(part, tmp_path, monkeypatch):
    """Nor waits for such a step, as `contrastive` has no CUDA kernels: it would fail, and take others with it."""
    monkeypatch.setattr(plan, "_lacks_engine", str)
    taken = steps(part, tmp_path)
    names = {step.name for step in taken}
    assert not {name for name in names if "cuda" in name and name.endswith("-contrastive")}
    awaited = {name for step in taken for names in (*step.words, step.hopper) for name in names}
    assert awaited <= names and "exercise-cuda-hopper-masked_topk" in awaited | names


def test_what_is_measured(tmp_path, monkeypatch):
    """Every op over dtype, k and rate, with both kinds of kernels and what they are compared with."""
    found = planned("measure", tmp_path, monkeypatch)
    cases = {case for case, _ in found}
    sizes = {(op, n) for op in OPS if op != "contrastive" for n in (12544, 50176)}
    sizes |= {("contrastive", n) for n in (16384, 65536)}
    assert {(case.op, case.anchors) for case in cases} == sizes
    assert {(case.op, case.dtype) for case in cases} == {(op, dtype) for op in OPS for dtype in DTYPES}
    calls = {"k=1", "k=8", "k=32", "density=0.001", "density=0.1", "rate=0.2", "rate=1", "queue", "dim=768", "clip"}
    assert calls | {"end-to-end"} < {case.call for case in cases}
    for case in cases:
        names = {name for of, name in found if of == case}
        assert {"cuda", "triton", "published"} <= names, case
        if case.images == 64 and case.op != "training_step":
            assert {"torch-chunked", "compiled"} <= names, case


def test_what_is_swept(tmp_path, monkeypatch):
    found = {}
    for case, name in planned("sweeps", tmp_path, monkeypatch):
        found.setdefault((case.op, name), set()).add((case.call, case.anchors))
    for backend in ("cuda", "triton"):
        sizes = {anchors for call, anchors in found["ghp_contrastive", backend] if not call.startswith("density")}
        assert sizes == {784 * 2**power for power in range(10)}
        densities = {call for call, _ in found["multi_positive_contrastive", backend]} - {"sampled"}
        assert {"density=0.0005", "density=0.05"} < densities
    assert {anchors for _, anchors in found["ghp_contrastive", "published"]} >= {784, 50176}


def test_steps_name_real_things(tmp_path):
    taken = [step for part in plan.PARTS for step in steps(part, tmp_path)]
    for step in taken:
        modules = [step.command[place + 1] for place, word in enumerate(step.command) if word == "-m"]
        assert all(importlib.util.find_spec(name) for name in modules), step
    names = {step.name for step in taken}
    assert {name for step in taken for asked in step.words for name in asked} <= names
    assert {name for step in taken for name in step.hopper} <= names
    for part in plan.PARTS:
        of_part = [step.name for step in steps(part, tmp_path)]
        assert len(of_part) == len(set(of_part))  # a log each


def test_caches_where_the_home_folder_cannot_be_written_to(tmp_path, monkeypatch):
    groups = [(python("one", "pass", environment={"CHOSEN": "1"}),)]
    assert plan.with_caches(groups) == groups
    monkeypatch.setattr(plan.os, "access", lambda *_: False)
    ((step,),) = plan.with_caches(groups)
    assert {"CHOSEN", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"} < set(step.environment)


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine with a GPU, on which gpu-check is given what it would take."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gpu_check, "check", lambda *arguments: given.append(arguments) or True)
    return given


def test_parts_are_taken_in_order(on_gpu, tmp_path):
    output = ["--output", str(tmp_path)]
    assert command.main(["gpu-check", *output]) == 0
    assert command.main(["gpu-check", *output, "--part", "sweeps", "--part", "right", "--minutes", "0.5"]) == 0
    assert [[name for name, _ in plans] for _, plans, *_ in on_gpu] == [
        ["right", "measure", "sweeps"],
        ["right", "sweeps"],
    ]
    assert on_gpu[1][2:] == (0.5, "nvidia-h100-80gb-hbm3", None)


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan", "1e9", "nine"])
def test_minutes_that_are_none(minutes, on_gpu, capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu-check", "--minutes", minutes])
    assert f"must be a number above 0, at most 1440, got {minutes}" in capsys.readouterr().err


@pytest.mark.parametrize("archive", [".", "no/such/folder/all.tar.gz"])
def test_archives_that_cannot_be_written(archive, on_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(["gpu-check", "--archive", archive])
    assert f"must be a file in a folder that can be written to, got {archive}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu-check"])
    assert "PyTorch sees none" in capsys.readouterr().err
