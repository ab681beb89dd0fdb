"""A run compared with a baseline: what became faster, what slower, and what is within the tolerance or the noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.pages import presentation
from benchmarks.results import PART, RESULTS, Row, folder_name
from benchmarks.run import WRONG, run

TOLERANCE = 0.05
_IDENTITY = ("device", "threads", "op", "call", "N", "dtype", "provider")
"""What two rows must share to be compared."""
FASTER, SAME, SLOWER = "faster", "within", "slower"


@dataclass(frozen=True)
class Change:
    """What two runs measured of the same thing.

    Attributes:
        before, after: the rows of the two runs.
        ratio: of the times, or of the times relative to a provider of the same run.
        verdict: one of `FASTER`, `SAME`, `SLOWER`.
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
    not_measured: list[Row]
    without_baseline: list[Row]
    not_compared: dict[str, list[Row]]
    lost: list[Row]
    relative_to: str | None

    @property
    def failed(self) -> bool:
        """Whether something of ours is slower, or has no time any more: it is wrong, fails or does not fit."""
        of_ours = (change for change in self.changes if presentation.is_ours(change.after.provider))
        lost = any(presentation.is_ours(row.provider) for row in self.lost)
        return lost or any(change.verdict == SLOWER for change in of_ours)


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
    baseline: Iterable[Row], measured: Iterable[Row], tolerance: float = TOLERANCE, relative_to: str | None = None
) -> Comparison:
    """Compare a run with a baseline, row by row, where device, threads, op, call, N, dtype and provider are the same.

    A time has changed if its median has by more than `tolerance` and the quartiles do not overlap. With `relative_to`,
    the name of a provider, its time in the same case and run is the unit, so that a machine that is slower than it was
    changes nothing.
    """
    old = {_identity(row): row for row in baseline if row.median_ms is not None}
    new = {_identity(row): row for row in measured}
    timed = {key: row for key, row in new.items() if row.median_ms is not None}
    changes, not_compared = [], {}
    for key in old.keys() & timed.keys():
        units = [_unit(rows, key, relative_to) for rows in (old, timed)]
        if _timer(old[key]) != _timer(timed[key]):
            not_compared.setdefault("timed in another way", []).append(timed[key])
        elif None in units:
            not_compared.setdefault(f"not measured beside {relative_to} in both", []).append(timed[key])
        else:
            changes.append(_change(old[key], timed[key], *units, tolerance))
    return Comparison(
        changes,
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
    sides = [list(zip(*map(_identity, rows), strict=True)) for rows in (baseline, measured)]
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


def _identity(row: Row) -> tuple:
    return *_machine(row), *row.key


def _timer(row: Row) -> str:
    return getattr(row, "timer", "") or "wall"


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


def report(comparison: Comparison, baseline: list[Row], measured: list[Row], tolerance: float) -> Iterator[str]:
    """A comparison in lines: each change, the slower last, what was not compared, and how many of each."""
    if comparison.relative_to:
        yield f"ratios are of times relative to {comparison.relative_to}"
    order = (SAME, FASTER, SLOWER)
    for change in sorted(comparison.changes, key=lambda change: (order.index(change.verdict), *change.after.key)):
        yield f"{change.verdict:6}  {_name(change.after):64}  {_times(change)}{_drift(change, baseline, measured)}"
    ops = {row.op for row in measured}
    others = [row for row in comparison.not_measured if row.op not in ops]
    if others:
        yield f"in the baseline, of ops that the run does not have ({len(others)})"
    for title, rows in {
        "in the baseline, not measured": [row for row in comparison.not_measured if row.op in ops],
        "measured, not in the baseline": comparison.without_baseline,
        **comparison.not_compared,
    }.items():
        if rows:
            yield "\n        ".join([f"{title} ({len(rows)}):", *map(_name, rows)])
    for row in comparison.lost:
        yield f"lost    {_name(row)}: {row.note.removeprefix(WRONG)}"
    counts = Counter(change.verdict for change in comparison.changes)
    yield f"{counts[FASTER]} faster, {counts[SAME]} within {tolerance:.0%} or the noise, {counts[SLOWER]} slower"


def _name(row: Row) -> str:
    return f"{row.op} {row.call} N={row.anchors} {row.dtype} {row.provider}"


def _times(change: Change) -> str:
    noise = " (quartiles overlap)" if change.noisy else ""
    return f"{change.before.median_ms:.4g} -> {change.after.median_ms:.4g} ms, x{change.ratio:.2f}{noise}"


def _drift(change: Change, baseline: list[Row], measured: list[Row]) -> str:
    """How many times as long a provider that is not ours took in each of the runs: a machine's drift is in both."""
    row = change.after
    if not presentation.is_ours(row.provider):
        return ""
    here = [[other for other in rows if _identity(other)[:-1] == _identity(row)[:-1]] for rows in (baseline, measured)]
    peers = [{other.provider for other in rows if other.median_ms is not None} for rows in here]
    name = presentation.yardstick(other for other in here[1] if other.provider in peers[0] & peers[1])
    if name is None or presentation.is_ours(name):
        return ""
    old, new = (presentation.at(rows, name, row.anchors).median_ms for rows in here)
    return f"; {name} x{old / change.before.median_ms:.2f} -> x{new / change.after.median_ms:.2f}"
