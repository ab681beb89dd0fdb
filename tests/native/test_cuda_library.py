"""What can be tested of the CUDA library without a GPU: its arithmetic on the CPU, loading, and when it is used."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hpkernels import BackendUnavailableError, _native, backends
from hpkernels.backends import Availability
from hpkernels.ops import _triton
from hpkernels.ops.local_propagation import reference

# Every task, or every run, of the launch, in descending order: none may depend on another.
HOST_LOOP = """
#include "local_propagation/stencil.h"
using namespace hpk;
template <bool transposed>
static void by_runs(const float* input, const float* weights, const StencilShape& shape, float* output) {
  const int height = shape.height, width = shape.width, patches = height * width;
  alignas(16) float zeros[4 * kRunPatches] = {};
  for (int64_t image = shape.batch; image-- > 0;) {
    for (int index = patches / kRunPatches; index-- > 0;) {
      const StencilRun<transposed> run(weights + image * 9 * patches, height, width, index);
      auto rows = run.rows(input + image * shape.dim * patches, zeros + kRunPatches);
      for (int64_t plane = 0; plane < shape.dim; ++plane, rows.next_plane()) {
        float sums[kRunPatches];
        run.sum(rows, sums);
        run.store(sums, output + (image * shape.dim + plane) * patches);
      }
    }
  }
}
template <bool transposed>
static void by_tasks(const float* input, const float* weights, const StencilShape& shape, float* output) {
  for (int64_t task = stencil_tasks(shape); task-- > 0;) stencil_task<transposed>(input, weights, shape, task, output);
}
#define APPLY(name, function)                                                                               \\
  extern "C" void name(const float* input, const float* weights, const int64_t* sizes, float* output) {     \\
    function(input, weights, {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}, output);                   \\
  }
APPLY(apply_forward_by_tasks, by_tasks<false>)
APPLY(apply_backward_by_tasks, by_tasks<true>)
APPLY(apply_forward_by_runs, by_runs<false>)
APPLY(apply_backward_by_runs, by_runs<true>)
"""


each_op = pytest.mark.parametrize("op", [op for op, backend in backends._modules if backend == "cuda"])


@pytest.fixture(scope="module")
def stencil(repository, tmp_path_factory):
    """The body of the CUDA kernels, compiled for the CPU."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"running the kernels' body on the CPU needs {compiler[0]}, which is not on PATH")
    folder = tmp_path_factory.mktemp("stencil")
    source, library = folder / "stencil.cpp", folder / "stencil.so"
    source.write_text(HOST_LOOP)
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{repository / 'csrc'}", source, "-o", library]
    subprocess.run([*compiler, *options], check=True)
    return ctypes.CDLL(str(library))


def outside_of(height, width, window):
    """(window², H, W): the cells that lie outside the image."""
    radius = window // 2
    offset = torch.arange(-radius, radius + 1)
    v = torch.arange(height)[None, None, :, None] + offset[:, None, None, None]
    u = torch.arange(width)[None, None, None, :] + offset[None, :, None, None]
    return ((v < 0) | (v >= height) | (u < 0) | (u >= width)).flatten(0, 1)


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 4, 5),
    (2, 8, 1, 7),
    (3, 17, 6, 2),
    (1, 9, 3, 3),
    (2, 3, 3, 8),
    (1, 2, 1, 4),
    (1, 5, 5, 12),
]
WAYS = [("tasks", 1), ("tasks", 3), ("tasks", 5), ("tasks", 9), ("runs", 3)]


@pytest.mark.parametrize(
    ("shape", "how", "window"),
    # Runs are of four patches.
    [(shape, *way) for shape in SHAPES for way in WAYS if way[0] != "runs" or shape[3] % 4 == 0],
)
@pytest.mark.parametrize("direction", ["apply_forward", "apply_backward"])
def test_body_of_the_kernels(stencil, direction, shape, how, window, generator):
    batch, _, height, width = shape
    values = torch.randn(shape, generator=generator)
    weights = torch.rand(batch, window * window, height, width, generator=generator)
    outside = outside_of(height, width, window)
    expected = getattr(reference, direction)(values.double(), weights.double().masked_fill(outside, 0))
    weights.masked_fill_(outside, torch.nan)  # read once, it would show
    result = torch.full(shape, torch.nan)
    sizes = (ctypes.c_int64 * 5)(*shape, window)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, weights, result)]
    getattr(stencil, f"{direction}_by_{how}")(*pointers[:2], sizes, pointers[2])
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5 * window)


def test_the_kernels_run_on_the_emulator(not_emulated):
    """Without a GPU the other tests of "cuda" are those of the emulator."""
    if not_emulated:
        pytest.skip(not_emulated)
    assert _native.LIBRARIES["_C_cuda"] == (True, "emulated on the CPU: slow, for tests")
    for op in backends.registered_ops():
        if (op, "cuda") in backends._modules:
            assert backends.availability(op, "cuda", "cpu").ok
            ok, reason = backends.availability(op, "cuda", "cuda")
            assert not ok and "HPKERNELS_CUDA_EMULATED is set" in reason


