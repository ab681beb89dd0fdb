"""``python -m hpkernels.tune --output FILE``: measure configurations of the Triton kernels on this machine's GPU.

Each kernel starts from its configuration in the table and moves to the fastest of its neighbours, with one tile size or
number of warps doubled or halved or one stage more or less, until none is faster. A configuration whose results are not
those of the table's is not timed. ``HPKERNELS_TRITON_TABLE=FILE`` makes the kernels use what is written; see
docs/triton.md.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.launches import Calls, Launch, Sizes, kernel_calls, recorded
from hpkernels.ops import _triton

Configuration = dict[str, int]
Expected = dict[str, list[Tensor]]  # outputs of each call
Timer = Callable[[Launch], float]

DTYPES = {"2": (torch.float16,), "4": (torch.float32,), "any": (torch.float16, torch.float32)}
LARGEST = {"num_warps": 16, "num_stages": 6}
LARGEST_TILE = 1024
LEAST_GAIN = 0.03  # of the time: less may be noise
# Ranking and discovery sum products in the same steps, so that a feature that is in the pool has one product in both.
FIXED = dict.fromkeys(
    (
        "masked_topk_top1_fwd_kernel",
        "masked_topk_fwd_kernel",
        "hidden_positives_fwd_kernel",
        "hidden_positives_between_fwd_kernel",
    ),
    ("BLOCK_D",),
)


class WrongResultError(RuntimeError):
    """A configuration gives other results than the table's."""


@dataclass(frozen=True)
class Entry:
    """One configuration of the table: of a kernel of an op, on an architecture, for an element size or "any"."""

    op: str
    kernel: str
    arch: str
    size: str

    @property
    def configuration(self) -> Configuration:
        """The one of the table."""
        return dict(_triton.table()[self.kernel][self.arch][self.size])

    def __str__(self) -> str:
        return f"{self.kernel}, element size {self.size}"


def main(arguments: list[str] | None = None) -> int:
    """Tune what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hpkernels.tune", description="Tune the Triton kernels on this GPU."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the table to write, or to add to")
    parser.add_argument("--op", action="append", metavar="OP", help="only this op; may be repeated")
    parser.add_argument("--kernel", action="append", metavar="KERNEL", help="only this kernel; may be repeated")
    parser.add_argument("--images", type=int, default=64, help="images of a batch (default: 64)")
    options = parser.parse_args(arguments)
    usable, reason = _triton.supports(torch.device("cuda"), torch.float16)
    if not torch.cuda.is_available() or not usable:
        reason = reason if torch.cuda.is_available() else "PyTorch sees none on this machine"
        print(f"hpkernels.tune measures on a GPU that Triton can use: {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    chosen = entries(_triton.architecture(device))
    for name, given in (("op", options.op), ("kernel", options.kernel)):
        known = {getattr(entry, name) for entry in chosen}
        if not set(given or ()) <= known:
            parser.error(f"--{name} must be one of {', '.join(sorted(known))}, got {', '.join(given)}")
        chosen = [entry for entry in chosen if not given or getattr(entry, name) in given]
    write_table(options.output, chosen, device, Sizes(images=options.images))
    return 0


def median_ms(launch: Launch) -> float:
    """The median time of a launch, with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(launch.make, return_mode="median"))


def write_table(
    path: Path, chosen: list[Entry], device: torch.device, sizes: Sizes, time: Callable[[Launch], float] = median_ms
) -> None:
    """Tune some entries on a device, and write each that has a faster configuration as soon as it is found."""
    add(path, {})
    for entry in chosen:
        calls: Calls = {}
        for dtype in DTYPES[entry.size]:
            made = kernel_calls(entry.op, dtype, device, sizes)
            calls |= {f"{name}, {dtype}": call for name, call in made.items()}
        faster = tune(entry, calls, time)
        if faster:
            add(path, {entry: faster})


def entries(arch: str) -> list[Entry]:
    """What the table has for an architecture."""
    folder = Path(_triton.__file__).parent
    return [
        Entry(op, kernel, arch, size)
        for op in backends.registered_ops()
        for kernel, by_arch in json.loads((folder / op / "triton.json").read_text()).items()
        for size in by_arch[arch]
    ]


