"""Build, test, sanitize and measure on a GPU, one step after another within a given time; a short table comes last.

Needs no network, and of packages PyTorch and NumPy; Triton for its backend; CMake, Ninja and nvcc to build. A wheel of
nvidia-cutlass that HPKERNELS_CUTLASS names is built with. The tests are left out where pytest or hypothesis is missing:
what is measured is verified anyway. Each step runs in a process of its own with its own limit, and leaves its output in
a log; a step that fails keeps none of the others from running but those whose results would mean nothing. Steps that
measure no time are taken some at once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.accuracy.verify import WrongResultError, verify
from benchmarks.cases import OPS, Case, cases
from benchmarks.compiled import resources
from benchmarks.providers import provider
from benchmarks.results import Row, read_folder
from hpkernels import __main__ as installed
from hpkernels import _native, backends
from hpkernels.launches import Sizes, kernel_calls

_CHECKOUT = Path(__file__).parents[2]
SMALL = Sizes(images=3, grid=(7, 9), dim=45, feature_dim=37, pool_size=150, heads=2, head_dim=23, large_grid=(6, 11))
"""What the sanitizers see, which make kernels a hundred times slower: more than a tile, and no multiple of anything."""
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

    `needs` names a step that must have succeeded, `missing` says why this one cannot be taken, `environment` are
    variables that are set unless the caller has set them, and `words` are added to the command, those of each step
    that has succeeded. One that is `only_told` counts for nothing: its tool reports what is no fault. One
    that `measures` and is out of time has kept what it had.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str | None = None
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    only_told: bool = False
    measures: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "out of time" or "left out", and after how many seconds."""

    step: Step
    result: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the kernels."""
        late = self.result == "out of time" and self.step.measures
        return self.result == "passed" or late or bool(self.step.missing) or self.step.only_told

    def __str__(self) -> str:
        return f"{self.step.name:16} {self.result:12} {self.seconds:6.0f} s"


Plan = list[tuple[Step, ...]]
"""Steps that are taken one after another, some of them several at once."""


def steps(output: Path) -> Plan:
    """What is done, in this order: whoever is cut off misses what matters least."""
    python = sys.executable
    own = (python, "-m", "benchmarks.gpu.gpu_check")
    tests = ("tests/ops", "tests/native", "tests/test_triton_routes.py", "-k", "cuda", "-v", "-p", "no:cacheprovider")
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    places = os.pathsep.join((os.environ.get("PATH", ""), str(toolkit)))
    sanitizer = shutil.which("compute-sanitizer", path=places) or ""

    def sanitize(tool: str, backend: str, engine: str = "", needs: str | None = None) -> Step:
        # What PyTorch asks of the driver in vain, to see what there is, is no error.
        under = (sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9")
        command = (*under, *own, "exercise", backend, *engine)
        # Barriers in shared memory that TMA completes are not modelled in full.
        only_told = (tool, engine) == ("racecheck", "1")
        missing = "" if engine in ("", *_engines(backend, "cuda")) else "this GPU has no such engine"
        missing = missing if sanitizer else "no compute-sanitizer"
        name = "-".join(filter(None, (tool, backend, engine)))
        return Step(name, command, 70, needs, missing, only_told=only_told)

    def measure(name: str, seconds: float, ops: Iterable[str], others: Iterable[str], *options: str) -> tuple[Step]:
        chosen = [word for op in ops for word in ("--op", op)] + [word for p in others for word in ("--provider", p)]
        run = (python, "-m", "benchmarks", "run", "--keep-going", "--output", str(output / "results"))
        # Kernels that crash take with them what is measured after them in the process.
        ours = {f"exercise-{backend}": ("--provider", backend) for backend in KERNELS}
        return (Step(name, (*run, *chosen, *options), seconds, words=ours, measures=True),)

    apart = ["ghp_contrastive", "contrastive"]
    loss, parts = apart[:1], [op for op in OPS if op not in apart]
    paper, small = ("--images", "16", "--images", "64"), ("--images", "1", "--images", "4")

    def of_both(task: str, seconds: float, *command: str) -> list[Step]:
        return [Step(f"{task}-{backend}", (*command, backend), seconds) for backend in KERNELS]

    compiling = Step("compile", (*own, "compile"), 75, missing=resources.reason_to_skip() or "")
    checking = Step("self-check", (python, "-m", "hpkernels", "check", "--device", "cuda:0", "--limit", "60"), 85)
    testing = Step("tests", (python, "-m", "pytest", *tests), 70, missing=f"needs {lacking[0]}" if lacking else "")
    return [
        # For this GPU alone, which takes a third of the time.
        (Step("build", (python, "setup.py", "build_ext", "--inplace"), 120, environment=_for_this_gpu()),),
        (Step("report", (*own, "report"), 20), compiling),
        (checking, *of_both("exercise", 30, *own, "exercise")),
        (*of_both("prove", 60, python, "-m", "benchmarks.gpu.prove"), *of_both("verify", 50, *own, "verify")),
        measure("loss", 60, loss, FASTEST_KNOWN, *paper),
        (
            sanitize("memcheck", "cuda"),  # all the more where kernels have crashed
            sanitize("initcheck", "cuda", "", "exercise-cuda"),
            sanitize("racecheck", "cuda", "0", "exercise-cuda"),
            sanitize("racecheck", "cuda", "1", "exercise-cuda"),
            sanitize("memcheck", "triton", "", "exercise-triton"),
            testing,
        ),
        measure("ops", 70, parts, FASTEST_KNOWN, *paper),
        measure("contrastive", 60, ["contrastive"], FASTEST_KNOWN, "--images", "64", "--dtype", "bfloat16"),
        measure("small", 30, loss, ["published"], *small),
        measure("bfloat16", 60, OPS, ["published"], "--images", "16", "--dtype", "bfloat16"),
        measure("float32", 60, OPS, ["published"], "--images", "16", "--dtype", "float32"),
        (sanitize("synccheck", "cuda", "", "exercise-cuda"),),
    ]


def _for_this_gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' if major == 9 else ''}"}


def check(
    output: Path, minutes: float, plan: Callable[[Path], Plan] = steps, report: Callable[[str], None] = print
) -> bool:
    """Take all steps that the time allows, write their logs into `output`, and report; whether all passed."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}

    def take(step: Step) -> Outcome:
        left = deadline - time.monotonic()
        if step.missing:
            return Outcome(step, f"left out: {step.missing}", 0)
        if left <= 0 or (step.needs is not None and outcomes[step.needs].result != "passed"):
            return Outcome(step, "left out", 0)
        words = [word for name, own in step.words.items() if outcomes[name].result == "passed" for word in own]
        step = replace(step, command=(*step.command, *words))
        return _take(step, min(step.seconds, left), output / f"{step.name}.log")

    for together in plan(output):
        with ThreadPoolExecutor(len(together)) as threads:
            for outcome in threads.map(take, together):
                outcomes[outcome.step.name] = outcome
                report(str(outcome))
    for line in summary(read_folder(output / "results")):
        report(line)
    return all(outcome.good for outcome in outcomes.values())


