"""What gpu-check does, in three parts of which each can be taken alone: whether all is right, times, and sweeps.

Each part begins with what the others need as well: the libraries, the Triton kernels and every kernel once. Where an
earlier part has left these, that takes seconds. The limits are planned for sixteen processors, and never measured. What
matters most comes first, since whoever is cut off misses the rest.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import OPS
from benchmarks.compiled import resources
from benchmarks.gpu import aims
from benchmarks.gpu.gpu_check import FASTEST_KNOWN, KERNELS, Plan, Step
from benchmarks.gpu.prove import PROOFS
from benchmarks.gpu.tasks import engines
from benchmarks.registry import STEPS
from hpkernels import backends

_PYTHON = sys.executable
_TASKS = (_PYTHON, "-m", "benchmarks.gpu.tasks")
_EAGER = tuple(name for name in FASTEST_KNOWN if name != "compiled")
_COMPILED = ("compiled", "compiled-chunked")
_PAPER, _SMALLER = ("--images", "64"), ("--images", "16")


def _common() -> Plan:
    """What every part begins with."""
    compiling = Step("compile", (*_TASKS, "compile"), 75, missing=resources.reason_to_skip() or "")
    exercised = []
    for op in backends.registered_ops():
        for backend in _backends_of(op):
            exercised += [Step(_exercise(backend, op), (*_TASKS, "exercise", backend, "0", op), 45)]
        if "cuda" in _backends_of(op):
            exercised += [Step(_hopper(op), (*_TASKS, "exercise", "cuda", "1", op), 45, missing=_lacks_engine())]
    return [
        (Step("build", (_PYTHON, "-m", "benchmarks.gpu.build"), 150),),
        (Step("report", (*_TASKS, "report"), 30), compiling),
        tuple(exercised),
    ]


def _backends_of(op: str) -> list[str]:
    """The backends that have kernels of a registered op: `contrastive` has none in CUDA."""
    return [backend for backend in KERNELS if backends.is_registered(op, backend)]


def _exercise(backend: str, op: str) -> str:
    return f"exercise-{backend}-{op}"


def _hopper(op: str) -> str:
    return f"exercise-cuda-hopper-{op}"


def _lacks_engine() -> str:
    return "" if "1" in engines("cuda", "cuda") else "this GPU has no such engine"


def right(results: Path) -> Plan:
    """Whether the kernels are right: step 1 of the hardware pass."""
    checking = Step("self-check", (_PYTHON, "-m", "hpkernels", "check", "--device", "cuda:0", "--limit", "60"), 180)
    proofs = [
        Step(
            f"prove-{backend}-{proof}",
            (_PYTHON, "-m", "benchmarks.gpu.prove", backend, proof),
            60,
            hopper=_hopper_of(backend, backends.registered_ops()),
        )
        for proof in PROOFS
        for backend in KERNELS
    ]
    verified = [
        Step(f"verify-{backend}-{op}", (*_TASKS, "verify", backend, op), 45, hopper=_hopper_of(backend, _made_of([op])))
        for op in OPS
        for backend in KERNELS
        if any(backend in _backends_of(each) for each in _made_of([op]))
    ]
    sanitized = [
        _sanitize("memcheck", "cuda", "0"),
        _sanitize("memcheck", "cuda", "1"),
        _sanitize("initcheck", "cuda", "0"),
        _sanitize("initcheck", "cuda", "1"),
        _sanitize("racecheck", "cuda", "0"),
        # Barriers in shared memory that TMA completes are not modelled in full.
        replace(_sanitize("racecheck", "cuda", "1"), only_told=True),
        _sanitize("memcheck", "triton", "0"),
        _sanitize("synccheck", "cuda", "0"),
    ]
    return [*_common(), (checking, *proofs, *verified), (_suite(), *sanitized)]


def _sanitize(tool: str, backend: str, engine: str) -> Step:
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    places = os.pathsep.join((os.environ.get("PATH", ""), str(toolkit)))
    sanitizer = shutil.which("compute-sanitizer", path=places)
    # What PyTorch asks of the driver in vain, to see what there is, is no error.
    under = (sanitizer or "", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9")
    missing = "" if sanitizer else "no compute-sanitizer"
    missing = missing or (_lacks_engine() if engine == "1" else "")
    name = f"{tool}-{backend}{'-hopper' if engine == '1' else ''}"
    return Step(name, (*under, *_TASKS, "exercise", backend, engine), 180, missing)


def _suite() -> Step:
    """All tests, several at a time where pytest-xdist is; those of kernels and ops come first, by their names."""
    lacking = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    at_once = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    # Whose conftest.py is of the training loop: it fails to import without.
    without = () if importlib.util.find_spec("pydantic") else ("--ignore", "tests/training")
    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *at_once, *without)
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return Step(
        "suite", (_PYTHON, "-m", "pytest", *options), 240, f"needs {lacking[0]}" if lacking else "", environment
    )


def measure(results: Path) -> Plan:
    """Times at the paper's size, then at others: step 2 of the hardware pass."""
    loss, steps = "ghp_contrastive", ("end-to-end", "forward+backward")
    apart = (loss, "training_step", "contrastive")
    parts = [op for op in OPS if op not in apart]
    of_parts = [_measure(results, op, 45, [op], _EAGER, *_PAPER) for op in parts]
    kernels = [
        Step(
            f"kernels-{backend}",
            (_PYTHON, "-m", "benchmarks.gpu.kernels", str(results / aims.KERNELS), backend),
            45,
            hopper=_hopper_of(backend, backends.registered_ops()),
            measures=True,
        )
        for backend in KERNELS
    ]
    of_steps = [
        _measure(results, f"step-{call}", 45, ["training_step"], ["published"], "--call", call, *_PAPER)
        for call in steps
    ]
    return [
        *_common(),
        (Step("ceilings", (*_TASKS, "ceilings"), 20, measures=True),),
        (_measure(results, "loss", 60, [loss], _EAGER, *_PAPER),),
        *((step,) for step in (*kernels, *of_parts, *of_steps)),
        (_measure(results, "contrastive", 60, ["contrastive"], FASTEST_KNOWN, *_PAPER, "--dtype", "bfloat16"),),
        (_measure(results, "compiled", 60, [loss, *parts], _COMPILED, *_PAPER, with_ours=False),),
        (_measure(results, "bfloat16", 45, OPS, ["published"], *_SMALLER, "--dtype", "bfloat16"),),
        (_measure(results, "float32", 45, OPS, ["published"], *_SMALLER, "--dtype", "float32"),),
        (_measure(results, "float16", 45, OPS, _EAGER, *_SMALLER),),
    ]


