"""The keyword arguments that `multi_positive_contrastive` and `ghp_contrastive` share, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hpkernels.ops import _checks as check
from hpkernels.ops._bits import pack_bits
from hpkernels.ops.multi_positive_contrastive.relations import negative_bits

Variant = Literal["joint", "separate"]
"""How the terms of A and S are put together."""

VARIANTS: tuple[Variant, ...] = ("joint", "separate")


@dataclass
class ContrastiveOptions:
    """How the loss of one branch is computed; the ops' docstrings explain each field."""

    specific_weight: float | Tensor
    anchors_per_image: int
    temperature: float
    base_temperature: float | None
    negative_rate: float
    negatives: Tensor | None
    seed: int | Tensor | None
    variant: Variant
    reweight: bool
    keep_specific_only: bool

    @property
    def scale(self) -> float:
        """temperature / base_temperature."""
        return 1.0 if self.base_temperature is None else self.temperature / self.base_temperature


def check_options(op: str, z: Tensor, options: ContrastiveOptions, has_specific: bool) -> ContrastiveOptions:
    """Check `options` for the anchors `z`; the result has lambda and the seed as tensors on the device of `z`."""
    anchors = z.shape[0]
    group = check.integer(op, "anchors_per_image", options.anchors_per_image, 1)
    if anchors % group:
        raise ValueError(f"{op}: `anchors_per_image` must divide the number of anchors N = {anchors}, got {group}")
    (accumulate,) = check.accumulation(z.dtype)
    temperature = check.reciprocal(op, "temperature", options.temperature, accumulate)
    base_temperature = options.base_temperature
    if base_temperature is not None:
        base_temperature = check.reciprocal(op, "base_temperature", base_temperature, accumulate)
        if temperature / base_temperature > torch.finfo(accumulate).max:
            raise ValueError(
                f"{op}: `base_temperature` must leave temperature / base_temperature finite, got {base_temperature!r}"
            )
    check_negatives(op, z, options)
    check.choice(op, "variant", options.variant, VARIANTS)
    check.flag(op, "reweight", options.reweight)
    check.flag(op, "keep_specific_only", options.keep_specific_only)
    return replace(
        options,
        specific_weight=_specific_weight(op, z, options.specific_weight, has_specific),
        anchors_per_image=group,
        temperature=temperature,
        base_temperature=base_temperature,
        negative_rate=check.real(op, "negative_rate", options.negative_rate, 0, 1),
        seed=_seed(op, z, options.seed),
    )


def check_negatives(op: str, z: Tensor, options: ContrastiveOptions) -> None:
    """Check that the negatives that are given fit the anchors `z`."""
    if options.negatives is not None:
        shape = (options.anchors_per_image, z.shape[0])
        check.tensor(op, "negatives", options.negatives, shape, check.BOOLEAN)
        check.same(op, "negatives", options.negatives, "z", z, dtype=False)


def check_settings(op: str, **settings: Any) -> None:
    """Check those of the options that a module keeps, before it is known what they are for."""
    nothing = torch.empty((0, 1), dtype=torch.float64)  # every number of anchors divides 0
    of_a_step: dict[str, Any] = {"specific_weight": 0.0, "negatives": None, "seed": 0}
    check_options(op, nothing, ContrastiveOptions(**settings, **of_a_step), has_specific=False)


def _specific_weight(op: str, z: Tensor, weight: float | Tensor, has_specific: bool) -> Tensor:
    name = "specific_weight"
    (accumulate,) = check.accumulation(z.dtype)
    if not isinstance(weight, Tensor):
        weight = check.real(op, name, weight, 0)
        if weight > 0 and not has_specific:
            raise ValueError(f"{op}: `{name}` must be 0 without `specific`, got {weight:g}")
        # A sum: where arithmetic takes it in, Dynamo makes a weight that changes at every step an input of the graph.
        # With torch.full it would compile anew for each.
        return torch.zeros((), dtype=accumulate, device=z.device) + weight
    check.tensor(op, name, weight, ())
    check.same(op, name, weight, "z", z, dtype=False)
    check.constant(op, name, weight)
    if not has_specific:
        raise ValueError(f"{op}: `{name}` must be the float 0.0 without `specific`, got a tensor")
    check.finite(op, name, weight)
    if check.readable(weight) and weight < 0:
        raise ValueError(f"{op}: `{name}` must be a finite number of at least 0, got {weight.item():g}")
    weight = weight.detach().to(accumulate)
    return weight.where(weight >= 0, torch.nan)  # where values cannot be read, a bad one shows in the loss


def _seed(op: str, z: Tensor, seed: int | Tensor | None) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=z.device)
    if not isinstance(seed, Tensor):
        check.integer(op, "seed", seed, -(2**63), 2**63 - 1)
        return torch.full((), seed, dtype=torch.int64, device=z.device)
    check.tensor(op, "seed", seed, (), check.INTEGER)
    check.same(op, "seed", seed, "z", z, dtype=False)
    return seed


def without_ignored(options: ContrastiveOptions, ignored: Tensor) -> ContrastiveOptions:
    """Checked `options` whose negatives leave out the anchors with `ignored` (N,) bool.

    Their columns of R are 0, and they have no positives: so they are in no denominator, and no anchors themselves. R is
    bit-packed, G N / 8 bytes; the negatives that are left are those of the same seed.
    """
    seed: Any = options.seed  # a tensor, as the options are checked
    shape = options.anchors_per_image, len(ignored)
    bits = negative_bits(options.negatives, seed, *shape, options.negative_rate)
    return replace(options, negatives=bits & pack_bits(~ignored[None]))
