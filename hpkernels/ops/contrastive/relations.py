"""Which pairs of an anchor and a key are positives, or take no part: by label, mask, lists, or several of these."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpkernels.ops import _checks as check
from hpkernels.ops._bits import pack_bits, words_per_row
from hpkernels.positive_mask import PositiveMask


@dataclass(frozen=True, eq=False)
class Labels:
    """Pairs with an equal label, compared inside the kernels: nothing of the size N x K is made.

    Attributes:
        anchor_ids: (N,), or (N, C) for C labels each, of any integer dtype but uint64. Pairs match if any of the C
            labels is equal: label c of the anchor to label c of the key. A negative label matches nothing.
        key_ids: (K,) or (K, C), in the same form. None: those of the anchors, for keys that are the anchors or
            correspond to them one by one.
    """

    anchor_ids: Tensor
    key_ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PairLists:
    """Pairs listed by anchor, as a CSR matrix lists its entries.

    Attributes:
        offsets: (N + 1,) int64, ascending from 0 to P: anchor i has the pairs ``offsets[i]`` to ``offsets[i + 1] - 1``.
        indices: (P,) int64, the keys, in any order.
        weights: (P,) floating-point, at least 0, how much each pair counts as a positive (soft positives), in float32
            unless the anchors are float64; a pair whose weight is 0 there is none. None: 1 each.
    """

    offsets: Tensor
    indices: Tensor
    weights: Tensor | None = None


Pairs = Labels | PairLists | PositiveMask | Tensor
"""One way to name pairs. Tensors stand for what they make: integers for `Labels`, a bool (N, K) for a mask."""


class Relation(NamedTuple):
    """Pairs as the backends take them: the union of what each form names. All None: no pairs.

    A listed pair that another form names as well, or that is listed twice, counts by the greatest of its weights.
    """

    anchor_ids: Tensor | None = None  # (N, C) int64
    key_ids: Tensor | None = None  # (K, C) int64
    bits: Tensor | None = None  # (N, ceil(K / 32)) int32
    offsets: Tensor | None = None  # (N + 1,) int64
    indices: Tensor | None = None  # (P,) int64
    weights: Tensor | None = None  # (P,) of the accumulation's dtype


class Sizes(NamedTuple):
    """What relations are between: N anchors and K keys, which are the anchors themselves if `own`.

    With `all_keys` those are the keys of this rank alone: it has their labels, while masks and lists name keys of all.
    """

    anchors: int
    keys: int
    own: bool
    all_keys: int | None = None

    @property
    def square(self) -> bool:
        """Whether masks are among anchors, and have no diagonal."""
        return self.own and self.all_keys is None

    @property
    def columns(self) -> int:
        """How many keys masks and lists have."""
        return self.keys if self.all_keys is None else self.all_keys


class Checked(NamedTuple):
    """A relation, whether (j, i) is in it wherever (i, j) is, and the anchors (N,) bool that take no part, if any."""

    relation: Relation
    symmetric: bool
    ignored: Tensor | None = None


def checked(op: str, name: str, pairs: Any, like: Tensor, sizes: Sizes, weighted: bool = False) -> Checked:
    """Check `pairs`, one form or a tuple of them, and put them together.

    Raises:
        TypeError, ValueError: they are not as described, or not pairs of these `sizes` on the device of `like`.
    """
    if not isinstance(pairs, tuple):
        return _of_part(op, name, pairs, like, sizes, weighted)
    if not pairs:
        raise ValueError(f"{op}: `{name}` must name pairs, got an empty tuple")
    parts = [_of_part(op, f"{name}[{at}]", part, like, sizes, weighted) for at, part in enumerate(pairs)]
    return functools.reduce(_both, parts)


def without(excluded: Checked | None, ignored: Tensor) -> Checked:
    """`excluded`, and all pairs of which either has `ignored` (N,) True."""
    either, every = torch.where(ignored, 0, -1), torch.zeros_like(ignored, dtype=torch.int64)
    labels = Relation(torch.stack((either, every), dim=1), torch.stack((every, either), dim=1))
    return Checked(labels, True) if excluded is None else _both(excluded, Checked(labels, True))


def without_ignored(positives: Relation, ignored: Tensor) -> Relation:
    """`positives` of anchors that are each other's keys, but for those with `ignored` (N,) True."""
    anchor_ids, key_ids, bits, offsets, indices, weights = positives
    if anchor_ids is not None and key_ids is not None:
        anchor_ids, key_ids = (ids.masked_fill(ignored[:, None], -1) for ids in (anchor_ids, key_ids))
    if bits is not None:
        bits = (bits & pack_bits(~ignored[None])).masked_fill_(ignored[:, None], 0)
    if indices is not None:  # a key that there is not is no pair
        of_rows = rows_of_pairs(positives).clamp(0, len(ignored) - 1)
        of_keys = indices.clamp(0, len(ignored) - 1)
        indices = indices.masked_fill(ignored[of_rows] | ignored[of_keys], -1)
    return Relation(anchor_ids, key_ids, bits, offsets, indices, weights)


