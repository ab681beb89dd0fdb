"""Plain PyTorch specification of `contrastive`, and the plain PyTorch epilogue of its blocks (see ``chunked.py``).

    l_ij   = <a_i, k_j> / temperature + bias_j
    Q_ij   = the pair takes part: not excluded, and not an anchor and itself
    W_ij   = Q_ij times the weight of the positive pair, 0 for all other pairs
    Den_ij = Q_ij, or with denominator="negatives" Q_ij and W_ij = 0
    n_i    = sum_j W_ij

    outside: L_i = log sum_{Den_i} exp l_ij - sum_j W_ij l_ij / n_i
    inside:  L_i = log sum_{Den_i} exp l_ij - log (sum_j W_ij exp l_ij / n_i)

The loss of the anchors is sum_i c_i L_i, where c_i is 0 for an anchor without positives or with an empty denominator.
That of the keys is the same with rows and columns exchanged. Each anchor has four statistics: the log-denominator, the
pull (sum_j W_ij l_ij, or log sum_j W_ij exp l_ij), n_i, and the number of its positives. In backward it has four
numbers:

    g_ij = push_i Den_ij exp(l_ij - shift_i) - pull_i W_ij             (outside)
    g_ij = push_i Den_ij exp(l_ij - shift_i) - pull_i W_ij exp(l_ij - pull_shift_i)    (inside)
    da_i = sum_j g_ij k_j / temperature,  dk_j = sum_i g_ij a_i / temperature,  dbias_j = sum_i g_ij
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels._native import Availability
from hpkernels.ops import _checks as check
from hpkernels.ops._bits import unpack_bits, words_of
from hpkernels.ops.contrastive.problem import Problem, Tile
from hpkernels.ops.contrastive.relations import Relation, rows_of_pairs


def supports(device: torch.device, dtype: torch.dtype) -> Availability:
    """Plain PyTorch runs everywhere."""
    return Availability(True, "plain PyTorch")


def contrastive_loss(
    anchors: Tensor,
    keys: Tensor | None,
    positives: Tensor,
    excluded: Tensor | None = None,
    *,
    temperature: float | Tensor,
    key_bias: Tensor | None = None,
    inside: bool = False,
    decoupled: bool = False,
    exclude_positives: bool = True,
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss: dense, the specification; differentiable in all floating-point arguments.

    `positives` (N, K) are W, bool or weights; `excluded` (N, K) bool.
    """
    (accumulate,) = check.accumulation(anchors.dtype)
    own = keys is None
    anchors = anchors.to(accumulate)
    logits = anchors @ (anchors if keys is None else keys.to(accumulate)).T / temperature
    if key_bias is not None:
        logits = logits + key_bias.to(accumulate)
    weights = positives.to(accumulate)
    taking_part = torch.ones_like(weights, dtype=torch.bool)
    if excluded is not None:
        taking_part = ~excluded if exclude_positives else ~excluded | (weights > 0)
    if own:
        taking_part = taking_part & ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    weights = weights * taking_part
    denominator = taking_part & (weights == 0) if decoupled else taking_part
    loss = _reduced(*_losses(logits, weights, denominator, inside), anchor_weight, reduction)
    if both_directions:
        mirrored = _reduced(*_losses(logits.T, weights.T, denominator.T, inside), None, reduction)
        loss = (loss + mirrored) / 2
    return loss


def _losses(logits: Tensor, weights: Tensor, denominator: Tensor, inside: bool) -> tuple[Tensor, Tensor]:
    """L (N,), 0 where there is none, and where there is one."""
    mass = weights.sum(dim=1)
    kept = (mass > 0) & denominator.any(dim=1)
    # An anchor that is left out has a row of finite numbers, which keeps its gradient free of NaN.
    log_denominator = logits.masked_fill(~denominator & kept[:, None], -torch.inf).logsumexp(dim=1)
    if inside:
        log_weights = weights.log().masked_fill(~kept[:, None], 0)
        pull = (logits + log_weights).logsumexp(dim=1) - mass.where(kept, 1).log()
    else:
        pull = (weights * logits).sum(dim=1) / mass.where(kept, 1)
    return (log_denominator - pull).where(kept, 0), kept


