"""Rows of results, their files, and the columns that say where and when they were measured."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import hpkernels
from benchmarks.csv_files import read_rows, write_rows
from benchmarks.inputs import END_TO_END
from benchmarks.timing import nvml
from hpkernels.ops import _triton

RESULTS = Path(__file__).parent / "results"
RESOURCES = "resources.csv"
"""What benchmarks/compiled/resources.py writes: no times, and other columns."""
ERRORS = "errors.csv"
"""What benchmarks/accuracy/errors.py writes: no times either."""
DISTRIBUTED = "distributed.csv"
"""What benchmarks/distributed.py writes: times of several processes."""

PART = f"{END_TO_END} "
"""How the call of a row begins that is a part of a whole step of training, timed with it."""


@dataclass(kw_only=True)
class Environment:
    """Where, when and with what a row was measured: the last columns of every file of measurements."""

    device: str = ""
    instructions: str = ""
    threads: int = 0
    hpkernels: str = ""
    torch: str = ""
    python: str = ""
    driver: str = ""
    cuda: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""


@dataclass
class Row(Environment):
    """One provider in one case; docs/benchmarks.md says what the columns mean. Empty where there is nothing to say."""

    op: str
    call: str
    images: int
    height: int
    width: int
    anchors: int
    dtype: str
    provider: str
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    repetitions: int = 0
    timer: str = ""
    wall_ms: float | None = None
    peak_mib: float | None = None
    verified_anchors: int | None = None
    note: str = ""
    tflops: float | None = None
    gb_s: float | None = None
    mm_tflops: float | None = None
    of_mm: float | None = None
    of_roofline: float | None = None
    roofline: str = ""
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: str = ""

    @property
    def images_per_second(self) -> float | None:
        """Of a whole step of training that was timed."""
        if self.op != "training_step" or self.call.startswith(PART) or not self.median_ms:
            return None
        return 1e3 * self.images / self.median_ms

    @property
    def key(self) -> tuple:
        """What was measured: rows of the same key are measurements of the same thing."""
        return self.op, self.call, self.anchors, self.dtype, self.provider

    def set_times(self, seconds: list[float], wall: Sequence[float] = (), timer: str = "wall") -> None:
        """Fill the columns of the time from the seconds of each repetition, and those by the wall clock if others."""
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
        self.q1_ms, self.median_ms, self.q3_ms = (round(1e3 * value, 4) for value in (low, middle, high))
        self.repetitions, self.timer = len(seconds), timer
        self.wall_ms = round(1e3 * statistics.median(wall or seconds), 4)


def environment(device: str = "cpu") -> dict[str, str | int]:
    """The columns of `Environment` for what is measured now, by the command that runs."""
    here = Environment(
        device=device_name(device),
        instructions=_instructions(device),
        threads=torch.get_num_threads(),
        hpkernels=hpkernels.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        driver=nvml.card().driver if device == "cuda" else "",
        cuda=(torch.version.cuda or "") if device == "cuda" else "",
        commit=commit(),
        date=now(),
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    )
    return asdict(here)


def now() -> str:
    """The date and time in UTC, as files have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _instructions(device: str) -> str:
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}, {_triton_version()}"


def _triton_version() -> str:
    return "no Triton" if _triton.triton is None else f"Triton {_triton.triton.__version__}"


def device_name(device: str = "cpu") -> str:
    """The processor's own name for itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def folder_name(device: str, threads: int | None = None) -> str:
    """The name of the folder that results of a device, a processor with this many threads, are kept in.

    Example:
        >>> folder_name("AMD EPYC 7763 64-Core Processor", 2)
        'amd-epyc-7763-2-threads'
    """
    name = re.sub(r"\(.*?\)|@.*|\d+-core|\b(cpu|processor)\b", " ", device.lower())
    words = re.findall(r"[a-z0-9]+", name)
    return "-".join(words if threads is None else [*words, str(threads), "thread" if threads == 1 else "threads"])


def folder_here(device: str = "cpu", threads: int | None = None) -> Path:
    """The folder of what is measured on this machine, on a CPU by so many threads (None: PyTorch's)."""
    threads = None if device == "cuda" else threads or torch.get_num_threads()
    return RESULTS / folder_name(device_name(device), threads)


def commit() -> str:
    """The commit of the checkout, with "+" if files under version control differ from it, but for results and pages.

    A copy without its history cannot say: there HPKERNELS_COMMIT does.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        places = ":(top)", ":(exclude)results", ":(top,exclude)docs"
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", *places) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HPKERNELS_COMMIT") or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=RESULTS.parent, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: a column is missing that every file has, or is none of `Row`.
    """
    return read_rows(path, Row)


def read_folder(folder: Path) -> list[Row]:
    """The rows of all CSV files of a folder that have an op's."""
    others = RESOURCES, ERRORS, DISTRIBUTED
    return [row for path in sorted(folder.glob("*.csv")) if path.name not in others for row in read(path)]


def write(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Write one CSV file an op; rows that a file has for other cases or providers stay."""
    by_op: dict[str, dict[tuple, Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, {})[row.key] = row
    written = []
    for op, new in by_op.items():
        path = folder / f"{op}.csv"
        merged = {row.key: row for row in (read(path) if path.exists() else [])} | new
        write_rows(path, Row, (merged[key] for key in sorted(merged)))
        written.append(path)
    return written
