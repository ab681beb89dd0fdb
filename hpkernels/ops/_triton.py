"""What the Triton kernels of all ops share: whether they can run, their configurations, their launch.

Kernels are plain ``@triton.jit`` functions. The host chooses tile sizes from ``hpkernels/ops/<op>/triton.json``, by
kernel, architecture and size of the elements; nothing is tuned during a call. ``python -m hpkernels.tune`` measures a
table of one's own, which the environment variable ``HPKERNELS_TRITON_TABLE`` names. Under ``TRITON_INTERPRET=1`` the
kernels run on the CPU, with tiles so small that tests of a few anchors take several of them.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels._native import Availability, capability, incapable
from hpkernels.ops import _kernels

try:
    import triton
except ImportError:
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLE_VARIABLE = "HPKERNELS_TRITON_TABLE"
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, one program after another; decided when they are imported."""

_LEAST_VERSION = (3, 6)
_LEAST_ON_SM100 = (3, 8)
"""Earlier versions lack barriers around tcgen05: loops of products of other projects gave other bits at each launch."""


def register(op: str) -> None:
    """Enter ``hpkernels/ops/<op>/triton.py``, or, without Triton, the reason why it is missing."""
    if triton is None:
        module = SimpleNamespace(supports=supports)
    else:
        module = importlib.import_module(f"hpkernels.ops.{op}.triton")
    backends.register(op, "triton", module, automatic="on request" if INTERPRETED else "checked")


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Whether the Triton kernels can run: on GPUs, and on the CPU under Triton's interpreter."""
    if triton is None:
        return Availability(False, "Triton is not installed; pip install 'triton>=3.6'")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < _LEAST_VERSION:
        return Availability(False, f"the Triton kernels need Triton 3.6, this is {triton.__version__}")
    if dtype not in DTYPES:
        return Availability(False, f"the Triton kernels take float16, bfloat16 and float32, not {dtype}")
    if device.type == "cuda" and not INTERPRETED:
        if torch.cuda.device_count() == 0:
            return Availability(False, "PyTorch sees no GPU to run the Triton kernels on")
        if torch.version.hip is None and (reason := incapable("Triton", device) or _racy(device, version)):
            return Availability(False, reason)
        return Availability(True, f"compiled by Triton {triton.__version__} when first used")
    if device.type == "cpu" and INTERPRETED:
        return Availability(True, "interpreted (TRITON_INTERPRET=1): slow, for tests")
    if INTERPRETED:
        return Availability(False, "TRITON_INTERPRET=1 is set, so the Triton kernels take tensors on the CPU only")
    return Availability(False, f"the Triton kernels take tensors on a GPU, not on {device.type}")


def _racy(device: torch.device, version: tuple[int, ...]) -> str:
    """Why this version of Triton is too old for an NVIDIA GPU, though not for others, or ""."""
    if version >= _LEAST_ON_SM100 or architecture_of(capability(device)) != "sm_100":
        return ""
    return (
        f"on GPUs of compute capability 10 the Triton kernels need Triton 3.8, this is {triton.__version__}, whose code"
        " for them can race"
    )


class Recorder(Protocol):
    """What sees the launches of a context; `hpkernels.launches.recorded` makes one."""

    architecture: str | None
    """The column to configure for; None: that of the device."""
    run: bool
    """Whether launches are made as well."""

    def configured(self, kernel: Any, like: Tensor) -> None:
        """See what a kernel is configured for."""

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        """See a launch."""


recorder: ContextVar[Recorder | None] = ContextVar("hpkernels_triton_recorder", default=None)
"""That of this thread, if there is one."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor, once for each point of `grid`."""
    recording = recorder.get()
    if recording is not None:
        recording.launched(kernel, grid, arguments, constants)
        if not recording.run:
            return
    on = arguments[0].device
    with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
        try:
            kernel[grid](*arguments, **constants)
        except Exception as error:  # of the driver, which does not load a kernel while a graph is captured
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            raise RuntimeError(
                f"hpkernels: {kernel.__name__} is not loaded yet, which cannot be done while a CUDA graph is captured:"
                " call the op once before, forward and backward, with the same shapes, dtypes and options"
            ) from error


