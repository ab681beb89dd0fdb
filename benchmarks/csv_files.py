"""CSV files of dataclasses: a line an object, a column a field."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file; columns that it is too old to have are as the fields' defaults.

    Raises:
        ValueError: a column is missing that every file has, or is no field.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        kinds = {field.name: str(field.type) for field in _columns(kind)}
        needed = {field.name for field in _columns(kind) if field.default is MISSING}
        given = set(reader.fieldnames or ())
        for fault, columns in {"lacks": needed - given, "has unknown": given - set(kinds)}.items():
            if columns:
                names = ", ".join(name for name in [*kinds, *(reader.fieldnames or ())] if name in columns)
                raise ValueError(f"{path} {fault} columns: {names}; is it a file that the benchmarks wrote?")
        return [kind(**{name: _parse(kinds[name], text) for name, text in line.items()}) for line in reader]


def _columns(kind: type[Any]) -> list[Field]:
    """The fields of a class, those that it inherits last."""
    inherited = {field.name for base in kind.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    return sorted(fields(kind), key=lambda field: field.name in inherited)


def _parse(kind: str, text: str) -> str | int | float | None:
    if kind == "str":
        return text
    if text == "":
        return None
    return int(text) if kind.startswith("int") else float(text)


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row], **same: Any) -> None:
    """Write a file, at once, and the folder that it is in; `same` are columns that all rows share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")  # whoever is stopped leaves the rows that there were
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in _columns(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | same for row in rows)
    unfinished.replace(path)
