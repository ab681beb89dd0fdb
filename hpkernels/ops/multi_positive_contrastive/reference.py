"""Plain PyTorch specification of `multi_positive_contrastive`, and the same in blocks of rows.

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

`contrastive_loss` is the specification, dense. `forward` and `backward` go through blocks of rows; a block of g^T is
made of the logits of that of g, with the statistics of the other anchors.

Both also serve a part of the anchors, those of some whole images: relations have the rows of anchors `first`,
``first + 1``, ... alone, z those of all. Then the images with a kept anchor are counted over all parts beforehand, and
backward takes the statistics of all anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hpkernels._native import Availability
from hpkernels.ops import _checks as check
from hpkernels.ops._bits import population_count
from hpkernels.ops._blocks import row_blocks
from hpkernels.ops.multi_positive_contrastive.relations import Relations, Transposed, negative_bits, negatives_of


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
    """The loss and the (N, 4) row statistics: dense, the specification; differentiable in z.

    `positives` and `specific` are (N, N) bool, `negatives` (G, N).
    """
    anchors = len(z)
    (accumulate,) = check.accumulation(z.dtype)
    logits = z.to(accumulate) @ z.to(accumulate).T / temperature
    own = torch.eye(anchors, dtype=torch.bool, device=z.device)
    denominator = (positives | negatives.repeat(anchors // len(negatives), 1)) & ~own
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
    return loss, torch.stack((log_denominator.where(usable, 0), push, pull, pull_specific), dim=1)


def loss_of_statistics(
    log_denominator: Tensor,
    agnostic_count: Tensor,
    specific_count: Tensor,
    agnostic_logits: Tensor,
    specific_logits: Tensor,
    specific_weight: Tensor | float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and the (N, 4) row statistics, for backends that sum over the pairs of each anchor by themselves.

    `log_denominator` (N,) is -inf where Den is empty; then the numbers of positives and the sums of their logits, (N,)
    each; `options` are those of `anchor_coefficients`.
    """
    usable = log_denominator > -torch.inf
    push, pull, pull_specific = anchor_coefficients(agnostic_count, specific_count, usable, specific_weight, **options)
    log_denominator = log_denominator.where(usable, 0)
    loss = (push * log_denominator - pull * agnostic_logits - pull_specific * specific_logits).sum()
    return loss, torch.stack((log_denominator, push, pull, pull_specific), dim=1)


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
    images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """push, pull and pull_specific of each anchor (N,), from its numbers of positives and whether Den is not empty.

    `images` are those that the means of the A and the S term are over, (2,), if not those of these anchors.
    """

    def coefficients(mass: Tensor, term: int) -> Tensor:
        over = None if images is None else images[term]
        return scale * mean_coefficients(mass, kept[term], anchors_per_image, reweight, over)

    counts = agnostic_count, specific_count
    kept = kept_anchors(*counts, usable, specific_weight, variant, keep_specific_only)
    if variant == "joint":
        pull = coefficients(agnostic_count + specific_weight * specific_count, 0)
        pull_specific = specific_weight * pull
    else:
        pull = coefficients(agnostic_count, 0)
        pull_specific = specific_weight * coefficients(specific_count, 1)
    return pull * agnostic_count + pull_specific * specific_count, pull, pull_specific


def kept_anchors(
    agnostic_count: Tensor,
    specific_count: Tensor,
    usable: Tensor,
    specific_weight: Tensor | float,
    variant: str,
    keep_specific_only: bool,
) -> tuple[Tensor, Tensor]:
    """Which anchors (N,) the A and the S term are over; in the joint variant they are one."""
    has_agnostic = agnostic_count > 0
    if variant == "separate":
        return has_agnostic & usable, (specific_count > 0) & usable
    if keep_specific_only:
        has_agnostic |= agnostic_count + specific_weight * specific_count > 0
    return has_agnostic & usable, has_agnostic & usable


