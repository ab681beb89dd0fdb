"""How keys come to the anchors of all ranks, and what is found of keys there back to the ranks that own them.

Either a rank gathers the keys of all, or they go round a ring: a rank computes with the keys of one rank while it sends
them to the next and receives others from the one before, so that it holds those of two ranks besides its own. Both have
the same method `round`, in which every rank visits all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpkernels.distributed._collectives import Group, agree, as_bytes, gathered_rows, rank_in, ranks_of, together
from hpkernels.ops import _checks as check


class Keys(NamedTuple):
    """Keys that are in one place, and what belongs to each of them.

    Attributes:
        vectors: (K, D).
        positive_ids, excluded_ids: (K, C) int64, or None.
        bias: (K,), or None.
        numbers: (K, 4), those that backward takes of keys, or None.
    """

    vectors: Tensor
    positive_ids: Tensor | None
    excluded_ids: Tensor | None
    bias: Tensor | None
    numbers: Tensor | None = None


Visit = Callable[[int, Keys], Sequence[Tensor]]
"""``visit(first, keys)`` computes with keys `first`, `first + 1`, ... of all, and returns what is theirs: (K, ...)."""
Combine = Callable[[Tensor, Tensor], Tensor]
"""Two of what different ranks have found of the same keys, as one."""


class Way(Protocol):
    """A way to all keys."""

    def __init__(self, op: str, group: Group, own: Keys, counts: Sequence[int]) -> None:
        """`own` are the keys of this rank, `counts` how many each rank has. Every rank must call it."""

    def round(
        self, visit: Visit, combine: Combine, found: Sequence[tuple[int, ...]], numbers: Tensor | None = None
    ) -> list[Tensor]:
        """Visit all keys. Every rank must call it, and if one fails all do.

        Args:
            visit: see above.
            combine: see above.
            found: the shapes of what `visit` returns, less K. Its dtype is that of the numbers.
            numbers: of the own keys, which then belong to `Keys`.

        Returns:
            What all ranks have found of the own keys, combined in an order that depends on this rank alone.
        """


class Gathering:
    """All keys on every rank, visited at once. See `Way`."""

    def __init__(self, op: str, group: Group, own: Keys, counts: Sequence[int]) -> None:
        self._op, self._group, self._counts = op, group, counts
        self._all = _each(lambda part: gathered_rows(part, group, counts).rows, own)

    def round(
        self, visit: Visit, combine: Combine, found: Sequence[tuple[int, ...]], numbers: Tensor | None = None
    ) -> list[Tensor]:
        """See `Way`."""
        if numbers is not None:
            numbers = gathered_rows(numbers, self._group, self._counts).rows
        with together(self._op, self._group):
            of_all = visit(0, self._all._replace(numbers=numbers))
        return [self._of_own(part, combine) for part in of_all]

    def _of_own(self, part: Tensor, combine: Combine) -> Tensor:
        """What all ranks have for the keys of this rank, one rank after another, so that not all are in memory."""
        rank, size = rank_in(self._group), ranks_of(self._group)
        parts = torch.split(part.contiguous(), list(self._counts))
        own: Tensor = parts[rank]
        for step in range(1, size):
            target, source = (rank + step) % size, (rank - step) % size
            arrived = torch.empty_like(parts[rank])
            _wait(_pass([parts[target]], target, [arrived], source, self._group))
            own = combine(own, arrived)
        return own


class Ring:
    """The keys of one rank after another; what is found of them travels with them. See `Way`."""

    def __init__(self, op: str, group: Group, own: Keys, counts: Sequence[int]) -> None:
        self._op, self._group, self._counts, self._own = op, group, counts, own
        self._rank, self._size = rank_in(group), ranks_of(group)

    def round(
        self, visit: Visit, combine: Combine, found: Sequence[tuple[int, ...]], numbers: Tensor | None = None
    ) -> list[Tensor]:
        """See `Way`."""
        held = self._own._replace(numbers=numbers)
        error: Exception | None = None
        sums: list[Tensor] = []
        for step in range(self._size):
            owner = (self._rank - step) % self._size
            incoming, coming = self._next(held, (owner - 1) % self._size) if step + 1 < self._size else (held, [])
            before, sums_coming = self._sums_of(owner, found, sums) if step else ([], [])
            # A rank that fails goes on passing keys, for the others wait for them.
            if error is None:
                try:
                    sums = list(visit(sum(self._counts[:owner]), held))
                except Exception as raised:
                    error = raised
            if error is not None:
                sums = self._empty(owner, found)
            _wait(sums_coming)
            if step:
                sums = [combine(*pair) for pair in zip(before, sums, strict=True)]
            _wait(coming)
            held = incoming
        if self._size > 1:  # those of the next rank, which are complete
            sums, coming = self._sums_of(self._rank, found, sums)
            _wait(coming)
        agree(self._op, self._group, error=error)
        return sums

    def _next(self, held: Keys, owner: int) -> tuple[Keys, list[Any]]:
        """Buffers for the keys of `owner`, which are on their way here, while those that are held go on."""
        incoming = _each(lambda part: part.new_empty((self._counts[owner], *part.shape[1:])), held)
        sent, received = ([part for part in keys if part is not None] for keys in (held, incoming))
        return incoming, self._pass_on(sent, received)

    def _sums_of(
        self, owner: int, found: Sequence[tuple[int, ...]], sent: list[Tensor]
    ) -> tuple[list[Tensor], list[Any]]:
        """Buffers for what was found of the keys of `owner`, on its way here, while what was `sent` goes on."""
        received = self._empty(owner, found)
        return received, self._pass_on(sent, received)

    def _empty(self, owner: int, found: Sequence[tuple[int, ...]]) -> list[Tensor]:
        vectors = self._own.vectors
        (dtype,) = check.accumulation(vectors.dtype)
        return [vectors.new_empty((self._counts[owner], *shape), dtype=dtype) for shape in found]

    def _pass_on(self, sent: list[Tensor], received: list[Tensor]) -> list[Any]:
        before, after = (self._rank - 1) % self._size, (self._rank + 1) % self._size
        return _pass(sent, after, received, before, self._group)


def _each(change: Callable[[Tensor], Tensor], keys: Keys) -> Keys:
    return Keys(*(None if part is None else change(part) for part in keys))  # type: ignore[arg-type]


def _pass(sent: Sequence[Tensor], target: int, received: Sequence[Tensor], source: int, group: Group) -> list[Any]:
    """Begin to send to one rank and to receive from another; `_wait` for what it returns before either is touched."""
    works = [dist.P2POp(dist.isend, as_bytes(part), group=group, group_peer=target) for part in sent]
    works += [dist.P2POp(dist.irecv, as_bytes(part), group=group, group_peer=source) for part in received]
    return dist.batch_isend_irecv(works) if works else []


def _wait(works: list[Any]) -> None:
    """Until all is sent and received; then forget them, for they keep what was sent."""
    while works:
        works.pop(0).wait()
