"""Which implementation of an op runs: the registry of backends and the choice made for each call.

A backend of an op is a module ``hpkernels/ops/<op>/<backend>.py`` that has the op's kernels and a function
``supports(device, dtype) -> Availability``. The op's ``registration.py`` enters it here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch

from hpkernels import _native
from hpkernels._native import Availability

Backend = Literal["auto", "cuda", "triton", "cpu", "reference"]
"""What a call may ask for."""

BACKENDS: tuple[Backend, ...] = ("cuda", "triton", "cpu", "reference")
"""Every backend, in the order in which ``auto`` prefers them."""

ENVIRONMENT_VARIABLE = "HPKERNELS_BACKEND"

Automatic = Literal["always", "checked", "on request"]
"""When ``auto`` takes a backend that can run: always, once `hpkernels.selfcheck` has found it right, or never."""

_modules: dict[tuple[str, str], ModuleType] = {}
_automatic: dict[tuple[str, str], Automatic] = {}
_context: ContextVar[Backend | None] = ContextVar("hpkernels_backend", default=None)

_T = TypeVar("_T")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


def register(op: str, backend: str, module: ModuleType, *, automatic: Automatic = "always") -> None:
    """Enter `module` as the implementation of `op` on `backend`, and when ``auto`` takes it."""
    _modules[op, backend] = module
    _automatic[op, backend] = automatic


def registered_ops() -> list[str]:
    """The names of all ops that have at least one backend."""
    return sorted({op for op, _ in _modules})


def is_registered(op: str, backend: str) -> bool:
    """Whether `op` has kernels of this backend, or a reason why they are missing."""
    return (op, backend) in _modules


def implementation(op: str, backend: str) -> ModuleType:
    """The module of `op` on `backend`; `select` has made sure that there is one."""
    return _modules[op, backend]


def availability(
    op: str, backend: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Availability:
    """Whether `backend` can run `op` on tensors of this device and dtype, or the reason why not."""
    if not is_registered(op, backend):
        return Availability(False, f"{op} has no {backend} kernels of its own; use backend='auto'")
    supported: Availability = _modules[op, backend].supports(torch.device(device), dtype)
    return supported


def automatic(
    op: str,
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    check: bool = False,
) -> Availability:
    """Whether ``auto`` may take `backend` for `op`, or the reason why it does not.

    A self-check that has not been made yet is a reason, unless `check` has it made now.
    """
    able = availability(op, backend, device, dtype)
    when = _automatic.get((op, backend))
    if able.ok and when == "on request":
        return Availability(False, f"only on request, backend='{backend}': {able.reason}")
    if able.ok and when == "checked":
        from hpkernels import selfcheck  # which imports this module

        return (selfcheck.passed if check else selfcheck.known)(backend, torch.device(device), dtype)
    return able


def select(op: str, backend: Backend, tensor: torch.Tensor, caller: str | None = None) -> Backend:
    """The backend that runs this call of `op`, whose inputs have the device and dtype of `tensor`.

    Errors name `caller`, the public function that was called, if it is not `op` itself.

    The request is the call's own `backend`, else that of the innermost `use_backend`, else that of the environment
    variable ``HPKERNELS_BACKEND``. ``auto`` takes the first of `BACKENDS` that can run the call and, on a GPU, has
    passed its self-check.

    Raises:
        ValueError: the request is not a known backend.
        BackendUnavailableError: the requested backend cannot run this call; the message says why.
        RuntimeError: a self-check is needed, and cannot be made while a CUDA graph is captured.
    """
    caller = caller or op
    backend = requested(backend, caller)
    if backend != "auto":
        refusal = _refusal(op, backend, tensor.device, tensor.dtype)
        if refusal:
            raise BackendUnavailableError(f"{caller}: backend '{backend}' is not available: {refusal}")
        return backend
    chosen: Any = _first(op, tensor.device, tensor.dtype)
    if not chosen:
        raise BackendUnavailableError(f"{caller}: no backend takes {tensor.dtype} tensors on {tensor.device.type}")
    return chosen  # type: ignore[no-any-return]


def requested(backend: Backend, caller: str) -> Backend:
    """What a call of `caller` asks for: its own `backend`, else that of the context, else of the environment."""
    source = f"{caller}: `backend`"
    in_context = _in_context()
    if backend == "auto" and in_context is not None:
        backend, source = in_context, "use_backend: `backend`"
    if backend == "auto":
        in_environment: Any = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        backend, source = in_environment, ENVIRONMENT_VARIABLE
    check_name(backend, source)
    return backend


def _constant_for_dynamo(function: Callable[..., _T]) -> Callable[..., _T]:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes longer than PyTorch.

    Dynamo does not trace the function: it calls it while it traces, and keeps the result.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_for_dynamo
def _in_context() -> Backend | None:
    """What the innermost `use_backend` asks for; the Dynamo of PyTorch 2.11 cannot trace this."""
    return _context.get()


@_constant_for_dynamo
def _refusal(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend that was asked for cannot run, or ""."""
    able = availability(op, backend, device, dtype)
    return "" if able.ok else able.reason


@_constant_for_dynamo
def _first(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``auto`` takes, or "". The first call that falls back to the reference says why."""
    passed_over: dict[str, str] = {}
    for candidate in BACKENDS:
        ok, reason = automatic(op, candidate, device, dtype, check=True)
        if ok:
            if candidate == "reference":
                _warn_of_reference(device, dtype, passed_over)
            return candidate
        passed_over[candidate] = reason
    return ""


_warned: set[str] = set()
_meant = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""The backends that are made for tensors of a type of device."""
_hints = {"cuda": " (`python -m hpkernels check` tries again, `python -m hpkernels` says more)"}


def _warn_of_reference(device: torch.device, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    """Say once in a process that faster kernels could have run here, and why they do not."""
    meant = _meant.get(device.type, ())
    # On the CPU others take all there is; on a GPU nothing else takes float64.
    if (device.type == "cpu" and _native.LIBRARIES["_C"].ok) or (device.type == "cuda" and dtype == torch.float64):
        meant = ()
    why = "; ".join(f"{backend}: {reasons[backend]}" for backend in meant if backend in reasons)
    if why and why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"hpkernels: {str(dtype).removeprefix('torch.')} tensors on {device} take the reference backend, which is"
            f" slower: {why}{_hints.get(device.type, '')}",
            UserWarning,
            stacklevel=4,
        )


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every op inside the ``with`` block whose own `backend` is ``"auto"`` on `backend`.

    Under ``torch.compile`` the choice is made when the graph is traced, and stays in it: the first call of the compiled
    function belongs inside the block. The block cannot be inside the function, where `backend` does the same.

    Examples:
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
