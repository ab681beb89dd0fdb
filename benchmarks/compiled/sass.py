"""What NVIDIA's disassembler says of kernels, Triton's and CUDA's: which spills are inside of loops.

A spill in a prologue or an epilogue is paid once; one inside of a loop is paid in each of its steps.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

MOST_SPILLED = 1024
"""Bytes of a thread that may be kept in memory, where no loop loads or stores them."""

_MEMORY = ("LDL", "STL")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([\w.]+)\s*([^;]*);")


def cuobjdump() -> str | None:
    """The path of Triton's or the CUDA toolkit's ``cuobjdump``, if there is one."""
    triton = importlib.util.find_spec("triton")
    of_triton = () if triton is None else (Path(triton.origin).parent / "backends" / "nvidia" / "bin",)
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    path = os.pathsep.join(map(str, (*of_triton, home, os.environ.get("PATH", os.defpath))))
    return shutil.which("cuobjdump", path=path)


def dump(file: Path | str, *options: str) -> str:
    """What ``cuobjdump`` prints of a file."""
    return subprocess.run([cuobjdump(), *options, file], check=True, capture_output=True, text=True).stdout


def loop_spills(text: str) -> dict[tuple[str, str], int]:
    """By architecture and function of ``cuobjdump -sass``: the loads and stores of local memory in its loops."""
    found: dict[tuple[str, str], int] = {}
    architecture = ""
    for part in re.split(r"^\s*(?=arch = |Function : )", text, flags=re.MULTILINE):
        head = part.partition("\n")[0].strip()
        if head.startswith("arch = "):
            architecture = head.removeprefix("arch = ")
        elif head.startswith("Function : "):
            found[architecture, head.removeprefix("Function : ")] = _loop_spills(part)
    return found


def _loop_spills(function: str) -> int:
    lines = [(int(at, 16), guard, name.split(".")[0], rest) for at, guard, name, rest in _LINE.findall(function)]
    memory = {at for at, _, name, _ in lines if name in _MEMORY}
    return len(memory & _in_loops(lines)) if memory else 0


def _in_loops(lines: list[tuple[int, str, str, str]]) -> set[int]:
    """The addresses between a backward branch and its target: on a way from the target that comes to the branch again.

    Not all that lies between them: rarely needed blocks stand at the end of a kernel, and branch back from there.
    """
    after: dict[int, set[int]] = {at: set() for at, *_ in lines}
    before: dict[int, set[int]] = {at: set() for at, *_ in lines}
    backward, calls = [], []
    following = [at for at, *_ in lines[1:]] + [None]
    for (at, guard, name, rest), next_at in zip(lines, following, strict=True):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name in ("BRA", "CALL", "JMP", "WARPSYNC") else None
        to = int(target[1], 16) if target else None
        # "BRA UP0, 0x90" has a condition as well.
        ends = not guard and (name in ("EXIT", "RET", "BRX") or (name in ("BRA", "JMP") and "," not in rest))
        reached = {None if ends else next_at, to} | (set(after) if name == "BRX" else set())
        if name == "CALL":  # which comes back
            reached.discard(to)
            calls.append((at, to))
        for one in reached & after.keys():
            after[at].add(one)
            before[one].add(at)
            if one <= at:
                backward.append((one, at))
    inside: set[int] = set()
    for target, branch in backward:
        inside |= _reached([target], after) & _reached([branch], before)
    return inside | _reached([to for at, to in calls if at in inside and to in after], after)


def _reached(starts: Iterable[int], edges: dict[int, set[int]]) -> set[int]:
    found, waiting = set(starts), list(starts)
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found
