"""`ghp_contrastive` of a batch that is spread over many devices: each rank computes the rows of its own images.

z, features and codes are gathered, with their thresholds. A rank finds which of all anchors are positives of its own,
and the loss of these: their rows of A and S against all columns. The images that the means are over, and then the
losses, are added up over ranks. The four numbers of each anchor are gathered after forward, so that backward needs no
exchange: ``dz_i = sum_j (g_ij + g_ji) z_j / temperature`` of a rank's own rows takes the numbers of both anchors.

A and S are symmetric, or else a rank finds its rows of their transposes as well. R is a hash of (seed, row, column).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.distributed._collectives import (
    Group,
    eager,
    fingerprint,
    gathered_rows,
    of_first_rank,
    rank_in,
    ranks_of,
    together,
    total,
)
from hpkernels.ops import _checks as check
from hpkernels.ops import ghp_contrastive as one_process
from hpkernels.ops.hidden_positives import registration as discovery
from hpkernels.ops.hidden_positives import rows_of
from hpkernels.ops.masked_topk import masked_topk
from hpkernels.ops.multi_positive_contrastive import mean_of, registration
from hpkernels.ops.multi_positive_contrastive.options import ContrastiveOptions, Variant, check_negatives

_OP = "distributed.ghp_contrastive"


@eager
def ghp_contrastive(
    z: Tensor,
    features: Tensor,
    pool: Tensor,
    *,
    group: Group = None,
    specific: Tensor | None = None,
    specific_pool: Tensor | None = None,
    specific_weight: float | Tensor = 0.0,
    z_mixed: Tensor | None = None,
    anchors_per_image: int,
    temperature: float = 0.6,
    base_temperature: float | None = 0.07,
    negative_rate: float = 0.02,
    negatives: Tensor | None = None,
    seed: int | Tensor | None = None,
    variant: Variant = "joint",
    reweight: bool = True,
    keep_specific_only: bool = False,
    symmetric: bool = True,
    ddp: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Compute `hpkernels.ghp_contrastive` of the batch of all ranks, each of which has some of its images.

    The batch is what the ranks have, in the order of ranks. Every rank gets its loss, and the gradient of its own rows:
    those that one process with the whole batch would get, but for the rounding of sums in another order.

    Args:
        z: (R, D) projections of this rank's images, R = images of this rank * G. Ranks may have different numbers of
            images, at least one.
        features: (R, Df) frozen backbone features, no gradient.
        pool: (M, Df) task-agnostic reference pool, the same on all ranks.
        group: a process group of torch.distributed; None: the default one. In a group of one rank, or where
            torch.distributed has not been initialised, this is `hpkernels.ghp_contrastive`.
        specific, specific_pool, z_mixed: (R, Ds), (Ms, Ds), (R, D), each given on all ranks or on none.
        negatives: (G, N) bool mask of the whole batch of N anchors, the same on all ranks.
        seed: the same on all ranks, or None on all: rank 0 draws one, from PyTorch's generator of its device.
        ddp: multiply the gradient by the number of ranks, for the mean of `DistributedDataParallel`: see
            `hpkernels.distributed`.
        specific_weight, anchors_per_image, temperature, base_temperature, negative_rate: see
            `hpkernels.ghp_contrastive`. The same on all ranks.
        variant, reweight, keep_specific_only, symmetric: likewise.
        backend: see `hpkernels.ghp_contrastive`; the rank's own.

    Returns:
        The 0-d loss of the whole batch, the same bits on all ranks; float32 (float64 for float64 `z`). Gradients reach
        `z` and `z_mixed`.

    Raises:
        TypeError, ValueError: an argument of this rank is not as `hpkernels.ghp_contrastive` wants it; or ranks differ
            in what must be the same, which the message names with its values.
        RuntimeError: another rank has failed; its rank and its sentence.

    Notes:
        Every rank of the group must call it, with gradients asked for or not; backward exchanges nothing. Not for
        ``torch.compile(fullgraph=True)``, nor for CUDA graphs. Memory of a rank: the gathered rows of z, features and
        codes, and two packed masks of R N / 8 bytes, four with ``symmetric=False``. What it exchanges, and what fails
        how, is in docs/distributed.md.

    Examples:
        >>> import torch, hpkernels
        >>> from torch.nn.functional import normalize
        >>> rows = normalize(torch.eye(8)[:, :4] + torch.eye(8)[:, 4:] + 0.2)  # one process, and so a group of one
        >>> z = rows.clone().requires_grad_()
        >>> loss = hpkernels.distributed.ghp_contrastive(z, rows, rows[:1], anchors_per_image=4, seed=0)
        >>> bool(loss == hpkernels.ghp_contrastive(z, rows, rows[:1], anchors_per_image=4, seed=0))
        True
    """
    given: dict[str, Any] = {
        "specific_weight": specific_weight,
        "anchors_per_image": anchors_per_image,
        "temperature": temperature,
        "base_temperature": base_temperature,
        "negative_rate": negative_rate,
        "negatives": negatives,
        "seed": seed,
        "variant": variant,
        "reweight": reweight,
        "keep_specific_only": keep_specific_only,
    }
    agnostic, task_specific = (features, pool), (specific, specific_pool)
    if ranks_of(group) == 1:
        check.flag(_OP, "ddp", ddp)
        given |= {"specific": specific, "specific_pool": specific_pool, "symmetric": symmetric, "backend": backend}
        return one_process.ghp_contrastive(z, *agnostic, z_mixed=z_mixed, **given)
    with together(_OP, group) as shared:
        check.flag(_OP, "ddp", ddp)
        sources, options = _checked(z, z_mixed, agnostic, task_specific, given, symmetric, group)
        steps = [one_process.choose(_OP, backend, of_source) for of_source, _ in sources]
        loss_backend = backends.select("multi_positive_contrastive", backend, z, caller=_OP)
        thresholds = [
            masked_topk(*source, backend=by["masked_topk"]).values[:, 0]
            for source, by in zip(sources, steps, strict=True)
        ]
        shared.update(_to_agree(z, z_mixed, sources, given, options), symmetric=symmetric, ddp=ddp)
    if seed is None:
        drawn = of_first_rank(int(cast(Tensor, options.seed)), group)
        options = replace(options, seed=torch.full((), drawn, dtype=torch.int64, device=z.device))
    all_z, first, counts = gathered_rows(z, group)
    all_mixed = None if z_mixed is None else gathered_rows(z_mixed, group, counts).rows
    all_sources = [
        (gathered_rows(of_source, group, counts).rows, gathered_rows(threshold, group, counts).rows)
        for (of_source, _), threshold in zip(sources, thresholds, strict=True)
    ]
    with together(_OP, group):
        # The whole batch is known by now, and so is whether this fits it.
        check_negatives(_OP, all_z, options)
        own = [
            _discover(of_source, threshold, *of_all, first, symmetric, by["hidden_positives"])
            for (of_source, _), threshold, of_all, by in zip(sources, thresholds, all_sources, steps, strict=True)
        ]
        (positives, positives_t), (specific_bits, specific_t) = (*own, (None, None))[:2]
        masks = (positives, specific_bits, options.specific_weight, options.negatives, options.seed)
        weighting = (options.variant, options.reweight, options.keep_specific_only, symmetric)
        pairs = registration.contrastive_pairs(
            *masks,
            options.anchors_per_image,
            options.negative_rate,
            *weighting,
            z.shape[1] * z.element_size(),
            len(all_z),
            first,
            loss_backend,
        )
        images = registration.images_of(pairs, loss_backend)
    images = total(images, group)
    with together(_OP, group):
        losses, rows = registration.multi_positive_contrastive(
            all_z,
            all_mixed,
            *masks,
            pairs,
            options.anchors_per_image,
            options.temperature,
            options.scale,
            options.negative_rate,
            *weighting,
            images,
            first,
            loss_backend,
        )
    losses = total(losses, group)
    rows = gathered_rows(rows.transpose(0, 1), group, counts).rows.transpose(0, 1).contiguous()
    loss = mean_of(_OP, losses)
    # As in one process: what could not be read above must not pass as "no positives".
    loss = loss + torch.cat([threshold for _, threshold in all_sources]).amax().to(loss.dtype) * 0
    constants = (
        *(options.anchors_per_image, options.temperature, options.negative_rate, symmetric),
        *(first, loss_backend, ranks_of(group) if ddp else 1),
    )
    kept = (positives, specific_bits, positives_t, specific_t, options.negatives, options.seed, rows, *pairs)
    found: Tensor = _Loss.apply(z, z_mixed, loss, constants, all_z, all_mixed, *kept)
    return found


