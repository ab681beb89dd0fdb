"""Triton kernels of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

Two routes give the same result. "blocks": tiles of all pairs. "lists": tiles of the pairs of each image, which hold
most positives; across images the sampled negatives of each patch position, which its anchors share, and the listed
positives. The host rules lists out where they cannot pay; where they may, the kernels of both routes are launched and a
number on the device, from the counts of the bits, lets those of one do nothing. So no call waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._triton import aligned_rows, supports
from hpkernels.ops.hidden_positives.bits import as_bits
from hpkernels.ops.multi_positive_contrastive import lists
from hpkernels.ops.multi_positive_contrastive import triton_bits as bits
from hpkernels.ops.multi_positive_contrastive.reference import loss_of_statistics, stacked
from hpkernels.ops.multi_positive_contrastive.triton_blocks import (
    PARTS,
    contrastive_blocks_bwd_kernel,
    contrastive_blocks_fwd_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_pairs import (
    contrastive_pairs_bwd_kernel,
    contrastive_pairs_fwd_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_sampled import (
    sampled_columns_bwd_kernel,
    sampled_gather_bwd_kernel,
    sampled_rows_bwd_kernel,
    sampled_rows_fwd_kernel,
)

__all__ = ["backward", "forward", "supports"]

_PROGRAMS = 512  # that columns are split to reach where there are few rows or positions
_SPLITS = 4  # at least, of each position's list in the gradients of its columns


class _Pairs:
    """The masks, the negatives, and with `lists_allowed` the lists; `enabled`, on the device, is 1 for lists.

    They are the same for all branches, which have one shape.
    """

    def __init__(self, branches, positives, specific, negatives, seed, group, rate, lists_allowed) -> None:
        self.positives = positives.contiguous()
        self.specific = None if specific is None else specific.contiguous()
        self.anchors, self.dim = branches[0].shape
        self.group, self.rate = group, rate
        self.negatives = bits.draw(seed, group, self.anchors, rate) if negatives is None else as_bits(negatives)
        self.enabled = positives.new_zeros(())
        self.lists = self._find_lists() if lists_allowed else None

    def _find_lists(self) -> lists.Lists:
        capacity = lists.capacity(self.anchors)
        sampled_capacity = lists.sampled_capacity(self.group, self.anchors, self.rate)
        across = (self.positives, self.specific, self.group)
        offsets = bits.offsets_of(bits.count(*across))
        sampled_offsets = bits.offsets_of(bits.count(self.negatives))
        fit = (offsets[-1] <= capacity) & (sampled_offsets[-1] <= sampled_capacity)
        self.enabled = fit.to(torch.int32)
        columns = bits.columns_of(self.positives, offsets, self.enabled, capacity, self.specific, self.group)
        sampled = bits.columns_of(self.negatives, sampled_offsets, self.enabled, sampled_capacity)
        return lists.Lists(offsets, columns, sampled_offsets, sampled)

    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, S and R bit-packed; A again if there is no S, for the kernels do not read it then."""
        return self.positives, self.positives if self.specific is None else self.specific, self.negatives

    def sizes(self) -> tuple[int, int, int, int]:
        """N, D, words of a row of masks, G."""
        return self.anchors, self.dim, self.positives.shape[1], self.group


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
    branches = [aligned_rows(z).contiguous() for z in branches]
    lists_allowed = lists.allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    results = []
    for z in branches:
        parts = _blocks_forward(pairs, z, 1 / temperature, within=False)
        if lists_allowed:
            within = _blocks_forward(pairs, z, 1 / temperature, within=True)
            parts = torch.cat((parts, within, _lists_forward(pairs, z, 1 / temperature)))
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
        results.append((loss + (z * 0).sum(dtype=loss.dtype), statistics))  # of 0, or of NaN if z is not finite
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
    given = branches[0].shape[1]
    branches = [aligned_rows(z).contiguous() for z in branches]
    lists_allowed = symmetric and lists.allowed(len(positives), anchors_per_image, negatives, negative_rate)
    pairs = _Pairs(branches, positives, specific, negatives, seed, anchors_per_image, negative_rate, lists_allowed)
    stages = []
    if lists_allowed:
        stages = lists.stages(bits, pairs.negatives, pairs.anchors, pairs.dim, negative_rate)
    grads = []
    for grad_loss, z, statistics in zip(grad_losses, branches, rows, strict=True):
        numbers, factor = lists.scaled(statistics)
        grad_z = torch.empty_like(z, dtype=rows.dtype)
        _blocks_backward(pairs, z, numbers, grad_z, 1 / temperature, within=False, symmetric=symmetric)
        if lists_allowed:
            _blocks_backward(pairs, z, numbers, grad_z, 1 / temperature, within=True, symmetric=True)
            _lists_backward(pairs, stages, z, numbers, grad_z, 1 / temperature)
        grads.append((grad_z[:, :given] * (grad_loss * factor / temperature)).to(z.dtype))
    return grads


def _empty_parts(pairs: _Pairs, parts: int) -> Tensor:
    """Parts of the rows that add nothing."""
    empty = pairs.positives.new_zeros((parts, PARTS.value, pairs.anchors), dtype=torch.float32)
    empty[:, 0] = -torch.inf
    return empty


def _row_blocks(pairs: _Pairs, rows: int, within: bool) -> int:
    if within:
        return pairs.anchors // pairs.group * triton.cdiv(pairs.group + 31, rows)
    return triton.cdiv(pairs.anchors, rows)


