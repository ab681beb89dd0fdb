"""How one call is timed: by the wall clock on the CPU, by events on a GPU, there with a cold L2 cache.

On a GPU the call is captured as a CUDA graph, so that launching it takes no time; what cannot be captured is timed by
events around the call itself. ``triton.testing.do_bench`` and ``do_bench_cudagraph`` are not used: the latter keeps the
cache warm, both warm up for a fixed time, and neither lets several calls take turns or reads clocks meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.timing import nvml

Call = Callable[[], object]

WARM_UP = 1.0  # seconds at most, however unstable
BATCH = 10  # calls of which the median is compared with those of other batches
BATCH_SECONDS = 0.2  # after which a batch of fewer calls ends
WINDOW = 3  # batches that must agree
AGREEMENT, RESOLUTION = 0.03, 1e-6  # of their medians: a share of the least, or seconds, which events resolve
PAUSE, LONG_PAUSE = 0.002, 0.1  # seconds before each call; the long one while the GPU is throttled
UNKNOWN_L2 = 2**27  # bytes
SAME = 0.01  # of the norm of results: orders of summation may differ between a call and its graph


@dataclass
class Times:
    """What was measured of one call.

    Attributes:
        timer: "wall", "events" or "graph".
        seconds: of each repetition.
        wall: seconds until the caller has the results of a call, its launching included.
        samples: what NVML said during each repetition.
        note: what is to be known about them.
        spent: seconds that the repetitions took with all that goes with them.
    """

    timer: str
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    samples: list[nvml.Sample] = field(default_factory=list)
    note: str = ""
    spent: float = 0.0

    def add_note(self, note: str) -> None:
        """Say one thing more."""
        self.note = "; ".join(filter(None, (self.note, note)))


def seconds_of(call: Call) -> float:
    """Wall-clock seconds of one call; its results are freed after the clock has stopped.

    On a GPU until the device has finished, which includes the time of launching.
    """
    _wait_for_gpu()
    start = time.perf_counter()
    result = call()
    _wait_for_gpu()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class WallTimer:
    """Times a call on the CPU."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.times = Times("wall")

    def warm_up(self) -> None:
        """Call once: what is made at first use is made."""
        self._call()

    def repeat(self) -> None:
        """Time one call."""
        seconds = seconds_of(self._call)
        self.times.seconds.append(seconds)
        self.times.wall.append(seconds)
        self.times.spent += seconds


class GpuTimer:
    """Times a call on the current GPU.

    Args:
        call: what is timed.
        pool: memory that the graphs of calls share which never run at once; ``torch.cuda.graph_pool_handle()``.
        capture: whether to try a graph. Not for what waits for the device: a capture that fails leaves the allocator of
            PyTorch 2.11 in a state that later calls fail in, and keeps its memory.
    """

    def __init__(self, call: Call, pool: Any = None, capture: bool = True) -> None:
        self._call, self._card = call, nvml.card()
        self._run, reason = _replay(call, pool) if capture else (call, "no graph: it is not made for one")
        self.times = Times("events" if reason else "graph", note=reason)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def warm_up(self) -> None:
        """Call until the time is stable, or for so long."""
        if not stable(self._device_seconds):
            self.times.add_note("its time was not stable after the warm-up")

    def repeat(self) -> None:
        """Time one call by events, and one by the wall clock."""
        start = time.perf_counter()
        time.sleep(LONG_PAUSE if self._card.last.throttled else PAUSE)
        seconds = self._device_seconds(lambda: self.times.samples.append(self._card.sample()))
        flush_cache()
        self.times.wall.append(seconds_of(self._call))
        self.times.seconds.append(seconds)  # of both or of none, where memory does not suffice
        self.times.spent += time.perf_counter() - start

    def _device_seconds(self, meanwhile: Call = lambda: None) -> float:
        """Seconds between two events around the call; `meanwhile` is called while the device works."""
        flush_cache()
        self._start.record()
        result = self._run()
        self._end.record()
        meanwhile()
        torch.cuda.synchronize()
        del result
        return self._start.elapsed_time(self._end) / 1e3


def stable(seconds_of_one: Callable[[], float]) -> bool:
    """Call until the medians of the last batches agree; whether they did within the time of a warm-up."""
    end = time.perf_counter() + WARM_UP
    medians: list[float] = []
    while time.perf_counter() < end:
        batch: list[float] = []
        while len(batch) < BATCH and sum(batch) < BATCH_SECONDS:
            batch.append(seconds_of_one())
        medians.append(statistics.median(batch))
        last = medians[-WINDOW:]
        if len(last) == WINDOW and max(last) - min(last) <= max(AGREEMENT * min(last), RESOLUTION):
            return True
    return False


@cache
def _flushing_buffer(device: int) -> Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size or UNKNOWN_L2
    return torch.empty(size, dtype=torch.int8, device=f"cuda:{device}")


def flush_cache() -> None:
    """Write twice what the L2 cache holds, so that the next call finds nothing of its inputs there."""
    _flushing_buffer(torch.cuda.current_device()).zero_()


def captured(call: Callable[[], Any], pool: Any = None) -> tuple[Any, Callable[[], None]]:
    """The results of `call`, captured as a CUDA graph, and what replays it into them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # once before: kernels are compiled and loaded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer one restores the stream, which a capture that fails does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
        results = call()
    return results, graph.replay


def _replay(call: Call, pool: Any) -> tuple[Call, str]:
    """What replays `call`, and ""; or `call` itself, and why it cannot be replayed."""
    try:
        results, replay = captured(call, pool)
        right = _gives_again(replay, tree_leaves(results), tree_leaves(call()))
    except Exception as error:  # of whatever library: what is at fault with the call itself shows when it is timed
        torch.cuda.synchronize()
        return call, f"no graph: {str(error).partition(chr(10))[0]}"
    # Work on streams of a library's own is not captured: its graph would be replayed in no time.
    return (replay, "") if right else (call, "no graph: replayed, it gives other results")


def _gives_again(replay: Call, results: list[Any], expected: list[Any]) -> bool:
    """Whether a replay writes what is expected into results that were overwritten."""
    tensors = [(new, old) for new, old in zip(results, expected, strict=True) if isinstance(new, Tensor)]
    for result, _ in tensors:
        result.fill_(7)
    replay()
    return bool(tensors) and all(
        ((new.double() - old.double()).norm() <= SAME * old.double().norm()).item() for new, old in tensors
    )
