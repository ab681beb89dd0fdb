"""CUDA kernels of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

Two routes give the same result. "blocks": tiles of all pairs. "lists": tiles of the pairs of each image, which hold
most positives; across images the sampled negatives of each patch position, which its anchors share, and the listed
positives. The host rules lists out where they cannot pay; where they may, the kernels of both routes are launched and a
number on the device, from the counts of the bits, lets those of one do nothing. So no call waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels.cost import MOST_LISTED_DENSITY, lists_may_pay
from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops.hidden_positives.bits import pack_bits
from hpkernels.ops.multi_positive_contrastive import cuda_bits as bits
from hpkernels.ops.multi_positive_contrastive.reference import loss_of_statistics, stacked

__all__ = ["backward", "forward", "supports"]

_kernels = torch.ops.hpkernels_cuda

_NUMBERS = 5  # of a part of a row: log-sum, counts of A and S, sums of their logits
_MOST_LISTED = 2**26  # positives across images: 256 MiB of columns
_STAGED_BYTES = 2**28  # of gradients of sampled columns at a time


class _Lists(NamedTuple):
    """Pairs across images by their first anchor, or patch position: where each list starts, and its columns."""

    columns: Tensor
    offsets: Tensor
    sampled_columns: Tensor
    sampled_offsets: Tensor


class _Stage(NamedTuple):
    """Patch positions whose columns' gradients are held at a time: `count` from 32 `first_word` on.

    Those of column j are in the rows slots[j] to slots[j + 1] - 1 of `capacity`.
    """

    positions: Tensor
    slots: Tensor
    first_word: int
    count: int
    capacity: int


class _Pairs:
    """The masks, the negatives, and with `lists_allowed` the lists; `enabled`, on the device, is 1 for lists.

    They are the same for all branches, which have one shape.
    """

    def __init__(self, branches, positives, specific, negatives, seed, group, rate, lists_allowed) -> None:
        self.positives = positives.contiguous()
        self.specific = None if specific is None else specific.contiguous()
        self.anchors, self.dim = branches[0].shape
        self.group, self.rate = group, rate
        self.enabled = positives.new_full((), int(lists_allowed))
        self.negatives = self.lists = None  # no negatives: every other anchor is one
        if negatives is not None:
            self.negatives = pack_bits(negatives)
        elif rate < 1:
            self.negatives, counts = bits.draw(seed, group, self.anchors, rate)
            self.lists = self._find_lists(counts) if lists_allowed else None

    def _find_lists(self, sampled_counts: Tensor) -> _Lists:
        capacity = min(math.ceil(MOST_LISTED_DENSITY * self.anchors**2), _MOST_LISTED)
        sampled_capacity = self.sampled_capacity(self.group)
        across = (self.positives, self.specific, self.group)
        offsets = bits.offsets_of(bits.count(*across), self.enabled, capacity)
        sampled_offsets = bits.offsets_of(sampled_counts, self.enabled, sampled_capacity)
        columns = bits.columns_of(self.positives, offsets, self.enabled, capacity, self.specific, self.group)
        sampled_columns = bits.columns_of(self.negatives, sampled_offsets, self.enabled, sampled_capacity)
        return _Lists(columns, offsets, sampled_columns, sampled_offsets)

    def sampled_capacity(self, positions: int) -> int:
        """Room for the negatives drawn at some positions, ten standard deviations above their expected number."""
        expected = self.rate * positions * self.anchors
        return math.ceil(min(expected + 10 * math.sqrt(expected) + 64, positions * self.anchors))

    def stages(self) -> list[_Stage]:
        """The patch positions, so many at a time that the gradients of their columns fit `_STAGED_BYTES`."""
        positions = bits.transpose(self.negatives, self.anchors)
        expected_bytes = 4 * self.dim * max(self.rate, 1e-6) * self.anchors  # of a position
        words_at_a_time = max(1, int(_STAGED_BYTES / expected_bytes / 32))
        stages = []
        for first_word in range(0, positions.shape[1], words_at_a_time):
            words = positions[:, first_word : first_word + words_at_a_time]
            count = min(32 * words.shape[1], self.group - 32 * first_word)
            slots = bits.offsets_of(bits.count(words))
            stages.append(_Stage(positions, slots, first_word, count, self.sampled_capacity(count)))
        return stages

    def blocks(self, z: Tensor, within: bool, scale: float) -> tuple:
        """What the kernels of blocks take first."""
        return z, self.positives, self.specific, self.negatives, self.group, within, self.enabled, scale

    def listed(self, z: Tensor, scale: float) -> tuple:
        """What the kernels of listed positives take first."""
        lists = (self.lists.columns, self.lists.offsets)
        return z, self.positives, self.specific, self.negatives, *lists, self.enabled, scale

    def sampled(self, z: Tensor, scale: float) -> tuple:
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
    lists_allowed = _lists_allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    results = []
    for branch in branches:
        parts = _parts(pairs, aligned_rows(branch), 1 / temperature)
        loss, statistics = loss_of_statistics(
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
    lists_allowed = symmetric and _lists_allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    stages = pairs.stages() if lists_allowed else []
    grads = []
    for grad_loss, branch, statistics in zip(grad_losses, branches, rows, strict=True):
        # The coefficients of a large batch are too small for float16, in which tiles of g are multiplied with z.
        largest = statistics[1:].amax().clamp(min=torch.finfo(rows.dtype).tiny)
        numbers = torch.cat((statistics[:1], statistics[1:] / largest))
        grad = _gradient(pairs, stages, aligned_rows(branch), numbers, 1 / temperature, symmetric)
        grads.append((grad * (grad_loss * largest / temperature)).to(branch.dtype))
    return grads


def _lists_allowed(anchors: int, group: int, negatives: Tensor | None, rate: float) -> bool:
    """Whether lists may take less time than blocks; given negatives may be any number, so they take blocks."""
    return negatives is None and lists_may_pay(anchors, group, rate)


def _parts(pairs: _Pairs, z: Tensor, scale: float) -> Tensor:
    """What each part of the pairs adds to the numbers of the rows, (parts, 5, N)."""
    scopes = [False] if pairs.lists is None else [False, True]
    counts = [_kernels.contrastive_blocks_parts(pairs.anchors, pairs.group, within) for within in scopes]
    parts = z.new_zeros((sum(counts) + 2 * len(scopes) - 2, _NUMBERS, pairs.anchors), dtype=torch.float32)
    parts[:, 0] = -torch.inf  # parts of a route that is not taken add nothing
    *of_blocks, others = parts.split([*counts, 2 * len(scopes) - 2])
    for within, part in zip(scopes, of_blocks, strict=True):
        _kernels.contrastive_blocks_forward(*pairs.blocks(z, within, scale), part)
    if pairs.lists is not None:
        _kernels.contrastive_sampled_forward(*pairs.sampled(z, scale), others[0, 0])
        _kernels.contrastive_pairs_forward(*pairs.listed(z, scale), others[1])
    return parts


def _gradient(pairs: _Pairs, stages: list[_Stage], z: Tensor, numbers: Tensor, scale: float, symmetric: bool) -> Tensor:
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
