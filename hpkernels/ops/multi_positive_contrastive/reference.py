"""Plain PyTorch specification of `multi_positive_contrastive`.

    l_ij    = <z_i, z_j> / temperature
    Den_ij  = i != j and (A_ij or R[i % G, j])
    logp_ij = l_ij - log sum_{k in Den_i} exp l_ik
    L_c     = mean over the kept anchors i of image c of  omega_i * (-sum_j w_ij logp_ij / n_i)
    loss    = scale * mean over images c with a kept anchor of  L_c
    joint:    w = A + lambda S;  separate: the same with w = A, plus lambda times the same with w = S

Every term is linear in the log-denominators and the logits, so the loss has the form

    loss = sum_i (push_i * logDen_i - sum_j (pull_i * A_ij + pull_specific_i * S_ij) * l_ij)

and the four numbers (logDen, push, pull, pull_specific) of each anchor are all that backward needs:

    g_ij  = d loss / d l_ij = push_i * Den_ij * exp(l_ij - logDen_i) - pull_i * A_ij - pull_specific_i * S_ij
    dL/dz = (g + g^T) z / temperature
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hpkernels.backends import Availability
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives.bits import unpack_bits


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def contrastive_loss(
    z: Tensor,
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor | float,
    negatives: Tensor,
    *,
    anchors_per_image: int,
    temperature: float,
    scale: float = 1.0,
    variant: str = "joint",
    reweight: bool = False,
    keep_specific_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss and the (4, N) row statistics, for dense bool masks (N, N) and (G, N); differentiable in z."""
    logits, denominator = logits_and_denominator(z, positives, negatives, temperature)
    usable = denominator.any(dim=1)
    # An anchor with an empty denominator contributes nothing; filling its row keeps its gradient free of NaN.
    log_denominator = logits.masked_fill(~denominator & usable[:, None], -torch.inf).logsumexp(dim=1)

    agnostic = positives.to(logits.dtype)
    task = torch.zeros_like(agnostic) if specific is None else specific.to(logits.dtype)
    push, pull, pull_specific = anchor_coefficients(
        agnostic.sum(dim=1),
        task.sum(dim=1),
        usable,
        specific_weight,
        anchors_per_image=anchors_per_image,
        scale=scale,
        variant=variant,
        reweight=reweight,
        keep_specific_only=keep_specific_only,
    )

    pulls = pull[:, None] * agnostic + pull_specific[:, None] * task
    loss = (push * log_denominator).sum() - (pulls * logits).sum()
    loss = loss + (z.detach() * 0).sum(dtype=logits.dtype)  # 0, or NaN if z is not finite
    return loss, torch.stack((log_denominator, push, pull, pull_specific))


