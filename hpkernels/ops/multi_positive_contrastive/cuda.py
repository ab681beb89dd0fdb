"""CUDA kernels of `multi_positive_contrastive`, without any N x N tensor: see ``routes.py`` for how they go together.

The functions are those of ``routes.Kernels``. What they launch is in csrc/multi_positive_contrastive.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from hpkernels.ops._bits import words_per_row
from hpkernels.ops._cuda import aligned_rows, supports
from hpkernels.ops.multi_positive_contrastive import routes
from hpkernels.ops.multi_positive_contrastive.routes import Pairs, Reach, images_of

__all__ = ["aligned_rows", "backward", "forward", "images_of", "prepare", "supports"]

_kernels = torch.ops.hpkernels_cuda


def draw(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    bits = torch.empty((rows, words_per_row(columns)), dtype=torch.int32, device=seed.device)
    _kernels.contrastive_draw_negatives(seed, columns, int(rate * 2**32), bits)
    return bits


def list_sampled(pairs: Pairs, slot_capacity: int) -> None:
    anchors, lists = len(pairs.weights), pairs.required_lists
    transposed = pairs.positives.new_empty((anchors, words_per_row(pairs.group)))
    _kernels.contrastive_list_sampled(
        *(pairs.negatives, anchors, pairs.state, pairs.stage_columns, slot_capacity, transposed),
        *(lists.slot_ranges, lists.sampled_ranges, lists.sampled_columns, lists.slots),
    )


def count_and_list(pairs: Pairs, counts: Tensor) -> None:
    listed = (None, None) if pairs.lists is None else (pairs.lists.ranges, pairs.lists.columns)
    _kernels.contrastive_count_and_list(
        *(*_masks(pairs), pairs.anchors, pairs.group, pairs.first, pairs.state, counts, *listed)
    )


def weigh(
    pairs: Pairs, counts: Tensor, specific_weight: Tensor, variant: str, reweight: bool, keep_specific_only: bool
) -> None:
    weight = specific_weight.to(torch.float32)
    weighting = (variant == "joint", reweight, keep_specific_only)
    _kernels.contrastive_weigh(counts, weight, pairs.group, *weighting, pairs.weights, pairs.state)


def greatest_square(z: Tensor) -> Tensor:
    greatest = z.new_zeros((), dtype=torch.float32)
    _kernels.contrastive_greatest_square(z, greatest)
    return greatest


def blocks_parts(z: Tensor, pairs: Pairs, within: bool) -> int:
    rows = len(pairs.positives)
    parts: int = _kernels.contrastive_blocks_parts(pairs.anchors, pairs.group, within, pairs.first, rows)
    return parts


def _masks(pairs: Pairs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return pairs.positives, pairs.specific, pairs.negatives


def _blocks(pairs: Pairs, within: bool) -> tuple[Any, ...]:
    return *_masks(pairs), pairs.state, pairs.group, pairs.first, within, pairs.lists is not None


def blocks_forward(z: Tensor, pairs: Pairs, within: bool, scale: float, square: Tensor, parts: Tensor) -> None:
    _kernels.contrastive_blocks_forward(z, *_blocks(pairs, within), scale, square, parts)


def sampled_forward(z: Tensor, pairs: Pairs, scale: float, log_sums: Tensor) -> None:
    lists = pairs.required_lists
    listed = (lists.sampled_ranges, lists.sampled_columns)
    _kernels.contrastive_sampled_forward(z, pairs.group, *listed, pairs.state, scale, log_sums)


def rows_forward(
    z: Tensor,
    pairs: Pairs,
    scale: float,
    loss_scale: float,
    square: Tensor,
    parts: Tensor,
    within: Tensor | None,
    log_sums: Tensor | None,
    rows: Tensor,
) -> Tensor:
    losses = parts.new_empty(_kernels.contrastive_rows_parts(len(z)))
    listed = (None, None) if pairs.lists is None else (pairs.lists.ranges, pairs.lists.columns)
    _kernels.contrastive_rows_forward(
        *(z, *_masks(pairs), pairs.group, pairs.weights, pairs.state, *listed),
        *(scale, loss_scale, square, parts, within, log_sums, rows, losses),
    )
    return losses


def scale_rows(
    rows: Tensor, grad_losses: Tensor, temperature: float, reach: Reach | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    numbers, shifts, factors = torch.empty_like(rows), torch.empty_like(grad_losses), torch.empty_like(grad_losses)
    greatest = rows[..., 1:].amax()
    if reach is not None:
        greatest.addcmul_(greatest, reach[0], value=reach[1])
    measures = (greatest, *rows[..., 0].aminmax(dim=1))
    constants = (temperature, routes.GREATEST_G, routes.MOST_APART)
    _kernels.contrastive_scale_rows(rows, *measures, grad_losses, *constants, numbers, shifts, factors)
    return numbers, shifts, factors


def blocks_backward(
    z: Tensor,
    pairs: Pairs,
    within: bool,
    symmetric: bool,
    scale: float,
    numbers: Tensor,
    shift: Tensor,
    factor: Tensor,
    sums: Tensor,
) -> None:
    of_rows = (numbers, shift, factor, sums)
    transposed = pairs.transposed or (None, None)
    _kernels.contrastive_blocks_backward(z, *_blocks(pairs, within), symmetric, *transposed, scale, *of_rows)


def staged_rows(z: Tensor, group: int) -> int:
    rows: int = _kernels.contrastive_staged_rows(z, group)
    return rows


def sampled_backward(
    z: Tensor, pairs: Pairs, stage: int, scale: float, numbers: Tensor, sums: Tensor, staged: Tensor
) -> None:
    lists, columns = pairs.required_lists, pairs.columns_of(stage)
    listed = (lists.sampled_ranges, lists.sampled_columns, lists.slots)
    _kernels.contrastive_sampled_backward(z, pairs.group, *listed, pairs.state, *columns, scale, numbers, sums, staged)


def rows_backward(
    z: Tensor,
    pairs: Pairs,
    stage: int | None,
    scale: float,
    numbers: Tensor,
    sums: Tensor,
    staged: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    lists = pairs.required_lists
    listed = (lists.ranges, lists.columns, lists.slot_ranges)
    _kernels.contrastive_rows_backward(
        *(z, *_masks(pairs), pairs.group, pairs.state, *listed, *pairs.columns_of(stage)),
        *(scale, numbers, sums, staged, factor, out),
    )


_this = sys.modules[__name__]
prepare = functools.partial(routes.prepare, _this)
forward = functools.partial(routes.forward, _this)
backward = functools.partial(routes.backward, _this)
