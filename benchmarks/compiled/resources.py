"""Registers, spills and shared memory of every Triton kernel, compiled for each target without a GPU.

What is compiled is what the host functions launch with tensors of the paper's sizes on the meta device, specialised as
Triton would at run time: every configuration of the tables, every variant of a kernel.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import results
from benchmarks.compiled import sass
from benchmarks.csv_files import read_rows, write_rows
from benchmarks.pages import tables
from benchmarks.results import RESOURCES
from hpkernels import backends
from hpkernels.launches import Launch, Sizes, kernel_calls, recorded
from hpkernels.ops import _triton

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = ("float16", "float32", "bfloat16", "tf32")
"""Of the inputs; tf32: float32 with products in TF32, where PyTorch is set to allow it."""
CHECKED_DTYPES = DTYPES[:2]  # bfloat16 runs the code of float16
AMOUNTS = ("registers", "spill_bytes", "loop_spills", "scalar_spills", "shared_bytes")
BEGIN, END = "<!-- begin resources -->", "<!-- end resources -->"


@dataclass(frozen=True)
class Row:
    """A kernel compiled for a target; of variants that differ in the arguments alone, the most of each.

    `size` is the element size, or "any", of the entry of the configuration table. `registers` and `spill_bytes`, which
    are in memory, are of a thread; `loop_spills` are the instructions inside of loops that load or store such bytes;
    `scalar_spills` are scalar registers of AMD GPUs that are kept in vector registers.
    """

    kernel: str
    target: str
    size: str
    dtype: str
    constants: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_bytes: int = 0
    loop_spills: int = 0
    scalar_spills: int = 0
    shared_bytes: int = 0
    triton: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple:
        """What was compiled."""
        return self.kernel, self.target, self.size, self.dtype, self.constants, self.num_warps, self.num_stages

    def __str__(self) -> str:
        options = f"num_warps={self.num_warps} num_stages={self.num_stages}"
        return f"{self.kernel}[{self.constants} {options}], {self.dtype}, {self.target}"


@dataclass(frozen=True)
class Job:
    """What is to be compiled, and the row that says so."""

    source: Any
    target: Any
    options: dict[str, Any]
    row: Row


def reason_to_skip() -> str | None:
    """Why nothing can be compiled in this process, if so."""
    if _triton.triton is None:
        return "Triton is not installed"
    return "kernels are interpreted and cannot be compiled: unset TRITON_INTERPRET" if _triton.INTERPRETED else None


def jobs(
    dtypes: Iterable[str],
    ops: Iterable[str] | None = None,
    targets: Iterable[str] = tuple(TARGETS),
    sizes: Sizes | None = None,
) -> list[Job]:
    """All that the calls of the ops launch, once; what does not depend on the dtype counts as of the first."""
    found: dict[tuple, Job] = {}
    for op in backends.registered_ops() if ops is None else ops:
        for dtype in dtypes:
            calls = kernel_calls(op, torch.float32 if dtype == "tf32" else getattr(torch, dtype), "meta", sizes)
            for target in targets:
                with (
                    recorded(target) as launches,
                    patch.object(_triton, "tf32_allowed", lambda dtype=dtype: dtype == "tf32"),
                ):
                    for call in calls.values():
                        call()
                for launch in launches:
                    job = _job(launch, target, dtype)
                    found.setdefault((target, launch.size, job.source.hash(), str(job.options)), job)
    return list(found.values())


def _job(launch: Launch, target: str, dtype: str) -> Job:
    """A launch specialised for its arguments in the way Triton does it at run time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, gpu = launch.kernel, GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.constants)
    options, *source = kernel._pack_args(backend, options, bound, specialization, options)
    constants = sorted(item for item in launch.constants.items() if item[0] in kernel.arg_names)
    row = Row(
        kernel=launch.name,
        target=target,
        size=launch.size,
        dtype=dtype,
        constants=" ".join(f"{name}={value}" for name, value in constants),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return Job(ASTSource(kernel, *source), gpu, options.__dict__, row)


_jobs: list[Job] = []  # of the compiling processes, which are forked: kernels cannot be sent to them


def compile_all(jobs: list[Job], progress: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """The rows of all jobs, compiled on all processors, and one sentence for each that does not compile."""
    _jobs[:] = jobs
    rows: dict[tuple, Row] = {}
    failures = []
    fork = multiprocessing.get_context("fork")
    # Unlike multiprocessing.Pool, this does not wait forever for a process that its compiler has ended.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=fork) as pool:
        compiled = [pool.submit(_compile, index) for index in range(len(jobs))]
        for done, future in enumerate(as_completed(compiled), start=1):
            result = future.result()
            progress(f"compiled {done} of {len(jobs)} kernels")
            if isinstance(result, str):
                failures.append(result)
            else:
                rows[result.key] = _most(rows.get(result.key, result), result)
    return [rows[key] for key in sorted(rows)], sorted(failures)


def _most(one: Row, other: Row) -> Row:
    return replace(one, **{name: max(getattr(one, name), getattr(other, name)) for name in AMOUNTS})


def _compile(index: int) -> Row | str:
    import triton

    job = _jobs[index]
    try:
        kernel = triton.compile(job.source, target=job.target, options=job.options)
    except Exception as error:  # whatever a compiler fails with belongs to the kernel's name
        return f"{job.row} does not compile: {type(error).__name__}: {error}"
    usage = usage_of_amdgcn(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _usage_of_cubin(kernel.asm["cubin"])
    return replace(job.row, **usage, shared_bytes=kernel.metadata.shared)


def _usage_of_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = usage_of_cuobjdump(sass.dump(file.name, "-res-usage"))
        spills = sass.loop_spills(sass.dump(file.name, "-sass")) if usage["spill_bytes"] else {}
    return usage | {"loop_spills": sum(spills.values())}


def usage_of_cuobjdump(text: str) -> dict[str, int]:
    """Registers and spills, from what ``cuobjdump -res-usage`` prints."""
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spill_bytes": usage["STACK"] + usage["LOCAL"]}


def usage_of_amdgcn(text: str) -> dict[str, int]:
    """Registers and spills, from the metadata of an assembly; all spills count as if they were inside of loops."""
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
    spill_bytes = max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"])
    return {
        "registers": usage["vgpr_count"],
        "spill_bytes": spill_bytes,
        "loop_spills": spill_bytes // 4,
        "scalar_spills": usage["sgpr_spill_count"],
    }


def complaints(rows: list[Row], earlier: list[Row]) -> list[str]:
    """One sentence for each row beyond its limits or above what is committed, if any."""
    found = []
    known = {row.key: row for row in earlier}
    for row in rows:
        before = known.get(row.key, row)
        if row.loop_spills:
            found.append(f"{row} spills in loops: {row.loop_spills} instructions load or store memory")
        most_spilled = min(sass.MOST_SPILLED, before.spill_bytes)
        for name, what, limit in (
            ("shared_bytes", "bytes of shared memory", min(SHARED_LIMIT[row.target], before.shared_bytes)),
            ("registers", "registers", before.registers),
            ("spill_bytes", "bytes of spills", most_spilled),
        ):
            if getattr(row, name) > limit:
                found.append(f"{row} must take at most {limit} {what}, takes {getattr(row, name)}")
    return found


def unused(rows: list[Row], table: dict) -> list[str]:
    """One sentence for each configuration of the table that no row has."""
    compiled = {(row.kernel, row.target, row.size) for row in rows}
    return [
        f"no call launches {kernel} as it is configured for {target}, element size {size}"
        for kernel, by_arch in table.items()
        for target in TARGETS
        for size in by_arch[target]
        if (kernel, target, size) not in compiled
    ]


def committed(folder: Path = results.RESULTS) -> Path:
    """The file of the installed version of Triton."""
    return folder / f"triton-{_triton.triton.__version__}" / RESOURCES


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file."""
    return read_rows(path, Row) if path.exists() else []


def write(path: Path, rows: list[Row]) -> None:
    """Write rows with the version of Triton, the commit and the date."""
    write_rows(path, Row, rows, triton=_triton.triton.__version__, commit=results.commit(), date=results.now())


def write_tables(page: Path, results: Path) -> None:
    """Replace what stands between the page's two comments by a table for each version of Triton.

    Raises:
        ValueError: the page has not both comments, in this order.
    """
    files = sorted(results.glob(f"triton-*/{RESOURCES}"))
    tables.replace_between(page, BEGIN, END, "\n".join("\n".join([*table_of(read(file)), ""]) for file in files))


def table_of(rows: list[Row]) -> list[str]:
    """Lines of Markdown: for each kernel and target the most registers and the most shared memory of its rows."""
    measured = sorted({f"commit {row.commit}, {row.date[:10]}" for row in rows})
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    lines = [
        f"### Triton {rows[0].triton}",
        "",
        f"{len(rows)} compiled variants in {dtypes}; {'; '.join(measured)}.",
        "",
        f"| kernel | {' | '.join(TARGETS)} |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        cells = (_cell([row for row in rows if (row.kernel, row.target) == (kernel, target)]) for target in TARGETS)
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return lines


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    registers, spills, shared = (
        max(getattr(row, name) for row in rows) for name in ("registers", "spill_bytes", "shared_bytes")
    )
    return f"{registers}, {math.ceil(shared / 1024)} KiB" + (f", {spills} bytes spilled" if spills else "")
