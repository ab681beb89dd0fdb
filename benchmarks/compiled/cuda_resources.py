"""Registers, stack and shared memory of every CUDA kernel in the library as it is built, read without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import results
from benchmarks.compiled import sass
from benchmarks.csv_files import read_rows, write_rows
from benchmarks.pages import tables
from benchmarks.results import RESOURCES
from hpkernels import _native

BEGIN, END = "<!-- begin resources -->", "<!-- end resources -->"
_SOURCES = Path(__file__).parents[2] / "csrc"
_TYPES = {"half": "float16", "bfloat16": "bfloat16", "float": "float32", "double": "float64"}


@dataclass(frozen=True, order=True)
class Row:
    """A kernel as compiled for an architecture.

    `variant` are its template arguments, `dtype` the first type among them, if any. `registers`, `stack_bytes` and
    `local_bytes`, of which what does not fit into registers is a part, are of a thread. `shared_bytes`, which are fixed
    when the kernel is compiled, are of a block: from sm_90 on the system's own 1024 bytes are among them. `loop_spills`
    are the instructions inside of loops that load or store local memory.
    """

    kernel: str
    dtype: str
    variant: str
    architecture: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    loop_spills: int = 0
    compiler: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple:
        """What was compiled, and by what."""
        return self.kernel, self.variant, self.architecture, self.compiler

    def __str__(self) -> str:
        return f"{self.kernel}<{self.variant}>, {self.architecture}"


def reason_to_skip() -> str:
    """Why nothing can be read on this machine, or ""."""
    if _native._file("_C_cuda") is None:
        return "there is no _C_cuda, which HPKERNELS_BUILD=cuda builds"
    if sass.cuobjdump() is None:
        return "there is no cuobjdump, which Triton and the CUDA toolkit bring along"
    return "" if shutil.which("c++filt") else "there is no c++filt (binutils) on PATH"


def rows_of(library: Path) -> list[Row]:
    """What each kernel of a library takes, in order."""
    listed = sass.dump(library, "--dump-resource-usage")
    in_memory = re.findall(r" Function (\S+):\n.* (?:STACK|LOCAL):[1-9]", listed)
    spills = sass.loop_spills(_readable(sass.dump(library, "-sass", "-fun", ",".join(in_memory)))) if in_memory else {}
    compiler = _native.architectures(library).partition(" by ")[2].partition(",")[0]
    return [replace(row, compiler=compiler) for row in parse(_readable(listed), spills)]


def _readable(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def parse(text: str, loop_spills: Mapping[tuple[str, str], int] | None = None) -> list[Row]:
    """The rows of what ``cuobjdump --dump-resource-usage`` prints, demangled, and of `sass.loop_spills`."""
    rows, architecture, function = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (.+):$", line):
            function = found[1]
        elif found := dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)):
            used = (int(found[name]) for name in ("REG", "STACK", "LOCAL", "SHARED"))
            rows.append(
                Row(*_named(function), architecture, *used, (loop_spills or {}).get((architecture, function), 0))
            )
    return sorted(rows)


def _named(function: str) -> tuple[str, str, str]:
    """The name of a demangled kernel, its dtype and its template arguments."""
    short = re.sub(r"\(anonymous namespace\)::|hpk::|__(nv_)?(?=half|bfloat16)", "", function).replace("> >", ">>")
    name = re.search(r"(\w+)[<(]", short)
    depth, end = 0, name.end()
    if short[end - 1] == "<":
        depth = 1
        while depth:
            depth += {"<": 1, ">": -1}.get(short[end], 0)
            end += 1
    variant = short[name.end() : max(name.end(), end - 1)]
    types = [word for word in re.findall(r"\w+", variant) if word in _TYPES]
    return name[1], _TYPES[types[0]] if types else "", variant


def complaints(rows: Iterable[Row], earlier: Iterable[Row] = ()) -> list[str]:
    """One sentence for each kernel that spills in a loop, or much outside, or takes more registers than before."""
    before = {row.key: row.registers for row in earlier}
    found = []
    for row in rows:
        if row.loop_spills:
            found.append(f"{row} loads or stores local memory in loops: {row.loop_spills} instructions")
        if row.stack_bytes + row.local_bytes > sass.MOST_SPILLED:
            memory = f"{row.stack_bytes} bytes of stack and {row.local_bytes} bytes of local memory"
            found.append(f"{row} has {memory}, must have at most {sass.MOST_SPILLED}")
        if row.registers > before.get(row.key, row.registers):
            found.append(f"{row} must take at most {before[row.key]} registers, takes {row.registers}")
    return found


def newer_sources(library: Path, sources: Path = _SOURCES) -> list[str]:
    """The names of source files that were changed after the library was built, of which numbers would say nothing."""
    built = library.stat().st_mtime
    changed = (path for path in sources.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h"))
    return sorted(path.name for path in changed if path.stat().st_mtime > built and "emulation" not in path.parts)


def file_of(rows: list[Row], folder: Path = results.RESULTS) -> Path:
    """The file of the version of nvcc that compiled the rows: its first two numbers."""
    version = re.search(r"(\d+\.\d+)", rows[0].compiler)
    return folder / f"cuda-{version[1] if version else 'unknown'}" / RESOURCES


def write(path: Path, rows: list[Row]) -> None:
    """Write rows with the commit and the date."""
    write_rows(path, Row, rows, commit=results.commit(), date=results.now())


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file."""
    return read_rows(path, Row) if path.exists() else []


def write_tables(page: Path, folder: Path = results.RESULTS) -> None:
    """Replace what stands between the page's two comments by a table for each version of nvcc.

    Raises:
        ValueError: the page has not both comments, in this order.
    """
    files = sorted(folder.glob(f"cuda-*/{RESOURCES}"))
    tables.replace_between(page, BEGIN, END, "\n".join("\n".join([*table_of(read(file)), ""]) for file in files))


def table_of(rows: list[Row]) -> list[str]:
    """Lines of Markdown: for each kernel, engine and architecture the most registers of a thread among its variants."""
    architectures = sorted({row.architecture for row in rows}, key=lambda name: int(re.search(r"\d+", name)[0]))
    lines = [
        f"### {rows[0].compiler}",
        "",
        f"{len(rows)} compiled variants; commit {rows[0].commit}, {rows[0].date[:10]}.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        "|---" * (len(architectures) + 1) + "|",
    ]
    for kernel, wgmma in sorted({(row.kernel, _is_wgmma(row)) for row in rows}):
        own = [row for row in rows if (row.kernel, _is_wgmma(row)) == (kernel, wgmma)]
        cells = (_cell([row for row in own if row.architecture == name]) for name in architectures)
        lines.append(f"| `{kernel}`{', wgmma' if wgmma else ''} | {' | '.join(cells)} |")
    return lines


def _is_wgmma(row: Row) -> bool:
    return "Sm90" in row.variant


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    spilled = max(row.stack_bytes + row.local_bytes for row in rows)
    return str(max(row.registers for row in rows)) + (f", {spilled} bytes in memory" if spilled else "")
