"""What single steps of gpu-check do, on a CPU: proofs, exercises, verification, timed functions, builds."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Case
from benchmarks.gpu import build, goldens, kernels, prove, tasks
from benchmarks.providers import provider
from hpkernels import _native, backends, examination
from hpkernels.launches import Sizes
from hpkernels.ops import _triton

TINY = Sizes(images=2, grid=(2, 3), dim=7, feature_dim=5, pool_size=9, heads=1, head_dim=5, large_grid=(3, 3))


def test_verification_tells_right_from_wrong(monkeypatch):
    """On the interpreter or the emulator where there is one, on which a tiny case takes seconds."""
    tiny = Case("hidden_positives", "forward", images=2, grid=(2, 3))
    monkeypatch.setattr(tasks, "cases", lambda *_, **__: [tiny])
    lines = []
    assert tasks.verify_op("cpu", "reference", "hidden_positives", lines.append)
    assert lines == ["hidden_positives forward N=12 reference HPKERNELS_SM90=0: right"] * 3
    wrong = replace(provider(tiny, "reference"), run=lambda inputs: {"bits": torch.zeros(12, 1, dtype=torch.int32) - 1})
    monkeypatch.setattr(tasks, "provider", lambda *_: wrong)
    assert not tasks.verify_op("cpu", "reference", "hidden_positives", lines.append)
    assert "12 of 12 rows" in lines[-1]
    monkeypatch.setattr(tasks, "cases", lambda *_, **__: [])
    assert not tasks.verify_op("cpu", "reference", "hidden_positives", lines.append)  # nothing is not all
    assert lines[-1] == "reference runs no call of hidden_positives here"


@pytest.mark.skipif(not _triton.INTERPRETED, reason="kernels are not interpreted here")
def test_exercise_runs_triton_kernels(monkeypatch):
    monkeypatch.setattr(tasks, "SMALL", TINY)
    monkeypatch.setattr(tasks.backends, "registered_ops", lambda: ["hidden_positives"])
    # Two sizes of features, two dtypes, symmetric or not, and two relations between anchors and keys.
    assert tasks.exercise("cpu", "triton") == 16


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
    monkeypatch.setattr(tasks, "SMALL", TINY)
    schemas = (repository / "csrc" / "bindings_cuda.cpp").read_text()
    with Called() as called:
        tasks.exercise("cpu", "cuda")
    assert called.names == set(re.findall(r'm\.def\("(\w+)\(', schemas))


SIZES = examination.Sizes(images=3, grid=(3, 4), dim=24, feature_dim=40, pool_size=32, attention=(1, 4, 5, 2, 8))
CPU = torch.device("cpu")
PROVEN = {
    "threads": lambda backend: prove.threads(backend, CPU, SIZES),
    "goldens": lambda backend: goldens.goldens(backend, CPU, largest=70_000),
    "repeats": lambda backend: prove.repeats(backend, CPU, TINY),
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
        ("goldens", "multi_positive_contrastive", "backward"),
        ("goldens", "local_propagation", "apply_forward"),
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
    assert not prove.prove("cuda", CPU, report=lines.append)
    assert lines == ["cuda one: RuntimeError: illegal address", "cuda two: right", "cuda three: a row; a bit"]
    assert prove.prove("cuda", CPU, ["two"], lines.append) and lines[3:] == ["cuda two: right"]


@pytest.mark.parametrize("proof", ["threads", "goldens", "sampled_rows", "graphs", "engines", "uneven"])
def test_proofs_of_the_emulated_kernels(proof):
    if not _native.EMULATED:
        pytest.skip("needs the emulated CUDA kernels, which `make test` builds")
    assert PROVEN[proof]("cuda") == []


def test_repeats_that_differ(change):
    counter = itertools.count()
    change("hidden_positives", "forward", lambda bits: bits + next(counter))
    found = prove.repeats("cuda", CPU, TINY)
    assert found and all(wrong.endswith("other bits") for wrong in found)
    assert any(wrong.startswith("hidden_positives, forward, D=5") for wrong in found)


def test_no_golden_vectors_are_no_proof(tmp_path):
    assert goldens.goldens("reference", CPU, tmp_path) == [f"{tmp_path} has no golden vectors"]


def test_engines_follow_the_variable(monkeypatch):
    monkeypatch.setattr(_native, "EMULATED", True)
    assert tasks.engines("cuda", "cpu") == ("0", "1") and tasks.engines("triton", "cpu") == ("0",)
    monkeypatch.setenv("HPKERNELS_SM90", "0")
    assert tasks.engines("cuda", "cpu") == ("0",)


def test_functions_are_timed():
    """Those of the reference, on a CPU; rates are of the products that are told."""
    rows = list(kernels.rows_of("reference", "float32", "cpu", {}, TINY))
    assert len(rows) == kernels.CALLS and all(row.median_ms for row in rows)
    rates = {row.call: row.tflops * row.median_ms * 1e9 for row in rows if row.tflops}
    n, d = TINY.anchors, TINY.dim
    assert rates == pytest.approx(
        {
            "top-1 D=5": 2 * n * TINY.pool_size * 5,
            "top-1 D=7": 2 * n * TINY.pool_size * 7,
            "discovery D=5": n * n * 5,
            "discovery D=7": n * n * 7,
            "forward rate=1": 2 * n * n * d,
            "backward rate=1": 4 * n * n * d,
        },
        rel=0.01,
    )


def test_a_function_that_fails_keeps_others_from_nothing(change, capsys):
    def fail(results):
        raise RuntimeError("no such kernel")

    change("hidden_positives", "forward", fail)
    calls = [(row.call, row.median_ms is None) for row in kernels.rows_of("cuda", "float32", "cpu", {}, TINY)]
    assert ("discovery D=5", True) in calls and ("apply backward", False) in calls
    assert "no such kernel" in capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path):
    """With sources and two libraries, the latter as `build` leaves them."""
    (tmp_path / "csrc" / "op").mkdir(parents=True)
    (tmp_path / "csrc" / "op" / "op.cu").write_text("kernel")
    (tmp_path / "hpkernels").mkdir()
    (tmp_path / "hpkernels" / "_C.so").write_bytes(b"library")
    (tmp_path / "hpkernels" / "_C_cuda.so").write_bytes(b"\0hpkernels architectures: 8.0 9.0a by nvcc 13.0.88\0")
    (tmp_path / "build").mkdir()
    (tmp_path / build.STAMP).write_text(json.dumps(build.identity(tmp_path)))
    return tmp_path


def test_libraries_of_the_same_sources_are_kept(checkout, tmp_path_factory):
    assert build.is_current(checkout, (9, 0)) and build.is_current(checkout, None)
    assert not build.is_current(checkout, (10, 0))  # no code for that
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(checkout, copy, copy_function=shutil.copyfile)  # with other times
    assert build.is_current(copy, (9, 0))


@pytest.mark.parametrize("changed", ["csrc/op/op.cu", "hpkernels/_C.so"])
def test_libraries_of_other_sources_are_built_again(changed, checkout):
    (checkout / changed).write_text("other")
    assert not build.is_current(checkout, (9, 0))


def test_libraries_without_wgmma_are_built_again_for_hopper(checkout):
    (checkout / "hpkernels" / "_C_cuda.so").write_bytes(b"\0hpkernels architectures: 9.0a without wgmma by nvcc 13.0\0")
    (checkout / build.STAMP).write_text(json.dumps(build.identity(checkout)))
    assert not build.is_current(checkout, (9, 0))


def test_what_cannot_be_built_leaves_no_stamp(checkout):
    (checkout / build.STAMP).unlink()
    (checkout / "setup.py").write_text("exit(1)")
    assert not build.build(checkout, None)
    assert not (checkout / build.STAMP).exists() and not list((checkout / "hpkernels").iterdir())
    (checkout / "setup.py").write_text(
        "import pathlib; [pathlib.Path(f'hpkernels/{name}.so').touch() for name in ('_C', '_C_cuda')]"
    )
    assert build.build(checkout, None) and build.is_current(checkout, None)
