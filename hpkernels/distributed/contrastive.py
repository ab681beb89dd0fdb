"""`hpkernels.contrastive` of a batch that is spread over many devices: every rank has its own anchors and keys."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from hpkernels.backends import Backend
from hpkernels.distributed._collectives import Group, eager, gathered_rows, ranks_of, together
from hpkernels.distributed._contrastive import OP, Share, loss_of
from hpkernels.ops import _checks as check
from hpkernels.ops.contrastive import ContrastiveStatistics
from hpkernels.ops.contrastive.arguments import Aggregation, Denominator, Reduction, arguments_of, checked_keys
from hpkernels.ops.contrastive.registration import Arguments
from hpkernels.ops.contrastive.relations import Pairs, Relation

Exchange = Literal["gather", "ring"]
"""How keys come to the anchors of other ranks."""


@overload
def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    group: Group = None,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: Literal[False] = False,
    exchange: Exchange = "gather",
    ddp: bool = True,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    group: Group = None,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: Literal[True],
    exchange: Exchange = "gather",
    ddp: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, ContrastiveStatistics]: ...


@eager
def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    group: Group = None,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: bool = False,
    exchange: Exchange = "gather",
    ddp: bool = True,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """Compute `hpkernels.contrastive` of the anchors and keys of all ranks together, exactly, with their gradients.

    Anchors and keys of the batch are those of the ranks one after another, in the order of ranks. Every rank gets the
    loss that one process would have with all of them, computes the part of its own anchors, and gets the gradients of
    its own anchors and keys. Every rank of the group must call it.

    Args:
        anchors: (N, D), those of this rank, at least one; N may differ between ranks.
        keys: (K, D), those of this rank, at least one; K may differ. None: the anchors of all ranks are each other's
            keys, and none its own.
        group: the ranks, a process group of torch.distributed; None: the default one, or this process alone where
            torch.distributed has not been initialised.
        positives: which pairs are positives, in the forms that `hpkernels.contrastive` takes. `Labels` are those of
            this rank's anchors and keys, and are compared with those of all ranks. A `PositiveMask`, a bool tensor and
            `PairLists` have a row for each anchor of this rank, and name keys of the whole batch: (N, K of all ranks),
            with ``keys=`` for a `PositiveMask` even if `keys` is None.
        exclude: pairs that take no part, in the same forms.
        exclude_positives, positive_aggregation, denominator, both_directions: those of `hpkernels.contrastive`.
        temperature: the same on all ranks.
        key_bias: (K,), of this rank's keys.
        anchor_weight: (N,), of this rank's anchors; given on all ranks or on none.
        reduction: "mean" and "sum" are over the anchors of all ranks; "none": (N,), the losses of this rank's.
        return_statistics: also return the `ContrastiveStatistics` of this rank's anchors and keys.
        exchange: "gather": every rank holds the keys of all while it computes. "ring": keys go from rank to rank while
            others are computed with, and a rank holds those of two ranks besides its own. That takes a second round of
            them for gradients.
        ddp: multiply gradients by the number of ranks, for the mean over ranks that ``DistributedDataParallel`` takes;
            see `hpkernels.distributed`. The gradient of `temperature`, the same on all ranks, then is that of one
            process; without it is that divided by the number of ranks, whose sum over ranks is.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        The loss, float32 (float64 for float64 `anchors`), 0-d and the same on all ranks, or (N,); with
        `return_statistics` it and the statistics.

    Raises:
        TypeError, ValueError: an argument is not as described, or is not the same on all ranks and must be.
        RuntimeError: another rank has failed; the message has its number and its sentence.

    Notes:
        With "mean" and "sum" gradients are found forward, and backward exchanges nothing. With "none" every rank must
        call backward as well, which exchanges keys again; the gradient is that of the sum over ranks of what they make
        of their losses. ``torch.compile`` leaves the call out of its graphs. Deterministic: sums over ranks are taken
        in a fixed order. Double backward is refused. Bytes that are exchanged, and memory: docs/distributed.md.

    Examples:
        >>> import torch, hpkernels.distributed
        >>> codes = torch.nn.functional.normalize(torch.randn(6, 8)).requires_grad_()
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> loss = hpkernels.distributed.contrastive(codes, positives=labels)  # no group: this process alone
        >>> loss.backward()
        >>> codes.grad.shape
        torch.Size([6, 8])
    """
    with together(OP, group) as shared:
        check.choice(OP, "exchange", exchange, ("gather", "ring"))
        for name, value in {"ddp": ddp, "return_statistics": return_statistics}.items():
            check.flag(OP, name, value)
        keys = checked_keys(OP, anchors, keys)
        shared.update(D=anchors.shape[1], dtype=anchors.dtype, device=anchors.device.type, exchange=exchange)
        shared["keys"] = "None" if keys is None else "given"
    ranks = ranks_of(group)
    own = torch.tensor([[len(anchors if keys is None else keys)]], device=anchors.device)
    counts = gathered_rows(own, group, (1,) * ranks).rows.flatten().tolist()
    with together(OP, group) as shared:
        arguments = arguments_of(
            OP,
            anchors,
            keys,
            positives=positives,
            exclude=exclude,
            exclude_positives=exclude_positives,
            temperature=temperature,
            key_bias=key_bias,
            positive_aggregation=positive_aggregation,
            denominator=denominator,
            both_directions=both_directions,
            anchor_weight=anchor_weight,
            reduction=reduction,
            backend=backend,
            all_keys=sum(counts),
        )
        shared.update(_settings(arguments))
        shared["temperature"] = arguments.temperature.item()
    share = Share(arguments, counts, group, exchange == "ring", ranks if ddp else 1)
    loss, rows, columns = loss_of(share)
    return (loss, ContrastiveStatistics.of(rows, columns)) if return_statistics else loss


def _settings(arguments: Arguments) -> dict[str, object]:
    """What must be the same on all ranks, by the name that users give it."""
    given = {name: getattr(arguments, name) is not None for name in ("key_bias", "anchor_weight")}
    return {
        "positives": _labels(arguments.positives) + (", symmetric" if arguments.triangle else ""),
        "exclude": _labels(arguments.excluded),
        "exclude_positives": arguments.exclude_positives,
        **{name: "given" if is_given else "None" for name, is_given in given.items()},
        "positive_aggregation": "inside" if arguments.inside else "outside",
        "denominator": "negatives" if arguments.decoupled else "all",
        "both_directions": arguments.both,
        "reduction": arguments.reduction,
        **{f"{name}.requires_grad": needed for name, needed in arguments.needs._asdict().items()},
    }


def _labels(relation: Relation) -> str:
    """The labels that keys bring with them."""
    return "without labels" if relation.key_ids is None else f"with {relation.key_ids.shape[1]} labels a key"
