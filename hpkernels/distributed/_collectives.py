"""What the losses over many devices share: gathering rows, sums over ranks, and failing together.

A function of this package goes in phases, each of which ends with an exchange, and gathers only in between:

    with together(op, group) as shared:      # checks: what raises here ends all ranks
        check.tensor(op, "z", z, ("N", "D"))
        shared.update({"D": z.shape[1], "dtype": z.dtype, "temperature": temperature})
    all_z, first, counts = gathered_rows(z, group)
    with together(op, group):                # a kernel may fail on one rank alone
        loss = ...
    loss = total(loss, group)

So no rank waits in a collective that another never enters: a rank that raises in a phase raises its own error, and all
others a RuntimeError that has its sentence. What ends a process itself is left to the timeout of the process group.

`group` is a process group of torch.distributed, or None for the default one. Where torch.distributed has not been
initialised, None is a group of one rank, and nothing is exchanged.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup`` or None; builds of PyTorch without torch.distributed do not have the class."""


_P = ParamSpec("_P")
_R = TypeVar("_R")


class Gathered(NamedTuple):
    """The rows of all ranks.

    Attributes:
        rows: (sum of counts, ...), those of rank 0 first.
        first: where the rows of this rank begin.
        counts: how many rows each rank has.
    """

    rows: Tensor
    first: int
    counts: tuple[int, ...]


def ranks_of(group: Group = None) -> int:
    """How many ranks a group has: 1 without an initialised torch.distributed.

    Raises:
        TypeError, ValueError: `group` is something else, or this process is not in it.
    """
    # A number is what those get that are in no group.
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup | int)):
        raise TypeError(
            "hpkernels.distributed: `group` must be a process group of torch.distributed or None, got"
            f" {type(group).__name__}"
        )
    if not dist.is_available() or not dist.is_initialized():
        return 1
    size: int = dist.get_world_size(group)  # type: ignore[arg-type]
    if size < 1:
        raise ValueError("hpkernels.distributed: `group` must have this process in it, got a group of others")
    return size


def rank_in(group: Group = None) -> int:
    """The rank of this process in the group: 0 without an initialised torch.distributed."""
    return dist.get_rank(group) if ranks_of(group) > 1 else 0


def gathered_rows(tensor: Tensor, group: Group = None, counts: Sequence[int] | None = None) -> Gathered:
    """The rows of `tensor` of all ranks, one rank after another.

    Args:
        tensor: (rows, ...) of any dtype. Ranks may have different numbers of rows, also none; device type, dtype and
            the other sizes must agree (see `agree`). No gradient is kept.
        group: see above.
        counts: the numbers of rows where they are known, which saves a collective and a wait for the device.

    Returns:
        All rows, on the device of `tensor`, where this rank's begin, and the numbers of rows.

    Notes:
        Every rank must call it. It receives ``ranks * max(counts)`` rows: those of ranks that have fewer are padded.

    Examples:
        >>> import torch
        >>> from hpkernels.distributed._collectives import gathered_rows
        >>> rows, first, counts = gathered_rows(torch.ones(3, 2))  # one process
        >>> rows.shape, first, counts
        (torch.Size([3, 2]), 0, (3,))
    """
    tensor = tensor.detach()
    size = ranks_of(group)
    if size == 1:
        return Gathered(tensor, 0, (len(tensor),))
    if counts is None:
        own = torch.tensor([len(tensor)], device=tensor.device)
        of_ranks = own.new_empty(size)
        _all_gather(of_ranks, own, group=group)
        counts = of_ranks.tolist()
    most, sent = max(counts), as_bytes(tensor)
    if len(sent) < most:
        sent = torch.cat((sent, sent.new_zeros((most - len(sent), sent.shape[1]))))
    received = sent.new_empty((size * most, sent.shape[1]))
    _all_gather(received, sent, group=group)
    if min(counts) < most:
        received = torch.cat([received[most * rank :][:count] for rank, count in enumerate(counts)])
    rows = received.view(tensor.dtype).view(-1, *tensor.shape[1:])
    return Gathered(rows, sum(counts[: rank_in(group)]), tuple(counts))


def as_bytes(rows: Tensor) -> Tensor:
    """The bytes of (rows, ...), as (rows, bytes) uint8, for not every backend of torch.distributed takes every dtype.

    They are those of `rows` itself, not of a copy, if its elements lie one after another.
    """
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    if not flat.is_contiguous() or flat.stride(1) != 1:  # a single column may have any stride and be contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _all_gather(received: Tensor, sent: Tensor, group: Group) -> None:
    # The second name is that of PyTorch before 2.14.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent, group=group)


