"""What single steps of gpu-check do, each in a process of its own: ``python -m benchmarks.gpu.tasks TASK ...``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.accuracy.verify import WrongResultError, verify
from benchmarks.cases import Case, cases
from benchmarks.compiled import resources
from benchmarks.providers import provider
from benchmarks.timing import nvml, rates
from hpkernels import __main__ as installed
from hpkernels import _native, backends
from hpkernels.launches import Sizes, kernel_calls

SMALL = Sizes(images=3, grid=(7, 9), dim=45, feature_dim=37, pool_size=150, heads=2, head_dim=23, large_grid=(6, 11))
"""What the sanitizers see, which make kernels a hundred times slower: more than a tile, and no multiple of anything."""


def engines(backend: str, device: str) -> tuple[str, ...]:
    """The settings of HPKERNELS_SM90, which the library reads at each call, that make a difference, the simpler first.

    If that is 0, as it is once the kernels for Hopper have failed, there is one.
    """
    if os.environ.get("HPKERNELS_SM90") == "0":
        return ("0",)
    on_gpu = device == "cuda" and torch.cuda.is_available()
    hopper = _native.EMULATED or (on_gpu and torch.cuda.get_device_capability()[0] == 9)
    return ("0", "1") if backend == "cuda" and hopper else ("0",)


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


def exercise(device: str, backend: str, engine: str = "", op: str = "") -> int:
    """Make every call that launches a backend's kernels on small inputs, in two dtypes; returns how many there were.

    By each of the engines that there are, or one; of all ops, or one.
    """
    calls = 0
    for chosen in (engine,) if engine else engines(backend, device):
        for each in [op] if op else backends.registered_ops():
            for dtype in (torch.float16, torch.float32):
                if not backends.availability(each, backend, device, dtype).ok:
                    continue
                with patch.dict(os.environ, HPKERNELS_SM90=chosen):
                    for call in kernel_calls(each, dtype, device, SMALL, backend).values():
                        call()
                        calls += 1
    return calls


def verify_op(device: str, backend: str, op: str, report: Callable[[str], None] = print) -> bool:
    """Compare each call of an op with the reference in float64, in all dtypes; whether there are some, all right."""
    states = []
    for engine in engines(backend, device):
        for dtype in ("float16", "bfloat16", "float32"):
            for case in cases(op, device=device, dtype=dtype, images=(2,)):
                if not provider(case, backend).reason_to_skip(case):
                    wrong = _verified(case, backend, engine)
                    states.append(not wrong)
                    report(f"{case} {backend} HPKERNELS_SM90={engine}: {wrong or 'right'}")
    if not states:
        report(f"{backend} runs no call of {op} here")
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
    """Print what ``python -m hpkernels`` prints, and what the driver says; whether the CUDA library is loaded."""
    installed.main([])
    print(f"{torch.cuda.get_device_properties(0)}\n{nvml.card().missing or 'NVML answers'}", flush=True)
    for command in (["nvidia-smi", "-q"], ["nvcc", "--version"]):
        if shutil.which(command[0]):
            subprocess.run(command, check=False)
    return _native.LIBRARIES["_C_cuda"].ok


def print_ceilings(device: str) -> None:
    """Print the two rates that bound everything: of PyTorch's matrix products, by dtype, and of its copies."""
    for dtype in ("float16", "bfloat16", "float32"):
        found = rates.ceilings(device, dtype)
        print(f"{dtype}: {found.matrix[dtype] / 1e12:.1f} TFLOP/s, copy {found.bandwidth / 1e9:.0f} GB/s", flush=True)


def _run(task: str, *words: str) -> int | str:
    if task == "compile":
        return "\n".join(compile_ahead()) or 0
    if task == "report":
        return 0 if print_report() else 1
    if task == "ceilings":
        print_ceilings("cuda")
        return 0
    if task == "verify":
        return 0 if verify_op("cuda", *words) else 1
    made = exercise("cuda", *words)
    torch.cuda.synchronize()
    print(f"{made} calls")
    return 0 if made else 1


if __name__ == "__main__":
    if sys.argv[1] == "exercise":
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor its own memory, for the sanitizers
    sys.exit(_run(*sys.argv[1:]))