def logits_and_denominator(
    z: Tensor, positives: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The logits l (N, N) and the denominator set Den (N, N)."""
    anchors = len(z)
    z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    own = torch.eye(anchors, dtype=torch.bool, device=z.device)
    shared_by_images = negatives.repeat(anchors // len(negatives), 1)
    return z @ z.T / temperature, (positives | shared_by_images) & ~own


def loss_of_statistics(
    log_denominator: Tensor,
    agnostic_count: Tensor,
    specific_count: Tensor,
    agnostic_logits: Tensor,
    specific_logits: Tensor,
    specific_weight: Tensor | float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and the (4, N) row statistics, for backends that sum over the pairs of each anchor by themselves.

    `log_denominator` (N,) is -inf where Den is empty; then the numbers of positives and the sums of their logits, (N,)
    each; `options` are those of `anchor_coefficients`.
    """
    usable = log_denominator > -torch.inf
    push, pull, pull_specific = anchor_coefficients(agnostic_count, specific_count, usable, specific_weight, **options)
    log_denominator = log_denominator.where(usable, 0)
    loss = (push * log_denominator - pull * agnostic_logits - pull_specific * specific_logits).sum()
    return loss, torch.stack((log_denominator, push, pull, pull_specific))


def anchor_coefficients(
    agnostic_count: Tensor,
    specific_count: Tensor,
    usable: Tensor,
    specific_weight: Tensor | float,
    *,
    anchors_per_image: int,
    scale: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """push, pull and pull_specific of each anchor (N,), from its numbers of positives and whether Den is not empty."""

    def coefficients(mass: Tensor, kept: Tensor) -> Tensor:
        return scale * mean_coefficients(mass, kept & usable, anchors_per_image, reweight)

    has_agnostic, has_specific = agnostic_count > 0, specific_count > 0
    if variant == "joint":
        mass = agnostic_count + specific_weight * specific_count
        pull = coefficients(mass, has_agnostic | (mass > 0) if keep_specific_only else has_agnostic)
        pull_specific = specific_weight * pull
    else:
        pull = coefficients(agnostic_count, has_agnostic)
        pull_specific = specific_weight * coefficients(specific_count, has_specific)
    return pull * agnostic_count + pull_specific * specific_count, pull, pull_specific


def mean_coefficients(mass: Tensor, kept: Tensor, anchors_per_image: int, reweight: bool) -> Tensor:
    """The factor a_i of ``-sum_j w_ij logp_ij`` in the mean over images of the (weighted) mean over kept anchors.

    ``mass`` is n (N,). With reweighting a_i = 1 / sum of n over the image's kept anchors, else 1 / (n_i * number of
    kept anchors); both over the number of images that have any.
    """
    mass, kept = mass.view(-1, anchors_per_image), kept.view(-1, anchors_per_image)
    if reweight:
        divisor = mass.where(kept, 0).sum(dim=1, keepdim=True).expand_as(mass)
    else:
        divisor = mass * kept.sum(dim=1, keepdim=True)
    images = kept.any(dim=1).sum().clamp(min=1)
    return (1 / (divisor.where(kept, 1) * images)).where(kept, 0).flatten()


def forward(
    branches: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    anchors_per_image: int,
    temperature: float,
    scale: float,
    negative_rate: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
) -> tuple[Tensor, Tensor]:
    """The losses (branches,) and row statistics (branches, 4, N), for bit-packed positives (N, ceil(N / 32))."""
    anchors = len(branches[0])
    negatives = _dense_negatives(negatives, seed, anchors_per_image, anchors, negative_rate)
    agnostic = unpack_bits(positives, anchors)
    task = None if specific is None else unpack_bits(specific, anchors)
    return stacked(
        contrastive_loss(
            z,
            agnostic,
            task,
            specific_weight,
            negatives,
            anchors_per_image=anchors_per_image,
            temperature=temperature,
            scale=scale,
            variant=variant,
            reweight=reweight,
            keep_specific_only=keep_specific_only,
        )
        for z in branches
    )


def _dense_negatives(negatives: Tensor | None, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """R (G, N) bool: drawn, or given as it is or bit-packed."""
    if negatives is None:
        return bernoulli(seed, rows, columns, rate)
    return unpack_bits(negatives, columns) if negatives.dtype == torch.int32 else negatives


def stacked(results: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The losses and row statistics of branches in one tensor each."""
    losses, rows = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(rows)


def backward(
    grad_losses: Tensor,
    branches: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    negatives: Tensor | None,
    seed: Tensor,
    rows: Tensor,
    anchors_per_image: int,
    temperature: float,
    negative_rate: float,
    symmetric: bool,
) -> list[Tensor]:
    """The gradients of the branches from their row statistics; logits and negatives are computed again."""
    anchors = len(branches[0])
    negatives = _dense_negatives(negatives, seed, anchors_per_image, anchors, negative_rate)
    agnostic = unpack_bits(positives, anchors)
    task = None if specific is None else unpack_bits(specific, anchors)
    grads = []
    for grad_loss, z, statistics in zip(grad_losses, branches, rows, strict=True):
        log_denominator, push, pull, pull_specific = statistics[:, :, None]
        logits, denominator = logits_and_denominator(z, agnostic, negatives, temperature)
        grad = push * (logits - log_denominator).exp().where(denominator, 0) - pull * agnostic
        if task is not None:
            grad = grad - pull_specific * task
        grads.append(((grad + grad.T) @ z.to(logits.dtype) * (grad_loss / temperature)).to(z.dtype))
    return grads
