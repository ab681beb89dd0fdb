"""One case after another: verify each provider, measure its memory, then time all of them in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.accuracy.verify import WrongResultError, verify
from benchmarks.cases import Case, Inputs
from benchmarks.end_to_end import seconds_of_parts
from benchmarks.providers import Provider, providers
from benchmarks.results import Row
from benchmarks.timing import measure, nvml, rates
from benchmarks.timing.measure import WRONG

_LONGEST_COMPILE = 60.0  # seconds
_PRODUCT = "torch.mm"  # not the name of a provider


def run(
    all_cases: Iterable[Case],
    names: Iterable[str] | None,
    environment: dict,
    report: Callable[[Row], None],
    keep_going: bool = False,
    all_sizes: bool = False,
) -> Iterator[Row]:
    """The rows of all cases, for the providers of these names (None: all).

    With `keep_going` the others are timed where a provider is wrong or fails, which its row says. With `all_sizes` none
    is left out because of its time or memory.

    Raises:
        WrongResultError: a provider's results are not those of the reference; nothing of that case is timed.
    """
    verified: dict[tuple[Case, str], int] = {}
    too_slow: set[str] = set()
    missing: set[tuple[str, str]] = set()
    all_cases = list(all_cases)
    if any(case.device == "cuda" for case in all_cases) and (reason := nvml.card().missing):
        print(f"without clocks, power and temperature: {reason}")
    for case in all_cases:
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[..., object]] = {}
        for tried in providers(case):
            if names is not None and tried.name not in names:
                continue
            if reason := tried.reason_missing(case):
                if (case.op, tried.name) not in missing:
                    missing.add((case.op, tried.name))
                    print(f"{case.op}: without {tried.name}: {reason}")
                continue
            row = rows[tried.name] = _row(case, tried, environment)
            row.note = "" if all_sizes else tried.reason_to_skip(case)
            if tried.name in too_slow:
                row.note = f"left out: compiling took more than {_LONGEST_COMPILE:.0f} s"
            if row.note:
                continue
            try:
                row.verified_anchors = _verified_once(case, tried, verified, too_slow)
                memory = measure.peak_memory(case, tried.name, None if all_sizes else measure.PATIENCE)
            except (WrongResultError, RuntimeError) as error:
                if not keep_going:
                    raise
                row.note = f"{WRONG}{str(error).partition(chr(10))[0]}"
                continue
            row.note = memory.error
            row.peak_mib = None if memory.peak is None else round(memory.peak / 2**20, 1)
            if memory.seconds is not None and memory.seconds > measure.LONG_CALL:
                row.set_times([memory.seconds])
            elif not memory.error:
                calls[tried.name] = tried.run
        # Not before: processes that measure memory need what there is.
        inputs = case.inputs() if calls or any(row.median_ms for row in rows.values()) else {}
        if inputs:
            _time(case, inputs, rows, calls)
        for row in rows.values():
            report(row)
            yield row
            calls_of_each = 2 if row.timer == "events" else 1  # on a GPU one more by the wall clock
            for part, seconds in seconds_of_parts(inputs, row.provider, row.repetitions, calls_of_each).items():
                of_part = replace(row, call=f"{case.call} {part}", peak_mib=None)
                of_part.set_times(seconds)
                report(of_part)
                yield of_part


def _time(case: Case, inputs: Inputs, rows: dict[str, Row], calls: dict[str, Callable[..., object]]) -> None:
    """Time the calls, and a matrix product of the same shape among them, and fill the rows."""
    product = rates.product(case, inputs)
    timed = {name: partial(call, inputs) for name, call in calls.items()}
    timed |= {} if product is None else {_PRODUCT: product.call}
    not_captured = {tried.name for tried in providers(case) if not tried.is_captured(case)}
    measured = measure.times(timed, case.device, not_captured)
    mm = measured.pop(_PRODUCT, None)
    for name, times in measured.items():
        row = rows[name]
        row.note = times.note
        if times.seconds:
            row.set_times(times.seconds, times.wall, times.timer)
        for column, value in nvml.summary(times.samples).items():
            setattr(row, column, value)
    speed = product.flops / statistics.median(mm.seconds) if mm is not None and mm.seconds else None
    try:
        rates.fill(rows.values(), case, inputs, speed)
    except RuntimeError as error:  # the times are worth keeping without
        print(f"{case}: without rates: {str(error).partition(chr(10))[0]}")


def _verified_once(case: Case, tried: Provider, verified: dict[tuple[Case, str], int], too_slow: set[str]) -> int:
    key = case.verified(), tried.name
    if key not in verified:
        start = time.perf_counter()
        verified[key] = verify(case, tried)
        if tried.compiles and time.perf_counter() - start > _LONGEST_COMPILE:
            too_slow.add(tried.name)
    return verified[key]


def _row(case: Case, tried: Provider, environment: dict) -> Row:
    height, width = case.grid
    return Row(
        case.op, case.call, case.images, height, width, case.anchors, case.dtype, provider=tried.name, **environment
    )