def aligned_rows(matrix: Tensor) -> Tensor:
    """A matrix (R, D) with D a multiple of 16: of no other size and stride does Triton know how they divide.

    Without it rows are loaded element by element, and not ahead of their use.
    """
    return _kernels.aligned_rows(matrix, 16)


def configuration(kernel: Any, like: Tensor) -> dict[str, int]:
    """The tile sizes, ``num_warps`` and ``num_stages`` of `kernel` for elements and the device of `like`."""
    if (recording := recorder.get()) is not None:
        recording.configured(kernel, like)
    return dict(_lookup(kernel.__name__, architecture(like.device), like.element_size()))


def precision(like: Tensor) -> str:
    """How the loss multiplies: float32 as TF32 where PyTorch's setting allows it, else as three products of TF32."""
    if like.dtype == torch.float32 and tf32_allowed():
        return "tf32"
    return _float32_precision(like, ("sm_90", "sm_100"))


def comparable_precision(like: Tensor) -> str:
    """How ranking and discovery multiply, whose products are compared: float32 never as one product of TF32."""
    return _float32_precision(like, ("sm_90",))


def _float32_precision(like: Tensor, of_tf32: tuple[str, ...]) -> str:
    """Three products of TF32 on some architectures; elsewhere they take longer than float32 itself, or do not compile.

    The GPUs of graphics cards, of the column sm_80, multiply TF32 no faster than float32.
    """
    return "tf32x3" if like.dtype == torch.float32 and architecture(like.device) in of_tf32 else "ieee"


def tf32_allowed() -> bool:
    """Whether PyTorch's setting allows TF32 where products need not be exact."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def architecture(device: torch.device) -> str:
    """The column of the table that a device uses, or that a recorder asks for."""
    recording = recorder.get()
    return (recording and recording.architecture) or _architecture_at(device)


@functools.cache
def _architecture_at(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return architecture_of(capability(device))


def architecture_of(compute_capability: tuple[int, int]) -> str:
    """The column of NVIDIA GPUs of a compute capability."""
    # Others, like consumer Blackwell, have no more shared memory than the smallest of Ampere.
    return {9: "sm_90", 10: "sm_100"}.get(compute_capability[0], "sm_80")


@functools.cache
def _lookup(kernel: str, arch: str, element_size: int) -> dict[str, int]:
    by_size = table()[kernel][arch]
    return by_size.get(str(element_size)) or by_size["any"]


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Configurations by kernel, architecture and element size in bytes, or "any"; one's own come first.

    Raises:
        ValueError: the file that ``HPKERNELS_TRITON_TABLE`` names is no table of these kernels.
    """
    entries: dict = {}
    for file in sorted(Path(__file__).parent.glob("*/triton.json")):
        entries |= json.loads(file.read_text())
    file = os.environ.get(TABLE_VARIABLE)
    if file:
        try:
            own = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{TABLE_VARIABLE} must name a JSON file that can be read, got {file}: {error}") from error
        _check(own, entries, file)
        for kernel, by_arch in own.items():
            for arch, by_size in by_arch.items():
                entries[kernel][arch] |= by_size
    return entries


def _check(given: Any, like: dict | int, where: str) -> None:
    """Refuse what has not the form of `like`: all keys of a configuration, some keys elsewhere, positive integers."""
    keys = given.keys() if isinstance(given, dict) else None
    if isinstance(like, int):
        right, expected = type(given) is int and given > 0, "a positive integer"
    elif any(isinstance(value, int) for value in like.values()):
        right, expected = keys == like.keys(), f"an object of {', '.join(like)}"
    else:
        right, expected = keys is not None and keys <= like.keys(), f"an object of some of {', '.join(like)}"
    if not right:
        got = repr(given) if keys is None else ", ".join(keys)
        raise ValueError(f"{TABLE_VARIABLE}: {where} must be {expected}, got {got}")
    for key in keys or ():
        _check(given[key], like[key], f"{where}: {key}")
