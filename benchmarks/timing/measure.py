"""Time of calls, taken in turn so that all share the machine's noise, and peak memory of a call in a fresh process.

benchmarks/timing/timers.py says how one call is timed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable, Container
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import Case
from benchmarks.providers import provider
from benchmarks.timing.timers import Call, GpuTimer, Times, WallTimer, seconds_of

REPETITIONS = 5  # at least, unless BUDGET is spent before
FEWEST_REPETITIONS = 3  # even so
MOST_REPETITIONS = 50
ENOUGH = 0.5  # seconds after which REPETITIONS suffice
BUDGET = 10.0  # seconds of a provider's calls in one case
LONG_CALL = 60.0  # seconds; longer calls are timed once, in the process that measures their memory
PATIENCE = 300.0  # seconds of a process that measures memory
WRONG = "not timed: "
"""How the note of a row begins whose provider was wrong or failed."""


class Memory(NamedTuple):
    """What a call took in a process of its own.

    Attributes:
        peak: bytes of resident memory, above what was resident before the call; None: not measured.
        seconds: of the same call.
        error: why there is no measurement, or "".
    """

    peak: int | None = None
    seconds: float | None = None
    error: str = ""


def times(calls: dict[str, Call], device: str = "cpu", not_captured: Container[str] = frozenset()) -> dict[str, Times]:
    """What is measured of each call after a warm-up that is not counted; every round times each call once.

    On a GPU by a graph of the call, but for those that are `not_captured`.
    """
    timers = _timers(calls, device, not_captured)
    running = {name: timer for name, timer in timers.items() if _done(timer.warm_up, timer.times)}
    gc.collect()
    while running:
        running = {
            name: timer
            for name, timer in running.items()
            if _done(timer.repeat, timer.times) and not _finished(timer.times)
        }
    return {name: timer.times for name, timer in timers.items()}


def _timers(calls: dict[str, Call], device: str, not_captured: Container[str]) -> dict[str, WallTimer | GpuTimer]:
    if device != "cuda":
        return {name: WallTimer(call) for name, call in calls.items()}
    pool = torch.cuda.graph_pool_handle()
    return {name: GpuTimer(call, pool, name not in not_captured) for name, call in calls.items()}


def _done(step: Callable[[], None], measured: Times) -> bool:
    """Take a step; False, and a note, if it fails, or does not fit into a GPU's memory beside the graphs of others."""
    try:
        step()
    except torch.OutOfMemoryError:
        measured.add_note("did not fit into memory beside the other providers")
    except RuntimeError as error:
        measured.note = f"{WRONG}{str(error).partition(chr(10))[0]}"
        measured.seconds.clear()
    else:
        return True
    return False


def _finished(measured: Times) -> bool:
    count = len(measured.seconds)
    if measured.spent >= BUDGET:
        return count >= FEWEST_REPETITIONS
    return count >= MOST_REPETITIONS or (count >= REPETITIONS and measured.spent >= ENOUGH)


def peak_memory(case: Case, provider_name: str, patience: float | None = PATIENCE) -> Memory:
    """Peak memory of a call: on a GPU what PyTorch allocates, on the CPU what is resident in a fresh process.

    Which has `patience` seconds (None: all it takes).
    """
    on_gpu = case.device == "cuda"
    return _peak_on_gpu(case, provider_name) if on_gpu else _peak_on_cpu(case, provider_name, patience)


def _peak_on_gpu(case: Case, provider_name: str) -> Memory:
    run = provider(case, provider_name).run
    try:
        inputs = case.inputs()
        run(inputs)  # what libraries keep from their first use is not memory of the call
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _limit_memory_of_gpu(case, before)
        seconds = seconds_of(lambda: run(inputs))
        return Memory(torch.cuda.max_memory_allocated() - before, seconds)
    except torch.OutOfMemoryError:
        return Memory(error=_too_large(case))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak_on_cpu(case: Case, provider_name: str, patience: float | None) -> Memory:
    context = multiprocessing.get_context("forkserver")
    # The server imports and never computes: a process forked from it is as fresh as a new interpreter, and much sooner.
    context.set_forkserver_preload(["benchmarks.timing.measure"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, case, provider_name, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        memory = receiver.recv() if receiver.poll(patience) else Memory(error=f"took more than {patience:.0f} s")
    except EOFError:
        process.join()
        memory = Memory(error=f"the process ended with exit code {process.exitcode}")
    if process.is_alive() and memory.error:
        process.terminate()
    process.join()
    receiver.close()
    return memory


def _measure(sender: Connection, case: Case, provider_name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    _limit_memory()
    run = provider(case, provider_name).run
    # What libraries keep from their first use is not memory of the call; compiled code must have seen the size.
    warm_up = case if provider(case, provider_name).compiles else case.verified()
    try:
        run(warm_up.inputs())
        inputs = case.inputs()
        before = reset_peak()
        _limit_memory(case.memory_limit)
        seconds = seconds_of(lambda: run(inputs))
        peak = peak_above(before)
        # The limit of the system does not count memory that the allocator has kept from before.
        fits = peak is None or case.memory_limit is None or peak <= case.memory_limit * 2**30
        sender.send(Memory(peak, seconds) if fits else Memory(error=_too_large(case)))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        sender.send(Memory(error=_too_large(case)))


def _too_large(case: Case) -> str:
    return "does not fit into " + ("memory" if case.memory_limit is None else f"{case.memory_limit:g} GiB")


def _limit_memory_of_gpu(case: Case, used: int) -> None:
    """Make an allocation of a call beyond its limit fail, as one beyond the memory of the device does."""
    if case.memory_limit is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + case.memory_limit * 2**30) / total))


def _limit_memory(gib: float | None = None) -> None:
    """Make an allocation fail in this process beyond so much more, or, before others suffer, what the machine has."""
    if sys.platform == "linux":
        available = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable:")
        )
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        more = 0.9 * available if gib is None else min(0.9 * available, gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + int(more), hard))


def reset_peak() -> int | None:
    """Forget the peak so far and return the bytes that are resident now; None where the system has no such peak.

    The peak of ``getrusage`` cannot be used: it is that of the process's whole life, in which making the inputs may
    take more than the call, and a process inherits it from the one that started it.
    """
    if sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_above(before: int | None) -> int | None:
    """The bytes by which the peak since `reset_peak` exceeds what that has returned."""
    return None if before is None else max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
