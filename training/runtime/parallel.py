"""One run on several devices: the ranks that torchrun starts, each with its share of the images of every batch.

Every rank takes the same steps with the same random numbers, drawn for the whole batch. A loss has the value of the
whole batch on every rank, and there the gradient of the rank's own rows: the sum over ranks is the gradient of one
process. Sums are added in the order of ranks, so that all ranks have the same bits, and so has another run.

In one process, without torchrun, everything here is the identity.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpkernels.distributed._collectives import agree as agree
from hpkernels.distributed._collectives import gathered_rows, rank_in, ranks_of, total


class Share(NamedTuple):
    """Which rows of a batch a rank has: those from `first` to before `stop` of `rows`."""

    first: int
    stop: int
    rows: int

    def of(self, batch: Tensor) -> Tensor:
        """The rank's rows of a tensor (rows, ...)."""
        return batch[self.first : self.stop]

    @property
    def part(self) -> float:
        """How much of the batch that is, at most 1."""
        return (self.stop - self.first) / self.rows


def shares(rows: int) -> list[Share]:
    """What each rank has of `rows` rows: one after another, the first ranks one more where they do not divide."""
    ranks = ranks_of()
    ends = [rows // ranks * rank + min(rank, rows % ranks) for rank in range(ranks + 1)]
    return [Share(first, stop, rows) for first, stop in zip(ends, ends[1:], strict=False)]


def share(rows: int) -> Share:
    """What this rank has of `rows` rows."""
    return shares(rows)[rank_in()]


def is_first() -> bool:
    """Whether this rank is the one that writes and says what there is to say."""
    return rank_in() == 0


def whole(part: Tensor) -> Tensor:
    """The sum over ranks of a 0-d part of a loss; its gradient is that of this rank's part."""
    if ranks_of() == 1:
        return part
    return total(part.detach()) + (part - part.detach())


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks (N, ...), one rank after another; gradients reach this rank's own."""
    if ranks_of() == 1:
        return rows
    everything, first, _ = gathered_rows(rows)
    return torch.cat((everything[:first], rows, everything[first + len(rows) :]))


def greatest(number: int) -> int:
    """The greatest `number` of any rank; all must call it, at the same place of the same step."""
    return int(gathered_rows(torch.tensor([number])).rows.max())


def meet() -> None:
    """Wait until all ranks are here."""
    if ranks_of() > 1:
        dist.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in one exchange; parameters without one are the same on all."""
    # DistributedDataParallel does not fit: the head is called several times a step, and the mean is not wanted.
    if ranks_of() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, its_sum in zip(gradients, summed.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(its_sum.view_as(gradient))


def copy_first(module: nn.Module) -> None:
    """Give the module of every rank the parameters and buffers of the first one's."""
    if ranks_of() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def device_of_rank(name: str) -> str:
    """The device called `name` on this rank: of "cuda" its own GPU, by ``LOCAL_RANK``.

    Raises:
        ValueError: there are fewer GPUs than ranks on this machine, or `name` is one of them.
    """
    if not launched() or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ValueError(f"config: `device` must be auto, cuda or cpu for the ranks of torchrun, got {name!r}")
    ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if ranks > gpus > 0:
        raise ValueError(
            f"config: `device` {name!r} gives each rank a GPU of its own, and torchrun started {ranks} ranks for"
            f" {gpus}: start at most {gpus}, or choose device=cpu"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def joined(device: torch.device, minutes: float) -> Iterator[bool]:
    """Be one of the ranks of torchrun inside the block, and leave it together; without torchrun nothing happens.

    Args:
        device: that this rank computes on: NCCL connects GPUs, gloo CPUs.
        minutes: that a rank waits for another.

    Yields:
        whether this is the first rank. What the others print is lost.
    """
    if not launched():
        yield True
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(minutes=minutes)
    dist.init_process_group(backend, store=_store(), rank=rank, world_size=ranks, timeout=limit)
    if rank == 0:
        yield True
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield False
    # Only here: after an error the others may be in a collective, from which torchrun takes them.
    dist.barrier()
    dist.destroy_process_group()


def end() -> None:
    """End this process with success if torchrun has started it, and else go on."""
    if launched():
        sys.stdout.flush()
        os._exit(0)  # threads of gloo may outlive the interpreter, and abort the process while it ends


def may_speak(consequence: bool = False) -> bool:
    """Whether this rank is the one that says what has gone wrong: the first that asks.

    Args:
        consequence: what went wrong may come of what another rank is about to say, which goes first.
    """
    if not launched():
        return True
    if consequence:
        time.sleep(1)
    with suppress(RuntimeError):  # where torchrun itself has ended, there is nothing to ask
        return bool(_store().add("training has failed", 1) == 1)
    return True


def lost_rank(error: Exception) -> str | None:
    """What to say where an exchange fails because another rank of torchrun has ended or hangs; None of other errors.

    A rank that had something to say has said it before it ended. torchrun is about to end this one, so say it at once.
    """
    if not launched() or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        return None
    reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0])  # without the line of C++ that raised it
    return f"another rank has ended, or does not answer: {reason}; the same command goes on from the last checkpoint"


def launched() -> bool:
    """Whether torchrun has started this process as one of several ranks."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@functools.cache
def _store() -> dist.Store:
    """Where the ranks of torchrun find each other."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store
