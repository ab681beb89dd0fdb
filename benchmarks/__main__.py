"""``python -m benchmarks COMMAND``: measure, compare, draw, and read compiled kernels.

See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import baseline, distributed, estimates, folders, results, sweeps
from benchmarks.accuracy.error_tables import add_errors
from benchmarks.accuracy.verify import WrongResultError
from benchmarks.cases import DTYPES, OPS, Case, cases
from benchmarks.compiled import cuda_resources, resources
from benchmarks.compiled.clock_budget import add_clock_budget
from benchmarks.gpu import aims
from benchmarks.gpu.command import add_gpu_check
from benchmarks.pages import catalogue, plots, presentation, tables
from benchmarks.providers import known_names, limits
from benchmarks.results import RESULTS, Row
from benchmarks.run import WRONG, run
from hpkernels import _native
from hpkernels.ops import _triton

_DOCS = Path(__file__).parent.parent / "docs"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return options.command(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("run", help="verify, measure and write CSV files and plots")
    command.add_argument("--quick", action="store_true", help="one small case a call; nothing is written by default")
    command.add_argument("--op", action="append", metavar="OP", help="only this op; may be repeated")
    command.add_argument("--call", action="append", metavar="CALL", help="only this call of an op; may be repeated")
    command.add_argument("--provider", action="append", metavar="NAME", help="only this provider; may be repeated")
    command.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    command.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: float32, float16 on a GPU)")
    command.add_argument("--images", action="append", type=_count, metavar="B", help="only this size; may be repeated")
    command.add_argument("--all-sizes", action="store_true", help="leave nobody out, however large or slow the case is")
    command.add_argument("--keep-going", action="store_true", help="time the others where a provider is wrong or fails")
    command.add_argument(
        "--sweep", choices=sweeps.SWEEPS, help="vary the share of positives, or N till a call does not fit"
    )
    command.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="of a call, with --sweep memory (default: what there is)"
    )
    command.set_defaults(command=_run)

    command = commands.add_parser("plot", help="draw the plots of results again")
    command.add_argument("folder", type=Path, nargs="?", help="of results (default: each of benchmarks/results)")
    command.set_defaults(command=_plot)

    command = commands.add_parser("tables", help="write the measured part of docs/benchmarks.md from all results")
    command.set_defaults(command=_tables)

    command = commands.add_parser("compare", help="compare the times of a run with a baseline; 1 if ours are slower")
    command.add_argument("run", type=Path, nargs="?", help="folder of a run (default: measures what the baseline has)")
    command.add_argument(
        "--baseline", type=Path, nargs="?", help="folder of results (default: benchmarks/results/<device>)"
    )
    command.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    command.add_argument(
        "--tolerance", type=float, default=baseline.TOLERANCE, metavar="SHARE", help="default: %(default)s"
    )
    command.add_argument("--relative-to", metavar="PROVIDER", help="compare times in units of this provider's")
    command.set_defaults(command=_compare)

    command = commands.add_parser("estimates", help="compare the time of the CPU backend with hpkernels.estimate")
    command.set_defaults(command=_estimates)

    command = commands.add_parser("distributed", help="time and memory of a loss in several processes, and in one")
    command.add_argument("--anchors", type=_count, default=8192, metavar="N", help="of all ranks (default: 8192)")
    command.add_argument("--dim", type=_count, default=512, metavar="D", help="of their vectors (default: 512)")
    command.add_argument("--ranks", type=_count, default=2, help="processes of one thread each (default: 2)")
    command.set_defaults(command=_distributed)

    command = commands.add_parser(
        "resources", help="registers and spills of the Triton kernels, compiled for each target"
    )
    command.add_argument(
        "--check", action="store_true", help="write nothing; fail if limits or committed rows are passed"
    )
    command.add_argument("--quick", action="store_true", help="with --check: only Hopper in float16, in a minute")
    command.add_argument("--cuda", action="store_true", help="of the CUDA kernels, from the library as it is built")
    command.set_defaults(command=_resources)

    add_clock_budget(commands)
    add_errors(commands)
    add_gpu_check(commands)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    unknown = set(options.op or ()) - set(OPS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; known are {', '.join(OPS)}")
    unknown = set(options.provider or ()) - set(known_names())
    if unknown:
        parser.error(f"unknown provider {', '.join(sorted(unknown))}; known are {', '.join(known_names())}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch sees none on this machine")
    dtype = options.dtype or ("float32" if device == "cpu" else "float16")
    folder = options.output
    if folder is None and not options.quick:
        threads = torch.get_num_threads() if device == "cpu" else None
        folder = RESULTS / results.folder_name(results.device_name(device), threads)
    environment = results.environment(shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), device)
    chosen = _chosen(options, parser, device, dtype)
    if options.sweep == "memory" and options.output is None and folder is not None:
        # Apart: a call that does not fit into a limit is no replacement for one that was measured without.
        folder /= "memory" if options.memory_limit is None else f"memory-{options.memory_limit:g}-gib"
    if folder is not None:
        folders.check_output(folder, parser)
    for line in limits(chosen, options.provider):
        print(line)
    rows = []
    try:
        for row in _measured(options, chosen, environment):
            rows.append(row)
            if folder is not None:  # at once, so that a run that is cut off leaves what it has measured
                results.write(folder, [row])
    except WrongResultError as error:
        print(f"not timed, wrong result: {error}", file=sys.stderr)
        return 1
    if options.sweep == "memory":
        print("\n".join(["", *sweeps.largest(rows)]))
    if folder is not None:
        _draw(folder)
    return 1 if any(row.note.startswith(WRONG) for row in rows) else 0


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser, device: str, dtype: str) -> list[Case]:
    """The cases that were asked for."""
    limit = options.memory_limit
    if limit is not None and (options.sweep != "memory" or not 0 < limit < math.inf):
        parser.error(f"--memory-limit must be more than 0 and finite, with --sweep memory, got {limit:g}")
    if options.sweep:
        try:
            chosen = sweeps.sweep_cases(options.sweep, options.op, device, dtype, options.images, limit)
        except ValueError as error:
            parser.error(str(error))
    else:
        chosen = [case for op in options.op or OPS for case in cases(op, options.quick, device, dtype, options.images)]
    unknown = set(options.call or ()) - {case.call for case in chosen}
    if unknown:
        known = ", ".join(dict.fromkeys(case.call for case in chosen))
        parser.error(f"unknown call {', '.join(sorted(unknown))}; known are {known}")
    return [case for case in chosen if not options.call or case.call in options.call]


def _measured(options: argparse.Namespace, chosen: list[Case], environment: dict) -> Iterator[Row]:
    """The rows of the cases, each printed."""
    if options.sweep != "memory":
        return run(chosen, options.provider, environment, _print_row, options.keep_going, options.all_sizes)
    return sweeps.until_it_ends(
        chosen,
        options.provider,
        lambda some, names: run(some, names, environment, _print_row, options.keep_going, all_sizes=True),
    )


def _print_row(row: Row) -> None:
    print(presentation.line(row), flush=True)


def _draw(folder: Path) -> None:
    try:
        written = plots.plot(results.read_folder(folder), folder)
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed (pip install 'hpkernels[benchmarks]')")
    else:
        print(f"results in {folder}: {', '.join(path.name for path in written) or 'no plots, which need two sizes'}")


def _plot(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.folder:
        folder = folders.existing(options.folder, parser)
        folders.rows_of(folder, None, parser)
        measured = [folder]
    else:
        every = sorted(path for path in RESULTS.iterdir() if path.is_dir())
        measured = [folder for folder in every if results.read_folder(folder)]
    if not measured:
        parser.error(f"{RESULTS} has no results")
    for folder in measured:
        _draw(folder)
    return 0


def _tables(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    tables.replace_between(_DOCS / "benchmarks.md", catalogue.BEGIN, catalogue.END, catalogue.table())
    tables.replace_between(_DOCS / "benchmarks.md", aims.BEGIN, aims.END, aims.table())
    tables.write_tables(_DOCS / "benchmarks.md", RESULTS)
    return 0


def _compare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not 0 <= options.tolerance < math.inf:
        parser.error(f"--tolerance must be a share, 0 or more and finite, got {options.tolerance}")
    if options.relative_to not in (None, *known_names()):
        parser.error(f"unknown provider {options.relative_to}; known are {', '.join(known_names())}")
    measured = (
        None if options.run is None else folders.rows_of(folders.existing(options.run, parser), options.op, parser)
    )
    environment = results.environment("compare", "cuda" if torch.cuda.is_available() else "cpu")
    where = vars(measured[0]) if measured else environment
    if options.baseline:
        folder = folders.existing(options.baseline, parser)
    else:
        folder = baseline.folder_of(where["device"], where["threads"])
        if not folder.is_dir():
            parser.error(f"there is no baseline {folder}: measure one with `run`, or name another with --baseline")
    rows = folders.rows_of(folder, options.op, parser)
    if measured is None:
        measured = []
        for row in baseline.again(rows, environment):
            _print_row(row)
            measured.append(row)
    comparison = baseline.compare(rows, measured, options.tolerance, options.relative_to)
    if not comparison.changes and not comparison.lost:
        parser.error(f"{folder} and the run have nothing in common: {baseline.difference(rows, measured)}")
    for line in baseline.report(comparison, rows, measured, options.tolerance):
        print(line)
    return 1 if comparison.failed else 0


def _estimates(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for line in estimates.lines():
        print(line, flush=True)
    return 0


def _distributed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.anchors < options.ranks:
        parser.error(f"--anchors must be at least one a rank, got {options.anchors} for {options.ranks} ranks")
    for line in distributed.lines(options.anchors, options.dim, options.ranks):
        print(line, flush=True)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
