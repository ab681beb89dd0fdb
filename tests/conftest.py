from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same few examples on every run: a failure in continuous integration reproduces anywhere.
settings.register_profile("hpkernels", deadline=None, derandomize=True, database=None, max_examples=6)
settings.register_profile("deep", settings.get_profile("hpkernels"), max_examples=12)
settings.load_profile("deep" if os.environ.get("HPKERNELS_DEEP_TESTS") else "hpkernels")

REPOSITORY = Path(__file__).resolve().parent.parent


def _emulate_cuda(library: Path, sources: Path) -> str:
    """Have the CUDA kernels run on the CPU; returns "" or why they do not. A choice that was made before stays."""
    variable = "HPKERNELS_CUDA_EMULATED"
    if torch.cuda.is_available():
        return "the CUDA kernels are tested on the GPU"
    if variable in os.environ:
        return "" if os.environ[variable] else f"{variable} is empty"
    if not library.exists():
        return f"there is no {library.name}, which `make test` builds where CUDA's headers are"
    newest = max(sources.rglob("*.*"), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > library.stat().st_mtime:
        return f"{library.name} is older than {newest.name}; `make test` builds it where CUDA's headers are"
    os.environ[variable] = str(library)
    return ""


def _hasten_interpreter() -> None:
    """Have Triton's interpreter do in a third of its time what it does, by what is private to Triton.

    It replaces its language once a kernel, not at every call of a function in it as well; does not compute whether
    integers overflow, which it does not look at but in its debug mode; and finds the NumPy type of a type once. Where
    Triton has none of this, the tests are slower and no more.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        replace, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
        is_builtin, builder = tl.core.is_builtin, interpreter.interpreter_builder
        unchecked = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    except (ImportError, AttributeError, TypeError):
        return

    @functools.cache
    def languages(function: FunctionType) -> list[ModuleType]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def replace_once(function: FunctionType) -> object:
        if any(is_builtin(language.load) for language in languages(function)):
            return replace(function)
        return SimpleNamespace(restore=lambda: None)

    numpy_type_of_number = functools.cache(numpy_type)

    def numpy_type_once(of: tl.dtype) -> object:
        scalar = of.scalar  # the types of blocks and pointers have no hash
        return numpy_type(scalar) if scalar.is_ptr() else numpy_type_of_number(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype, builder.options = replace_once, numpy_type_once, unchecked


# Before any kernel is imported: without a GPU the Triton kernels are tested in Triton's interpreter, the CUDA kernels
# on an emulator.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    _hasten_interpreter()
NOT_EMULATED = _emulate_cuda(REPOSITORY / "build" / "emulated" / "_C_cuda_emulated.so", REPOSITORY / "csrc")

from hpkernels import _native  # noqa: E402
from hpkernels.testing.cases import Case  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what `-m` does
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as deep what interprets or emulates kernels beyond one case of each kind, and what of that is repeated."""
    for item in items:
        if hasattr(item, "callspec"):
            of = item.path.stem, item.originalname, item.callspec.params
            if _is_deep(*of):
                item.add_marker(pytest.mark.deep)
                if _is_repeated(*of):
                    item.add_marker(pytest.mark.repeated)


_WITH_PRODUCTS = ("test_masked_topk", "test_hidden_positives", "test_multi_positive_contrastive")
_IN_HALF_PRECISION = ("test_matches_reference", "test_gradients", "test_small_coefficients_keep_their_digits")
_LARGE_GOLDENS = ("joint_medium", "ghp_joint_medium", "lhp_14")


def _is_deep(module: str, test: str, parameters: dict[str, object]) -> bool:
    """Whether a simulated test repeats what another checks.

    What compilers see of an op is the same for every backend; a simulated kernel runs its programs in a fixed order.
    Of dtypes, bfloat16 runs the code of float16, and that differs from the code of float32 in the matrix products,
    whose values and gradients are compared. `ghp_contrastive` has no kernels of its own. The large golden files are
    many tiles of the same.
    """
    case, engine = parameters.get("case"), parameters.get("engine")
    if not (isinstance(case, Case) and case.backend in ("triton", "cuda") and case.device == "cpu"):
        return False
    if engine == "1":  # which takes 16-bit numbers alone
        return case.dtype != torch.float16
    if test in ("test_compile", "test_opcheck", "test_deterministic") or parameters.get("name") in _LARGE_GOLDENS:
        return True
    if module == "test_ghp_contrastive" and test not in ("test_matches_reference", "test_golden"):
        return True
    compared = module in _WITH_PRODUCTS and test in _IN_HALF_PRECISION
    return case.dtype == torch.bfloat16 or (case.dtype == torch.float16 and not compared)


def _is_repeated(module: str, test: str, parameters: dict[str, object]) -> bool:
    """Whether a deep test is left to `make test-all`, because other deep tests run the same code.

    `ghp_contrastive` runs the kernels of the ops that it is made of, and bfloat16 the code of float16. A simulated
    kernel is as deterministic, and looks the same to a compiler, in every dtype.
    """
    case = parameters["case"]
    assert isinstance(case, Case)
    if module == "test_ghp_contrastive" or (case.dtype == torch.bfloat16 and test != "test_matches_reference"):
        return True
    return test in ("test_deterministic", "test_opcheck") and case.dtype != torch.float32


@pytest.fixture(scope="session")
def emulate_cuda() -> Callable[[Path, Path], str]:
    """``emulate_cuda(library, sources)``: see above."""
    return _emulate_cuda


@pytest.fixture(scope="session")
def not_emulated() -> str:
    """Why the CUDA kernels do not run on the emulator, or ""."""
    return NOT_EMULATED


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Callable[[str], SimpleNamespace]:
    """``golden(name)``: the arrays of tests/golden/<name>.npz as tensors, and its `meta` as a dict."""

    def load(name: str) -> SimpleNamespace:
        with np.load(REPOSITORY / "tests" / "golden" / f"{name}.npz") as arrays:
            values = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "meta"}
            meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        return SimpleNamespace(**values, meta=meta)

    return load


@pytest.fixture(autouse=True)
def compile_afresh() -> Iterator[None]:
    """Forget what a test compiled: Dynamo limits the recompilations of a function over the whole process."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def without_gpu() -> Iterator[None]:
    """As on a machine without a GPU, in this process and in those that it starts: programs choose the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def cuda_graph() -> Callable[..., None]:
    """``cuda_graph(function, *inputs)``: a captured call of `function` gives, replayed, what a call gives.

    For its inputs as they are, and after their rows have been reversed in place.
    """
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device, and PyTorch sees none on this machine")

    def check(function: Callable[[], object], *inputs: torch.Tensor) -> None:
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        for change in (False, True):
            for value in inputs if change else ():
                value.copy_(value.flip(0))
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(result, function(), rtol=0, atol=0)

    return check


@pytest.fixture
def hopper(monkeypatch):
    """Have the engine for sm_90a take what it can, on an emulator that was built with it."""
    if _native.EMULATED:
        compiled = _native.architectures(Path(os.environ[_native.EMULATED_VARIABLE]))
        if "without wgmma" in compiled:
            pytest.skip(f"the CUDA kernels are {compiled}")
    monkeypatch.setenv("HPKERNELS_SM90", "1")


@pytest.fixture(params=["0", "1"], ids=["sm_80", "sm_90a"])
def engine(request, monkeypatch):
    """Either engine; on a GPU of another kind than sm_90 both are that of sm_80."""
    if request.param == "1":
        request.getfixturevalue("hopper")
    monkeypatch.setenv("HPKERNELS_SM90", request.param)
    return request.param
