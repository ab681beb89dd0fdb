"""Build, test, sanitize and measure on a GPU, one step after another within a given time; a short table comes last.

Needs no network; PyTorch, Triton, NumPy, pytest and hypothesis, and CMake, Ninja and nvcc for the compiled
libraries. Each step runs in a process of its own with its own limit, and leaves its output in a log; a step
that fails keeps none of the others from running but those whose results would mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results import Row, read_folder
from hpkernels import backends
from hpkernels.testing.launches import Sizes, kernel_calls

_CHECKOUT = Path(__file__).parent.parent
SMALL = Sizes(images=2, grid=(5, 7), dim=48, feature_dim=40, pool_size=150, heads=2, head_dim=24, large_grid=(6, 9))
"""What the sanitizers see: they make kernels a hundred times slower."""


@dataclass(frozen=True)
class Step:
    """One command and its limit in seconds; `needs` names a step that must have succeeded."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "left out", and after how many seconds."""

    step: Step
    result: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.step.name:12} {self.result:12} {self.seconds:6.0f} s"


def steps(output: Path) -> list[Step]:
    """What is done, in this order."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    exercise = (python, "-m", "benchmarks.gpu_check")
    tests = ("tests/ops", "tests/test_triton_routes.py", "-k", "cuda", "-q", "-p", "no:cacheprovider")
    return [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 150),
        Step("report", (python, "-m", "hpkernels"), 30),
        Step("exercise", exercise, 90),
        Step("tests", (python, "-m", "pytest", *tests), 200),
        *(
            Step(tool, (sanitizer, "--tool", tool, "--error-exitcode", "9", *exercise), 60, needs="exercise")
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Step("benchmarks", (python, "-m", "benchmarks", "run", "--output", str(output / "results")), 200, "exercise"),
    ]


def check(
    output: Path, minutes: float, plan: Callable[[Path], list[Step]] = steps, report: Callable[[str], None] = print
) -> bool:
    """Take all steps that the time allows, write their logs into `output`, and report; whether all passed."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    for step in plan(output):
        left = deadline - time.monotonic()
        if left <= 0 or (step.needs is not None and outcomes[step.needs].result != "passed"):
            outcomes[step.name] = Outcome(step, "left out", 0)
        else:
            outcomes[step.name] = _take(step, min(step.seconds, left), output / f"{step.name}.log")
        report(str(outcomes[step.name]))
    for line in summary(read_folder(output / "results")):
        report(line)
    return all(outcome.result == "passed" for outcome in outcomes.values())


def _take(step: Step, limit: float, log: Path) -> Outcome:
    start = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {' '.join(step.command)}\n")
        file.flush()
        try:
            status = subprocess.run(
                step.command, cwd=_CHECKOUT, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
            result = "failed" if status else "passed"
        except subprocess.TimeoutExpired:
            result = "out of time"
        except OSError as error:
            file.write(f"{error}\n")
            result = "failed"
    return Outcome(step, result, time.monotonic() - start)


def summary(rows: list[Row]) -> list[str]:
    """A line for each call at its largest size: medians, peak memory, and times faster than the published way."""
    lines = []
    for op, call in dict.fromkeys((row.op, row.call) for row in rows):
        measured = [row for row in rows if (row.op, row.call) == (op, call) and row.median_ms is not None]
        if not measured:
            continue
        anchors = max(row.anchors for row in measured)
        own = [row for row in measured if row.anchors == anchors]
        published = next((row.median_ms for row in own if row.provider == "published"), None)
        lines.append(f"{op} {call}, N = {anchors}, {own[0].dtype}")
        for row in sorted(own, key=lambda row: row.median_ms):
            memory = "" if row.peak_mib is None else f"{row.peak_mib:10.1f} MiB"
            ratio = "" if published is None else f"  {published / row.median_ms:6.2f} x published"
            lines.append(f"  {row.provider:24}{row.median_ms:10.3f} ms{memory}{ratio}")
    return lines


def exercise(device: str) -> int:
    """Make every call that launches Triton kernels on small inputs, in two dtypes; returns how many there were."""
    calls = 0
    for op in backends.registered_ops():
        for dtype in (torch.float16, torch.float32):
            for call in kernel_calls(op, dtype, device, SMALL).values():
                call()
                calls += 1
    return calls


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor its own memory, for the sanitizers
    print(f"{exercise('cuda')} calls")
    torch.cuda.synchronize()
