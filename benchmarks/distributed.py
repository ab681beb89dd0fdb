"""`hpkernels.distributed.contrastive` in processes of one thread, and one process with as many threads, on this CPU."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels
from benchmarks.timing.measure import _reset_peak, _status, seconds_of

_CLASSES = 100
_REPETITIONS = 5
_TIMEOUT = timedelta(minutes=10)

CALLS = ("keys", "both", "own")
"""Anchors against as many keys with gradients to both, in one direction or in both; and anchors among each other."""
WAYS = ("one process", "gather", "ring")


class Measured(NamedTuple):
    """Of a call, forward and backward.

    Attributes:
        milliseconds: the median over repetitions of the slowest rank's time.
        peak: bytes of resident memory of the rank that takes most, above what was resident before the first call; None
            where the system has no such peak.
    """

    milliseconds: float
    peak: int | None


def lines(anchors: int, dim: int, ranks: int) -> Iterator[str]:
    """A line a call and a way, for a batch of so many anchors in all."""
    for call in CALLS:
        for way in WAYS:
            measured = _measured(call, way, anchors, dim, ranks)
            memory = "" if measured.peak is None else f"{measured.peak / 2**20:8.1f} MiB a rank"
            yield f"{call:6} {way:12} {measured.milliseconds:9.1f} ms {memory}"


def _measured(call: str, way: str, anchors: int, dim: int, ranks: int) -> Measured:
    processes = 1 if way == "one process" else ranks
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(processes)]
        arguments = (processes, ranks // processes, Path(folder) / "store", call, way, anchors, dim)
        started = [
            context.Process(target=_rank, args=(sender, rank, *arguments)) for rank, (_, sender) in enumerate(ends)
        ]
        for process, (_, sender) in zip(started, ends, strict=True):
            process.start()
            sender.close()  # so that a process that ends early is seen
        of_ranks = [receiver.recv() for receiver, _ in ends]
        for process in started:
            process.join()
    seconds, peaks = zip(*of_ranks, strict=True)
    slowest = [max(of_round) for of_round in zip(*seconds, strict=True)]
    return Measured(1e3 * statistics.median(slowest), None if None in peaks else max(peaks))


def _rank(
    sender: Connection, rank: int, ranks: int, threads: int, store: Path, call: str, way: str, anchors: int, dim: int
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    torch.manual_seed(rank)
    _run(call, way, *_inputs(64, dim))  # what libraries keep from their first use is not memory of the call
    inputs = _inputs(anchors // ranks, dim)
    before = _reset_peak()
    _run(call, way, *inputs)
    peak = None if before is None else max(0, _status("VmHWM") - before)
    seconds = []
    for _ in range(_REPETITIONS):
        dist.barrier()
        seconds.append(seconds_of(lambda: _run(call, way, *inputs)))
    sender.send((seconds, peak))
    dist.destroy_process_group()


def _inputs(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors and keys, and the labels of both."""
    anchors, keys = (normalize(torch.randn(count, dim)).requires_grad_() for _ in range(2))
    labels, key_labels = torch.randint(_CLASSES, (2, count))
    return anchors, keys, labels, key_labels


def _run(call: str, way: str, anchors: Tensor, keys: Tensor, labels: Tensor, key_labels: Tensor) -> object:
    own = call == "own"
    positives = labels if own else hpkernels.Labels(labels, key_labels)
    inputs = [anchors] if own else [anchors, keys]
    both = call == "both"
    if way == "one process":
        loss = hpkernels.contrastive(*inputs, positives=positives, both_directions=both)
    elif way == "ring":
        loss = hpkernels.distributed.contrastive(*inputs, positives=positives, both_directions=both, exchange="ring")
    else:
        loss = hpkernels.distributed.contrastive(*inputs, positives=positives, both_directions=both)
    return torch.autograd.grad(loss, inputs)
