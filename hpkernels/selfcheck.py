"""Whether a GPU backend is right on the device at hand, found out once and kept.

Before ``auto`` takes `cuda` or `triton` for the first time on a device and for a dtype, a small problem goes through
all of the backend's ops, forward and backward, and is compared with the reference in float64 on the CPU. The verdict
holds for the whole backend, so that thresholds and the comparisons with them never come from different ones. It is kept
in ``$XDG_CACHE_HOME/hpkernels`` under all that it depends on: GPU, driver, versions, the package's own files.

It is a guard against what is miscompiled or crashes here, not a test: large sizes are beyond it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from hpkernels import _native
from hpkernels._native import Availability
from hpkernels._version import __version__
from hpkernels.examination import examine
from hpkernels.ops import _triton

VARIABLE = "HPKERNELS_SELF_CHECK"
MODES = ("auto", "trust", "again", "never")
"""Check once and keep the verdict; take what can run, unchecked; check again in this process; take no such backend."""

LIMIT_S = 300.0
"""Seconds after which a check counts as hanging."""

_QUIET_S = 2.0  # before anything is said

_started = time.time()
_checking = threading.Lock()
_verdicts: dict[tuple[str, torch.device, torch.dtype], Availability] = {}


def passed(backend: str, device: torch.device, dtype: torch.dtype) -> Availability:
    """Whether `backend` is right on `device` for `dtype`; the first call finds out, which may take half a minute.

    Raises:
        ValueError: the environment variable ``HPKERNELS_SELF_CHECK`` is not one of `MODES`.
        RuntimeError: no verdict is kept and a CUDA graph is being captured; or the check left the device unusable.
    """
    verdict = known(backend, device, dtype)
    if verdict is not UNKNOWN:
        return verdict
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"hpkernels: call the op once before capturing a CUDA graph: backend '{backend}' has not been checked for"
            f" {_name(dtype)} on this device yet (or name it, backend='{backend}', which asks for no check)"
        )
    with _checking:
        verdict = known(backend, device, dtype)
        if verdict is UNKNOWN:
            verdict = check(backend, device, dtype)
    return verdict


UNKNOWN = Availability(False, "not checked on this device yet: at the first call, or by `python -m hpkernels check`")
"""The verdict of `known` where there is none."""


def known(backend: str, device: torch.device, dtype: torch.dtype) -> Availability:
    """The verdict as far as it is known, without a check."""
    chosen = mode()
    if chosen == "trust":
        return Availability(True, f"not checked ({VARIABLE}=trust)")
    if chosen == "never":
        return Availability(False, f"only on request, backend='{backend}' ({VARIABLE}=never)")
    key = (backend, _with_index(device), dtype)
    if key not in _verdicts:
        kept = _record(*key).read()
        if kept is None:
            return UNKNOWN
        _verdicts[key] = kept
    return _verdicts[key]


def mode() -> str:
    """What ``HPKERNELS_SELF_CHECK`` asks for."""
    chosen = os.environ.get(VARIABLE) or "auto"
    if chosen not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {chosen!r}")
    return chosen


def check(backend: str, device: torch.device, dtype: torch.dtype) -> Availability:
    """Check now, unless another process does: then wait for its verdict. Keeps the verdict, if there is where to.

    A marker is written before and removed after. One that is found although nobody holds the lock is that of a process
    that crashed, hung or was stopped in its check, and this must not happen twice.
    """
    device = _with_index(device)
    record = _record(backend, device, dtype)
    with (
        _said_if_slow(f"{backend}, {_name(dtype)} on {record.identity['device']}") as say,
        record.locked(LIMIT_S + 60) as alone,
    ):
        verdict = record.read()
        if verdict is None:
            verdict = _new_verdict(record, backend, device, dtype) if alone else _OTHER_HANGS
        say(f"passed: {verdict.reason}" if verdict.ok else f"failed: {verdict.reason}")
    _verdicts[backend, device, dtype] = verdict
    # Where a kernel hangs, so does whatever follows it.
    if not (verdict.ok or _still_computes(device)):
        raise RuntimeError(
            f"hpkernels: the self-check of backend '{backend}' left {device} unusable for this process"
            f" ({verdict.reason}); start again, or with {VARIABLE}=never if that happens again"
        )
    return verdict


_OTHER_HANGS = Availability(False, "another process is checking, and does not end")


def _new_verdict(record: _Record, backend: str, device: torch.device, dtype: torch.dtype) -> Availability:
    """Make the check. Kept is what tells of the kernels: wrong rows, a hang, a device that computes no more.

    Any other error may be one of this moment or this environment: no memory, no compiler, a full disk.
    """
    if mode() != "again" and (died := record.verdict_of_marker()) is not None:
        record.write(died)
        return died
    record.mark()
    try:
        verdict = _in_a_thread(lambda: examine(backend, device, dtype), LIMIT_S)
    except Exception as error:
        verdict = Availability(False, _first_line(error))
        if _still_computes(device):
            record.unmark()
            return verdict
    except KeyboardInterrupt:  # somebody lost patience
        record.unmark()
        raise
    record.write(verdict)
    return verdict


def settle(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Keep the verdict of a check whose process ended without one."""
    record = _record(backend, _with_index(device), dtype)
    with record.locked(10) as alone:
        if alone and (died := record.verdict_of_marker()) is not None:
            record.write(died)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + str(error).partition("\n")[0]