def mean_coefficients(
    mass: Tensor, kept: Tensor, anchors_per_image: int, reweight: bool, images: Tensor | None = None
) -> Tensor:
    """The factor a_i of ``-sum_j w_ij logp_ij`` in the mean over images of the (weighted) mean over kept anchors.

    ``mass`` is n (N,). With reweighting a_i = 1 / sum of n over the image's kept anchors, else 1 / (n_i * number of
    kept anchors); both over the number of images that have any, or over `images`.
    """
    mass, kept = mass.view(-1, anchors_per_image), kept.view(-1, anchors_per_image)
    if reweight:
        divisor = mass.where(kept, 0).sum(dim=1, keepdim=True).expand_as(mass)
    else:
        divisor = mass * kept.sum(dim=1, keepdim=True)
    images = (images_with(kept) if images is None else images).clamp(min=1)
    return (1 / (divisor.where(kept, 1) * images)).where(kept, 0).flatten()


def images_with(kept: Tensor) -> Tensor:
    """How many images have a kept anchor, of (images, G) bool."""
    return kept.any(dim=1).sum()


def prepare(
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    anchors_per_image: int,
    negative_rate: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
    *_: Any,
    anchors: int | None = None,
    first: int = 0,
    bits_of: Callable[..., Tensor] = negative_bits,
) -> list[Tensor]:
    """For all anchors nothing: relations are read where they are needed. For a part of N `anchors` `kept_images`."""
    if anchors is None or len(positives) == anchors:
        return []
    bits = bits_of(negatives, seed, anchors_per_image, anchors, negative_rate)
    weighting = (specific_weight, variant, keep_specific_only)
    return [kept_images(positives, specific, bits, first, *weighting)]


def kept_images(
    positives: Tensor,
    specific: Tensor | None,
    negatives: Tensor,
    first: int,
    specific_weight: Tensor,
    variant: str,
    keep_specific_only: bool,
) -> Tensor:
    """How many images have an anchor that is kept in the A and in the S term, (2,) int64.

    Of bit-packed relations (R, words), whose rows are anchors from `first` on, and R (G, words).
    """
    rows, group = len(positives), len(negatives)
    counts = positives.new_zeros((2, rows), dtype=torch.int64)
    usable = counts.new_empty(rows, dtype=torch.bool)
    for block in row_blocks(positives, 64 * positives.shape[1]):
        own = torch.arange(block.start, block.stop, device=positives.device)
        denominator = positives[block] | negatives[own % group]
        own += first
        others = ~(torch.ones_like(own, dtype=torch.int32) << (own % 32).int())
        places = own[:, None] // 32
        denominator.scatter_(1, places, denominator.gather(1, places) & others[:, None])
        usable[block] = denominator.any(dim=1)
        for count, bits in zip(counts, (positives, specific), strict=True):
            if bits is not None:
                count[block] = population_count(bits[block])
    kept = kept_anchors(counts[0], counts[1], usable, specific_weight, variant, keep_specific_only)
    return torch.stack([images_with(of_term.view(-1, group)) for of_term in kept])


def images_of(prepared: list[Tensor]) -> Tensor:
    """What `kept_images` has found for `prepare`."""
    return prepared[0]


