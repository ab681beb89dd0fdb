from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

import hpkernels
from hpkernels import __main__ as program
from hpkernels import _native, backends, examination, selfcheck
from hpkernels.cost import lists_may_be_faster
from hpkernels.ops import _triton
from hpkernels.ops.local_propagation.reference import _window_cells
from hpkernels.ops.multi_positive_contrastive import routes

CPU = torch.device("cpu")
SMALL = functools.partial(
    examination.Sizes, images=3, grid=(3, 4), dim=24, feature_dim=40, pool_size=32, attention=(1, 4, 5, 2, 8)
)
FUNCTIONS = [
    ("masked_topk", "forward"),
    ("masked_topk", "backward"),
    ("hidden_positives", "forward"),
    ("hidden_positives", "between"),
    ("contrastive", "statistics"),
    ("contrastive", "gradient"),
    ("multi_positive_contrastive", "forward"),
    ("multi_positive_contrastive", "backward"),
    ("local_propagation", "weights_forward"),
    ("local_propagation", "apply_forward"),
    ("local_propagation", "apply_backward"),
]


def forget():
    """As in a new process."""
    selfcheck._verdicts.clear()
    selfcheck._record_of.cache_clear()
    selfcheck._identity.cache_clear()
    backends._warned.clear()


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Verdicts in a folder of the test, problems that are small, no variables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(selfcheck.VARIABLE, raising=False)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(examination, "Sizes", SMALL)
    monkeypatch.setattr(backends, "_modules", dict(backends._modules))
    monkeypatch.setattr(backends, "_automatic", dict(backends._automatic))
    forget()
    yield
    forget()


@pytest.fixture
def pretend():
    """``pretend(backend, **changed)``: a GPU backend that runs on the CPU, the reference but for some functions.

    Returns the list of the functions of `FUNCTIONS` that were called, to which each call adds.
    """

    def enter(backend="cuda", **changed):
        called = []

        def call(name, own, correct, *arguments):
            called.append(name)
            return own(correct, *arguments)

        for op in backends.registered_ops():
            reference = backends.implementation(op, "reference")
            module = SimpleNamespace(**vars(reference))
            module.supports = lambda device, dtype: backends.Availability(device.type == "cpu", "here")
            for name in [function for of, function in FUNCTIONS if of == op]:
                own = changed.get(f"{op}_{name}", lambda correct, *arguments: correct(*arguments))
                setattr(module, name, functools.partial(call, f"{op}_{name}", own, getattr(reference, name)))
            backends.register(op, backend, module, automatic="checked")
        return called

    for backend in ("cuda", "triton"):  # which may be simulated here
        for op in backends.registered_ops():
            backends.register(op, backend, SimpleNamespace(supports=lambda *of: backends.Availability(False, "none")))
    return enter


def taken(op="masked_topk"):
    return backends.select(op, "auto", torch.empty(1))


def one_row_off(correct, *arguments):
    """What is right but for the last row of the first of the results; for the rows that statistics are added to."""
    results = correct(*arguments)
    if results is None:
        results = arguments[4][:, 0]
    first = results if isinstance(results, torch.Tensor) else results[0]
    first[-1] += 1 if not first.is_floating_point() else 0.02 * first.abs().max()
    return results


def test_a_backend_that_is_right_is_taken_and_checked_once(pretend):
    called = pretend()
    assert backends.automatic("masked_topk", "cuda") == selfcheck.UNKNOWN and not called
    assert {taken(op) for op in backends.registered_ops()} == {"cuda"}
    assert set(called) == {f"{op}_{function}" for op, function in FUNCTIONS}
    checked = len(called)
    assert taken() == "cuda" and len(called) == checked
    forget()  # as in the next process: from the file
    assert taken() == "cuda" and len(called) == checked
    ok, reason = backends.automatic("masked_topk", "cuda")
    assert ok and reason.startswith("checked on this device in ")
    assert backends.select("masked_topk", "auto", torch.empty(1, dtype=torch.float16)) == "cuda"
    assert len(called) == 2 * checked  # each dtype by itself


