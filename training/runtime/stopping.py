"""SIGTERM, which Slurm sends before it takes a machine away, and Ctrl-C: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from training.runtime import parallel

_AGAIN = 1.0  # seconds; a launcher repeats the Ctrl-C of its terminal at once, and means the same one


class Stopped(Exception):
    """Training ended early, at a signal, and its state is saved; `status` is the exit status that tells so."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class Stopping:
    """Inside a ``with`` block SIGTERM and SIGINT are kept for `requested`; a second Ctrl-C interrupts at once.

    Only the main thread receives signals: in another one nothing changes.

    Attributes:
        number: of the first signal, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0

    def __enter__(self) -> Stopping:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before and isinstance(error, Exception) and parallel.lost_rank(error):
            # torchrun is about to send it, and may send it before this rank has said why it ends.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def requested(self) -> bool:
        """Whether a signal asked to stop."""
        return self.number is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > _AGAIN:
            raise KeyboardInterrupt