def _blocks_forward(pairs: _Pairs, z: Tensor, scale: float, within: bool) -> Tensor:
    config = _triton.configuration(contrastive_blocks_fwd_kernel, z)
    blocks = _row_blocks(pairs, config["BLOCK_ROWS"], within)
    tiles = triton.cdiv(pairs.group + 31 if within else pairs.anchors, config["BLOCK_COLUMNS"])
    splits = min(tiles, triton.cdiv(_PROGRAMS, blocks))
    parts = _empty_parts(pairs, splits)
    _triton.launch(
        contrastive_blocks_fwd_kernel,
        (blocks, splits),
        *(z, *pairs.masks(), pairs.enabled, parts, scale, *pairs.sizes()),
        HAS_SPECIFIC=pairs.specific is not None,
        PRECISION=_triton.precision(z),
        ENABLED_IF=int(within),
        WITHIN=within,
        **config,
    )
    return parts


def _blocks_backward(
    pairs: _Pairs, z: Tensor, numbers: Tensor, grad: Tensor, scale: float, within: bool, symmetric: bool
) -> None:
    config = _triton.configuration(contrastive_blocks_bwd_kernel, z)
    blocks = _row_blocks(pairs, config["BLOCK_ROWS"], within)
    _triton.launch(
        contrastive_blocks_bwd_kernel,
        (blocks, triton.cdiv(pairs.dim, config["BLOCK_GRAD"])),
        *(z, *pairs.masks(), pairs.enabled, numbers, grad, scale, *pairs.sizes()),
        HAS_SPECIFIC=pairs.specific is not None,
        PRECISION=_triton.precision(z),
        ENABLED_IF=int(within),
        WITHIN=within,
        SYMMETRIC=symmetric,
        WHOLE=config["BLOCK_GRAD"] >= pairs.dim,
        **config,
    )


def _lists_forward(pairs: _Pairs, z: Tensor, scale: float) -> Tensor:
    sampled, listed = parts = _empty_parts(pairs, 2)
    of_pairs, images = pairs.lists, pairs.anchors // pairs.group
    config = _triton.configuration(sampled_rows_fwd_kernel, z)
    _triton.launch(
        sampled_rows_fwd_kernel,
        (pairs.group, triton.cdiv(images, config["BLOCK_ROWS"])),
        *(z, of_pairs.sampled_columns, of_pairs.sampled_offsets, pairs.enabled, sampled, scale),
        *(pairs.anchors, pairs.dim, pairs.group),
        PRECISION=_triton.precision(z),
        **config,
    )
    _triton.launch(
        contrastive_pairs_fwd_kernel,
        (pairs.anchors,),
        *(z, *pairs.masks(), of_pairs.columns, of_pairs.offsets, pairs.enabled, listed, scale, *pairs.sizes()),
        HAS_SPECIFIC=pairs.specific is not None,
        **_triton.configuration(contrastive_pairs_fwd_kernel, z),
    )
    return parts


def _lists_backward(
    pairs: _Pairs, stages: list[lists.Stage], z: Tensor, numbers: Tensor, grad: Tensor, scale: float
) -> None:
    of_pairs, images = pairs.lists, pairs.anchors // pairs.group
    config = _triton.configuration(contrastive_pairs_bwd_kernel, z)
    _triton.launch(
        contrastive_pairs_bwd_kernel,
        (pairs.anchors, triton.cdiv(pairs.dim, config["BLOCK_D"])),
        *(z, *pairs.masks(), of_pairs.columns, of_pairs.offsets, pairs.enabled, numbers, grad, scale, *pairs.sizes()),
        HAS_SPECIFIC=pairs.specific is not None,
        **config,
    )
    sampled = (z, of_pairs.sampled_columns, of_pairs.sampled_offsets, pairs.enabled, numbers)
    sizes = (pairs.anchors, pairs.dim, pairs.group)
    config = _triton.configuration(sampled_rows_bwd_kernel, z)
    _triton.launch(
        sampled_rows_bwd_kernel,
        (pairs.group, triton.cdiv(images, config["BLOCK_ROWS"]), triton.cdiv(pairs.dim, config["BLOCK_GRAD"])),
        *(*sampled, grad, scale, *sizes),
        PRECISION=_triton.precision(z),
        WHOLE=config["BLOCK_GRAD"] >= pairs.dim,
        **config,
    )
    for stage in stages:
        _sampled_columns_backward(pairs, stage, sampled, sizes, grad, scale)


def _sampled_columns_backward(
    pairs: _Pairs, stage: lists.Stage, sampled: tuple, sizes: tuple, grad: Tensor, scale: float
) -> None:
    """What the sampled columns get from the rows: products by position are staged, and gathered by column."""
    z, *_ = sampled
    config = _triton.configuration(sampled_columns_bwd_kernel, z)
    gather = _triton.configuration(sampled_gather_bwd_kernel, grad)
    staged = grad.new_empty((stage.capacity, pairs.dim))
    words = stage.positions.shape[1]
    features = triton.cdiv(pairs.dim, config["BLOCK_GRAD"])
    tiles = triton.cdiv(math.ceil(pairs.rate * pairs.anchors), config["BLOCK_COLUMNS"])  # of a list, as expected
    splits = min(max(tiles, 1), max(_SPLITS, triton.cdiv(_PROGRAMS, stage.count * features)))
    _triton.launch(
        sampled_columns_bwd_kernel,
        (stage.count, splits, features),
        *(*sampled, stage.positions, stage.slots, staged, scale, *sizes, words, stage.first_word, stage.capacity),
        PRECISION=_triton.precision(z),
        WHOLE=config["BLOCK_GRAD"] >= pairs.dim,
        **config,
    )
    _triton.launch(
        sampled_gather_bwd_kernel,
        (triton.cdiv(pairs.anchors, gather["BLOCK_COLUMNS"]), triton.cdiv(pairs.dim, gather["BLOCK_GRAD"])),
        *(staged, stage.slots, pairs.enabled, grad, pairs.anchors, pairs.dim, stage.capacity),
        **gather,
    )
