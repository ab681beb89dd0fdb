"""The drop-in op: hidden-positive discovery and the multi-positive contrastive loss of both branches in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives import hidden_positives
from hpkernels.ops.masked_topk import masked_topk
from hpkernels.ops.multi_positive_contrastive import mean_loss
from hpkernels.ops.multi_positive_contrastive.options import ContrastiveOptions, Variant, check_options
from hpkernels.positive_mask import PositiveMask

Source = tuple[Tensor, Tensor]
"""Features of the anchors, and the pool of their kind."""


def ghp_contrastive(
    z: Tensor,
    features: Tensor,
    pool: Tensor,
    *,
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
    backend: Backend = "auto",
) -> Tensor:
    """Compute the global-hidden-positive loss of HP (CVPR 2023): thresholds, positives and both branches.

    Thresholds ``r_i = max_m <features_i, pool_m>``; positives A of `features` and S of `specific`
    (see `hidden_positives`); the loss (see `multi_positive_contrastive`) of `z`, and of `z_mixed` if given, with the
    same positives and negatives; the mean of the branches.

    Args:
        z: (N, D) floating-point projections, L2-normalised rows, ordered image by image.
        features: (N, Df) frozen backbone features, L2-normalised, no gradient.
        pool: (M, Df) task-agnostic reference pool, L2-normalised, dtype of `features`.
        specific: (N, Ds) outputs of the EMA head, L2-normalised, no gradient. Needs `specific_pool`.
        specific_pool: (Ms, Ds) task-specific reference pool.
        specific_weight: lambda >= 0, a float or a 0-d tensor. The float 0.0 skips task-specific discovery.
        z_mixed: (N, D) projections of the locally propagated codes, dtype of `z`.
        anchors_per_image, temperature, base_temperature, negative_rate, negatives: see `multi_positive_contrastive`.
        seed, variant, reweight, keep_specific_only, backend: likewise.
        symmetric: of A and S, see `hidden_positives`.

    Returns:
        The 0-d loss, float32 (float64 for float64 `z`); gradients reach `z` and `z_mixed`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, inputs that are not finite, or whose inner products are not, are a ValueError; elsewhere
            the loss is NaN.

    Notes:
        Under autocast a pool of another floating dtype is cast to that of its features.
        Similarities are compared in float32 whatever the dtypes. Deterministic for a given seed. Memory: two packed
        masks of N²/8 bytes; the reference works on blocks of rows in up to 256 MiB besides.

    Examples:
        >>> import torch, hpkernels
        >>> from torch.nn.functional import normalize
        >>> rows = normalize(torch.eye(8)[:, :4] + torch.eye(8)[:, 4:] + 0.2)
        >>> z = rows.clone().requires_grad_()
        >>> loss = hpkernels.ghp_contrastive(z, rows, rows[:1], anchors_per_image=4, seed=0)
        >>> loss.backward()
        >>> z.grad.shape
        torch.Size([8, 4])
    """
    op = "ghp_contrastive"
    options = ContrastiveOptions(
        specific_weight=specific_weight,
        anchors_per_image=anchors_per_image,
        temperature=temperature,
        base_temperature=base_temperature,
        negative_rate=negative_rate,
        negatives=negatives,
        seed=seed,
        variant=variant,
        reweight=reweight,
        keep_specific_only=keep_specific_only,
    )
    sources, options = check_arguments(op, z, z_mixed, (features, pool), (specific, specific_pool), options, symmetric)
    # Before anything runs: a request that one of the steps cannot meet is refused at once.
    chosen = [choose(op, backend, of_source) for of_source, _ in sources]
    loss_backend = backends.select("multi_positive_contrastive", backend, z, caller=op)
    found = [_discover(*source, symmetric, by) for source, by in zip(sources, chosen, strict=True)]
    positives, specific_positives = found[0][1], found[1][1] if len(found) > 1 else None
    loss = mean_loss(op, z, z_mixed, positives, specific_positives, options, loss_backend)
    # NaN thresholds come from inputs that were not readable above; they must not pass as "no positives".
    thresholds = torch.cat([threshold for threshold, _ in found])
    return loss + thresholds.amax().to(loss.dtype) * 0


def check_arguments(
    op: str,
    z: Tensor,
    z_mixed: Tensor | None,
    agnostic: tuple[Tensor, Tensor],
    task_specific: tuple[Tensor | None, Tensor | None],
    options: ContrastiveOptions,
    symmetric: bool,
) -> tuple[list[Source], ContrastiveOptions]:
    """Check what `ghp_contrastive` is given: features and pool of A, and of S if it has a weight; checked options."""
    check.tensor(op, "z", z, ("N", "D"))
    features, pool = agnostic[0], check.with_autocast(agnostic[1], agnostic[0])
    specific, specific_pool = task_specific[0], check.with_autocast(task_specific[1], task_specific[0])
    _check_source(op, z, "features", features, "pool", pool)
    if (specific is None) != (specific_pool is None):
        given, missing = ("specific", "specific_pool") if specific_pool is None else ("specific_pool", "specific")
        raise ValueError(f"{op}: `{missing}` must be given together with `{given}`, got None")
    if specific is not None:
        _check_source(op, z, "specific", specific, "specific_pool", specific_pool)
    if z_mixed is not None:
        check.tensor(op, "z_mixed", z_mixed, (z.shape[0], z.shape[1]))
        check.same(op, "z_mixed", z_mixed, "z", z)
        check.finite(op, "z_mixed", z_mixed)
    check.finite(op, "z", z)
    check.flag(op, "symmetric", symmetric)
    specific_weight = options.specific_weight
    options = check_options(op, z, options, has_specific=specific is not None)
    sources = [(features, pool)]
    uses_specific = isinstance(specific_weight, Tensor) or specific_weight > 0
    if specific is not None and specific_pool is not None and uses_specific:
        sources.append((specific, specific_pool))
    return sources, options


def _check_source(op: str, z: Tensor, name: str, features: Tensor, pool_name: str, pool: Tensor) -> None:
    check.tensor(op, name, features, (z.shape[0], "D"))
    check.tensor(op, pool_name, pool, ("M", features.shape[1]))
    check.same(op, name, features, "z", z, dtype=False)
    check.same(op, pool_name, pool, name, features)
    for argument, value in ((name, features), (pool_name, pool)):
        check.constant(op, argument, value)
        check.finite(op, argument, value, products=True)


def choose(op: str, backend: Backend, features: Tensor) -> dict[str, Backend]:
    """The backend of each step of discovery."""
    return {name: backends.select(name, backend, features, caller=op) for name in ("masked_topk", "hidden_positives")}


def _discover(
    features: Tensor, pool: Tensor, symmetric: bool, chosen: dict[str, Backend]
) -> tuple[Tensor, PositiveMask]:
    threshold = masked_topk(features, pool, backend=chosen["masked_topk"]).values[:, 0]
    found = hidden_positives(features, threshold, symmetric=symmetric, backend=chosen["hidden_positives"])
    return threshold, found
