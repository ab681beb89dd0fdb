"""``python -m benchmarks COMMAND``: measure, compare, draw, and read compiled kernels.

See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import arguments, results, sweeps
from benchmarks.accuracy.error_tables import add_errors
from benchmarks.accuracy.verify import WrongResultError
from benchmarks.cases import DTYPES, OPS, Case, cases
from benchmarks.compare import add_compare
from benchmarks.compiled.clock_budget import add_clock_budget
from benchmarks.compiled.commands import add_resources
from benchmarks.distributed import add_distributed
from benchmarks.estimates import add_estimates
from benchmarks.gpu import aims
from benchmarks.gpu.command import add_gpu_check
from benchmarks.pages import catalogue, distributed_table, plots, presentation, tables
from benchmarks.providers import known_names, limits
from benchmarks.results import RESULTS, Row
from benchmarks.run import WRONG, run

_DOCS = Path(__file__).parent.parent / "docs"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
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
    command.add_argument(
        "--images", action="append", type=arguments.count, metavar="B", help="only this size; may be repeated"
    )
    command.add_argument("--all-sizes", action="store_true", help="leave nobody out, however large or slow the case is")
    command.add_argument("--keep-going", action="store_true", help="time the others where a provider is wrong or fails")
    command.add_argument(
        "--sweep", choices=sweeps.SWEEPS, help="vary the share of positives, or N till a call does not fit"
    )
    command.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="of a call, with --sweep memory (default: what there is)"
    )
    command.add_argument("--limits", action="store_true", help="only print what each provider cannot express")
    command.set_defaults(command=_run)

    command = commands.add_parser("plot", help="draw the plots of results again")
    command.add_argument("folder", type=Path, nargs="?", help="of results (default: each of benchmarks/results)")
    command.set_defaults(command=_plot)

    command = commands.add_parser("tables", help="write what docs/benchmarks.md and distributed.md have of all results")
    command.set_defaults(command=_tables)

    add_compare(commands)
    add_estimates(commands)
    add_distributed(commands)
    add_resources(commands)
    add_clock_budget(commands)
    add_errors(commands)
    add_gpu_check(commands)
    return parser


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
        folder = results.folder_here(device)
    environment = results.environment(device)
    chosen = _chosen(options, parser, device, dtype)
    if options.limits:
        print("\n".join(limits(chosen, options.provider)))
        return 0
    if options.sweep == "memory" and options.output is None and folder is not None:
        # Apart: a call that does not fit into a limit is no replacement for one that was measured without.
        folder /= "memory" if options.memory_limit is None else f"memory-{options.memory_limit:g}-gib"
    if folder is not None:
        arguments.check_output(folder, parser)
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
        folder = arguments.existing(options.folder, parser)
        arguments.rows_of(folder, None, parser)
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
    distributed_table.write_table(_DOCS / "distributed.md", RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
