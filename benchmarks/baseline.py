"""A run compared with a baseline: time and memory that changed, and what is within the tolerance or the noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.pages import presentation
from benchmarks.results import PART, RESULTS, Row, folder_name
from benchmarks.run import run

TOLERANCE = 0.05
MEMORY_TOLERANCE, MEMORY_NOISE = 0.25, 8.0
"""A share, and MiB: what the allocator keeps differs from run to run by as much, though the code is the same."""
_IDENTITY = ("device", "threads", "op", "call", "N", "dtype", "provider")
"""The names of what `identity` has."""
FASTER, SAME, SLOWER = "faster", "within", "slower"
LESS, MORE = "less", "more"


@dataclass(frozen=True)
class Change:
    """What two runs measured of the same thing.

    Attributes:
        before, after: the rows of the two runs.
        ratio: of the times, or of the times relative to a provider of the same run; or of the peaks of memory.
        verdict: of times one of `FASTER`, `SAME`, `SLOWER`, of memory one of `LESS`, `SAME`, `MORE`.
        noisy: whether the ratio alone would have been called a change.
    """

    before: Row
    after: Row
    ratio: float
    verdict: str
    noisy: bool


@dataclass(frozen=True)
class Comparison:
    """All that there is to say about a run and a baseline."""

    changes: list[Change]
    memory: list[Change]
    not_measured: list[Row]
    without_baseline: list[Row]
    not_compared: dict[str, list[Row]]
    lost: list[Row]
    relative_to: str | None

    @property
    def failed(self) -> bool:
        """Whether something of ours is slower, takes more memory, or has no time any more.

        Without a time it is wrong, fails or does not fit.
        """
        worse = [change.after for change in [*self.changes, *self.memory] if change.verdict in (SLOWER, MORE)]
        return any(presentation.is_ours(row.provider) for row in [*self.lost, *worse])


def _left_out(row: Row) -> bool:
    """Whether a row has no time because it was not asked for."""
    return not row.note or row.note.startswith("left out")


def folder_of(device: str, threads: int) -> Path:
    """The folder of `benchmarks/results` with the results of a device."""
    folders = [RESULTS / folder_name(device, threads), RESULTS / folder_name(device)]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def again(baseline: Iterable[Row], environment: dict) -> Iterator[Row]:
    """Measure once more what a baseline has of this device; the rows, each as soon as it is there."""
    providers: dict[Case, list[str]] = {}
    here = environment["device"], environment["threads"]
    for row in baseline:
        if row.median_ms is not None and _machine(row) == here and not row.call.startswith(PART):
            device = "cuda" if row.instructions.startswith("sm_") else "cpu"
            case = Case(row.op, row.call, row.images, (row.height, row.width), device, row.dtype)
            providers.setdefault(case, []).append(row.provider)
    for case, names in providers.items():
        yield from run([case], names, environment, lambda row: None, keep_going=True, all_sizes=True)


def compare(
    baseline: Iterable[Row],
    measured: Iterable[Row],
    tolerance: float = TOLERANCE,
    relative_to: str | None = None,
    memory_tolerance: float = MEMORY_TOLERANCE,
) -> Comparison:
    """Compare a run with a baseline, row by row, where device, threads, op, call, N, dtype and provider are the same.

    A time has changed if its median has by more than `tolerance` and the quartiles do not overlap. With `relative_to`,
    the name of a provider, its time in the same case and run is the unit, so that a machine that is slower than it was
    changes nothing.

    Peak memory has changed if it has by more than `memory_tolerance` and by more than `MEMORY_NOISE`.
    """
    old = {identity(row): row for row in baseline if row.median_ms is not None}
    new = {identity(row): row for row in measured}
    timed = {key: row for key, row in new.items() if row.median_ms is not None}
    changes, memory, not_compared = [], [], {}
    for key in old.keys() & timed.keys():
        units = [_unit(rows, key, relative_to) for rows in (old, timed)]
        if _timer(old[key]) != _timer(timed[key]):
            not_compared.setdefault("timed in another way", []).append(timed[key])
        elif None in units:
            not_compared.setdefault(f"not measured beside {relative_to} in both", []).append(timed[key])
        else:
            changes.append(_change(old[key], timed[key], *units, tolerance))
        if None not in (old[key].peak_mib, timed[key].peak_mib):
            memory.append(_memory_change(old[key], timed[key], memory_tolerance))
    return Comparison(
        changes,
        memory,
        [row for key, row in old.items() if key not in new or (key not in timed and _left_out(new[key]))],
        [row for key, row in timed.items() if key not in old],
        not_compared,
        [row for key, row in new.items() if key in old and key not in timed and not _left_out(row)],
        relative_to,
    )


def difference(baseline: Iterable[Row], measured: Iterable[Row]) -> str:
    """Why nothing of a run can be compared with a baseline."""
    baseline, measured = list(baseline), list(measured)
    if not measured:
        return "it has no case that was timed on this machine"
    sides = [list(zip(*map(identity, rows), strict=True)) for rows in (baseline, measured)]
    differing = [
        f"{name} {_listed(old)} and {_listed(new)}"
        for name, old, new in zip(_IDENTITY, *sides, strict=True)
        if not set(old) & set(new)
    ]
    return "; ".join(differing) or f"no case has the same {', '.join(_IDENTITY)} in both and was timed"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _machine(row: Row) -> tuple[str, int]:
    return row.device, row.threads


def identity(row: Row) -> tuple:
    """What two rows must share to be compared."""
    return *_machine(row), *row.key


def _timer(row: Row) -> str:
    return row.timer or "wall"


def _unit(rows: dict[tuple, Row], key: tuple, provider: str | None) -> tuple[float, float, float] | None:
    """The quartiles of a provider in the case of a row, in ms: the unit of its time. None: it was not timed there."""
    if provider is None:
        return 1.0, 1.0, 1.0
    peer = rows.get((*key[:-1], provider))
    return None if peer is None else (peer.q1_ms, peer.median_ms, peer.q3_ms)


def _change(before: Row, after: Row, old_unit: tuple, new_unit: tuple, tolerance: float) -> Change:
    (old_low, old, old_high), (low, middle, high) = (
        (row.q1_ms / unit[2], row.median_ms / unit[1], row.q3_ms / unit[0])
        for row, unit in ((before, old_unit), (after, new_unit))
    )
    ratio = middle / old
    zone = SLOWER if ratio > 1 + tolerance else FASTER if ratio < 1 - tolerance else SAME
    overlap = low <= old_high and old_low <= high
    return Change(before, after, ratio, SAME if overlap else zone, overlap and zone != SAME)


def _memory_change(before: Row, after: Row, tolerance: float) -> Change:
    old, new = before.peak_mib, after.peak_mib
    zone = MORE if new > old * (1 + tolerance) else LESS if new < old * (1 - tolerance) else SAME
    noisy = zone != SAME and abs(new - old) <= MEMORY_NOISE
    return Change(before, after, new / old if old else math.inf, SAME if noisy else zone, noisy)