def tune(entry: Entry, calls: Calls, time: Callable[[Launch], float] = median_ms) -> Configuration | None:
    """The fastest configuration found for an entry, None if that is the table's.

    Args:
        entry: what is tuned.
        calls: of the op; those that launch the kernel with the entry are measured.
        time: the time of a launch, in ms.
    """
    start = entry.configuration
    expected: dict[str, list[Tensor]] = {}
    for name, call in calls.items():
        outputs, used = _run(entry, start, call)
        if used:
            expected[name] = outputs
    if not expected:
        print(f"{entry}: no call launches it")
        return None
    calls = {name: calls[name] for name in expected}
    measured = {_key(start): _measure(entry, start, calls, expected, time)}
    print(f"{entry}: {measured[_key(start)]:.4g} ms with {start}")
    best, improved = start, True
    while improved:
        candidates = [
            candidate for candidate in neighbours(best, FIXED.get(entry.kernel, ())) if _key(candidate) not in measured
        ]
        for candidate in candidates:
            measured[_key(candidate)] = _try(entry, candidate, calls, expected, time)
        fastest = min([best, *candidates], key=lambda candidate: measured[_key(candidate)])
        improved = measured[_key(fastest)] < (1 - LEAST_GAIN) * measured[_key(best)]
        best = fastest if improved else best
    if best is start:
        return None
    # The fastest of many may owe it to noise.
    before, after = (_measure(entry, each, calls, expected, time) for each in (start, best))
    print(f"{entry}: {before:.4g} ms -> {after:.4g} ms with {best}")
    return best if after < (1 - LEAST_GAIN) * before else None


def neighbours(configuration: Configuration, fixed: Container[str] = ()) -> Iterator[Configuration]:
    """Configurations that differ by one step of one number that is not `fixed`."""
    for name, value in configuration.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for changed in steps:
            if name not in fixed and 1 <= changed <= LARGEST.get(name, LARGEST_TILE):
                yield configuration | {name: changed}


def add(path: Path, configurations: dict[Entry, Configuration]) -> None:
    """Write configurations into a table, whole or not at all; what else the table has stays."""
    table = json.loads(path.read_text()) if path.exists() else {}
    for entry, configuration in configurations.items():
        table.setdefault(entry.kernel, {}).setdefault(entry.arch, {})[entry.size] = configuration
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(table, indent=2) + "\n")
    unfinished.replace(path)


def _key(configuration: Configuration) -> tuple[Any, ...]:
    return tuple(configuration.items())


def _try(entry: Entry, configuration: Configuration, calls: Calls, expected: Expected, time: Timer) -> float:
    """The time of the calls, infinite if the configuration cannot run or gives other results."""
    from triton.errors import TritonError

    changed = ", ".join(f"{k}={v}" for k, v in configuration.items() if v != entry.configuration[k])
    try:
        with redirect_stdout(io.StringIO()):  # to which Triton prints all of a program that the assembler refuses
            taken = _measure(entry, configuration, calls, expected, time)
    except torch.AcceleratorError:  # the device is lost to this process
        raise
    except (TritonError, RuntimeError) as error:
        print(f"  {changed}: left out, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return math.inf
    print(f"  {changed}: {taken:.4g} ms", flush=True)
    return taken


def _measure(entry: Entry, configuration: Configuration, calls: Calls, expected: Expected, time: Timer) -> float:
    total = 0.0
    for name, call in calls.items():
        outputs, launches = _run(entry, configuration, call)
        if not all(map(_same, outputs, expected[name])):
            raise WrongResultError(f"{name} gives other results")
        total += sum(map(time, launches))
    return total


def _run(entry: Entry, configuration: Configuration, call: Callable[[], Any]) -> tuple[list[Tensor], list[Launch]]:
    """The outputs of a call with `configuration` for `entry`, and the launches that used it."""
    with configured(entry, configuration), recorded(entry.arch, run=True) as launches:
        outputs = call()
    used = {launch.key: launch for launch in launches if (launch.name, launch.size) == (entry.kernel, entry.size)}
    return list(outputs if isinstance(outputs, tuple) else (outputs,)), list(used.values())


@contextmanager
def configured(entry: Entry, configuration: Configuration) -> Iterator[None]:
    """Use `configuration` for `entry` inside the ``with`` block."""
    by_size = _triton.table()[entry.kernel][entry.arch]
    try:
        with patch.dict(by_size, {entry.size: configuration}):
            _triton._lookup.cache_clear()
            yield
    finally:
        _triton._lookup.cache_clear()


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Whether results agree: floating-point numbers up to rounding, in units of the row's largest, others exactly."""
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-2
    actual, expected = actual.float(), expected.float()
    largest = expected.where(expected.isfinite(), 0).abs()
    largest = largest.amax(dim=-1, keepdim=True) if largest.ndim else largest
    close = ((actual - expected).abs() <= tolerance * largest) | (actual == expected)
    return bool((close | (actual.isnan() & expected.isnan())).all())


if __name__ == "__main__":
    sys.exit(main())