def forward(
    branches: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    pairs: list[Tensor],
    anchors_per_image: int,
    temperature: float,
    scale: float,
    negative_rate: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
    images: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The losses (branches,) and row statistics (branches, R, 4), for bit-packed positives (R, ceil(N / 32))."""
    (accumulate,) = check.accumulation(branches[0].dtype)
    vectors = [z.detach().to(accumulate) for z in branches]
    drawn = negatives_of(negatives, seed, anchors_per_image, len(vectors[0]), negative_rate)
    relations = Relations(positives, specific, drawn, len(vectors[0]), first)
    counts = vectors[0].new_zeros((2, len(positives)))  # of A and of S
    usable = torch.empty_like(counts[0], dtype=torch.bool)
    sums = vectors[0].new_zeros((len(branches), 3, len(positives)))
    for rows in _row_blocks(positives, vectors[0]):
        agnostic, task, denominator = relations.of_rows(rows)
        usable[rows] = denominator.any(dim=1)
        for count, mask in zip(counts, (agnostic, task), strict=True):
            if mask is not None:
                count[rows] = mask.sum(dim=1)
        for z, (log_denominator, *log_probabilities) in zip(vectors, sums, strict=True):
            logits = (z[relations.anchors_at(rows)] @ z.T).div_(temperature)
            log_denominator[rows] = logits.where(denominator, -torch.inf).logsumexp(dim=1).where(usable[rows], 0)
            logits -= log_denominator[rows, None]
            for total, mask in zip(log_probabilities, (agnostic, task), strict=True):
                if mask is not None:
                    total[rows] = logits.where(mask, 0).sum(dim=1)
    push, pull, pull_specific = anchor_coefficients(
        counts[0],
        counts[1],
        usable,
        specific_weight,
        anchors_per_image=anchors_per_image,
        scale=scale,
        variant=variant,
        reweight=reweight,
        keep_specific_only=keep_specific_only,
        images=images,
    )
    results = []
    for z, (log_denominator, agnostic_log_p, specific_log_p) in zip(vectors, sums, strict=True):
        loss = -(pull * agnostic_log_p + pull_specific * specific_log_p).sum()
        loss = loss + (z * 0).sum()  # 0, or NaN if z is not finite
        results.append((loss, torch.stack((log_denominator, push, pull, pull_specific), dim=1)))
    return stacked(results)


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
    pairs: list[Tensor],
    rows: Tensor,
    anchors_per_image: int,
    temperature: float,
    negative_rate: float,
    symmetric: bool,
    transposed: Transposed | None = None,
    first: int = 0,
) -> list[Tensor]:
    """The gradients of the branches from their row statistics; logits and negatives are computed again.

    `rows` (branches, N, 4) are of all anchors, gradients (R, D) of those that have rows of `positives`. Of relations
    that are not symmetric `transposed` has these rows of their transposes; without it, they must have all rows.
    """
    vectors = [z.detach().to(rows.dtype) for z in branches]
    drawn = negatives_of(negatives, seed, anchors_per_image, len(vectors[0]), negative_rate)
    relations = Relations(positives, specific, drawn, len(vectors[0]), first, transposed)
    grads = [z.new_empty((len(positives), z.shape[1])) for z in vectors]
    for block in _row_blocks(positives, vectors[0]):
        of_rows, own = relations.of_rows(block), relations.anchors_at(block)
        of_columns = relations.of_columns(block, of_rows if symmetric else None)
        for z, statistics, grad in zip(vectors, rows, grads, strict=True):
            logits = (z[own] @ z.T).div_(temperature)
            of_logits = _gradient_of_logits(logits, statistics.T[:, own, None], *of_rows)
            of_logits += _gradient_of_logits(logits, statistics.T[:, None], *of_columns)
            torch.mm(of_logits, z, out=grad[block])
    scales = grad_losses / temperature
    return [grad.mul_(factor).to(z.dtype) for grad, factor, z in zip(grads, scales, branches, strict=True)]


def _row_blocks(positives: Tensor, z: Tensor) -> list[slice]:
    """Blocks of rows of all pairs of the anchors `z`: four numbers of its dtype and eight bools a pair fit."""
    return row_blocks(positives, (4 * z.element_size() + 8) * len(z), multiple=32)


def _gradient_of_logits(
    logits: Tensor, statistics: Tensor, agnostic: Tensor, task: Tensor | None, denominator: Tensor
) -> Tensor:
    """g of a block of pairs, from the statistics of the anchor that has the other as its positive or negative."""
    log_denominator, push, pull, pull_specific = statistics
    grad: Tensor = (logits - log_denominator).exp_().mul_(push).masked_fill_(~denominator, 0)
    grad -= pull.where(agnostic, 0)
    if task is not None:
        grad -= pull_specific.where(task, 0)
    return grad