def _both(first: Checked, second: Checked) -> Checked:
    ignored = [part.ignored for part in (first, second) if part.ignored is not None]
    return Checked(
        _united(first.relation, second.relation),
        first.symmetric and second.symmetric,
        functools.reduce(torch.logical_or, ignored) if ignored else None,
    )


def _of_part(op: str, name: str, part: Any, like: Tensor, sizes: Sizes, weighted: bool) -> Checked:
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        check.tensor(op, name, part, (sizes.anchors, sizes.columns), check.BOOLEAN)
        part = PositiveMask.from_dense(part, keys=not sizes.square)
    elif isinstance(part, Tensor) and part.dtype in check.ANY_INTEGER:
        if part.dim() == 2:
            raise TypeError(
                f"{op}: `{name}` must be Labels for labels in several columns, or a bool tensor for a mask, got an"
                f" integer tensor of shape {tuple(part.shape)}"
            )
        part = Labels(part)
    if isinstance(part, Labels):
        return Checked(_of_labels(op, name, part, like, sizes), sizes.own and part.key_ids is None)
    if isinstance(part, PositiveMask):
        return Checked(_of_mask(op, name, part, like, sizes), sizes.square and part.symmetric, part.ignored)
    if isinstance(part, PairLists):
        return Checked(_of_lists(op, name, part, like, sizes, weighted), False)
    got = f"a tensor of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
    raise TypeError(
        f"{op}: `{name}` must be an integer or bool tensor, Labels, a PositiveMask, PairLists or a tuple of them,"
        f" got {got}"
    )


def _of_labels(op: str, name: str, labels: Labels, like: Tensor, sizes: Sizes) -> Relation:
    anchor_ids = _ids(op, f"{name}.anchor_ids", labels.anchor_ids, sizes.anchors, None, like)
    columns = anchor_ids.shape[1]
    if labels.key_ids is not None:
        key_ids = _ids(op, f"{name}.key_ids", labels.key_ids, sizes.keys, columns, like)
    elif sizes.keys != sizes.anchors:
        raise ValueError(
            f"{op}: `{name}.key_ids` must be given where there are not as many keys ({sizes.keys}) as anchors"
            f" ({sizes.anchors}), got None"
        )
    else:
        key_ids = anchor_ids
    return Relation(anchor_ids=anchor_ids, key_ids=key_ids)


def _ids(op: str, name: str, ids: Tensor, count: int, columns: int | None, like: Tensor) -> Tensor:
    if isinstance(ids, Tensor) and ids.dim() == 2:
        check.tensor(op, name, ids, (count, columns or "C"), check.LABELS)
    else:
        check.tensor(op, name, ids, (count,), check.LABELS)
        if columns not in (None, 1):
            raise ValueError(f"{op}: `{name}` must have {columns} columns as those of the anchors, got one")
    check.same(op, name, ids, "anchors", like, dtype=False)
    return check.saveable(ids.long().reshape(count, -1)).contiguous()


def _of_mask(op: str, name: str, mask: PositiveMask, like: Tensor, sizes: Sizes) -> Relation:
    wanted = None if sizes.square else sizes.columns
    if mask.anchors != sizes.anchors or mask.keys != wanted:
        among = "among themselves" if sizes.square else f"and {sizes.columns} keys"
        raise ValueError(f"{op}: `{name}` must be a mask of {sizes.anchors} anchors {among}, got {mask!r}")
    # Attributes can be changed after the constructor has checked them, and kernels trust the shape.
    check.tensor(op, f"{name}.bits", mask.bits, (sizes.anchors, words_per_row(sizes.columns)), (torch.int32,))
    check.same(op, name, mask.bits, "anchors", like, dtype=False)
    return Relation(bits=check.saveable(mask.bits).contiguous())