def total(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks of a small tensor of any shape, the same on all; every rank must call it. No gradient.

    Added in the order of ranks, and so the same bits on all of them and in every run, which an all-reduce does not
    promise.

    Examples:
        >>> import torch
        >>> from hpkernels.distributed._collectives import total
        >>> total(torch.tensor([1.0, 2.0]))  # one process
        tensor([1., 2.])
    """
    of_ranks = gathered_rows(tensor[None], group, (1,) * ranks_of(group)).rows
    summed: Tensor = functools.reduce(torch.add, of_ranks)
    return summed


def of_first_rank(value: Any, group: Group = None) -> Any:
    """What rank 0 of the group has for `value`, an object that can be pickled; every rank must call it."""
    if ranks_of(group) == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def agree(op: str, group: Group = None, *, error: Exception | None = None, **settings: Any) -> None:
    """Raise on every rank if one has failed or if settings differ; every rank must call it.

    Args:
        op: the name that messages begin with.
        group: see above.
        error: what this rank has raised since the last exchange.
        settings: what must be the same on all ranks: objects that can be pickled and compared. For a tensor pass its
            `fingerprint`, and sizes and dtypes by themselves. A name that a rank does not pass is None there.

    Raises:
        Exception: `error` itself.
        RuntimeError: another rank has an error; its rank and its sentence.
        ValueError: a setting differs; its name, and the values by rank.

    Examples:
        >>> from hpkernels.distributed._collectives import agree
        >>> agree("contrastive", temperature=0.07, D=512)  # one process agrees with itself
    """
    size = ranks_of(group)
    if size > 1:
        sentence = None if error is None else f"{type(error).__name__}: {error}"
        of_ranks: list[Any] = [None] * size
        dist.all_gather_object(of_ranks, (sentence, settings), group=group)
    if error is not None:
        raise error
    if size == 1:
        return
    for rank, (sentence, _) in enumerate(of_ranks):
        if sentence is not None:
            raise RuntimeError(f"{op}: rank {rank} has failed, and so no rank can go on: {sentence}")
    for name in {name: None for _, of_rank in of_ranks for name in of_rank}:
        by_value: dict[str, list[int]] = {}
        for rank, (_, of_rank) in enumerate(of_ranks):
            by_value.setdefault(str(of_rank.get(name)), []).append(rank)
        if len(by_value) > 1:
            got = ", ".join(f"{value} on rank {' and '.join(map(str, ranks))}" for value, ranks in by_value.items())
            raise ValueError(f"{op}: `{name}` must be the same on all ranks, got {got}")


@contextmanager
def together(op: str, group: Group = None) -> Iterator[dict[str, Any]]:
    """A phase without collectives, at whose end ranks `agree`: what its body raises ends all ranks.

    It gives a dict, for settings that must be the same on all ranks. Every rank must enter it, and no collective may
    stand inside: one rank would wait in it for another that has left.

    Examples:
        >>> from hpkernels.distributed._collectives import together
        >>> with together("contrastive") as shared:
        ...     shared["temperature"] = 0.07
    """
    shared: dict[str, Any] = {}
    error: Exception | None = None
    try:
        yield shared
    except Exception as raised:
        error = raised
    agree(op, group, error=error, **shared)


def eager(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have ``torch.compile`` leave a call of `function` out of its graphs: it cannot trace the exchange of objects.

    As ``torch.compiler.disable`` does, which imports the compiler, and that takes longer than all else: so not before
    the compiler is there.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        result: _R = torch.compiler.disable(function)(*args, **options)  # type: ignore[no-untyped-call]
        return result

    return call


def fingerprint(tensor: Tensor) -> str:
    """Dtype, shape and a checksum of the bits of a tensor: equal for equal tensors, whatever their devices.

    Examples:
        >>> import torch
        >>> from hpkernels.distributed._collectives import fingerprint
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(2, 3))
        True
    """
    by_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = tensor.detach().contiguous().flatten().view(by_size[tensor.element_size()]).long()
    places = torch.arange(1, 2 * len(words), 2, device=words.device)  # odd: no bit of a word is lost
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(tensor.shape)} {int((words * places).sum()) % 2**64:016x}"
