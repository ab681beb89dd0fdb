"""What a rank computes of `contrastive`: its own anchors against the keys of all ranks, in rounds over them.

One round finds the statistics of its anchors, and its part of those of the keys; the parts of all ranks are merged on
the rank that owns the keys. A second finds gradients. Where the loss is a number they are found forward, so that
backward has nothing to exchange; and where the keys are gathered and the loss is of the anchors alone, in one round.

Anchors that are each other's keys, with symmetric relations, need no gradient of keys: that of anchor i is
sum_j (g_ij + g_ji) a_j / temperature, and g_ji is known from the numbers of anchor j, which travel with the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.distributed._collectives import Group, rank_in, ranks_of, together, total
from hpkernels.distributed._exchange import Gathering, Keys, Ring, Way
from hpkernels.ops._bits import bits_of_columns
from hpkernels.ops._kernels import double_backward_error
from hpkernels.ops.contrastive import chunked
from hpkernels.ops.contrastive.arguments import check_loss
from hpkernels.ops.contrastive.chunked import Gradients, Needs
from hpkernels.ops.contrastive.problem import Problem
from hpkernels.ops.contrastive.registration import Arguments
from hpkernels.ops.contrastive.relations import Relation

OP = "distributed.contrastive"


class Share(NamedTuple):
    """What a rank has of the problem.

    Attributes:
        arguments: those of its own anchors and keys, but masks and lists name keys of all ranks; `triangle` says that
            the anchors are the keys and the relations symmetric.
        counts: how many keys each rank has.
        group: the ranks.
        ring: whether keys go round, or are gathered.
        factor: what gradients are multiplied by.
    """

    arguments: Arguments
    counts: Sequence[int]
    group: Group
    ring: bool
    factor: int


class _Rank:
    """The anchors of this rank, and the way to the keys of all."""

    def __init__(self, share: Share) -> None:
        arguments = share.arguments
        self._kernels: Any = backends.implementation("contrastive", arguments.backend)
        self._arguments, self._group = arguments, share.group
        self._anchors = arguments._replace(keys=None).problem(self._kernels)
        self._own = sum(share.counts[: rank_in(share.group)]) if arguments.keys is None else -1
        keys = arguments.anchors if arguments.keys is None else arguments.keys
        ids = arguments.positives.key_ids, arguments.excluded.key_ids
        way: type[Way] = Ring if share.ring else Gathering
        self._way = way(OP, share.group, Keys(keys.detach(), *ids, self._anchors.key_bias), share.counts)

    def statistics(self) -> tuple[Tensor, Tensor | None]:
        """Those of its anchors (N, 4), and in both directions of its keys (K, 4)."""
        rows = chunked.empty_statistics(self._anchors, len(self._anchors.anchors))
        both, inside = self._arguments.both, self._arguments.inside

        def visit(first: int, keys: Keys) -> list[Tensor]:
            nonlocal rows
            of_rows, of_keys = chunked.statistics(self._kernels, self._problem(first, keys), both)
            rows = chunked.merged(rows, of_rows, inside)
            return [] if of_keys is None else [of_keys]

        merge = functools.partial(chunked.merged, inside=inside)
        of_keys = self._way.round(visit, merge, [(4,)] if both else [])
        return rows, of_keys[0] if both else None

    def one_pass(self) -> tuple[Tensor, Gradients]:
        """The statistics of its anchors (N, 4), and the gradients of ``sum_i weight_i L_i`` over all ranks."""
        rows = torch.empty(0)

        def found(problem: Problem, keys: Keys) -> Gradients:
            nonlocal rows
            rows, gradients = chunked.one_pass(self._kernels, problem, self._arguments.anchor_weight, self._needs())
            return gradients

        gradients = self._gradients(found, None)
        return rows, gradients

    def two_pass(self, rows: Tensor, columns: Tensor | None) -> Gradients:
        """The gradients from the numbers of its anchors (N, 4) and, in both directions, of its keys (K, 4)."""

        def found(problem: Problem, keys: Keys) -> Gradients:
            return chunked.two_pass(self._kernels, problem, rows, keys.numbers, self._needs())

        return self._gradients(found, rows if self._arguments.triangle else columns)

    def _gradients(self, found: Any, numbers: Tensor | None) -> Gradients:
        anchors: Tensor | None = None
        temperature: Tensor | None = None
        needs, dim = self._needs(), self._anchors.anchors.shape[1]

        def visit(first: int, keys: Keys) -> list[Tensor]:
            nonlocal anchors, temperature
            part: Gradients = found(self._problem(first, keys), keys)
            anchors, temperature = _sum(anchors, part.anchors), _sum(temperature, part.temperature)
            return [of_keys for of_keys in (part.keys, part.key_bias) if of_keys is not None]

        shapes: list[tuple[int, ...]] = [(dim,)] * needs.keys + [()] * needs.key_bias
        home = iter(self._way.round(visit, torch.add, shapes, numbers))
        keys = next(home) if needs.keys else None
        key_bias = next(home) if needs.key_bias else None
        if self._arguments.keys is None:
            anchors, keys = _sum(anchors, keys), None
        if temperature is not None:
            # The same on all ranks, so that a learnt temperature stays the same on all.
            temperature = total(temperature, self._group) / ranks_of(self._group)
            if self._arguments.triangle:  # with g_ij + g_ji each pair is in the sums of two anchors
                temperature /= 2
        return Gradients(anchors, keys, temperature, key_bias)

    def _needs(self) -> Needs:
        """What is needed of the problem of some keys, which are never the anchors themselves there."""
        arguments, needs = self._arguments, self._arguments.needs
        if arguments.keys is not None:
            return needs
        return needs._replace(keys=needs.anchors and not arguments.triangle)

    def _problem(self, first: int, keys: Keys) -> Problem:
        """That of its anchors and keys `first`, `first + 1`, ... of all."""
        columns = slice(first, first + len(keys.vectors))
        own = self._own - first
        return self._anchors._replace(
            keys=self._kernels.vectors(keys.vectors),
            positives=_of_columns(self._arguments.positives, columns, keys.positive_ids),
            excluded=_of_columns(self._arguments.excluded, columns, keys.excluded_ids),
            key_bias=keys.bias,
            own=own if self._own >= 0 and 0 <= own < len(keys.vectors) else -1,
            triangle=False,
        )


def _of_columns(relation: Relation, columns: slice, key_ids: Tensor | None) -> Relation:
    """The pairs of these keys; listed keys out of range are no pairs to the kernels."""
    bits, indices = relation.bits, relation.indices
    return relation._replace(
        key_ids=key_ids,
        bits=None if bits is None else bits_of_columns(bits, columns),
        indices=None if indices is None else indices - columns.start,
    )


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first.add_(second)


def loss_of(share: Share) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of all ranks; of this one the statistics of anchors (N, 4) and, in both directions, of keys (K, 4)."""
    arguments = share.arguments
    inputs = (arguments.anchors, arguments.keys, arguments.temperature, arguments.key_bias)
    return _Loss.apply(*inputs, share)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor | None, temperature: Tensor, key_bias: Tensor | None, share: Share
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        arguments = share.arguments
        with torch.autocast(anchors.device.type, enabled=False):
            loss, rows, columns, found = _forward(share)
        ctx.dtypes = [None if part is None else part.dtype for part in (anchors, keys, temperature, key_bias)]
        ctx.found = found is not None
        if found is not None:
            ctx.needs = [part is not None for part in found]
            ctx.save_for_backward(*(part for part in found if part is not None))
        elif any(arguments.needs):
            tensors, ctx.settings = arguments.parts()
            ctx.save_for_backward(rows, *tensors)
            ctx.rest = share[1:]
        ctx.mark_non_differentiable(*(part for part in (rows, columns) if part is not None))
        return loss, rows, columns

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        with torch.no_grad(), torch.autocast(grad_loss.device.type, enabled=False):
            if ctx.found:
                saved = iter(ctx.saved_tensors)
                found = [next(saved) * grad_loss if needed else None for needed in ctx.needs]
            else:
                rows, *tensors = ctx.saved_tensors
                share = Share(Arguments.of([*tensors, *ctx.settings]), *ctx.rest)
                found = list(_gradients_of_each(share, rows, grad_loss))
            found = [None if part is None else part.to(dtype) for part, dtype in zip(found, ctx.dtypes, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            found = [None if part is None else _Refused.apply(part.requires_grad_()) for part in found]
        return *found, None


class _Refused(torch.autograd.Function):
    """A gradient that cannot be differentiated, and says so."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise double_backward_error(OP)


def _forward(share: Share) -> tuple[Tensor, Tensor, Tensor | None, Gradients | None]:
    """The loss, the statistics, and the gradients if they are found forward."""
    arguments, group, rank = share.arguments, share.group, _Rank(share)
    columns: Tensor | None = None
    found: Gradients | None = None
    if arguments.one_pass and not share.ring:
        rows, found = rank.one_pass()
    else:
        rows, columns = rank.statistics()
    weight, inside = arguments.anchor_weight, arguments.inside
    losses = chunked.losses_of(rows, inside) if weight is None else chunked.losses_of(rows, inside) * weight
    for vectors in (arguments.anchors, arguments.keys, arguments.key_bias):
        if vectors is not None:
            losses = losses + chunked.nothing_of(vectors).to(losses.dtype)
    if arguments.reduction == "none":
        with together(OP, group) if losses.device.type == "cpu" else nullcontext():
            check_loss(arguments, OP, losses)
        return losses, rows, None, None
    sums = _sums(losses, rows, weight)
    if columns is not None:
        sums = torch.stack((sums, _sums(chunked.losses_of(columns, inside), columns, None)))
    of_losses, masses = total(sums, group).to(rows.dtype).unbind(dim=-1)
    divisors = masses.where(masses > 0, 1) if arguments.reduction == "mean" else torch.ones_like(masses)
    loss = (of_losses / divisors).mean()
    check_loss(arguments, OP, loss)
    factors = share.factor / divisors
    if found is not None:
        found = Gradients(*(None if part is None else part.mul_(factors) for part in found))
    elif any(arguments.needs):
        of_rows, of_columns = (factors, factors) if columns is None else (factors / 2).unbind()
        numbers = _numbers(rows, of_rows, weight, inside)
        found = rank.two_pass(numbers, None if columns is None else _numbers(columns, of_columns, None, inside))
    return loss, rows, columns, found


def _sums(losses: Tensor, statistics: Tensor, weight: Tensor | None) -> Tensor:
    """The sums of losses and of what they count, (2,), in double precision."""
    counts = chunked.kept(statistics).to(losses.dtype)
    mass = counts if weight is None else counts * weight
    return torch.stack((losses.sum(), mass.sum())).double()


def _gradients_of_each(share: Share, rows: Tensor, grad_losses: Tensor) -> Gradients:
    """Those of the losses of anchors one by one, from their statistics."""
    arguments = share.arguments
    numbers = _numbers(rows, grad_losses * share.factor, arguments.anchor_weight, arguments.inside)
    return _Rank(share).two_pass(numbers, None)


def _numbers(statistics: Tensor, coefficients: Tensor, weight: Tensor | None, inside: bool) -> Tensor:
    of_each = coefficients.expand(len(statistics)) if weight is None else coefficients * weight
    return chunked.numbers_of(statistics, of_each, inside)