def _take(step: Step, limit: float, log: Path) -> Outcome:
    start = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {' '.join(step.command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=_CHECKOUT,
                env=step.environment | os.environ,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            result = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started, which would go on
            process.wait()
            result = "out of time"
        except OSError as error:
            file.write(f"{error}\n")
            result = "failed"
    return Outcome(step, result, time.monotonic() - start)


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


def _engines(backend: str, device: str) -> tuple[str, ...]:
    """The settings of HPKERNELS_SM90, which the library reads at each call, that make a difference."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    hopper = _native.EMULATED or (on_gpu and torch.cuda.get_device_capability()[0] == 9)
    return ("1", "0") if backend == "cuda" and hopper else ("0",)


def compile_ahead() -> list[str]:
    """Compile the Triton kernels on all processors, so that none is waited for later; one sentence for each failure."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if target not in resources.TARGETS:  # the column that this GPU takes is of another, and compiled for that
        return []
    jobs = [
        job
        for sizes in (None, Sizes(images=2), SMALL)
        for job in resources.jobs(resources.DTYPES[:3], None, [target], sizes)
    ]
    return resources.compile_all(jobs, lambda line: None)[1]


def exercise(device: str, backend: str, engine: str = "") -> int:
    """Make every call that launches a backend's kernels on small inputs, in two dtypes; returns how many there were.

    By each of the engines that there are, or one.
    """
    calls = 0
    for op in backends.registered_ops():
        for dtype in (torch.float16, torch.float32):
            if not backends.availability(op, backend, device, dtype).ok:
                continue
            for chosen in (engine,) if engine else _engines(backend, device):
                with patch.dict(os.environ, HPKERNELS_SM90=chosen):
                    for call in kernel_calls(op, dtype, device, SMALL, backend).values():
                        call()
                        calls += 1
    return calls


def verify_all(device: str, backend: str, report: Callable[[str], None] = print) -> bool:
    """Compare each call of each op with the reference in float64, in two dtypes; whether there are some, all right."""
    states = []
    for op in OPS:
        for dtype in ("float16", "float32"):
            for case in cases(op, device=device, dtype=dtype, images=(2,)):
                if provider(case, backend).reason_to_skip(case):
                    continue
                for engine in _engines(backend, device):
                    wrong = _verified(case, backend, engine)
                    states.append(not wrong)
                    report(f"{case} {backend} HPKERNELS_SM90={engine}: {wrong or 'right'}")
    return bool(states) and all(states)


def _verified(case: Case, backend: str, engine: str) -> str:
    """What is wrong with a backend in a case, or ""."""
    try:
        with patch.dict(os.environ, HPKERNELS_SM90=engine):
            verify(case, provider(case, backend))
    except (WrongResultError, RuntimeError) as error:
        return str(error)
    return ""


def print_report() -> bool:
    """Print what ``python -m hpkernels`` prints; whether the CUDA library is loaded."""
    installed.main([])
    return _native.LIBRARIES["_C_cuda"].ok


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor its own memory, for the sanitizers
    task, *rest = sys.argv[1:]
    if task == "compile":
        failures = compile_ahead()
        sys.exit("\n".join(failures) if failures else 0)
    elif task == "report":
        sys.exit(0 if print_report() else 1)
    elif task == "verify":
        sys.exit(0 if verify_all("cuda", *rest) else 1)
    made = exercise("cuda", *rest)
    torch.cuda.synchronize()
    print(f"{made} calls")
    sys.exit(0 if made else 1)
