"""``python -m benchmarks distributed``: `hpkernels.distributed.contrastive` on this CPU.

In processes of one thread, and in one process with as many threads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels
from benchmarks import arguments, results
from benchmarks.csv_files import read_rows, write_rows
from benchmarks.results import DISTRIBUTED, Environment
from benchmarks.timing.measure import peak_above, reset_peak
from benchmarks.timing.timers import seconds_of

_CLASSES = 100
_REPETITIONS = 5
_TIMEOUT = timedelta(minutes=10)

CALLS = ("keys", "both", "own")
"""Anchors against as many keys with gradients to both, in one direction or in both; and anchors among each other."""
WAYS = ("one process", "gather", "ring")


@dataclass
class DistributedRow(Environment):
    """A call, forward and backward, for a batch of so many anchors in all.

    The times are quartiles, over repetitions, of the slowest rank's. `peak_mib` is resident memory of the rank that
    takes most, above what was resident before the first call; None where the system has no such peak.
    """

    call: str
    way: str
    anchors: int
    dim: int
    ranks: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    repetitions: int
    peak_mib: float | None

    @property
    def key(self) -> tuple:
        """What was measured."""
        return self.anchors, self.dim, self.ranks, self.call, self.way


def add_distributed(commands: Any) -> None:
    """Enter the command `distributed` into those of ``python -m benchmarks``."""
    command = commands.add_parser("distributed", help="time and memory of a loss in several processes, and in one")
    command.add_argument(
        "--anchors", type=arguments.count, default=8192, metavar="N", help="of all ranks (default: 8192)"
    )
    command.add_argument(
        "--dim", type=arguments.count, default=512, metavar="D", help="of their vectors (default: 512)"
    )
    command.add_argument("--ranks", type=arguments.count, default=2, help="processes of one thread each (default: 2)")
    command.add_argument("--output", type=Path, help=f"folder of {DISTRIBUTED} (default: benchmarks/results/<device>)")
    command.set_defaults(command=_distributed)


def _distributed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.anchors < options.ranks:
        parser.error(f"--anchors must be at least one a rank, got {options.anchors} for {options.ranks} ranks")
    folder = options.output or results.folder_here(threads=options.ranks)
    arguments.check_output(folder, parser)
    environment = results.environment() | {"threads": options.ranks}
    for row in measure(options.anchors, options.dim, options.ranks, environment):
        memory = "" if row.peak_mib is None else f"{row.peak_mib:8.1f} MiB a rank"
        print(f"{row.call:6} {row.way:12} {row.median_ms:9.1f} ms {memory}", flush=True)
        write(folder, [row])
    return 0


def write(folder: Path, rows: Iterable[DistributedRow]) -> None:
    """Write the rows of a device; those of other sizes stay."""
    path = folder / DISTRIBUTED
    merged = {row.key: row for row in [*(read(path) if path.exists() else []), *rows]}
    write_rows(path, DistributedRow, (merged[key] for key in sorted(merged)))


def read(path: Path) -> list[DistributedRow]:
    """The rows of a file that `write` has written."""
    return read_rows(path, DistributedRow)


def measure(anchors: int, dim: int, ranks: int, environment: dict[str, Any]) -> Iterator[DistributedRow]:
    """A row a call and a way, each as soon as it is measured."""
    for call in CALLS:
        for way in WAYS:
            milliseconds, peak = _measured(call, way, anchors, dim, ranks)
            low, middle, high = (
                round(value, 4) for value in statistics.quantiles(milliseconds, n=4, method="inclusive")
            )
            peak_mib = None if peak is None else round(peak / 2**20, 1)
            sizes = call, way, anchors, dim, ranks
            yield DistributedRow(*sizes, middle, low, high, len(milliseconds), peak_mib, **environment)


def _measured(call: str, way: str, anchors: int, dim: int, ranks: int) -> tuple[list[float], int | None]:
    """The milliseconds of each repetition by its slowest rank, and the peak in bytes of the rank that takes most."""
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
    slowest = [1e3 * max(of_round) for of_round in zip(*seconds, strict=True)]
    return slowest, None if None in peaks else max(peaks)


def _rank(
    sender: Connection, rank: int, ranks: int, threads: int, store: Path, call: str, way: str, anchors: int, dim: int
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    torch.manual_seed(rank)
    _run(call, way, *_inputs(64, dim))  # what libraries keep from their first use is not memory of the call
    inputs = _inputs(anchors // ranks, dim)
    before = reset_peak()
    _run(call, way, *inputs)
    peak = peak_above(before)
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