def _reduced(losses: Tensor, kept: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    of_each = kept.to(losses.dtype) if weight is None else weight.to(losses.dtype) * kept
    if reduction == "none":
        return of_each * losses
    total, mass = (of_each * losses).sum(), of_each.sum()
    return total if reduction == "sum" else total / mass.where(mass > 0, 1)


def pair_bytes(problem: Problem) -> int:
    """Up to four numbers beside the product, and eight bools."""
    return 5 * problem.scale.element_size() + 8


def prepare(problem: Problem) -> Any:
    """The anchors of the listed pairs of positives and of what is excluded, or None."""
    relations = (problem.positives, problem.excluded)
    return [None if lists.offsets is None else rows_of_pairs(lists) for lists in relations]


def vectors(rows: Tensor) -> Tensor:
    """Anchors or keys in the dtype of the accumulation."""
    (accumulate,) = check.accumulation(rows.dtype)
    return rows.detach().to(accumulate).contiguous()


def pairs(products: Tensor, tile: Tile, problem: Problem, prepared: Any) -> Any:
    """Turn products (R, C) into logits, and return W (R, C) and Den (R, C) bool."""
    products.mul_(problem.scale)
    if problem.key_bias is not None:
        products += problem.key_bias[tile.columns]
    return _pairs(tile, problem, prepared)


def statistics(logits: Tensor, tile: Tile, problem: Problem, pairs: Any, rows: Tensor, columns: Tensor | None) -> None:
    """Add those of a tile to the statistics of its rows (R, 4) and columns (C, 4)."""
    weights, denominator = pairs
    _add(rows, logits, weights, denominator, problem.inside)
    if columns is not None:
        _add(columns, logits.T, weights.T, denominator.T, problem.inside)


def gradient(logits: Tensor, tile: Tile, problem: Problem, pairs: Any, rows: Tensor, columns: Tensor | None) -> Tensor:
    """g (R, C) of a tile, from the numbers of its rows (R, 4) and, of the other direction, of its columns (C, 4)."""
    weights, denominator = pairs
    grad = _gradient(logits, weights, denominator, rows[:, None], problem.inside)
    if columns is not None:
        grad += _gradient(logits, weights, denominator, columns, problem.inside)
    return grad


def _add(statistics: Tensor, logits: Tensor, weights: Tensor, denominator: Tensor, inside: bool) -> None:
    log_denominator, pull, mass, count = statistics.unbind(dim=1)
    found = logits.where(denominator, -torch.inf).logsumexp(dim=1)
    torch.logaddexp(log_denominator, found, out=log_denominator)
    if inside:
        torch.logaddexp(pull, (logits + weights.log()).logsumexp(dim=1), out=pull)
    else:
        pull += (logits * weights).sum(dim=1)
    mass += weights.sum(dim=1)
    count += (weights > 0).sum(dim=1)


def _gradient(logits: Tensor, weights: Tensor, denominator: Tensor, numbers: Tensor, inside: bool) -> Tensor:
    shift, push, pull_shift, pull = numbers.unbind(dim=-1)
    grad = (logits - shift).clamp_(max=0).exp_().mul_(push).masked_fill_(~denominator, 0)
    if inside:
        return grad.sub_((logits - pull_shift).add_(weights.log()).clamp_(max=0).exp_().mul_(pull))
    return grad.sub_(pull * weights)


def _pairs(tile: Tile, problem: Problem, prepared: Any) -> tuple[Tensor, Tensor]:
    """W (R, C) and Den (R, C) bool of a tile."""
    listed_positives, listed_excluded = prepared
    weights = _weights(problem.positives, tile, listed_positives, problem.scale)
    taking_part = _weights(problem.excluded, tile, listed_excluded, problem.scale) == 0
    if not problem.exclude_positives:
        taking_part |= weights > 0
    if problem.own >= 0:
        of_rows = torch.arange(tile.rows.start, tile.rows.stop, device=weights.device)[:, None] + problem.own
        of_columns = torch.arange(tile.columns.start, tile.columns.stop, device=weights.device)
        taking_part &= of_columns > of_rows if problem.triangle else of_columns != of_rows
    weights.masked_fill_(~taking_part, 0)
    return weights, taking_part & (weights == 0) if problem.decoupled else taking_part


def _weights(pairs: Relation, tile: Tile, listed: Tensor | None, like: Tensor) -> Tensor:
    """The weights of the pairs of a tile, (R, C) in the dtype of `like`."""
    (rows, columns), shape = tile, tile.shape
    found = torch.zeros(shape, dtype=torch.bool, device=like.device)
    if pairs.anchor_ids is not None and pairs.key_ids is not None:
        for of_anchors, of_keys in zip(pairs.anchor_ids[rows].T, pairs.key_ids[columns].T, strict=True):
            found |= (of_anchors[:, None] == of_keys) & (of_keys >= 0)
    if pairs.bits is not None:
        found |= unpack_bits(pairs.bits[rows, words_of(columns)], shape[1])
    weights = found.to(like.dtype)
    if listed is not None and pairs.indices is not None:
        inside = (listed >= rows.start) & (listed < rows.stop)
        inside &= (pairs.indices >= columns.start) & (pairs.indices < columns.stop)
        places = (listed - rows.start) * shape[1] + pairs.indices - columns.start
        # What is not of this tile goes to a place beyond its last.
        places = places.where(inside, shape[0] * shape[1])
        values = weights.new_ones(len(places)) if pairs.weights is None else pairs.weights
        flat = torch.cat((weights.flatten(), weights.new_zeros(1))).scatter_reduce_(0, places, values, "amax")
        weights = flat[:-1].view(shape)
    return weights
