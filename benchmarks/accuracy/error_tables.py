"""``python -m benchmarks errors``: measure rounding errors, and write them into the pages of the ops."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments, results
from benchmarks.accuracy.errors import ErrorRow, greater, measure, read, write
from benchmarks.accuracy.regimes import OPS, USUAL
from benchmarks.cases import DTYPES
from benchmarks.pages.tables import replace_between
from benchmarks.results import ERRORS, RESULTS
from hpkernels import backends

BEGIN, END = "<!-- begin measured errors -->", "<!-- end measured errors -->"
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_DOCS = Path(__file__).parents[2] / "docs"


def add_errors(commands: Any) -> None:
    """Enter the command `errors` into those of ``python -m benchmarks``."""
    about = "measure rounding errors; write them into the pages of the ops"
    command = commands.add_parser(
        "errors",
        help=about,
        description=f"{about}. Without --output this overwrites benchmarks/results/<device>/{ERRORS} and the tables in"
        " docs/*.md.",
    )
    command.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    command.add_argument("--output", type=Path, help=f"folder of {ERRORS}; the pages stay as they are")
    command.set_defaults(command=_errors)


def _errors(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.output is not None:
        arguments.check_output(options.output, parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.output or results.folder_here(device)
    environment = results.environment(device)
    for op in options.op or OPS:
        rows = measure(op, environment, device)
        write(folder, rows)
        print(f"{op}: {len(rows)} rows", flush=True)
    if options.output is None:
        write_tables(_DOCS, RESULTS)
    return 0


def write_tables(docs: Path, results: Path) -> None:
    """Write the tables of all devices into the pages of the ops."""
    measured = [read(path) for path in sorted(results.glob(f"*/{ERRORS}"))]
    for op in OPS:
        replace_between(docs / f"{op}.md", BEGIN, END, table(op, measured))


def table(op: str, measured: Iterable[list[ErrorRow]]) -> str:
    """The errors of `op` on each device as Markdown."""
    parts = []
    for rows in measured:
        own = [row for row in rows if row.op == op]
        if own:
            parts += [_caption(own[0]), "", *_lines(own), ""]
    return "\n".join(["", *parts])


def _caption(row: ErrorRow) -> str:
    where = f"{row.device}, {row.instructions}, {row.threads} threads, PyTorch {row.torch}"
    return f"Measured on {where}, {row.date[:10]}, commit {row.commit}, by `{row.command}`:"


def _lines(rows: list[ErrorRow]) -> list[str]:
    names = [name for name in backends.BACKENDS if any(row.backend == name for row in rows)]
    columns = [*(f"`{name}`" for name in names), "PyTorch"]
    hardest = [f"hardest for {columns[0]}", f"{columns[0]} there", "PyTorch there", "PyTorch at worst"]
    heads = ["output", "dtype", *columns, *hardest]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for output in dict.fromkeys(row.output for row in rows):
        for dtype in DTYPES:
            by_backend = [
                {row.regime: row for row in rows if (row.output, row.dtype, row.backend) == (output, dtype, name)}
                for name in names
            ]
            lines.append("| " + " | ".join([f"`{output}`", dtype, *_cells(by_backend)]) + " |")
    return lines


def _cells(by_backend: list[dict[str, ErrorRow]]) -> list[str]:
    first = by_backend[0]
    worst = reduce(greater, (row.error for row in first.values()))
    hardest = next(name for name, row in first.items() if row.error == worst or worst != worst)
    plain = [row.plain for row in first.values()]
    of_torch = None if None in plain else reduce(greater, plain)

    usual = [*(own[USUAL].error for own in by_backend), first[USUAL].plain]
    return [*map(_number, usual), hardest, *map(_number, (first[hardest].error, first[hardest].plain, of_torch))]


def _number(value: float | None) -> str:
    if value is None:
        return "no operator"
    if not 0 < value < 0.01:
        return format(value, ".2g" if value < 10 else ".0f")
    digits, _, exponent = format(value, ".1e").partition("e-")
    return f"{digits}·10⁻{exponent.lstrip('0').translate(_SUPERSCRIPTS)}"
