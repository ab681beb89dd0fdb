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
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpkernels.backends import Availability
from hpkernels.ops import _checks as check
from hpkernels.ops._blocks import row_blocks
from hpkernels.ops.hidden_positives.bits import unpack_bits, words_of
from hpkernels.ops.multi_positive_contrastive.negatives import negative_bits


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


def prepare(*_: Any) -> list[Tensor]:
    """Nothing: the relations are read where they are needed."""
    return []


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
) -> tuple[Tensor, Tensor]:
    """The losses (branches,) and row statistics (branches, N, 4), for bit-packed positives (N, ceil(N / 32))."""
    (accumulate,) = check.accumulation(branches[0].dtype)
    vectors = [z.detach().to(accumulate) for z in branches]
    relations = _Relations.of(positives, specific, negatives, seed, anchors_per_image, negative_rate)
    counts = vectors[0].new_zeros((2, len(positives)))  # of A and of S
    usable = torch.empty_like(counts[0], dtype=torch.bool)
    sums = vectors[0].new_zeros((len(branches), 3, len(positives)))
    for rows in _row_blocks(vectors[0]):
        agnostic, task, denominator = relations.of_rows(rows)
        usable[rows] = denominator.any(dim=1)
        for count, mask in zip(counts, (agnostic, task), strict=True):
            if mask is not None:
                count[rows] = mask.sum(dim=1)
        for z, (log_denominator, *log_probabilities) in zip(vectors, sums, strict=True):
            logits = (z[rows] @ z.T).div_(temperature)
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
) -> list[Tensor]:
    """The gradients of the branches from their row statistics; logits and negatives are computed again."""
    vectors = [z.detach().to(rows.dtype) for z in branches]
    relations = _Relations.of(positives, specific, negatives, seed, anchors_per_image, negative_rate)
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in vectors]
    for block in _row_blocks(vectors[0]):
        of_rows = relations.of_rows(block)
        of_columns = relations.of_columns(block, of_rows if symmetric else None)
        for z, statistics, grad in zip(vectors, rows, grads, strict=True):
            logits = (z[block] @ z.T).div_(temperature)
            of_logits = _gradient_of_logits(logits, statistics.T[:, block, None], *of_rows)
            of_logits += _gradient_of_logits(logits, statistics.T[:, None], *of_columns)
            torch.mm(of_logits, z, out=grad[block])
    scales = grad_losses / temperature
    return [grad.mul_(factor).to(z.dtype) for grad, factor, z in zip(grads, scales, branches, strict=True)]


def _row_blocks(z: Tensor) -> list[slice]:
    """Blocks of rows of all pairs of the anchors `z`: four numbers of its dtype and eight bools a pair fit."""
    return row_blocks(z, (4 * z.element_size() + 8) * len(z), multiple=32)


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


_Block = tuple[Tensor, Tensor | None, Tensor]  # of A, S and Den, bool


@dataclass(frozen=True)
class _Relations:
    """A, S and R bit-packed, of which Den and dense blocks are made; R may be one row that stands for all."""

    positives: Tensor
    specific: Tensor | None
    negatives: Tensor

    @classmethod
    def of(
        cls,
        positives: Tensor,
        specific: Tensor | None,
        negatives: Tensor | None,
        seed: Tensor,
        anchors_per_image: int,
        rate: float,
    ) -> _Relations:
        group = 1 if rate in (0, 1) else anchors_per_image
        return cls(positives, specific, negative_bits(negatives, seed, group, len(positives), rate))

    def of_rows(self, rows: slice) -> _Block:
        """A_ij, S_ij and Den_ij for i in `rows`, (rows, N) each."""
        anchors = len(self.positives)
        positions = torch.arange(rows.start, rows.stop, device=self.negatives.device) % len(self.negatives)
        drawn = unpack_bits(self.negatives[positions], anchors)
        agnostic = unpack_bits(self.positives[rows], anchors)
        task = None if self.specific is None else unpack_bits(self.specific[rows], anchors)
        return agnostic, task, _without_own(agnostic | drawn, rows)

    def of_columns(self, rows: slice, of_rows: _Block | None) -> _Block:
        """A_ji, S_ji and Den_ji for i in `rows`, (rows, N) each; A and S are those `of_rows` if they are symmetric."""
        if of_rows is None:
            agnostic = _columns(self.positives, rows)
            task = None if self.specific is None else _columns(self.specific, rows)
        else:
            agnostic, task, _ = of_rows
        drawn = _columns(self.negatives, rows).repeat(1, len(self.positives) // len(self.negatives))
        return agnostic, task, _without_own(agnostic | drawn, rows)


def _columns(bits: Tensor, columns: slice) -> Tensor:
    """Some columns of a packed matrix, as rows: (columns, R) bool."""
    return unpack_bits(bits[:, words_of(columns)], columns.stop - columns.start).T.contiguous()


def _without_own(pairs: Tensor, rows: slice) -> Tensor:
    """`pairs` (rows, N) without those of an anchor and itself."""
    pairs.diagonal(rows.start).fill_(False)
    return pairs