def sweeps(results: Path) -> Plan:
    """Density and N: the rest of step 2."""
    memory, largest = results / "memory", tuple(str(2**power) for power in range(8))
    grown = ("ghp_contrastive", "contrastive", "hidden_positives", "multi_positive_contrastive")
    few = [word for count in largest for word in ("--images", count)]
    densities = ("multi_positive_contrastive", "ghp_contrastive")
    sweep = ("--sweep", "memory")
    return [
        *_common(),
        (_measure(results, "density", 120, densities, ["published"], "--sweep", "density"),),
        *((_measure(memory, f"memory-{op}", 75, [op], (), *sweep),) for op in grown[:2]),
        (_measure(memory, "memory-others", 75, grown, ["published", "torch-chunked"], *few, *sweep, with_ours=False),),
        *((_measure(memory, f"memory-{op}", 45, [op], (), *sweep),) for op in grown[2:]),
        (Step("errors", (_PYTHON, "-m", "benchmarks", "errors", "--output", str(results)), 60, measures=True),),
    ]


def _measure(
    folder: Path, name: str, seconds: float, ops: Iterable[str], others: Iterable[str], *options: str, with_ours=True
) -> Step:
    """``python -m benchmarks run``, with those of our backends whose kernels have run for all these ops."""
    chosen = [word for op in ops for word in ("--op", op)] + [word for p in others for word in ("--provider", p)]
    command = (_PYTHON, "-m", "benchmarks", "run", "--device", "cuda", "--keep-going", "--output", str(folder))
    made_of = _made_of(ops)
    # Kernels that crash take with them what is measured after them in the process.
    words = {
        tuple(_exercise(backend, op) for op in made_of if backend in _backends_of(op)): ("--provider", backend)
        for backend in KERNELS
        if with_ours
    }
    hopper = _hopper_of("cuda", made_of) if with_ours else ()
    return Step(name, (*command, *chosen, *options), seconds, words=words, hopper=hopper, measures=True)


def _made_of(ops: Iterable[str]) -> list[str]:
    """The registered ops that these run."""
    return sorted({step for op in ops for step in STEPS.get(op, (op,))})


def _hopper_of(backend: str, ops: Iterable[str]) -> tuple[str, ...]:
    """The steps that have exercised the engine for Hopper in these ops."""
    if backend != "cuda" or _lacks_engine():
        return ()
    return tuple(_hopper(op) for op in ops if "cuda" in _backends_of(op))


PARTS: dict[str, Callable[[Path], Plan]] = {"right": right, "measure": measure, "sweeps": sweeps}
"""By name, in order; each is given the folder of the results."""


def with_caches(plan: Plan) -> Plan:
    """The same steps, with folders for what is compiled and found out if the home folder cannot be written to."""
    if os.access(Path.home(), os.W_OK):
        return plan
    kept = Path(tempfile.gettempdir()) / "hpkernels-gpu-check"
    caches = {"TRITON_CACHE_DIR": str(kept / "triton"), "XDG_CACHE_HOME": str(kept), "MPLCONFIGDIR": str(kept)}
    return [tuple(replace(step, environment=caches | step.environment) for step in together) for together in plan]