def _checked(
    z: Tensor,
    z_mixed: Tensor | None,
    agnostic: tuple[Tensor, Tensor],
    task_specific: tuple[Tensor | None, Tensor | None],
    given: dict[str, Any],
    symmetric: bool,
    group: Group,
) -> tuple[list[one_process.Source], ContrastiveOptions]:
    """The sources of A and S and the options, checked but for negatives, whose columns are those of the whole batch."""
    seed = 0 if given["seed"] is None and rank_in(group) > 0 else given["seed"]  # rank 0 draws for all
    options = ContrastiveOptions(**given | {"negatives": None, "seed": seed})
    sources, options = one_process.check_arguments(_OP, z, z_mixed, agnostic, task_specific, options, symmetric)
    negatives = given["negatives"]
    if negatives is not None:
        check.tensor(_OP, "negatives", negatives, (options.anchors_per_image, "N"), check.BOOLEAN)
        check.same(_OP, "negatives", negatives, "z", z, dtype=False)
    return sources, replace(options, negatives=negatives)


def _to_agree(
    z: Tensor,
    z_mixed: Tensor | None,
    sources: list[one_process.Source],
    given: dict[str, Any],
    options: ContrastiveOptions,
) -> dict[str, Any]:
    """What must be the same on all ranks, by the names that a message has for it."""
    settings = ("temperature", "base_temperature", "negative_rate", "variant", "reweight", "keep_specific_only")
    named: dict[str, Any] = {name: getattr(options, name) for name in settings}
    named |= {
        "anchors_per_image": int(options.anchors_per_image),
        "specific_weight": float(options.specific_weight),
        "specific": "used" if len(sources) > 1 else "not used",
        "z_mixed": "None" if z_mixed is None else "a tensor",
        "negatives": None if options.negatives is None else fingerprint(options.negatives),
        "seed": None if given["seed"] is None else int(cast(Tensor, options.seed)),
        "device of z": z.device.type,
        "dtype of z": z.dtype,
        "D of z": z.shape[1],
    }
    for name, pool_name, (features, pool) in zip(
        ("features", "specific"), ("pool", "specific_pool"), sources, strict=False
    ):
        named |= {f"D of {name}": features.shape[1], f"dtype of {name}": features.dtype, pool_name: fingerprint(pool)}
    return named


