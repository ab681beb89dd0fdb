"""``python -m benchmarks resources``: registers and spills of the kernels, written into files and pages, or checked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.compiled import cuda_resources, resources
from benchmarks.results import RESULTS
from hpkernels import _native
from hpkernels.ops import _triton

_DOCS = Path(__file__).parents[2] / "docs"


def add_resources(commands: Any) -> None:
    """Enter the command `resources` into those of ``python -m benchmarks``."""
    command = commands.add_parser(
        "resources", help="registers and spills of the Triton kernels, compiled for each target"
    )
    command.add_argument(
        "--check", action="store_true", help="write nothing; fail if limits or committed rows are passed"
    )
    command.add_argument("--quick", action="store_true", help="with --check: only Hopper in float16, in a minute")
    command.add_argument("--cuda", action="store_true", help="of the CUDA kernels, from the library as it is built")
    command.set_defaults(command=_resources)


def _resources(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.cuda:
        return _cuda_resources(options.check, parser)
    if options.quick and not options.check:
        parser.error("--quick goes with --check: the committed rows are of all targets and dtypes")
    reason = resources.reason_to_skip()
    if reason:
        parser.error(reason)
    dtypes, targets = resources.DTYPES, tuple(resources.TARGETS)
    if options.check:
        dtypes = resources.CHECKED_DTYPES
    if options.quick:
        dtypes, targets = ("float16",), ("sm_90",)
    rows, complaints = resources.compile_all(
        resources.jobs(dtypes, targets=targets), lambda line: print(f"\r{line}", end="", flush=True)
    )
    print()
    file = resources.committed()
    complaints += resources.complaints(rows, resources.read(file) if options.check else [])
    if not options.quick:
        complaints += resources.unused(rows, _triton.table())
    if not options.check:
        resources.write(file, rows)
        resources.write_tables(_DOCS / "triton.md", RESULTS)
    return _complain(complaints)


def _cuda_resources(check: bool, parser: argparse.ArgumentParser) -> int:
    if reason := cuda_resources.reason_to_skip():
        parser.error(reason)
    library = _native._file("_C_cuda")
    if not check and (newer := cuda_resources.newer_sources(library)):
        parser.error(f"{library.name} is older than {', '.join(newer)}: python setup.py build_ext --inplace")
    rows = cuda_resources.rows_of(library)
    if not rows:
        parser.error(f"{library.name} has no kernels")
    file = cuda_resources.file_of(rows)
    complaints = cuda_resources.complaints(rows, cuda_resources.read(file) if check else [])
    if not check:
        cuda_resources.write(file, rows)
        cuda_resources.write_tables(_DOCS / "cuda.md")
    print(f"{len(rows)} kernels, compiled for {_native.architectures(library)}")
    return _complain(complaints)


def _complain(complaints: list[str]) -> int:
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0
