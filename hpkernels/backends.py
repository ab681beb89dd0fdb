"""Which implementation of an op runs: the registry of backends and the choice made for each call.

A backend of an op is a module ``hpkernels/ops/<op>/<backend>.py`` that has the op's kernels and a function
``supports(device_type, dtype) -> Availability``. The op's ``registration.py`` enters it here.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

Backend = Literal["auto", "cuda", "triton", "cpu", "reference"]
"""What a call may ask for."""

BACKENDS: tuple[Backend, ...] = ("cuda", "triton", "cpu", "reference")
"""Every backend, in the order in which ``auto`` prefers them."""

ENVIRONMENT_VARIABLE = "HPKERNELS_BACKEND"

_modules: dict[tuple[str, str], ModuleType] = {}
_on_request_only: set[tuple[str, str]] = set()
_context: ContextVar[Backend | None] = ContextVar("hpkernels_backend", default=None)


class Availability(NamedTuple):
    """Whether a backend can run an op, and if not, the reason in one sentence."""

    ok: bool
    reason: str


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


def register(op: str, backend: str, module: ModuleType, *, automatic: bool = True) -> None:
    """Enter `module` as the implementation of `op` on `backend`; ``auto`` chooses it only if `automatic`."""
    _modules[op, backend] = module
    if not automatic:
        _on_request_only.add((op, backend))


def registered_ops() -> list[str]:
    """The names of all ops that have at least one backend."""
    return sorted({op for op, _ in _modules})


def implementation(op: str, backend: str) -> ModuleType:
    """The module of `op` on `backend`; `select` has made sure that there is one."""
    return _modules[op, backend]


def availability(op: str, backend: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> Availability:
    """Whether `backend` can run `op` on tensors of this device type and dtype, or the reason why not."""
    if (op, backend) not in _modules:
        return Availability(False, f"{op} has no {backend} kernels in this version; use backend='reference'")
    supported: Availability = _modules[op, backend].supports(device_type, dtype)
    return supported


def automatic(op: str, backend: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> Availability:
    """Whether ``auto`` may take `backend` for `op`, or the reason why it does not."""
    able = availability(op, backend, device_type, dtype)
    if able.ok and (op, backend) in _on_request_only:
        return Availability(False, f"only on request, backend='{backend}': it has never run on a GPU")
    return able


def select(op: str, backend: Backend, tensor: torch.Tensor, caller: str | None = None) -> Backend:
    """The backend that runs this call of `op`, whose inputs have the device and dtype of `tensor`.

    Errors name `caller`, the public function that was called, if it is not `op` itself.

    The request is the call's own `backend`, else that of the innermost `use_backend`, else that of the environment
    variable ``HPKERNELS_BACKEND``. ``auto`` takes the first of `BACKENDS` that can run the call.

    Raises:
        ValueError: the request is not a known backend.
        BackendUnavailableError: the requested backend cannot run this call; the message says why.
    """
    caller = caller or op
    source = f"{caller}: `backend`"
    in_context = _context.get()
    if backend == "auto" and in_context is not None:
        backend, source = in_context, "use_backend: `backend`"
    if backend == "auto":
        in_environment: Any = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        backend, source = in_environment, ENVIRONMENT_VARIABLE
    check_name(backend, source)
    if backend != "auto":
        ok, reason = availability(op, backend, tensor.device.type, tensor.dtype)
        if not ok:
            raise BackendUnavailableError(f"{caller}: backend '{backend}' is not available: {reason}")
        return backend
    for candidate in BACKENDS:
        if automatic(op, candidate, tensor.device.type, tensor.dtype).ok:
            runs = isinstance(tensor, torch.Tensor) and not torch.compiler.is_compiling()  # and is not only asked about
            if runs and candidate == "reference" and tensor.device.type == "cpu":
                _warn_without_library()
            return candidate
    raise BackendUnavailableError(f"{caller}: no backend takes {tensor.dtype} tensors on {tensor.device.type}")


@functools.cache  # so at most once in a process
def _warn_without_library() -> None:
    from hpkernels import _native  # which imports this module

    ok, reason = _native.LIBRARIES["_C"]
    if not ok:
        warnings.warn(
            "hpkernels: CPU tensors take the reference backend, which is slower and needs more memory: "
            f"{reason} (with HPKERNELS_BUILD=cpu the installation fails and says what is missing)",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every op inside the ``with`` block whose own `backend` is ``"auto"`` on `backend`.

    Under ``torch.compile`` the choice is made when the graph is traced, and stays in it: the first call of the compiled
    function belongs inside the block. The block cannot be inside the function, where `backend` does the same.

    Example:
        >>> import hpkernels, torch
        >>> with hpkernels.use_backend("reference"):
        ...     values, indices = hpkernels.masked_topk(torch.eye(3), torch.eye(3))
        >>> indices.flatten().tolist()
        [0, 1, 2]
    """
    check_name(backend, "use_backend: `backend`")
    token = _context.set(backend)
    try:
        yield
    finally:
        _context.reset(token)


def check_name(backend: str, source: str) -> None:
    """Check that `backend` may be asked for; `source` says where the name is from."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{source} must be one of {known}, got {backend!r}")