def _discover(
    features: Tensor,
    threshold: Tensor,
    all_features: Tensor,
    all_thresholds: Tensor,
    first: int,
    symmetric: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """The rows of a relation, and of its transpose if it is not symmetric: (R, ceil(N / 32)) int32 each."""
    everything = (features, threshold, all_features, all_thresholds, first)
    bits = rows_of(*everything, symmetric=symmetric, backend=backend)
    if symmetric:
        return bits, None
    # A_ji = <f_j, f_i> > r_j: the threshold is that of the column alone.
    below = torch.full_like(threshold, -torch.inf)
    transposed: Tensor = discovery.hidden_positives_between(
        features, all_features, below, all_thresholds, False, first, backend
    )
    return bits, transposed


class _Loss(torch.autograd.Function):
    """The loss that has been computed, whose backward computes the gradients of this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, z_mixed: Tensor | None, loss: Tensor, constants: tuple[Any, ...], *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(z, z_mixed, *tensors)
        ctx.constants = constants
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        own_z, own_mixed, all_z, all_mixed, *kept = ctx.saved_tensors
        positives, specific, positives_t, specific_t, negatives, seed, rows, *pairs = kept
        group, temperature, rate, symmetric, first, backend, factor = ctx.constants
        needs_z, needs_mixed, *_ = ctx.needs_input_grad
        asked = slice(0 if needs_z else 1, 2 if needs_mixed else 1)  # a branch that needs no gradient is left out
        z, mixed = (*(all_z, all_mixed)[asked], None)[:2]
        grads = registration.multi_positive_contrastive_backward(
            (grad_loss * factor / len(rows)).expand(len(rows))[asked],
            *(z, mixed, positives, specific, negatives, seed, pairs, rows[asked]),
            *(group, temperature, rate, symmetric, positives_t, specific_t, first, backend),
        )
        if torch.is_grad_enabled():  # by create_graph: the gathered rows do not show that gradients depend on z
            grads = [_Gradient.apply(grad, own_z, own_mixed) for grad in grads]
        none = [None] * len(ctx.saved_tensors)  # of the loss, the constants, and all that is saved but the branches
        return grads[0] if needs_z else None, grads[-1] if needs_mixed else None, *none


class _Gradient(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of_branches: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(f"{_OP}: double backward is not supported: its gradient is not differentiable")