@pytest.mark.parametrize(
    ("gpu", "chosen", "built", "reason"),
    [
        (True, None, "now", "tested on the GPU"),
        (False, "", "now", "HPKERNELS_CUDA_EMULATED is empty"),
        (False, None, None, "no library.so, which `make test` builds"),
        (False, None, "before", "library.so is older than kernel.cu"),
        (False, None, "now", ""),
        (False, "another.so", None, ""),
    ],
)
def test_choice_of_the_emulator(emulate_cuda, gpu, chosen, built, reason, monkeypatch, tmp_path):
    sources, library = tmp_path / "csrc", tmp_path / "library.so"
    sources.mkdir()
    for path, time in ((sources / "kernel.cu", 100), (library, {None: None, "before": 99, "now": 101}[built])):
        if time is not None:
            path.touch()
            os.utime(path, (time, time))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(os, "environ", {} if chosen is None else {"HPKERNELS_CUDA_EMULATED": chosen})
    found = emulate_cuda(library, sources)
    assert reason in found and bool(found) == bool(reason)
    if not found:
        assert os.environ["HPKERNELS_CUDA_EMULATED"] == (chosen or str(library))


def test_the_library_loads_without_a_gpu(repository):
    """No crash, the kernels of the sources are registered, and they refuse tensors that are not on a GPU."""
    file = _native._file("_C_cuda")
    if file is None or torch.version.cuda is None:
        pytest.skip("needs _C_cuda" if file is None else "needs a PyTorch with CUDA")
    kernels = re.findall(r'm\.def\("(\w+)\(', (repository / "csrc" / "bindings_cuda.cpp").read_text())
    assert "hidden_positives" in kernels
    script = f"""
import torch
torch.ops.load_library({str(file)!r})
missing = [name for name in {kernels} if not hasattr(torch.ops.hpkernels_cuda, name)]
assert not missing, missing
value = torch.zeros(1, 1, 2, 2)
for kernel in ("local_propagation_apply", "local_propagation_apply_backward"):
    try:
        getattr(torch.ops.hpkernels_cuda, kernel)(value, value, value)
    except NotImplementedError as error:
        assert "CPU" in str(error)
    else:
        raise AssertionError("ran on the CPU")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("cuda", "devices", "reason"),
    [
        (None, 1, "PyTorch is built without CUDA and cannot load _C_cuda.so, compiled for 8.0 10.0+PTX"),
        ("13.0", 0, "PyTorch sees no CUDA device to use _C_cuda.so, compiled for 8.0 10.0+PTX"),
    ],
)
def test_it_is_not_loaded_where_it_is_of_no_use(cuda, devices, reason, monkeypatch, tmp_path):
    file = tmp_path / "_C_cuda.so"
    file.write_bytes(b"\x7fELF\0hpkernels architectures: 8.0 10.0+PTX\0rest")
    monkeypatch.setattr(_native, "EMULATED", False)
    monkeypatch.setattr(_native, "_file", lambda library: file)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.ops, "load_library", lambda file: pytest.fail("loaded"))
    assert _native._load_cuda() == (False, reason)


def test_a_library_that_does_not_load_is_no_crash(monkeypatch, tmp_path):
    file = tmp_path / "_C_cuda.so"
    file.write_bytes(b"no library")
    monkeypatch.setattr(_native, "EMULATED", False)
    monkeypatch.setattr(_native, "_file", lambda library: file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ok, reason = _native._load_cuda()
    assert not ok and reason.startswith("_C_cuda.so does not load: ")


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """``pretend_gpu(*capabilities, compiled=...)``: as if such a library were loaded and there were these GPUs."""
    file = tmp_path / "_C_cuda.so"
    caches = _native._capability, _native._compiled_for
    for function in caches:
        function.cache_clear()

    def pretend(*capabilities, compiled="8.0 9.0a 10.0+PTX by nvcc 13.0.88", driver=(13, 0)):
        file.write_bytes(f"hpkernels architectures: {compiled}".encode() + b"\0rest")
        libraries = _native.LIBRARIES | {"_C_cuda": Availability(True, "pretended")}
        monkeypatch.setattr(_native, "_file", lambda library: file)
        monkeypatch.setattr(_native, "LIBRARIES", libraries)
        monkeypatch.setattr(_native, "EMULATED", False)
        monkeypatch.setattr(_native, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])

    yield pretend
    for function in caches:
        function.cache_clear()


def test_supported_gpus(pretend_gpu):
    pretend_gpu((9, 0), (8, 0))
    assert backends.availability("local_propagation", "cuda", "cuda") == (True, "pretended")
    ok, reason = backends.availability("local_propagation", "cuda", "cpu")
    assert not ok and "on a CUDA device, not on cpu" in reason


def test_gpus_that_are_too_old(pretend_gpu):
    """Each GPU for itself: an old one beside it takes nothing from a new one."""
    pretend_gpu((9, 0), (7, 5))
    assert backends.availability("local_propagation", "cuda", "cuda:0").ok
    ok, reason = backends.availability("local_propagation", "cuda", "cuda:1")
    assert not ok and reason == "the CUDA kernels need compute capability 8.0, cuda:1 has 7.5"


def test_gpus_that_nothing_was_compiled_for(pretend_gpu):
    pretend_gpu((8, 0), (12, 0), compiled="8.0 9.0a by nvcc 13.0.88")
    assert backends.availability("local_propagation", "cuda", "cuda:0").ok
    ok, reason = backends.availability("local_propagation", "cuda", "cuda:1")
    assert not ok and reason == (
        "the CUDA kernels are compiled for 8.0 9.0a by nvcc 13.0.88, cuda:1 has 12.0; "
        "reinstall with TORCH_CUDA_ARCH_LIST=12.0"
    )


@pytest.mark.parametrize(("driver", "runs"), [((12, 9), False), ((13, 0), True), ((14, 1), True), (None, True)])
def test_drivers_that_are_too_old(driver, runs, pretend_gpu):
    pretend_gpu((9, 0), driver=driver)
    ok, reason = backends.availability("local_propagation", "cuda", "cuda")
    assert ok == runs
    assert runs or reason == (
        "the CUDA kernels are compiled for 8.0 9.0a 10.0+PTX by nvcc 13.0.88, which needs a driver of CUDA 13, and this"
        " one is of CUDA 12.9; update the driver, or reinstall with an nvcc of that version"
    )


def test_without_a_driver_its_version_is_unknown():
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA driver")
    assert _native.driver_version() is None


@pytest.mark.parametrize(
    ("compiled", "runs", "runs_not"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(12, 0)]),
        (
            "8.0 9.0a 10.0+PTX by nvcc 13.0.88, without wgmma: built without nvidia-cutlass",
            [(8, 6), (9, 0), (12, 0)],
            [],
        ),
        ("9.0a by nvcc 13.0.88", [(9, 0)], [(8, 0), (13, 0)]),
        ("unknown architectures", [(8, 0), (12, 0)], []),
    ],
)
def test_code_for_a_gpu(compiled, runs, runs_not):
    for capability in runs + runs_not:
        assert _native.has_code_for(compiled, capability) == (capability in runs), capability


@each_op
@pytest.mark.parametrize("gpu", [(7, 5), (12, 0)])
def test_auto_leaves_such_gpus_to_others(op, gpu, pretend_gpu, monkeypatch):
    """Even where the CUDA kernels are what ``auto`` prefers; whoever asks for them by name is told why not."""
    pretend_gpu(gpu, compiled="8.0 9.0a")
    monkeypatch.setattr(backends, "_automatic", {key: "always" for key in backends._automatic})
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    expected = "reference" if gpu == (7, 5) or _triton.triton is None else "triton"
    assert backends.select(op, "auto", on_gpu) == expected
    with pytest.raises(BackendUnavailableError, match=rf"^{op}: backend 'cuda' is not available: .*{gpu[0]}\.{gpu[1]}"):
        backends.select(op, "cuda", on_gpu)


@each_op
def test_the_choice_follows_the_dtype(op, pretend_gpu, monkeypatch):
    pretend_gpu((9, 0))
    monkeypatch.setattr(backends, "_automatic", {key: "always" for key in backends._automatic})
    monkeypatch.setitem(backends._automatic, (op, "triton"), "on request")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert backends.select(op, "auto", SimpleNamespace(device=torch.device("cuda"), dtype=dtype)) == "cuda"
    double = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    assert backends.select(op, "auto", double) == "reference"
    with pytest.raises(BackendUnavailableError, match="take float16, bfloat16 and float32, not torch.float64"):
        backends.select(op, "cuda", double)


def test_the_choice_can_be_compiled(pretend_gpu):
    """Dynamo calls what chooses while it traces: it cannot trace the question to the driver."""
    pretend_gpu((7, 5))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)

    @torch.compile(fullgraph=True, backend="eager")
    def sign(value):
        return -value if backends.select("local_propagation", "auto", on_gpu) == "reference" else value

    with pytest.warns(UserWarning, match="compute capability 8.0, cuda:0 has 7.5"):
        assert sign(torch.ones(1)).item() == -1


COLD = """
import sys, threading
import torch, hpkernels
device, backend = sys.argv[1:]
found = []

def rank():  # the first that anybody does with CUDA, but for the tensors
    found.append(hpkernels.hidden_positives(features, threshold, backend=backend).bits.cpu())

features, threshold = torch.eye(256, dtype=torch.float16, device=device), torch.zeros(256, device=device)
thread = threading.Thread(target=rank)
thread.start()
thread.join()
assert torch.cuda.current_device() == 0
expected = hpkernels.hidden_positives(features.cpu(), threshold.cpu(), backend="reference").bits
assert torch.equal(found[0], expected)
"""


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_fresh_thread_on_either_gpu(backend, device):
    """A thread that has not used CUDA has no current context, and the current device of another is 0."""
    if torch.cuda.device_count() <= torch.device(device).index:
        pytest.skip(f"needs {device}, and PyTorch sees {torch.cuda.device_count()} GPUs on this machine")
    command = [sys.executable, "-c", COLD, device, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