@pytest.mark.parametrize(("op", "function"), FUNCTIONS)
def test_one_wrong_row_is_found_and_the_whole_backend_left_out(op, function, pretend):
    pretend("cuda", **{f"{op}_{function}": one_row_off})
    pretend("triton")
    assert {taken(of) for of in backends.registered_ops()} == {"triton"}
    ok, reason = backends.automatic("masked_topk", "cuda")
    assert not ok and op in reason.replace("the loss", "multi_positive_contrastive")
    assert "1 of " in reason and reason.endswith("rows differ from the reference")


def test_one_flipped_bit_is_found(pretend):
    def flip(correct, *arguments):
        bits = correct(*arguments)
        bits[5, 0] ^= 1 << 17
        return bits

    pretend("cuda", hidden_positives_forward=flip)
    assert taken() == "cpu" and "hidden_positives of features: 1 of 36" in backends.automatic("masked_topk", "cuda")[1]


@pytest.mark.parametrize("wrong", ["nan", "shape"])
def test_other_wrong_results(wrong, pretend):
    def change(correct, *arguments):
        gradients = correct(*arguments)
        return [gradient * torch.nan if wrong == "nan" else gradient[1:] for gradient in gradients]

    pretend("cuda", multi_positive_contrastive_backward=change)
    assert taken() == "cpu"
    assert "gradient of the loss, rate 0.02: 36 of 36 rows" in backends.automatic("masked_topk", "cuda")[1]


