"""Build, test, sanitize and measure on a GPU, in parts that each take their steps within a given time.

Each step runs in processes of its own with its own limit, and leaves its output in a log; a step that fails keeps none
of the others from running. What is done in which order is in ``plan.py``. Everything is written to one folder, which
is packed into one file after each step, so that whoever is cut off has what was found until then.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import aims
from benchmarks.results import Row, read_folder

_CHECKOUT = Path(__file__).parents[2]
_AT_ONCE = 12
"""Processes on one GPU, of which each takes half a GiB of its memory before it computes anything."""
_LAST_WORDS = 5.0
"""Seconds that a step which is out of time has to say what it found."""
KERNELS = ("cuda", "triton")
FASTEST_KNOWN = (
    "published",
    "compiled",
    "torch-topk",
    "torch-matmul",
    "torch-bmm",
    "torch-dense",
    "torch-chunked",
    "memeff",
)


@dataclass(frozen=True)
class Step:
    """One command and its limit in seconds.

    Attributes:
        name: of the step and of its log.
        command: what is run, in the root of the checkout.
        seconds: after which it is ended.
        missing: why it cannot be taken here, or "".
        environment: variables that are set unless the caller has set them.
        words: added to the command, each if all the steps that it is kept under have passed; a step that is to have
            some and gets none is left out.
        hopper: steps without which the engine for Hopper is not used.
        only_told: counts for nothing: the tool reports what is no fault.
        measures: if out of time, it has kept what it had, which is no fault.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    words: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    hopper: tuple[str, ...] = ()
    only_told: bool = False
    measures: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "left out", after how long, and what else to say."""

    step: Step
    result: str
    seconds: float = 0.0
    remark: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the kernels."""
        late = self.result == "out of time" and self.step.measures
        return self.result == "passed" or late or bool(self.step.missing) or self.step.only_told

    def __str__(self) -> str:
        return f"{self.step.name:36} {self.result:12} {self.seconds:5.0f} s  {self.remark}".rstrip()


Plan = list[tuple[Step, ...]]
"""Steps that are taken one after another, some of them several at once."""


def _say(line: str) -> None:
    print(line, flush=True)


def check(
    output: Path,
    plans: Iterable[tuple[str, Plan]],
    minutes: float,
    device: str,
    archive: Path | None = None,
    report: Callable[[str], None] = _say,
) -> bool:
    """Take the steps of all parts, write logs and results, and report; whether all steps passed.

    Args:
        output: folder of all that is written; what is there of earlier parts stays.
        plans: the steps of each part, by its name.
        minutes: that each part may take.
        device: name of the folder in which `output` has the results of this GPU.
        archive: file that the folder is packed into; None: none.
        report: is given each line.
    """
    results = output.resolve() / "results" / device
    outcomes: dict[str, Outcome] = {}
    good = True
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; steps would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for part, plan in plans:
        report(f"part {part}, at most {minutes:g} minutes")
        runner = _Runner(results / "logs" / part, time.monotonic() + 60 * minutes, outcomes)
        for together in plan:
            for outcome in runner.take(together):
                outcomes[outcome.step.name] = outcome
                good = good and outcome.good
                report(str(outcome))
            _pack(output, archive)
    lines = [*summary(read_folder(results)), "", *aims.compared(aims.read(results))]
    if outcomes:
        failed = [name for name, outcome in outcomes.items() if not outcome.good]
        lines += ["", f"{len(outcomes)} steps, not passed: {', '.join(failed) or 'none'}"]
    (results / "logs").mkdir(parents=True, exist_ok=True)
    (results / "logs" / "summary.txt").write_text("\n".join([*map(str, outcomes.values()), *lines, ""]))
    _pack(output, archive)
    for line in lines:
        report(line)
    return good


