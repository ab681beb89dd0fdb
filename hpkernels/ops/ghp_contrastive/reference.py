"""Plain PyTorch specification of `ghp_contrastive`: the references of its parts, one after another.

r_i  = max_m <f_i, pool_m>
A_ij = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not symmetric; S likewise from the task-specific features
loss = mean over branches z of  multi_positive_contrastive(z, A, S, lambda, negatives)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels.ops.hidden_positives.reference import positives
from hpkernels.ops.masked_topk import reference as masked_topk
from hpkernels.ops.multi_positive_contrastive.reference import contrastive_loss


def ghp_contrastive(
    branches: list[Tensor],
    features: Tensor,
    pool: Tensor,
    specific: Tensor | None,
    specific_pool: Tensor | None,
    specific_weight: float | Tensor,
    negatives: Tensor,
    symmetric: bool = True,
    **options: Any,
) -> Tensor:
    """The loss of the branches (N, D) for a dense (G, N) negative mask; differentiable by plain autograd."""
    agnostic = discover(features, pool, symmetric)
    task = None if specific is None or specific_pool is None else discover(specific, specific_pool, symmetric)
    losses = [contrastive_loss(z, agnostic, task, specific_weight, negatives, **options)[0] for z in branches]
    return torch.stack(losses).sum() / len(losses)


def discover(features: Tensor, pool: Tensor, symmetric: bool = True) -> Tensor:
    """The (N, N) bool hidden positives of `features` with the reference pool."""
    values, _ = masked_topk.forward(features, pool, k=1)
    return positives(features, values[:, 0], symmetric)