def test_a_backend_that_raises_is_left_out_and_the_reference_says_why_once(pretend, monkeypatch):
    def fail(correct, *arguments):
        raise RuntimeError("no kernel image is available\nmore lines")

    pretend("cuda", masked_topk_backward=fail)
    monkeypatch.setattr(_native, "LIBRARIES", _native.LIBRARIES | {"_C": backends.Availability(False, "not built")})
    monkeypatch.setattr(backends, "_meant", {"cpu": ("cuda", "cpu")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert taken() == taken("hidden_positives") == "reference"
    (said,) = [str(warning.message) for warning in caught]
    assert "cuda: RuntimeError: no kernel image is available; cpu: not built" in said and "\n" not in said


def test_a_check_that_hangs_is_given_up_and_not_made_again(pretend, monkeypatch):
    called = pretend("cuda", hidden_positives_forward=lambda *arguments: threading.Event().wait())
    monkeypatch.setattr(selfcheck, "LIMIT_S", 0.5)
    assert taken() == "cpu"
    forget()
    assert taken() == "cpu" and called.count("hidden_positives_forward") == 1
    assert backends.automatic("masked_topk", "cuda") == (False, "it did not end within 0.5 s")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left on device"), TimeoutError("slow")],
)
def test_what_may_be_better_next_time_is_not_kept(error, pretend, tmp_path):
    def fail(correct, *arguments):
        raise error

    pretend("cuda", masked_topk_forward=fail)
    assert taken() == "cpu"
    assert backends.automatic("masked_topk", "cuda").reason.startswith(type(error).__name__)
    forget()  # in the next process there is room
    pretend("cuda")
    assert taken() == "cuda"


def test_an_error_that_leaves_the_device_unusable_is_kept(pretend, monkeypatch):
    pretend("cuda", masked_topk_forward=lambda *arguments: 1 / 0)
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_computes", functools.partial(raise_, RuntimeError("illegal address")))
        with pytest.raises(RuntimeError, match="start again, or with HPKERNELS_SELF_CHECK=never"):
            taken()
    forget()
    called = pretend("cuda")
    assert taken() == "cpu" and not called


def test_a_check_that_dies_leaves_no_older_verdict(pretend, process, tmp_path):
    """As when the driver changed under a name that is still the same."""
    assert output(process())[1].startswith("cuda checked on this device")
    assert output(process("os.kill(os.getpid(), signal.SIGKILL)", HPKERNELS_SELF_CHECK="again"))[0] == -9
    assert output(process())[1].startswith("cpu an earlier check did not end: process ")


def test_a_marker_is_settled_without_a_check(pretend):
    called = pretend("cuda")
    selfcheck._record("cuda", CPU, torch.float32).mark()
    selfcheck.settle("cuda", CPU, torch.float32)
    ok, reason = backends.automatic("masked_topk", "cuda")
    assert not ok and "did not end" in reason and not called


def test_without_locks_nothing_is_kept(pretend, monkeypatch, tmp_path):
    """A marker of another process would look like that of one that crashed."""
    monkeypatch.setattr(selfcheck.FileLock, "acquire", functools.partial(raise_, NotImplementedError("no locks here")))
    called = pretend("cuda")
    assert taken() == "cuda" and not list((tmp_path / "cache").rglob("*.json"))
    once = len(called)
    forget()
    assert taken() == "cuda" and len(called) == 2 * once


def test_a_verdict_with_tf32_is_another(pretend, monkeypatch):
    called = pretend("cuda")
    assert taken() == "cuda"
    once = len(called)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert taken() == "cuda" and len(called) == once  # in a process the first verdict holds
    forget()
    assert taken() == "cuda" and len(called) == 2 * once


def test_another_process_that_hangs_is_not_waited_for_forever(pretend, monkeypatch):
    pretend("cuda")
    monkeypatch.setattr(selfcheck, "LIMIT_S", -59.5)
    with selfcheck._record("cuda", CPU, torch.float32).locked(1) as alone:
        assert alone and taken() == "cpu"
    assert backends.automatic("masked_topk", "cuda").reason == "another process is checking, and does not end"


SCRIPT = """
import os, signal, sys, time
from types import SimpleNamespace
import torch
import hpkernels
from hpkernels import backends, selfcheck

def supports(device, dtype):
    return backends.Availability(device.type == "cpu", "here")

def forward(*arguments):
    with open("calls", "a") as file:
        file.write("x")
    {action}
    return backends.implementation("masked_topk", "reference").forward(*arguments)

correct = backends.implementation("masked_topk", "reference")
backends._modules.pop(("masked_topk", "triton"), None)
module = SimpleNamespace(supports=supports, forward=forward, backward=correct.backward)
backends.register("masked_topk", "cuda", module, automatic="checked")
for op in backends.registered_ops():
    if op != "masked_topk":
        backends._modules.pop((op, "cuda"), None)
print(backends.select("masked_topk", "auto", torch.empty(1)), backends.automatic("masked_topk", "cuda").reason)
"""


@pytest.fixture
def process(tmp_path, repository):
    """``process(action, **variables)``: start a process whose CUDA backend does `action` in its forward."""

    def start(action="pass", **variables):
        script = tmp_path / f"{len(list(tmp_path.glob('*.py')))}.py"
        script.write_text(SCRIPT.format(action=action))
        environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment, text=True, **pipes)

    return start


