"""Where the time of a step goes, of the steps that are timed."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Clock:
    """Seconds by part. A part inside of another counts for itself; what is in none is "other".

    On a GPU it waits for the device wherever a part begins or ends, so time few steps: the others run as they would.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []  # empty: no step is timed
        self._since = 0.0

    @contextmanager
    def step(self, timed: bool = True) -> Iterator[dict[str, float]]:
        """Time the step inside the block, if it is `timed`; the seconds of its parts are there when the block ends."""
        self._seconds = defaultdict(float)
        if timed:
            self._since = self._now()
            self._inside = ["other"]
        try:
            yield self._seconds
            if timed:
                self._count()
        finally:
            self._inside = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is inside the block is the part `name`."""
        if not self._inside:
            yield
            return
        self._count()
        self._inside.append(name)
        try:
            yield
            self._count()
        finally:
            self._inside.pop()

    def _count(self) -> None:
        now = self._now()
        self._seconds[self._inside[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def timed(part: str) -> Callable[[_Function], _Function]:
    """Count a function of a run, its first argument, as a part of the step."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapped(run: Any, *arguments: Any, **keywords: Any) -> Any:
            with run.train_bank.clock.part(part):
                return function(run, *arguments, **keywords)

        return wrapped  # type: ignore[return-value]

    return decorate