def _of_lists(op: str, name: str, lists: PairLists, like: Tensor, sizes: Sizes, weighted: bool) -> Relation:
    offsets, indices, weights = lists.offsets, lists.indices, lists.weights
    check.tensor(op, f"{name}.offsets", offsets, (sizes.anchors + 1,), check.INTEGER)
    if not _is_empty(indices, check.INTEGER):
        check.tensor(op, f"{name}.indices", indices, ("P",), check.INTEGER)
    given = {"offsets": offsets, "indices": indices}
    if weights is not None:
        if not weighted:
            raise ValueError(f"{op}: `{name}.weights` must be None, as pairs take part or do not, got a tensor")
        if not (_is_empty(weights, check.FLOATING) and indices.shape == (0,)):
            check.tensor(op, f"{name}.weights", weights, (indices.shape[0] or "P",))
        check.constant(op, f"{name}.weights", weights)
        check.finite(op, f"{name}.weights", weights)
        given["weights"] = weights
    for argument, value in given.items():
        check.same(op, f"{name}.{argument}", value, "anchors", like, dtype=False)
    if check.readable(offsets):
        _check_lists(op, name, lists, sizes)
    if indices.shape[0] == 0:
        return Relation()
    (accumulate,) = check.accumulation(like.dtype)
    of_pairs = None if weights is None else check.saveable(weights.detach().to(accumulate)).contiguous()
    if of_pairs is not None:
        check.finite(op, f"{name}.weights", of_pairs)  # also in the dtype that they are added up in
    return Relation(
        offsets=check.saveable(offsets).contiguous(), indices=check.saveable(indices).contiguous(), weights=of_pairs
    )


def _is_empty(value: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a list has no pairs, as no other tensor may have."""
    return isinstance(value, Tensor) and value.shape == (0,) and value.dtype in dtypes


def _check_lists(op: str, name: str, lists: PairLists, sizes: Sizes) -> None:
    offsets, indices, pairs = lists.offsets, lists.indices, lists.indices.shape[0]
    if offsets[0] != 0 or offsets[-1] != pairs or (offsets.diff() < 0).any():
        raise ValueError(
            f"{op}: `{name}.offsets` must ascend from 0 to the number of indices, {pairs}, got values from"
            f" {offsets[0].item()} to {offsets[-1].item()}{'' if (offsets.diff() >= 0).all() else ' that descend'}"
        )
    wrong = (indices < 0) | (indices >= sizes.columns)
    if wrong.any():
        raise ValueError(
            f"{op}: `{name}.indices` must be keys from 0 to {sizes.columns - 1}, got {indices[wrong][0].item()}"
        )
    if lists.weights is not None and (lists.weights < 0).any():
        raise ValueError(
            f"{op}: `{name}.weights` must be at least 0, got {lists.weights[lists.weights < 0][0].item():g}"
        )


def _united(first: Relation, second: Relation) -> Relation:
    return Relation(
        _beside(first.anchor_ids, second.anchor_ids),
        _beside(first.key_ids, second.key_ids),
        first.bits if second.bits is None else second.bits if first.bits is None else first.bits | second.bits,
        *_concatenated(first, second),
    )


def _beside(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else torch.cat((first, second), dim=1)


def _concatenated(first: Relation, second: Relation) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The lists of both, row by row."""
    if first.offsets is None or second.offsets is None:
        return (second if first.offsets is None else first)[3:]
    lists = (first, second)
    indices = [part.indices for part in lists if part.indices is not None]
    weights = [part.weights for part in lists if part.weights is not None]
    if len(weights) == 1:
        ones = [weights[0].new_ones(len(listed)) for listed in indices]
        weights = [one if part.weights is None else part.weights for part, one in zip(lists, ones, strict=True)]
    order = torch.cat([rows_of_pairs(part) for part in lists]).argsort(stable=True)
    return first.offsets + second.offsets, torch.cat(indices)[order], torch.cat(weights)[order] if weights else None


def rows_of_pairs(lists: Relation) -> Tensor:
    """The anchor of each listed pair, (P,) int64."""
    assert lists.offsets is not None and lists.indices is not None
    places = torch.arange(len(lists.indices), device=lists.indices.device)
    return torch.searchsorted(lists.offsets, places, right=True) - 1


torch.serialization.add_safe_globals([Labels, PairLists])