def output(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out.strip(), error


def test_a_check_that_kills_the_process_is_not_made_again(process, tmp_path):
    assert output(process("os.kill(os.getpid(), signal.SIGKILL)"))[0] == -9
    status, out, _ = output(process("os.kill(os.getpid(), signal.SIGKILL)"))
    assert status == 0 and out.startswith("cpu an earlier check did not end: process ")
    assert "`python -m hpkernels check` tries again" in out
    assert (tmp_path / "calls").read_text() == "x"
    # Asked to, it tries again; this time all is well, and stays so.
    assert output(process(HPKERNELS_SELF_CHECK="again"))[1].startswith("cuda checked on this device")
    assert output(process())[1].startswith("cuda checked on this device")


def test_a_check_that_is_killed_from_outside(process, tmp_path):
    """As by a scheduler, or whoever loses patience."""
    hanging = process("time.sleep(600)")
    try:
        wait_for(tmp_path / "calls", hanging)
    finally:
        hanging.kill()
        hanging.communicate()
    assert output(process())[1].startswith("cpu an earlier check did not end: process ")


def wait_for(file, process):
    for _ in range(1200):
        if file.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{file} did not appear")


def test_of_many_ranks_one_checks(process, tmp_path):
    ranks = [process("time.sleep(0.3)") for _ in range(3)]
    for rank in ranks:
        assert output(rank)[1].startswith("cuda checked on this device")
    calls = len((tmp_path / "calls").read_text())
    assert calls == 3  # of the forwards of one check


def test_a_slow_check_says_so(process, pretend, capsys):
    _, _, error = output(process("time.sleep(1)"))
    begun, ended = error.strip().splitlines()
    assert begun == "hpkernels: checking cuda, float32 on CPU, once (or waiting for a process that does) ..."
    assert ended.startswith("hpkernels: cuda, float32 on CPU passed: checked on this device in ")
    pretend("cuda")
    assert taken() == "cuda" and capsys.readouterr().err == ""  # a quick one does not


@pytest.mark.parametrize("mode", ["trust", "never", "again"])
def test_modes(mode, pretend, monkeypatch):
    called = pretend("cuda", masked_topk_forward=one_row_off)
    assert taken() == "cpu"
    times = called.count("masked_topk_backward") + len(called)
    forget()
    monkeypatch.setenv(selfcheck.VARIABLE, mode)
    monkeypatch.setattr(selfcheck, "_started", time.time())
    pretend("cuda")  # mended
    assert taken() == {"trust": "cuda", "never": "cpu", "again": "cuda"}[mode]
    reason = backends.automatic("masked_topk", "cuda").reason
    assert {"trust": "not checked", "never": "only on request", "again": "checked on"}[mode] in reason
    assert len(called) <= times  # the first backend was not asked again


def test_an_unknown_mode(pretend, monkeypatch):
    pretend("cuda")
    monkeypatch.setenv(selfcheck.VARIABLE, "no")
    with pytest.raises(ValueError, match=r"^HPKERNELS_SELF_CHECK must be one of auto, trust, again, never, got 'no'"):
        taken()
    monkeypatch.setenv(selfcheck.VARIABLE, "")
    assert taken() == "cuda"


def test_a_backend_that_is_named_is_not_checked(pretend):
    called = pretend("cuda")
    hpkernels.masked_topk(torch.eye(3), torch.eye(3), backend="cuda")
    with backends.use_backend("cuda"):
        hpkernels.masked_topk(torch.eye(3), torch.eye(3))
    assert called == ["masked_topk_forward"] * 2


@pytest.mark.parametrize("place", ["a file", "read-only", "no home"])
def test_where_nothing_can_be_kept_the_check_is_made_in_each_process(place, pretend, monkeypatch, tmp_path):
    if place == "a file":
        (tmp_path / "cache").write_text("in the way")
    elif place == "read-only":
        (tmp_path / "cache").mkdir(mode=0o500)
        if os.access(tmp_path / "cache", os.W_OK):  # as root is allowed to
            monkeypatch.setattr("pathlib.Path.mkdir", functools.partial(raise_, PermissionError("read-only")))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr("pathlib.Path.home", functools.partial(raise_, RuntimeError("no home")))
    called = pretend("cuda")
    assert taken() == "cuda"
    once = len(called)
    assert taken() == "cuda" and len(called) == once
    forget()
    assert taken() == "cuda" and len(called) == 2 * once


def raise_(error, *arguments, **options):
    raise error


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ok": 1, "reason": "yes"}', '{"reason": "yes"}', "\x00\xff"])
def test_a_verdict_that_cannot_be_read_is_made_anew(content, pretend, tmp_path):
    called = pretend("cuda")
    assert taken() == "cuda"
    once = len(called)
    (verdict,) = (tmp_path / "cache" / "hpkernels" / "selfcheck").glob("*.json")
    verdict.write_bytes(content.encode("latin-1"))
    forget()
    assert taken() == "cuda" and len(called) == 2 * once


def test_a_verdict_is_of_one_state_of_things(monkeypatch, tmp_path):
    def identity():
        selfcheck._identity.cache_clear()
        return selfcheck._identity(CPU)

    first = identity()
    assert identity() == first
    table = tmp_path / "table.json"
    table.write_text("{}")
    monkeypatch.setenv(_triton.TABLE_VARIABLE, str(table))
    with_table = identity()
    table.write_text('{"a": 1}')
    others = [with_table, identity()]
    for target, name, value in [
        (torch, "__version__", "2.99"),
        (torch.version, "cuda", "99.9"),
        (selfcheck, "_driver", lambda: "999.1"),
        (selfcheck, "_own_files", lambda: [table]),
        (selfcheck, "__version__", "9"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            others.append(identity())
    for variable in ("TRITON_PTXAS_PATH", "HPKERNELS_SM90"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            others.append(identity())
    assert len({str(found) for found in [first, *others]}) == 1 + len(others)
    with monkeypatch.context() as patch:
        gpu = SimpleNamespace(name="GPU", major=9, minor=0, multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        on_gpu = selfcheck._identity(torch.device("cuda", 0))
        gpu.multi_processor_count = 16
        assert on_gpu != selfcheck._identity(torch.device("cuda", 1))
    package = [file.name for file in selfcheck._own_files()]
    assert {"selfcheck.py", "reference.py", "triton.json"} <= set(package)


def test_nothing_of_the_caller_reaches_the_check(pretend):
    seen = []

    def look(correct, *arguments):
        seen.append(
            (
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.empty(()).device.type,
                torch.are_deterministic_algorithms_enabled(),
                torch._C._len_torch_dispatch_stack(),
            )
        )
        return correct(*arguments)

    pretend("cuda", hidden_positives_forward=look)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
            torch._subclasses.FakeTensorMode(),
        ):
            assert backends.select("masked_topk", "auto", SimpleNamespace(device=CPU, dtype=torch.float32)) == "cuda"
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen and set(seen) == {(False, False, "cpu", False, 0)}
    assert torch.equal(torch.get_rng_state(), before)


def test_under_compilation_the_check_is_made_while_tracing(pretend):
    called = pretend("cuda")

    @torch.compile(fullgraph=True, backend="eager")
    def rank(query, pool):
        return hpkernels.masked_topk(query, pool).values

    assert rank(torch.eye(3), torch.eye(3)).tolist() == [[1.0]] * 3
    assert set(called) == {f"{op}_{function}" for op, function in FUNCTIONS}
    of_the_check = len(called) - 1  # the last is of the call itself
    rank(torch.eye(3), torch.eye(3))
    assert len(called) == of_the_check + 2


def test_during_graph_capture(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(selfcheck, "_identity", functools.cache(lambda device: {"device": "GPU"}))
    monkeypatch.setattr(selfcheck, "examine", lambda *of: pytest.fail("checked while a graph was captured"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the op once before capturing a CUDA graph: backend 'cuda' has not"):
        selfcheck.passed("cuda", gpu, torch.float16)
    selfcheck._record("cuda", gpu, torch.float16).write(backends.Availability(True, "checked before"))
    assert selfcheck.passed("cuda", gpu, torch.float16) == (True, "checked before")


def test_a_device_that_computes_no_more_is_said(pretend, monkeypatch):
    pretend("cuda", masked_topk_forward=lambda *arguments: 1 / 0)
    monkeypatch.setattr(selfcheck, "_computes", functools.partial(raise_, RuntimeError("illegal address")))
    with pytest.raises(RuntimeError, match=r"'cuda' left cpu unusable for this process \(ZeroDivisionError: .*start"):
        taken()
    assert taken() == "cpu"


# The problem itself.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_cpu_kernels_pass_in_full_size(dtype, monkeypatch):
    if not _native.LIBRARIES["_C"].ok:
        pytest.skip("this installation has no _C library")
    monkeypatch.undo()
    assert examination.examine("cpu", CPU, dtype).ok


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_simulated_kernels_pass(backend, dtype):
    ok, reason = backends.availability("masked_topk", backend, "cpu", dtype)
    if not ok:
        pytest.skip(reason)
    assert examination.examine(backend, CPU, dtype).ok


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_pass_on_this_gpu(backend, dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and PyTorch sees none on this machine")
    monkeypatch.undo()
    ok, reason = backends.availability("masked_topk", backend, "cuda", dtype)
    if not ok:
        pytest.skip(reason)
    verdict = examination.examine(backend, torch.device("cuda", 0), dtype)
    assert verdict.ok, verdict.reason


def test_the_problem_takes_both_routes_and_leaves_no_doubt(monkeypatch):
    """Lists fit in one of the calls; no weight of the attention is so near its threshold that rounding decides."""
    monkeypatch.undo()
    sizes = examination.Sizes()
    given = examination.problem(torch.float32, sizes)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    results = dict(examination.results("reference", "reference", exact, sizes))
    bits, anchors, group = results["hidden_positives of features"], len(given["features"]), 8 * 24
    mask = hpkernels.PositiveMask(bits, anchors).to_dense()
    across = int(mask.sum()) - sum(int(mask[i : i + group, i : i + group].sum()) for i in range(0, anchors, group))
    assert 0 < across < routes.capacity(anchors) and lists_may_be_faster(anchors, group, 0.02)
    assert not lists_may_be_faster(anchors, group, 1.0)
    logits = (exact["query"] @ exact["key"].mT)[:, :, 1:, 1:].mean(dim=1) / 8
    low, high = (logits.quantile(quantile, dim=2, keepdim=True) for quantile in (0.1, 0.9))
    above = logits.clamp(low, high).softmax(dim=2) * logits.shape[2] - 1  # the threshold
    cells, inside = _window_cells(28, 28, 3, CPU)
    assert above.gather(2, cells.expand(len(above), -1, -1))[:, inside].abs().min() > 1e-6


def test_the_kernels_of_triton_are_compiled_ahead(monkeypatch):
    """All that the calls launch, as for the GPU at hand, before anything is launched."""
    pytest.importorskip("triton")
    monkeypatch.undo()
    gpu, sizes = torch.device("cuda", 0), examination.Sizes()
    monkeypatch.setattr(_triton, "_architecture_at", lambda device: "sm_90")
    compiled = []
    monkeypatch.setattr(examination, "compile_ahead", lambda launches, device: compiled.append((launches, device)))
    examination._compile_ahead(gpu, torch.float16, sizes)
    ((launches, device),) = compiled
    names = {launch.name for launch in launches}
    assert device == gpu and {"masked_topk_top1_fwd_kernel", "hidden_positives_fwd_kernel"} < names
    assert "hidden_positives_between_fwd_kernel" in names
    assert {"sampled_columns_bwd_kernel", "contrastive_rows_bwd_kernel", "contrastive_blocks_bwd_kernel"} < names
    assert {"rows_fwd_kernel", "apply_fwd_kernel", "apply_bwd_kernel"} < names and len(names) > 20
    assert {"tile_list_kernel", "tile_rows_kernel", "tile_columns_kernel", "tile_gradient_kernel"} < names


# The command.


@pytest.fixture
def executable(monkeypatch, tmp_path):
    """``executable(script)``: what runs instead of Python, with the mode as $HPKERNELS_SELF_CHECK."""

    def write(script):
        file = tmp_path / "python"
        file.write_text("#!/bin/sh\n" + textwrap.dedent(script))
        file.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(file))

    return write


VERDICT = """{"ok": true, "reason": "checked"}"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f"echo '{VERDICT}'", (True, "checked")),
        ("kill -9 $$", (False, "its process ended with status -9 and said: nothing")),
        ("echo 'CUDA error: lost' >&2; exit 3", (False, "its process ended with status 3 and said: CUDA error: lost")),
        ("[ $4 = --settle ] || exec sleep 600", (False, "its process did not end within 1 s")),
    ],
)
def test_a_process_of_the_command(script, expected, executable, tmp_path):
    """Where the first gives no verdict, a second makes one of its marker, and checks nothing."""
    executable(f"echo $4 >> {tmp_path}/tasks; {script}")
    assert program._in_a_process("cuda", "cuda:0", "float16", 1.0) == expected
    assert (tmp_path / "tasks").read_text().split() == (["--one"] if expected[0] else ["--one", "--settle"])


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(program, "DTYPES", (torch.float32,))
    monkeypatch.setattr(program, "_gpus", list)
    verdicts = {"cpu": backends.Availability(True, "checked on this device")}
    monkeypatch.setattr(program, "_in_a_process", lambda backend, *of: verdicts[backend])
    assert program.main(["check"]) == 0
    expected = "cpu on cpu float32 right checked on this device 1 of 1 are right"
    assert " ".join(capsys.readouterr().out.split()) == expected
    for arguments in (["check", "--json"], ["--json", "check"]):
        assert program.main(arguments) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert told == {"backend": "cpu", "device": "cpu", "dtype": "float32"} | verdicts["cpu"]._asdict()
    verdicts["cpu"] = backends.Availability(False, "loss: 1 of 36 rows")
    assert program.main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_backend_that_lacks_an_op_is_checked(pretend, monkeypatch):
    """As the CUDA backend, of which `contrastive` has no kernels."""
    pretend("cuda")
    del backends._modules["contrastive", "cuda"]
    assert program._checkable("cuda", "cpu", torch.float32) == ("cuda", CPU, torch.float32)
    assert {entry["backend"] for entry in program.self_checks("cpu")} == {"cuda", "cpu"}


def test_a_wrong_mode_is_a_sentence(monkeypatch):
    monkeypatch.setenv(selfcheck.VARIABLE, "no")
    with pytest.raises(SystemExit, match=r"^HPKERNELS_SELF_CHECK must be one of auto, .* got 'no'$"):
        program.main([])


def test_the_command_in_processes_of_its_own(monkeypatch, capsys):
    if not _native.LIBRARIES["_C"].ok:
        pytest.skip("this installation has no _C library")
    monkeypatch.setattr(program, "DTYPES", (torch.float32,))
    assert program.main(["check"]) == 0
    assert "right    checked on this device in " in capsys.readouterr().out


def test_the_report_shows_verdicts(pretend, monkeypatch):
    pretend("cuda")
    pretend("triton", masked_topk_forward=one_row_off)
    monkeypatch.setattr(program, "_gpus", lambda: ["cpu"])
    monkeypatch.setattr(program, "DTYPES", (torch.float32,))
    told = program.report()
    assert {row["float32"] for row in told["auto"]} == {"cuda (not checked yet)"}
    text = "\n".join(program.lines(told))
    assert re.search(r"^masked_topk +cpu +cuda\*$", text, re.MULTILINE) and "* if its self-check passes" in text
    for backend in ("cuda", "triton"):
        selfcheck.check(backend, CPU, torch.float32)
    told = program.report()
    assert {row["float32"] for row in told["auto"]} == {"cuda"}
    text = "\n".join(program.lines(told))
    assert "cuda       on cpu     float32    right    checked on" in text
    assert "triton     on cpu     float32    FAILED   masked_topk of features, values: 1 of 36 rows" in text
