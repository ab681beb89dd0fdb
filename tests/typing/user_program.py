"""A program as users write it, which type checkers must follow in strict mode; it also runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import assert_type

import hpkernels
from hpkernels import (
    Backend,
    BackendUnavailableError,
    ContrastiveStatistics,
    Explanation,
    Labels,
    PairLists,
    PositiveMask,
    Variant,
)
from hpkernels.compat import SupConLoss
from hpkernels.nn import ClipLoss, HiddenPositiveLoss, LocalPropagation, ReferencePool


def check_ops(z: Tensor, pool: Tensor, backend: Backend, variant: Variant) -> None:
    """The functions."""
    ranked = hpkernels.masked_topk(z, pool, k=2, backend=backend)
    values, indices = ranked
    assert_type(values, Tensor)
    assert_type(ranked.indices, Tensor)
    positives = hpkernels.hidden_positives(z.detach(), values[:, 0].detach(), backend=backend)
    assert_type(positives, PositiveMask)
    assert_type(positives | positives, PositiveMask)
    between = hpkernels.hidden_positives(z.detach(), keys=pool, key_threshold=pool.new_zeros(len(pool)))
    assert_type(between.T.keys, int | None)
    assert_type(PositiveMask.from_dense(between.to_dense(), keys=True), PositiveMask)
    assert_type(positives.to("cpu").count(), Tensor)
    labels = torch.arange(len(z)) % 2
    for relation in (positives, labels):
        loss = hpkernels.multi_positive_contrastive(z, relation, temperature=1, variant=variant, backend=backend)
        assert_type(loss, Tensor)
    options: dict[str, Any] = {"anchors_per_image": len(z), "seed": 0}
    assert_type(hpkernels.ghp_contrastive(z, z.detach(), pool, variant=variant, **options), Tensor)
    code, tokens = torch.rand(1, 3, 2, 2), torch.rand(1, 2, 5, 4)
    assert_type(hpkernels.local_propagation(code, tokens, tokens, backend="auto"), Tensor)
    weights = hpkernels.local_propagation_weights(tokens, tokens, (2, 2))
    assert_type(weights, Tensor)
    assert_type(hpkernels.apply_local_propagation(code, weights), Tensor)
    with hpkernels.use_backend("reference"):
        hpkernels.masked_topk(z, pool)


def check_contrastive(z: Tensor, queue: Tensor, backend: Backend) -> None:
    """The general loss and what names its positives, on one device and on many."""
    labels = Labels(torch.arange(len(z)) % 2, torch.arange(len(queue)) % 2)
    pairs = PairLists(torch.arange(len(z) + 1), torch.zeros(len(z), dtype=torch.long))
    assert_type(labels.key_ids, Tensor | None)
    assert_type(hpkernels.contrastive(z, queue, positives=(labels, pairs), backend=backend), Tensor)
    loss, statistics = hpkernels.contrastive(z, queue, positives=labels, return_statistics=True)
    assert_type(loss, Tensor)
    assert_type(statistics, ContrastiveStatistics)
    assert_type(statistics.key_positives, Tensor | None)
    assert_type(hpkernels.distributed.contrastive(z, queue, positives=labels, exchange="ring"), Tensor)
    _, statistics = hpkernels.distributed.contrastive(z, queue, positives=labels, return_statistics=True)
    assert_type(statistics, ContrastiveStatistics)
    options: dict[str, Any] = {"anchors_per_image": len(z), "seed": 0}
    assert_type(hpkernels.distributed.ghp_contrastive(z, z.detach(), queue, ddp=False, **options), Tensor)


def check_plans() -> None:
    """What an op would take, and why."""
    assert_type(hpkernels.__version__, str)
    explanation = hpkernels.explain("ghp_contrastive", device="H100", N=50176)
    assert_type(explanation, Explanation)
    assert_type(explanation.backend, str)
    assert_type(hpkernels.estimate("masked_topk", N=1568).best, str)
    try:
        hpkernels.masked_topk(torch.rand(2, 2), torch.rand(2, 2), backend="cuda")
    except BackendUnavailableError as error:
        print(f"as it should be: {error}")


def check_modules(z: Tensor, vectors: Tensor, backend: Backend) -> None:
    """The modules; what calling a module gives is Any in PyTorch, so `forward` is asked."""
    pool = ReferencePool(*vectors.shape)
    pool.fill(vectors)
    assert_type(pool.vectors, Tensor)
    assert_type(pool.forward(), Tensor)
    loss = HiddenPositiveLoss(len(z), variant="separate", backend=backend)
    assert_type(loss.temperature, float)
    assert_type(loss.variant, Variant)
    assert_type(loss.backend, Backend)
    assert_type(loss.forward(z, z.detach(), pool.forward(), seed=0), Tensor)
    code, tokens = torch.rand(1, 3, 2, 2), torch.rand(1, 2, 5, 4)
    assert_type(LocalPropagation(window=3).forward(code, tokens, tokens), Tensor)
    assert_type(SupConLoss(contrast_mode="all").backend, Backend)
    supcon = hpkernels.nn.SupConLoss(contrast_mode="one", backend=backend)
    assert_type(supcon.forward(torch.stack((z, z), dim=1), torch.arange(len(z))), Tensor)
    assert_type(ClipLoss().forward(z, z.detach(), 10.0), Tensor)
    assert_type(ClipLoss().forward(z, z.detach(), torch.tensor(10.0), output_dict=True), dict[str, Tensor])


def check_mistakes(z: Tensor, pool: Tensor) -> None:
    """What must be an error to a type checker, and is one when it runs."""
    hpkernels.masked_topk(z, pool, backend="gpu")  # type: ignore[arg-type]
    hpkernels.use_backend("gpu")  # type: ignore[arg-type]
    hpkernels.contrastive(z, pool)  # type: ignore[call-overload]
    hpkernels.contrastive(z, pool, positives=z > 0, denominator="some")  # type: ignore[call-overload]
    HiddenPositiveLoss(4, variant="both")  # type: ignore[arg-type]
    hpkernels.nn.SupConLoss(contrast_mode="none")  # type: ignore[arg-type]


def main() -> None:
    """Run what is right."""
    torch.manual_seed(0)
    z, pool = normalize(torch.randn(8, 4)).requires_grad_(), normalize(torch.randn(3, 4))
    check_ops(z, pool, "auto", "joint")
    check_contrastive(z, pool, "auto")
    check_plans()
    check_modules(z, pool, "reference")


if __name__ == "__main__":
    main()
