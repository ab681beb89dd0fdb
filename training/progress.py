"""What a run tells while it trains: a bar, and scalars for TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if TYPE_CHECKING:
    from training.run import Run


class Progress:
    """The bar and the log of a run, open inside a ``with`` block."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.anchors = run.config.batch_size * run.train_bank.anchors_per_image  # of one step
        self._started = time.perf_counter() - run.state.seconds

    def __enter__(self) -> Progress:
        step = self.run.state.step
        self.writer = SummaryWriter(f"{self.run.config.output}/tensorboard", purge_step=step)
        self.bar = tqdm(
            total=self.run.steps * self.anchors,
            initial=step * self.anchors,
            unit="anchor",
            unit_scale=True,
            desc="train",
        )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
        self.writer.close()

    @property
    def seconds(self) -> float:
        """Spent in training so far, also before the run was interrupted."""
        return time.perf_counter() - self._started

    def advance(self) -> None:
        """One step is done."""
        self.bar.update(self.anchors)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Show the figures of a step, and keep them for the curves of the report."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(
            loss=f"{figures['loss']:.3f}",
            lam=f"{figures['lambda']:.2f}",
            positives=f"{figures['positives_per_anchor']:.0f}",
        )
        self.run.state.history.append({"step": step} | figures)

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Add figures to those of a step that were found after it; what is no number is left out."""
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        history = self.run.state.history
        if figures and not (history and history[-1]["step"] == step):
            history.append({"step": step})
        if figures:
            history[-1] |= figures

    @contextmanager
    def outside_training(self, name: str, step: int) -> Iterator[None]:
        """The time of the block does not count as training; it is a scalar of that name."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._started += seconds
        self.writer.add_scalar(name, seconds, step)
