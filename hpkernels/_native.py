"""The compiled libraries, loaded with the package: `_C` holds the CPU kernels, `_C_cuda` the CUDA kernels."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

EMULATED_VARIABLE = "HPKERNELS_CUDA_EMULATED"
"""Names the file of the CUDA kernels compiled for the CPU (csrc/emulation), which tests then see as "cuda"."""

_LEAST_CAPABILITY = (8, 0)


class Availability(NamedTuple):
    """Whether a backend can run an op, and if not, the reason in one sentence."""

    ok: bool
    reason: str


def _file(library: str) -> Path | None:
    """The compiled file ``hpkernels/<library>.*``, if this installation has it."""
    files = sorted(Path(__file__).parent.glob(f"{library}.*"))
    return files[0] if files else None


def _left_elsewhere(library: str) -> Availability | None:
    """The reason where this copy of the package has no such library, and another on Python's path has."""
    own = Path(__file__).resolve().parent
    for package in (Path(folder, "hpkernels").resolve() for folder in sys.path):
        if package != own and any(package.glob(f"{library}.*")):
            return Availability(
                False,
                f"hpkernels is imported from {own}, which has no {library} library; the copy in {package} has one: run"
                " from another folder, or install with `pip install --editable`",
            )
    return None


def _load(file: Path, reason: str) -> Availability:
    """Load a library and with it the kernels that it registers, or say why that is not possible."""
    try:
        torch.ops.load_library(file)  # type: ignore[no-untyped-call]
    except OSError as error:
        return Availability(False, f"{file.name} does not load: {error}")
    return Availability(True, reason)


def _load_cpu() -> Availability:
    file = _file("_C")
    if file is None:
        return _left_elsewhere("_C") or Availability(
            False,
            "this installation has no _C library; reinstall with a C++ compiler at hand (with HPKERNELS_BUILD=cpu the"
            " installation fails and says what is missing)",
        )
    return _load(file, f"compiled, {file.name}")


def _load_cuda() -> Availability:
    if EMULATED:
        return _load(Path(os.environ[EMULATED_VARIABLE]), "emulated on the CPU: slow, for tests")
    file = _file("_C_cuda")
    if file is None:
        return _left_elsewhere("_C_cuda") or Availability(
            False, "this installation has no _C_cuda library; reinstall with nvcc and a PyTorch with CUDA at hand"
        )
    compiled = f"{file.name}, compiled for {architectures(file)}"
    if torch.version.cuda is None:
        return Availability(False, f"PyTorch is built without CUDA and cannot load {compiled}")
    # is_available() would start CUDA, after which the process may not fork workers that use it.
    if torch.cuda.device_count() == 0:
        return Availability(False, f"PyTorch sees no CUDA device to use {compiled}")
    return _load(file, compiled)


def architectures(file: Path) -> str:
    """What a `_C_cuda` file was compiled for and by, read without loading it: "8.0 9.0a by nvcc 13.0.88"."""
    found = re.search(rb"hpkernels architectures: ([^\0]+)", file.read_bytes())
    return found[1].decode() if found else "unknown architectures"


def has_code_for(compiled: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this capability runs what was compiled for `compiled`, as `architectures` gives it."""

    def runs(major: str, minor: str, kind: str, ptx: str) -> bool:
        least = int(major), int(minor)
        if kind == "a":  # of one GPU alone
            return capability == least
        # Code runs on the later GPUs of its generation as well, PTX on all later ones.
        return capability >= least and (capability[0] == least[0] or (bool(ptx) and not kind))

    listed = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", compiled.split(" by ")[0])
    return not listed or any(runs(*entry) for entry in listed)


EMULATED = bool(os.environ.get(EMULATED_VARIABLE))
LIBRARIES = {"_C": _load_cpu(), "_C_cuda": _load_cuda()}
"""Each library: whether it is loaded, and what it is or why not."""


def supports_cpu(device: torch.device, dtype: torch.dtype) -> Availability:
    """Whether the CPU kernels can run, which take every floating-point dtype."""
    if device.type != "cpu":
        return Availability(False, f"the CPU kernels take tensors on the CPU, not on {device.type}")
    return LIBRARIES["_C"]


def supports_cuda(device: torch.device, dtype: torch.dtype) -> Availability:
    """Whether the CUDA kernels can run on `device`; they take every floating-point dtype."""
    if EMULATED and device.type == "cpu":
        return LIBRARIES["_C_cuda"]
    if EMULATED:
        return Availability(False, f"{EMULATED_VARIABLE} is set, so the CUDA kernels take tensors on the CPU only")
    if device.type != "cuda":
        return Availability(False, f"the CUDA kernels take tensors on a CUDA device, not on {device.type}")
    if not LIBRARIES["_C_cuda"].ok:
        return LIBRARIES["_C_cuda"]
    reason = _old_driver() or incapable("CUDA", device) or _without_code(device)
    return Availability(False, reason) if reason else LIBRARIES["_C_cuda"]


def incapable(kernels: str, device: torch.device) -> str:
    """Why an NVIDIA GPU is too old for the kernels of this name, or ""."""
    if capability(device) >= _LEAST_CAPABILITY:
        return ""
    found, needed = _dotted(capability(device)), _dotted(_LEAST_CAPABILITY)
    return f"the {kernels} kernels need compute capability {needed}, {_named(device)} has {found}"


def _without_code(device: torch.device) -> str:
    """Why the CUDA kernels do not run on a GPU that is new enough for them, or ""."""
    compiled = _compiled_for()
    if has_code_for(compiled, capability(device)):
        return ""
    found = _dotted(capability(device))
    return (
        f"the CUDA kernels are compiled for {compiled}, {_named(device)} has {found}; "
        f"reinstall with TORCH_CUDA_ARCH_LIST={found}"
    )


def _old_driver() -> str:
    """Why the driver does not run what this nvcc compiled, or "": it must be of the same major version, or newer."""
    found, driver = re.search(r" by nvcc (\d+)\.", _compiled_for()), driver_version()
    if found is None or driver is None or driver[0] >= int(found[1]):
        return ""
    return (
        f"the CUDA kernels are compiled for {_compiled_for()}, which needs a driver of CUDA {found[1]}, and this one is"
        f" of CUDA {_dotted(driver)}; update the driver, or reinstall with an nvcc of that version"
    )


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver knows; None where it cannot be asked. This does not start CUDA."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10  # 12080 is 12.8


@functools.cache
def _compiled_for() -> str:
    file = _file("_C_cuda")
    return architectures(file) if file else ""


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU."""
    return _capability(_index(device))


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """The compute capability of a GPU. To ask for it starts CUDA."""
    return torch.cuda.get_device_capability(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _named(device: torch.device) -> str:
    return f"cuda:{_index(device)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
