"""Which instructions a step of a kernel's main loop takes, read from what NVIDIA's disassembler prints."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([\w.]+)\s*([^;]*);")
_BRANCHES, _ENDS = ("BRA", "CALL", "JMP"), ("EXIT", "RET", "BRX")


@dataclass(frozen=True)
class Step:
    """How often a thread meets each instruction in a step of a loop, by name.

    Attributes:
        most: all that is in the loop, once each; what only some steps do, and waits that are repeated, among it.
        fewest: what is on the shortest way through the loop that meets the instruction which the loop was found by.
    """

    most: Counter[str]
    fewest: Counter[str]


def step(function: str, name: str, trips: tuple[int, ...]) -> Step:
    """A step of the loop nest around the most instructions of a name in the SASS of one function.

    `trips` say how often each loop of the nest goes round in a step of the first, which itself has 1.
    """
    lines = [(int(at, 16), guard, whole.split(".")[0], rest) for at, guard, whole, rest in _LINE.findall(function)]
    names = {at: own for at, _, own, _ in lines}
    after = _edges(lines)
    nest = _nest(_loops(after), {at for at, own in names.items() if own == name}, len(trips))
    times = dict.fromkeys(nest[0], 1)
    for loop, count in zip(nest[1:], trips[1:], strict=True):
        for at in loop:
            times[at] *= count
    most: Counter[str] = Counter()
    for at in times:
        most[names[at]] += times[at]
    fewest: Counter[str] = Counter()
    for at in _shortest_round(after, times, min(nest[0]), {at for at in nest[-1] if names[at] == name}):
        fewest[names[at]] += times[at]
    return Step(most, fewest)


def _edges(lines: list[tuple[int, str, str, str]]) -> dict[int, set[int]]:
    """Where each instruction may be followed by which."""
    after: dict[int, set[int]] = {at: set() for at, *_ in lines}
    for (at, guard, name, rest), following in zip(lines, [*after, None][1:], strict=True):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name in _BRANCHES else None
        ends = not guard and (name in _ENDS or (name in ("BRA", "JMP") and "," not in rest))
        after[at] = {None if ends else following, int(target[1], 16) if target else None} & after.keys()
    return after


def _loops(after: dict[int, set[int]]) -> list[frozenset[int]]:
    """The instructions of each loop: those that come back to its start without meeting it before."""
    before: dict[int, set[int]] = {at: set() for at in after}
    for at, following in after.items():
        for one in following:
            before[one].add(at)
    found: dict[int, set[int]] = {}
    for start in after:
        inside, waiting = {start}, [at for at in before[start] if at > start]
        while waiting:
            at = waiting.pop()
            if at not in inside:
                inside.add(at)
                waiting += before[at]
        if len(inside) > 1:
            found[start] = inside
    return sorted(map(frozenset, found.values()), key=len)


def _nest(loops: list[frozenset[int]], wanted: set[int], depth: int) -> list[frozenset[int]]:
    """The innermost loop with the most of what is wanted, and those around it, from the outermost."""
    holding = [loop for loop in loops if loop & wanted]
    leaves = [loop for loop in holding if not any(other < loop for other in holding)]
    nest = [max(leaves, key=lambda loop: len(loop & wanted))]
    while len(nest) < depth:
        nest.append(next(loop for loop in holding if nest[-1] < loop))
    return nest[::-1]


def _shortest_round(after: dict[int, set[int]], times: dict[int, int], start: int, through: set[int]) -> list[int]:
    """The way of the fewest instructions from the start of a loop back to it, by one of those that it is to meet."""
    there, back = _distances(after, times, start), _distances(_reversed(after), times, start)
    middle = min(through, key=lambda at: there[at][0] + back[at][0] - times[at])
    return [*_way(there, middle), *_way(back, middle)[1:-1]]


def _reversed(after: dict[int, set[int]]) -> dict[int, set[int]]:
    before: dict[int, set[int]] = {at: set() for at in after}
    for at, following in after.items():
        for one in following:
            before[one].add(at)
    return before


def _distances(edges: dict[int, set[int]], times: dict[int, int], start: int) -> dict[int, tuple[int, int | None]]:
    """How many instructions it takes from `start` to each other of `times`, with the one before it on the way."""
    found: dict[int, tuple[int, int | None]] = {}
    waiting: list[tuple[int, int, int | None]] = [(times[start], start, None)]
    while waiting:
        length, at, previous = heapq.heappop(waiting)
        if at in found:
            continue
        found[at] = length, previous
        for one in edges[at] & times.keys():
            if one not in found:
                heapq.heappush(waiting, (length + times[one], one, at))
    return found


def _way(found: dict[int, tuple[int, int | None]], end: int) -> list[int]:
    way, at = [], end
    while at is not None:
        way.append(at)
        at = found[at][1]
    return way
