"""What is checked before `contrastive` computes, on one device or many."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.contrastive.chunked import Needs
from hpkernels.ops.contrastive.registration import Arguments
from hpkernels.ops.contrastive.relations import Checked, Pairs, Relation, Sizes, checked, without, without_ignored

Aggregation = Literal["outside", "inside"]
Denominator = Literal["all", "negatives"]
Reduction = Literal["mean", "sum", "none"]


def arguments_of(
    op: str,
    anchors: Tensor,
    keys: Tensor | None,
    *,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None,
    exclude_positives: bool,
    temperature: float | Tensor,
    key_bias: Tensor | None,
    positive_aggregation: Aggregation,
    denominator: Denominator,
    both_directions: bool,
    anchor_weight: Tensor | None,
    reduction: Reduction,
    backend: Backend | None,
    all_keys: int | None = None,
) -> Arguments:
    """What the custom op takes, from what users pass to `op`; `all_keys` is that of ``relations.Sizes``.

    Without a `backend` it is chosen later.

    Raises:
        TypeError, ValueError: an argument is not as ``hpkernels.contrastive`` describes it.
    """
    keys = checked_keys(op, anchors, keys)
    count = anchors.shape[0]
    sizes = Sizes(count, count if keys is None else keys.shape[0], keys is None, all_keys)
    check.choice(op, "positive_aggregation", positive_aggregation, ("outside", "inside"))
    check.choice(op, "denominator", denominator, ("all", "negatives"))
    check.choice(op, "reduction", reduction, ("mean", "sum", "none") if not both_directions else ("mean", "sum"))
    for name, value in {"exclude_positives": exclude_positives, "both_directions": both_directions}.items():
        check.flag(op, name, value)
    of_positives = checked(op, "positives", positives, anchors, sizes, weighted=True)
    excluded = None if exclude is None else checked(op, "exclude", exclude, anchors, sizes)
    for relation in (of_positives, excluded):
        if relation is not None and relation.ignored is not None:
            excluded = without(excluded, relation.ignored)
            of_positives = of_positives._replace(relation=without_ignored(of_positives.relation, relation.ignored))
    scale = _temperature(op, temperature, anchors)
    if key_bias is not None:
        check.tensor(op, "key_bias", key_bias, (sizes.keys,))
        check.same(op, "key_bias", key_bias, "anchors", anchors, dtype=False)
        _check_finite_sum(op, "key_bias", key_bias, anchors)
    if anchor_weight is not None:
        anchor_weight = _weight(op, anchor_weight, anchors)
    check.finite(op, "anchors", anchors)
    if keys is not None:
        check.finite(op, "keys", keys)
    needs = Needs(*map(_needs_gradient, (anchors, keys, scale, key_bias)))
    arguments = Arguments(
        anchors,
        keys,
        of_positives.relation,
        Relation() if excluded is None else excluded.relation,
        key_bias,
        scale,
        anchor_weight,
        _is_symmetric(of_positives, excluded, key_bias, both_directions),
        positive_aggregation == "inside",
        denominator == "negatives",
        exclude_positives,
        both_directions,
        reduction,
        needs,
        "" if backend is None else backends.select("contrastive", backend, anchors, op),
    )
    if not any(needs) or arguments.one_pass:
        return arguments
    return arguments._replace(
        anchors=check.saveable(anchors),
        keys=None if keys is None else check.saveable(keys),
        key_bias=None if key_bias is None else check.saveable(key_bias),
    )


def checked_keys(op: str, anchors: Tensor, keys: Tensor | None) -> Tensor | None:
    """Check the shapes of `anchors` and `keys`; the keys in the dtype of the anchors."""
    check.tensor(op, "anchors", anchors, ("N", "D"))
    if keys is None:
        return None
    keys = check.with_autocast(keys, anchors)
    check.tensor(op, "keys", keys, ("K", anchors.shape[1]))
    check.same(op, "keys", keys, "anchors", anchors)
    return keys


def check_loss(arguments: Arguments, op: str, loss: Tensor) -> None:
    """Check that what the inputs, which were checked themselves, add up to has not made the loss infinite or NaN."""
    if not check.readable(loss.detach()) or loss.isfinite().all():
        return
    others = {
        "key_bias": arguments.key_bias,
        "anchor_weight": arguments.anchor_weight,
        "positives.weights": arguments.positives.weights,
    }
    names = ", ".join(f"`{name}`" for name, value in others.items() if value is not None)
    raise ValueError(
        f"{op}: `anchors` and `keys` must have inner products that are finite when divided by the temperature"
        f"{f', and {names} sums with them that are' if names else ''}, in {str(loss.dtype).removeprefix('torch.')},"
        f" got a loss of {loss[~loss.isfinite()].flatten()[0].item()}"
    )


def _is_symmetric(positives: Checked, excluded: Checked | None, key_bias: Tensor | None, both: bool) -> bool:
    """Whether the loss of pair (i, j) is that of (j, i), and the anchors are their own keys."""
    relations = positives.symmetric and (excluded is None or excluded.symmetric)
    return relations and key_bias is None and not both


def _needs_gradient(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


def _temperature(op: str, temperature: float | Tensor, anchors: Tensor) -> Tensor:
    """The temperature as a 0-d tensor of the accumulation's dtype."""
    (accumulate,) = check.accumulation(anchors.dtype)
    if not isinstance(temperature, Tensor):
        value = check.reciprocal(op, "temperature", temperature, accumulate)
        # A sum, so that Dynamo makes a float that changes at every step an input of the graph.
        return torch.zeros((), dtype=accumulate, device=anchors.device) + value
    check.tensor(op, "temperature", temperature, ())
    check.same(op, "temperature", temperature, "anchors", anchors, dtype=False)
    if check.readable(temperature):
        check.reciprocal(op, "temperature", temperature.item(), accumulate)
    # Where values cannot be read, a bad one shows in the loss.
    return temperature.to(accumulate).where(temperature > 0, torch.nan)


def _check_finite_sum(op: str, name: str, value: Tensor, anchors: Tensor) -> None:
    """Check that `value` is finite in the dtype that it is added up in."""
    (accumulate,) = check.accumulation(anchors.dtype)
    check.finite(op, name, value)
    check.finite(op, name, value.detach().to(accumulate))


def _weight(op: str, weight: Any, anchors: Tensor) -> Tensor:
    (accumulate,) = check.accumulation(anchors.dtype)
    check.tensor(op, "anchor_weight", weight, (anchors.shape[0],))
    check.same(op, "anchor_weight", weight, "anchors", anchors, dtype=False)
    check.constant(op, "anchor_weight", weight)
    _check_finite_sum(op, "anchor_weight", weight, anchors)
    if check.readable(weight) and (weight < 0).any():
        raise ValueError(f"{op}: `anchor_weight` must be at least 0, got {weight.min().item():g}")
    weight = weight.detach().to(accumulate)
    checked: Tensor = weight.where(weight >= 0, torch.nan)  # where values cannot be read, a bad one shows in the loss
    return checked.contiguous()
