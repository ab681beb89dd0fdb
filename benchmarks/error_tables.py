"""``python -m benchmarks errors``: measure rounding errors, and write them into the pages of the ops."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.errors import ErrorRow, greater, measure, read, write
from benchmarks.regimes import OPS, USUAL
from benchmarks.results import ERRORS, RESULTS
from benchmarks.tables import replace_between
from hpkernels import backends

BEGIN, END = "<!-- begin measured errors -->", "<!-- end measured errors -->"
_DOCS = Path(__file__).parent.parent / "docs"


def add_errors(commands: Any) -> None:
    """Enter the command `errors` into those of ``python -m benchmarks``."""
    command = commands.add_parser("errors", help="measure rounding errors; write them into the pages of the ops")
    command.add_argument("--op", action="append", choices=OPS, help="only this op; may be repeated")
    command.set_defaults(command=_errors)


def _errors(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = RESULTS / results.folder_name(
        results.device_name(device), torch.get_num_threads() if device == "cpu" else None
    )
    environment = results.environment(shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), device)
    for op in options.op or OPS:
        rows = measure(op, environment, device)
        write(folder, rows)
        print(f"{op}: {len(rows)} rows", flush=True)
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
    columns = [f"`{name}`" for name in names] + ["PyTorch"]
    heads = ["output", "dtype", *columns, *(f"hardest: {column}" for column in columns), f"hardest for `{names[0]}`"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for output in dict.fromkeys(row.output for row in rows):
        for dtype in DTYPES:
            by_backend = [
                [row for row in rows if (row.output, row.dtype, row.backend) == (output, dtype, name)] for name in names
            ]
            lines.append("| " + " | ".join([f"`{output}`", dtype, *_cells(by_backend)]) + " |")
    return lines


def _cells(by_backend: list[list[ErrorRow]]) -> list[str]:
    of_usual, of_hardest = [], []
    for own in by_backend:
        of_usual.append(next(row.error for row in own if row.regime == USUAL))
        of_hardest.append(_greatest(row.error for row in own))
    first = by_backend[0]
    plain_usual = next(row.plain for row in first if row.regime == USUAL)
    plain_hardest = None if plain_usual is None else _greatest(row.plain for row in first if row.plain is not None)
    hardest = next(row.regime for row in first if row.error == of_hardest[0])
    return [*map(_number, [*of_usual, plain_usual, *of_hardest, plain_hardest]), hardest]


def _greatest(values: Iterable[float]) -> float:
    return reduce(greater, values)


def _number(value: float | None) -> str:
    if value is None:
        return "no operator"
    return format(value, ".1e") if value else "0"
