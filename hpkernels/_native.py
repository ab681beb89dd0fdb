"""The compiled libraries, loaded with the package: `_C` holds the CPU kernels, `_C_cuda` the CUDA kernels."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from hpkernels.backends import Availability

EMULATED_VARIABLE = "HPKERNELS_CUDA_EMULATED"
"""Names the file of the CUDA kernels compiled for the CPU (csrc/emulation), which tests then see as "cuda"."""

_LEAST_CAPABILITY = (8, 0)

_T = TypeVar("_T")


def _file(library: str) -> Path | None:
    """The compiled file ``hpkernels/<library>.*``, if this installation has it."""
    files = sorted(Path(__file__).parent.glob(f"{library}.*"))
    return files[0] if files else None


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
        return Availability(False, "this installation has no _C library; reinstall with a C++ compiler at hand")
    return _load(file, f"compiled, {file.name}")


def _load_cuda() -> Availability:
    if EMULATED:
        return _load(Path(os.environ[EMULATED_VARIABLE]), "emulated on the CPU: slow, for tests")
    file = _file("_C_cuda")
    if file is None:
        return Availability(
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
# Once and at import, because Dynamo traces the choice of a backend.
LIBRARIES = {"_C": _load_cpu(), "_C_cuda": _load_cuda()}
"""Each library: whether it is loaded, and what it is or why not."""


def supports_cpu(device_type: str, dtype: torch.dtype) -> Availability:
    """Whether the CPU kernels can run, which take every floating-point dtype."""
    if device_type != "cpu":
        return Availability(False, f"the CPU kernels take tensors on the CPU, not on {device_type}")
    return LIBRARIES["_C"]


def supports_cuda(device_type: str, dtype: torch.dtype) -> Availability:
    """Whether the CUDA kernels can run, which take every floating-point dtype, on all the GPUs that PyTorch sees."""
    if EMULATED and device_type == "cpu":
        return LIBRARIES["_C_cuda"]
    if EMULATED:
        return Availability(False, f"{EMULATED_VARIABLE} is set, so the CUDA kernels take tensors on the CPU only")
    if device_type != "cuda":
        return Availability(False, f"the CUDA kernels take tensors on a CUDA device, not on {device_type}")
    reason = (incapable("CUDA") or _without_code()) if LIBRARIES["_C_cuda"].ok else ""
    return Availability(False, reason) if reason else LIBRARIES["_C_cuda"]


def incapable(kernels: str) -> str:
    """Why a visible NVIDIA GPU, of which there is one, is too old for the kernels of this name, or ""."""
    if _least_capability() >= _LEAST_CAPABILITY:
        return ""
    found, needed = _dotted(_least_capability()), _dotted(_LEAST_CAPABILITY)
    return f"the {kernels} kernels need compute capability {needed}, a visible GPU has {found}"


def _constant_for_dynamo(function: Callable[[], _T]) -> Callable[[], _T]:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes longer than PyTorch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_for_dynamo
def _least_capability() -> tuple[int, int]:
    return _capabilities()[0]


@_constant_for_dynamo
def _without_code() -> str:
    return _read_without_code()


@functools.cache
def _read_without_code() -> str:
    """Why the CUDA kernels do not run on a visible GPU that is new enough for them, or ""."""
    file = _file("_C_cuda")
    compiled = architectures(file) if file else ""
    for capability in _capabilities():
        if not has_code_for(compiled, capability):
            found = _dotted(capability)
            return (
                f"the CUDA kernels are compiled for {compiled}, a visible GPU has {found}; "
                f"reinstall with TORCH_CUDA_ARCH_LIST={found}"
            )
    return ""


@functools.cache
def _capabilities() -> list[tuple[int, int]]:
    """Those of the visible GPUs, the least first. To ask for them starts CUDA."""
    return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
