"""What pretraining tells while it trains: a bar, and ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from training.pretraining.run import Pretraining
from training.runtime.progress import LOG, cut_log, peak_memory


class PretrainingLog:
    """The bar and the log of a run, open inside a ``with`` block."""

    def __init__(self, run: Pretraining) -> None:
        self.run = run
        self._steps = 0  # since the last line
        self._since = self._last = time.perf_counter()

    def __enter__(self) -> PretrainingLog:
        log = Path(self.run.config.output) / LOG
        cut_log(log, self.run.state.step)
        self._file = open(log, "a", encoding="utf-8")  # noqa: SIM115
        self._bar = tqdm(total=self.run.steps, initial=self.run.state.step, unit="step")
        self._since = self._last = time.perf_counter()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()
        self._file.close()

    def count(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.run.state.seconds += now - self._last
        self._last = now
        self._steps += 1
        self._bar.update()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Show the figures of a step, and keep them with the speed since the last ones."""
        now = time.perf_counter()
        speed = self._steps * self.run.config.batch_size / (now - self._since)
        self._steps, self._since = 0, now
        line = {
            "step": step,
            **{name: float(f"{value:.6g}") for name, value in figures.items()},
            "images_per_second": round(speed, 3),
            "memory_gb": round(peak_memory(self.run.device) / 1e9, 3),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(
            f"{speed:.3g} images/s, loss {figures['loss']:.3f}, rank {figures['effective_rank']:.1f}, by position"
            f" {figures['by_position']:.0%}, prototypes {figures['prototypes_used']:.0f}"
        )
