"""What a run tells while it trains: a bar, and scalars for TensorBoard."""

from __future__ import annotations

import threading
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

    def flush(self) -> None:
        """Write what is logged so far to the disk."""
        self.writer.flush()

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


@contextmanager
def named_errors(folder: str) -> Iterator[None]:
    """Name the folder of a log that cannot be written, once: TensorBoard's thread would print a traceback as well.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    before = threading.excepthook
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else before(failed)
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:  # it has a name
            raise
        raise OSError(f"a log in {folder} cannot be written: {error.strerror}") from error
    finally:
        threading.excepthook = before
