"""What a run tells while it trains: a bar, ``log.jsonl``, and scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.runtime.checkpoint import written_whole
from training.runtime.parallel import is_first

if TYPE_CHECKING:
    from training.run import Run

LOG = "log.jsonl"
"""The file in the output folder with one JSON object for each logged step."""

_BAR = "{percentage:3.0f}% {elapsed}<{remaining}, {rate_fmt}{postfix}"  # a picture of a bar would push the speed out


class Progress:
    """The bar and the logs of a run, open inside a ``with`` block."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.anchors = run.config.batch_size * run.train_bank.anchors_per_image  # of one step
        self._started = time.perf_counter() - run.state.seconds
        self._seconds = 0.0  # in the steps since the last that was logged
        self._steps = 0
        self._parts: dict[str, float] = {}  # of the last timed step, in seconds
        self.writer: SummaryWriter | None = None
        self.log_file: TextIO | None = None

    def __enter__(self) -> Progress:
        step, output = self.run.state.step, Path(self.run.config.output)
        if is_first():  # of several ranks
            cut_log(output / LOG, step)
            self.log_file = open(output / LOG, "a", encoding="utf-8")  # noqa: SIM115
            self.writer = SummaryWriter(f"{output}/tensorboard", purge_step=step)
        self.bar = tqdm(
            total=self.run.steps * self.anchors,
            initial=step * self.anchors,
            unit=" anchors",
            unit_scale=True,
            bar_format=_BAR,
        )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.log_file is not None:
            self.log_file.close()

    @property
    def seconds(self) -> float:
        """Spent in training so far, also before the run was interrupted."""
        return time.perf_counter() - self._started

    @contextmanager
    def step(self, timed: bool) -> Iterator[None]:
        """The block is a step; if it is `timed`, also the parts of it."""
        begin = time.perf_counter()
        with self.run.train_bank.clock.step(timed) as parts:
            yield
        self._seconds += time.perf_counter() - begin
        self._steps += 1
        self._parts = dict(parts)
        self.bar.update(self.anchors)

    def flush(self) -> None:
        """Write what is logged so far to the disk."""
        if self.writer is not None:
            self.writer.flush()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Show the figures of the step that was timed, and keep them: its speed in the logs alone."""
        speed = self._speed()
        line = {"step": step} | figures | speed | {"seconds": {name: round(s, 6) for name, s in self._parts.items()}}
        self._write(line)
        self._scalars(step, figures | {f"speed/{name}": value for name, value in speed.items()})
        self.bar.set_postfix_str(
            f"{speed['images_per_second']:.3g} images/s, in loss {speed['loss_share']:.0%},"
            f" data {speed['data_share']:.0%}, {speed['memory_gb']:.1f} GB, loss {figures['loss']:.3f},"
            f" lambda {figures['lambda']:.2f}, positives {figures['positives_per_anchor']:.0f}"
        )
        self.run.state.history.append({"step": step} | figures)
        self._seconds, self._steps = 0.0, 0

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Add figures to those of a step that were found after it; what is no number is left out."""
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._scalars(step, figures)
        history = self.run.state.history
        if figures and not (history and history[-1]["step"] == step):
            history.append({"step": step})
        if figures:
            history[-1] |= figures
            self._write({"step": step} | figures)

    @contextmanager
    def outside_training(self, name: str, step: int) -> Iterator[None]:
        """The time of the block does not count as training; it is a scalar of that name."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._started += seconds
        self._scalars(step, {name: seconds})

    def _write(self, line: dict[str, Any]) -> None:
        if self.log_file is not None:
            self.log_file.write(json.dumps(line) + "\n")
            self.log_file.flush()

    def _scalars(self, step: int, figures: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)

    def _speed(self) -> dict[str, float]:
        rate = self._steps / self._seconds
        step = sum(self._parts.values())
        return {
            "images_per_second": round(rate * self.run.config.batch_size, 3),
            "anchors_per_second": round(rate * self.anchors, 1),
            "loss_share": round(self._parts.get("loss", 0.0) / step, 4),
            "data_share": round(self._parts.get("data", 0.0) / step, 4),
            "memory_gb": round(peak_memory(self.run.device) / 1e9, 3),
        }


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cut_log(log: Path, step: int) -> None:
    """Keep the lines of steps before `step`, which a resumed run takes again; the last may be cut off."""
    if not log.exists():
        return
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) < step]
    with written_whole(log) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _step_of(line: str) -> float:
    try:
        values: Any = json.loads(line)
        return values["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


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