# A thread of its own.


def _in_a_thread(examination: Callable[[], Availability], limit_s: float) -> Availability:
    """The verdict of `examination`, which hangs if it takes longer.

    Inference mode, autocast, default devices and modes that record or fake calls belong to a thread, and stay out.
    """
    found: Future[Availability] = Future()

    def run() -> None:
        try:
            found.set_result(examination())
        except Exception as error:
            found.set_exception(error)

    with _deterministic_algorithms_off():
        threading.Thread(target=run, name="hpkernels self-check", daemon=True).start()
        try:
            return found.result(limit_s)
        except FutureTimeout:
            if found.done():  # on Python 3.11 and later an examination may raise the same
                raise
            return Availability(False, f"it did not end within {limit_s:g} s")


@contextmanager
def _deterministic_algorithms_off() -> Iterator[None]:
    """PyTorch's setting, which is of the whole process, fills every empty tensor."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=only_warn)


def _still_computes(device: torch.device) -> bool:
    """Whether the device computes: after an illegal address it does nothing more for this process."""
    try:
        return _in_a_thread(lambda: _computes(device), 10).ok
    except Exception:  # there is more than one type of it
        return False


def _computes(device: torch.device) -> Availability:
    return Availability(bool((torch.ones(1, device=device) + 1).item() == 2), "")


@contextmanager
def _said_if_slow(what: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr what goes on, if it takes more than two seconds; yields what says how it ended."""
    said = threading.Event()

    def begin() -> None:
        said.set()
        print(f"hpkernels: checking {what}, once (or waiting for a process that does) ...", file=sys.stderr, flush=True)

    def end(verdict: str) -> None:
        timer.cancel()
        if said.is_set():
            print(f"hpkernels: {what} {verdict}", file=sys.stderr, flush=True)

    timer = threading.Timer(_QUIET_S, begin)
    timer.daemon = True
    timer.start()
    try:
        yield end
    finally:
        timer.cancel()


# What is kept.


