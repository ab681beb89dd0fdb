from __future__ import annotations

import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import hpkernels
from hpkernels import BackendUnavailableError, _native, backends, use_backend
from hpkernels.__main__ import report

OP = "masked_topk"
CPU = torch.empty(1)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def register(monkeypatch):
    """``register(backend, dtypes, result)``: enter a backend of masked_topk that takes `dtypes` on the CPU only."""
    # Without those that may run on the CPU, interpreted or emulated.
    own = ((OP, "cuda"), (OP, "triton"))
    others = {key: module for key, module in backends._modules.items() if key not in own}
    monkeypatch.setattr(backends, "_modules", others)
    monkeypatch.setattr(backends, "_automatic", dict(backends._automatic))

    def enter(backend, dtypes=(torch.float32,), result=7.0):
        def supports(device, dtype):
            if device.type != "cpu":
                return backends.Availability(False, "it runs on the CPU only")
            return backends.Availability(dtype in dtypes, f"it takes {dtypes}")

        def forward(query, pool, k, mask, query_group, pool_group):
            shape = (query.shape[0], k)
            return torch.full(shape, result, dtype=torch.float32), torch.zeros(shape, dtype=torch.int64)

        backends.register(OP, backend, SimpleNamespace(supports=supports, forward=forward))

    return enter


def test_every_op_has_a_reference():
    assert backends.registered_ops() == sorted(
        ["masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation", "contrastive"]
    )
    for op in backends.registered_ops():
        for device_type in ("cpu", "cuda"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                assert backends.availability(op, "reference", device_type, dtype).ok


def test_an_unavailable_backend_says_why():
    for op in backends.registered_ops():
        for backend in backends.BACKENDS:
            ok, reason = backends.availability(op, backend)
            assert isinstance(ok, bool) and len(reason) > 5
    ok, reason = backends.availability(OP, "no such backend")
    assert not ok and OP in reason and reason.endswith("use backend='auto'")


def test_auto_prefers_in_the_stated_order(register):
    assert backends.BACKENDS == ("cuda", "triton", "cpu", "reference")
    for backend in ("cpu", "triton", "cuda"):
        register(backend)
        assert backends.select(OP, "auto", CPU) == backend
    # A call that they do not take goes on to the next that does.
    assert backends.select(OP, "auto", CPU.double()) == "reference"
    assert backends.select(OP, "auto", CPU.to("meta")) == "reference"


def test_the_selected_backend_runs(register):
    register("cpu", result=7.0)
    query, pool = torch.eye(2), torch.eye(2)
    assert hpkernels.masked_topk(query, pool).values.tolist() == [[7.0], [7.0]]
    assert hpkernels.masked_topk(query, pool, backend="cpu").values.tolist() == [[7.0], [7.0]]
    assert hpkernels.masked_topk(query, pool, backend="reference").values.tolist() == [[1.0], [1.0]]
    assert hpkernels.masked_topk(query.double(), pool.double()).values.tolist() == [[1.0], [1.0]]


def test_the_call_outranks_the_context_which_outranks_the_environment(register, monkeypatch):
    for backend in ("cpu", "triton", "cuda"):
        register(backend)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    assert backends.select(OP, "auto", CPU) == "triton"
    with use_backend("cpu"):
        assert backends.select(OP, "auto", CPU) == "cpu"
        assert backends.select(OP, "reference", CPU) == "reference"
        with use_backend("cuda"):
            assert backends.select(OP, "auto", CPU) == "cuda"
        assert backends.select(OP, "auto", CPU) == "cpu"
    assert backends.select(OP, "auto", CPU) == "triton"
    for unset in ("auto", ""):
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, unset)
        assert backends.select(OP, "auto", CPU) == "cuda"


def test_use_backend_ends_with_the_block_even_after_an_error(register):
    register("cpu")
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.select(OP, "auto", CPU) == "cpu"


def test_use_backend_does_not_reach_other_threads(register):
    register("cpu")
    found = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(backends.select(OP, "auto", CPU)))
        thread.start()
        thread.join()
    assert found == ["cpu"]