class _Runner:
    """Takes steps until a deadline, with what is known of those before."""

    def __init__(self, logs: Path, deadline: float, outcomes: dict[str, Outcome]) -> None:
        self._logs, self._deadline, self._outcomes = logs, deadline, outcomes
        logs.mkdir(parents=True, exist_ok=True)

    def take(self, together: tuple[Step, ...]) -> Iterable[Outcome]:
        """Take steps at once, as many as fit into the memory of a GPU."""
        workers = min(len(together), _AT_ONCE)
        threads = max(1, (os.cpu_count() or 1) // workers)
        shared = {"OMP_NUM_THREADS": str(threads)} if workers > 1 else {}
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda step: self._take(step, shared), together)

    def _take(self, step: Step, shared: dict[str, str]) -> Outcome:
        left = self._deadline - time.monotonic()
        if step.missing:
            return Outcome(step, "left out", remark=step.missing)
        if left <= 0:
            return Outcome(step, "left out", remark="no time")
        words = [word for names, own in step.words.items() if all(map(self._passed, names)) for word in own]
        if step.words and not words:
            return Outcome(step, "left out", remark=f"has not passed: {', '.join(self._not_passed(step))}")
        given = {"PYTHONUNBUFFERED": "1"} | shared | step.environment | os.environ
        remark = ""
        if failed := [name for name in step.hopper if not self._passed(name)]:
            given["HPKERNELS_SM90"] = "0"
            remark = f"with HPKERNELS_SM90=0: {failed[0]} has not passed"
        command, limit = [*step.command, *words], min(step.seconds, left)
        start = time.monotonic()
        log = self._logs / f"{step.name}.log"
        result = _run(command, given, limit, log)
        if result == "failed":
            remark = "; ".join(filter(None, (remark, _last_line(log))))
        return Outcome(step, result, time.monotonic() - start, remark)

    def _not_passed(self, step: Step) -> list[str]:
        return [name for names in step.words for name in names if not self._passed(name)]

    def _passed(self, name: str) -> bool:
        return name in self._outcomes and self._outcomes[name].result == "passed"


def _run(command: list[str], environment: dict[str, str], limit: float, log: Path) -> str:
    with log.open("w") as file:
        said = f"HPKERNELS_SM90={environment['HPKERNELS_SM90']} " if "HPKERNELS_SM90" in environment else ""
        file.write(f"$ {said}{shlex.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=_CHECKOUT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return "failed"
        try:
            return "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started, which would go on; one that the driver holds is not waited for."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        if sent == signal.SIGKILL or process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n", 1)[-1].split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _pack(output: Path, archive: Path | None) -> None:
    """Pack the folder into one file, which is never there in part."""
    if archive is not None:
        unfinished = archive.with_name(f"{archive.name}.part")
        with tarfile.open(unfinished, "w:gz") as file:
            file.add(output, arcname=".", filter=lambda entry: None if _is(entry.name, archive, output) else entry)
        unfinished.replace(archive)


def _is(name: str, archive: Path, output: Path) -> bool:
    """Whether a file of the folder is the archive of it."""
    return (output / name).resolve() in (archive.resolve(), archive.resolve().with_name(f"{archive.name}.part"))


def summary(rows: list[Row]) -> list[str]:
    """A line for each case: medians in ms, the fastest of what is known by name, and how many times faster we are."""
    lines = []
    for case in dict.fromkeys((row.op, row.call, row.dtype, row.anchors) for row in rows):
        own = {
            row.provider: row.median_ms
            for row in rows
            if (row.op, row.call, row.dtype, row.anchors) == case and row.median_ms is not None
        }
        known = min((name for name in FASTEST_KNOWN if name in own), key=own.get, default=None)
        ours = min((own[name] for name in KERNELS if name in own), default=None)
        times = [f"{own[name]:10.3f}" if name in own else f"{'-':>10}" for name in (*KERNELS, "published")]
        fastest = f"{own[known]:10.3f} {known:13}" if known else f"{'-':>10} {'':13}"
        ratio = f"{own[known] / ours:8.2f} x" if known and ours else ""
        op, call, dtype, anchors = case
        lines.append(f"{op:26} {call:16} {dtype:8} {anchors:6} {' '.join(times)} {fastest}{ratio}".rstrip())
    times = " ".join(f"{name:>10}" for name in (*KERNELS, "published", "fastest"))
    return [f"{'median ms':52} {'N':>6} {times} known", *lines] if lines else []
