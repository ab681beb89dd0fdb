"""CUDA kernels of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

Two routes give the same result. "blocks": tiles of all pairs. "lists": tiles of the pairs of each image, which hold
most positives; across images the sampled negatives of each patch position, which its anchors share, and the listed
positives. The host rules lists out where they cannot pay; where they may, the kernels of both routes are launched and a
number on the device, from the counts of the bits, lets those of one do nothing. So no call waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops.hidden_positives.bits import as_bits
from hpkernels.ops.multi_positive_contrastive import cuda_bits as bits
from hpkernels.ops.multi_positive_contrastive import lists
from hpkernels.ops.multi_positive_contrastive.reference import loss_of_statistics, stacked

__all__ = ["backward", "forward", "supports"]

_kernels = torch.ops.hpkernels_cuda

_NUMBERS = 5  # of a part of a row: log-sum, counts of A and S, sums of their logits


class _Pairs:
    """The masks, the negatives, and with `lists_allowed` the lists; `enabled`, on the device, is 1 for lists.

    They are the same for all branches, which have one shape.
    """

    def __init__(
        self,
        branches: list[Tensor],
        positives: Tensor,
        specific: Tensor | None,
        negatives: Tensor | None,
        seed: Tensor,
        group: int,
        rate: float,
        lists_allowed: bool,
    ) -> None:
        self.positives = positives.contiguous()
        self.specific = None if specific is None else specific.contiguous()
        self.anchors, self.dim = branches[0].shape
        self.group, self.rate = group, rate
        self.enabled = positives.new_full((), int(lists_allowed))
        self.negatives: Any = None
        self.lists: Any = None  # no negatives: every other anchor is one
        if negatives is not None:
            self.negatives = as_bits(negatives)
        elif rate < 1:
            self.negatives, counts = bits.draw(seed, group, self.anchors, rate)
            self.lists = self._find_lists(counts) if lists_allowed else None

    def _find_lists(self, sampled_counts: Tensor) -> lists.Lists:
        capacity = lists.capacity(self.anchors)
        sampled_capacity = lists.sampled_capacity(self.group, self.anchors, self.rate)
        across = (self.positives, self.specific, self.group)
        offsets = bits.offsets_of(bits.count(*across), self.enabled, capacity)
        sampled_offsets = bits.offsets_of(sampled_counts, self.enabled, sampled_capacity)
        columns = bits.columns_of(self.positives, offsets, self.enabled, capacity, self.specific, self.group)
        sampled_columns = bits.columns_of(self.negatives, sampled_offsets, self.enabled, sampled_capacity)
        return lists.Lists(offsets, columns, sampled_offsets, sampled_columns)

    def blocks(self, z: Tensor, within: bool, scale: float) -> tuple[Any, ...]:
        """What the kernels of blocks take first."""
        return z, self.positives, self.specific, self.negatives, self.group, within, self.enabled, scale

    def listed(self, z: Tensor, scale: float) -> tuple[Any, ...]:
        """What the kernels of listed positives take first."""
        columns = (self.lists.columns, self.lists.offsets)
        return z, self.positives, self.specific, self.negatives, *columns, self.enabled, scale

    def sampled(self, z: Tensor, scale: float) -> tuple[Any, ...]:
        """What the kernels of sampled negatives take first."""
        return z, self.group, self.lists.sampled_columns, self.lists.sampled_offsets, self.enabled, scale


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
    lists_allowed = lists.allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    results = []
    for branch in branches:
        parts = _parts(pairs, aligned_rows(branch), 1 / temperature)
        loss, statistics = loss_of_statistics(  # type: ignore[call-arg]  # the rows' number is not known
            parts[:, 0].logsumexp(dim=0),
            *parts[:, 1:].sum(dim=0),
            specific_weight,
            anchors_per_image=anchors_per_image,
            scale=scale,
            variant=variant,
            reweight=reweight,
            keep_specific_only=keep_specific_only,
        )
        not_finite = (branch.detach() * 0).sum(dtype=loss.dtype)  # 0, or NaN if z is not finite
        results.append((loss + not_finite, statistics))
    return stacked(results)


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
    """The gradients of the branches from their row statistics; logits, negatives and lists are computed again."""
    lists_allowed = symmetric and lists.allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    stages = []
    if lists_allowed:
        stages = lists.stages(bits, pairs.negatives, pairs.anchors, pairs.dim, negative_rate)
    grads = []
    for grad_loss, branch, statistics in zip(grad_losses, branches, rows, strict=True):
        numbers, factor = lists.scaled(statistics)
        grad = _gradient(pairs, stages, aligned_rows(branch), numbers, 1 / temperature, symmetric)
        grads.append((grad * (grad_loss * factor / temperature)).to(branch.dtype))
    return grads


def _parts(pairs: _Pairs, z: Tensor, scale: float) -> Tensor:
    """What each part of the pairs adds to the numbers of the rows, (parts, 5, N)."""
    scopes = [False] if pairs.lists is None else [False, True]
    counts = [_kernels.contrastive_blocks_parts(pairs.anchors, pairs.group, within) for within in scopes]
    parts = z.new_zeros((sum(counts) + 2 * len(scopes) - 2, _NUMBERS, pairs.anchors), dtype=torch.float32)
    parts[:, 0] = -torch.inf  # parts of a route that is not taken add nothing
    *of_blocks, others = parts.split([*counts, 2 * len(scopes) - 2])  # type: ignore[no-untyped-call]
    for within, part in zip(scopes, of_blocks, strict=True):
        _kernels.contrastive_blocks_forward(*pairs.blocks(z, within, scale), part)
    if pairs.lists is not None:
        _kernels.contrastive_sampled_forward(*pairs.sampled(z, scale), others[0, 0])
        _kernels.contrastive_pairs_forward(*pairs.listed(z, scale), others[1])
    return parts


def _gradient(
    pairs: _Pairs, stages: list[lists.Stage], z: Tensor, numbers: Tensor, scale: float, symmetric: bool
) -> Tensor:
    """sum over j of (g_ij + g_ji) z_j, (N, D) float32, with the numbers (4, N) of the rows."""
    grad = z.new_empty((pairs.anchors, pairs.dim), dtype=torch.float32)
    _kernels.contrastive_blocks_backward(*pairs.blocks(z, False, scale), symmetric, numbers, grad)
    if pairs.lists is not None:
        _kernels.contrastive_blocks_backward(*pairs.blocks(z, True, scale), symmetric, numbers, grad)
        _kernels.contrastive_pairs_backward(*pairs.listed(z, scale), numbers, grad)
        _kernels.contrastive_sampled_rows_backward(*pairs.sampled(z, scale), numbers, grad)
        for stage in stages:
            staged = grad.new_empty((stage.capacity, pairs.dim))
            places = (stage.positions, stage.slots, stage.first_word, stage.count, staged)
            _kernels.contrastive_sampled_columns_backward(*pairs.sampled(z, scale), numbers, *places, grad)
    return grad