def test_a_request_that_cannot_be_met_raises(register, monkeypatch):
    register("cpu", dtypes=(torch.float32,))
    pattern = r"^masked_topk: backend 'cpu' is not available: it takes"
    with pytest.raises(BackendUnavailableError, match=pattern):
        backends.select(OP, "cpu", CPU.double())
    with pytest.raises(BackendUnavailableError, match=pattern), use_backend("cpu"):
        backends.select(OP, "auto", CPU.double())
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(BackendUnavailableError, match=pattern):
        backends.select(OP, "auto", CPU.double())
    assert issubclass(BackendUnavailableError, RuntimeError)


def test_an_op_that_nothing_runs_raises(register, monkeypatch):
    monkeypatch.setattr(backends, "_modules", {})
    register("cpu")
    with pytest.raises(BackendUnavailableError, match=r"^masked_topk: no backend takes torch.float64 tensors on cpu"):
        backends.select(OP, "auto", CPU.double())


def test_unknown_names_say_where_they_came_from(monkeypatch):
    with pytest.raises(ValueError, match=r"^masked_topk: `backend` must be one of auto, cuda, .* got 'gpu'"):
        backends.select(OP, "gpu", CPU)
    with (
        pytest.raises(ValueError, match=r"^use_backend: `backend` must be one of auto, .* got 'gpu'"),
        use_backend("gpu"),
    ):
        pass
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match=r"^HPKERNELS_BACKEND must be one of auto, .* got 'gpu'"):
        backends.select(OP, "auto", CPU)
    assert backends.select(OP, "reference", CPU) == "reference"  # a call's own choice does not read it


def test_the_context_is_honoured_under_compilation():
    @torch.compile(fullgraph=True, backend="eager")
    def run(query, pool):
        return hpkernels.masked_topk(query, pool).values

    with use_backend("reference"):
        assert run(torch.eye(3), torch.eye(3)).tolist() == [[1.0]] * 3


def test_auto_passes_over_a_backend_that_is_on_request_only(monkeypatch):
    tensor = torch.ones(1)
    assert backends.select(OP, "auto", tensor) == "cpu"
    monkeypatch.setitem(backends._automatic, (OP, "cpu"), "on request")
    assert backends.select(OP, "auto", tensor) == "reference"
    assert backends.select(OP, "cpu", tensor) == "cpu"


@pytest.fixture
def no_library(monkeypatch):
    """As after an installation without a C++ compiler, and before the first call of an op."""
    missing = backends.Availability(False, "this installation has no _C library; reinstall with a compiler")
    monkeypatch.setattr(_native, "LIBRARIES", _native.LIBRARIES | {"_C": missing})
    backends._warned.clear()
    yield
    backends._warned.clear()


@pytest.mark.parametrize("library", ["_C", "_C_cuda"])
def test_the_checkout_before_the_installed_copy_is_named(library, tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_file", lambda library: None)
    monkeypatch.setattr(_native, "EMULATED", False)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    load = {"_C": _native._load_cpu, "_C_cuda": _native._load_cuda}[library]
    assert f"this installation has no {library} library" in load().reason
    installed = tmp_path / "hpkernels"
    installed.mkdir()
    (installed / f"{library}.abi3.so").touch()
    ok, reason = load()
    assert not ok and f"has no {library} library; the copy in {installed} has one" in reason


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "hpkernels" in str(warning.message)]


def test_without_the_library_the_first_call_says_so_once(no_library):
    def rank():
        hpkernels.masked_topk(torch.eye(3), torch.eye(3))

    def rank_on_reference():
        hpkernels.masked_topk(torch.eye(3), torch.eye(3), backend="reference")
        with use_backend("reference"):
            rank()
        backends.select(OP, "auto", CPU.to("meta"))
        report()  # says it in its own way

    assert warnings_of(rank_on_reference) == []  # asked for
    (said,) = warnings_of(torch.compile(rank, fullgraph=True, backend="eager"))
    assert "reference" in said and "has no _C library; reinstall with a compiler" in said and "\n" not in said
    assert warnings_of(rank) == []
    assert warnings_of(lambda: hpkernels.hidden_positives(torch.eye(3), torch.zeros(3))) == []


def test_with_the_library_nothing_is_said(register):
    if not _native.LIBRARIES["_C"].ok:
        pytest.skip("this installation has no _C library")
    backends._warned.clear()
    register("cpu", dtypes=(torch.float32,))
    assert warnings_of(lambda: backends.select(OP, "auto", CPU.double())) == []