class _Record:
    """The files of one verdict: the verdict, the marker of a check that goes on, the lock of who makes it."""

    def __init__(self, identity: dict[str, Any]):
        self.identity = identity
        text = json.dumps(identity, sort_keys=True)
        name = f"{identity['backend']}-{identity['dtype']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        folder = _folder()
        self._verdict, self._marker, self._lock = (
            None if folder is None else folder / f"{name}.{kind}" for kind in ("json", "started", "lock")
        )

    def read(self) -> Availability | None:
        """The verdict that is kept; in the mode "again" only one that is younger than this process."""
        kept = _read(self._verdict)
        if kept is None or not isinstance(kept.get("ok"), bool) or not isinstance(kept.get("reason"), str):
            return None
        time_of_it = kept.get("time")
        if mode() == "again" and not (isinstance(time_of_it, float) and time_of_it >= _started):
            return None
        return Availability(kept["ok"], kept["reason"])

    def write(self, verdict: Availability) -> None:
        """Keep a verdict; the check has ended."""
        _write(self._verdict, verdict._asdict() | {"time": time.time(), "of": self.identity})
        self.unmark()

    def verdict_of_marker(self) -> Availability | None:
        """What the marker of a check that nobody makes any more tells."""
        begun = _read(self._marker)
        if begun is None:
            return None
        return Availability(
            False,
            f"an earlier check did not end: process {begun.get('process')} of {begun.get('when')} crashed, hung or was"
            " stopped; `python -m hpkernels check` tries again",
        )

    def mark(self) -> None:
        """Begin a check; what was found before counts no more."""
        if self._verdict is not None:
            with suppress(OSError):
                self._verdict.unlink(missing_ok=True)
        _write(self._marker, {"process": os.getpid(), "when": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"})

    def unmark(self) -> None:
        """End a check."""
        if self._marker is not None:
            with suppress(OSError):
                self._marker.unlink(missing_ok=True)

    @contextmanager
    def locked(self, limit_s: float) -> Iterator[bool]:
        """Hold the lock, which the system gives back when a process ends, however it does; False if another keeps it.

        Where there can be no lock, as in a folder that nobody may write to, each process is alone, and keeps nothing:
        it could not tell the marker of another that checks from that of one that crashed.
        """
        lock, alone = None, True
        if self._lock is not None:
            try:
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self._lock)
                lock.acquire(timeout=limit_s)
            except Timeout:
                lock, alone = None, False
            except (OSError, NotImplementedError):
                lock = self._verdict = self._marker = self._lock = None
        try:
            yield alone
        finally:
            if lock is not None:
                lock.release()


def _record(backend: str, device: torch.device, dtype: torch.dtype) -> _Record:
    # Where PyTorch's setting allows TF32 the kernels for float32 are others, and the tolerance is.
    precision = torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""
    return _record_of(backend, device, dtype, precision)


@cache
def _record_of(backend: str, device: torch.device, dtype: torch.dtype, precision: str) -> _Record:
    return _Record({"backend": backend, "dtype": _name(dtype), "precision": precision} | _identity(device))


def _folder() -> Path | None:
    """Where verdicts are kept; None without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the standard has it
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "hpkernels" / "selfcheck"


def _read(file: Path | None) -> dict[str, Any] | None:
    """A JSON object, or None if there is none that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write(file: Path | None, value: dict[str, Any]) -> None:
    """Replace a file as a whole; where nothing may be written, nothing is."""
    if file is None:
        return
    half = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(value, indent=1), encoding="utf-8")
        half.replace(file)
    except OSError:
        with suppress(OSError):
            half.unlink(missing_ok=True)


@cache
def _identity(device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on besides backend and dtype."""
    found: dict[str, Any] = {"device": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,  # a slice of a GPU has fewer
        }
    table = os.environ.get(_triton.TABLE_VARIABLE)
    ptxas = [os.environ[name] for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH") if os.environ.get(name)]
    return found | {
        "driver": _driver(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": getattr(_triton.triton, "__version__", None),  # type: ignore[attr-defined]  # None where there is none
        "ptxas": [*ptxas, _digest(list(map(Path, ptxas)))],
        "table": _digest([Path(table)]) if table else None,
        "engine": os.environ.get("HPKERNELS_SM90"),
        "hpkernels": [__version__, _digest(_own_files())],
    }


def _driver() -> str:
    """The version of the NVIDIA driver, or of the CUDA that it knows."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return str(_native.driver_version())


def _own_files() -> list[Path]:
    """What the package computes with: its sources, tables and libraries."""
    package = Path(__file__).parent
    return sorted([*package.rglob("*.py"), *package.rglob("*.json"), *package.glob("_C*")])


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            content = str(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
