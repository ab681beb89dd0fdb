"""What a run tells while it trains: a bar, and scalars for TensorBoard."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.parallel import is_first

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
        self.writer = SummaryWriter(f"{self.run.config.output}/tensorboard", purge_step=step) if is_first() else None
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
        if self.writer:
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
        if self.writer:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(
            loss=f"{figures['loss']:.3f}",
            lam=f"{figures['lambda']:.2f}",
            positives=f"{figures['positives_per_anchor']:.0f}",
        )
        self.run.state.history.append({"step": step} | figures)
