"""The Triton backend of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

``routes.py`` says in which order the kernels run; here is how each is launched. Its functions are ``routes.Kernels``.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
import triton
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._bits import words_per_row
from hpkernels.ops._triton import supports
from hpkernels.ops.multi_positive_contrastive import routes
from hpkernels.ops.multi_positive_contrastive.routes import Pairs, Reach, images_of
from hpkernels.ops.multi_positive_contrastive.triton_anchors import (
    contrastive_scale_kernel,
    contrastive_square_kernel,
    contrastive_weigh_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_blocks import (
    contrastive_blocks_bwd_kernel,
    contrastive_blocks_fwd_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_pairs import (
    draw_negatives_kernel,
    list_negatives_kernel,
    list_positives_kernel,
    transpose_negatives_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_rows import (
    contrastive_rows_bwd_kernel,
    contrastive_rows_fwd_kernel,
)
from hpkernels.ops.multi_positive_contrastive.triton_sampled import (
    sampled_columns_bwd_kernel,
    sampled_rows_bwd_kernel,
    sampled_rows_fwd_kernel,
)

__all__ = ["aligned_rows", "backward", "forward", "images_of", "prepare", "supports"]

_PROGRAMS = 512  # that columns are split to reach where there are few rows


def aligned_rows(matrix: Tensor) -> Tensor:
    """A contiguous matrix (R, D) with D a multiple of 16."""
    return _triton.aligned_rows(matrix).contiguous()


def draw(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    words = words_per_row(columns)
    bits = torch.empty((rows, words), dtype=torch.int32, device=seed.device)
    config = _triton.configuration(draw_negatives_kernel, bits)
    grid = (rows, triton.cdiv(words, config["BLOCK_WORDS"]))
    _triton.launch(draw_negatives_kernel, grid, bits, seed, columns, words, int(rate * 2**32), **config)
    return bits


def list_sampled(pairs: Pairs, slot_capacity: int) -> None:
    lists, negatives = pairs.required_lists, pairs.negatives
    anchors, (positions, words) = len(pairs.weights), negatives.shape
    transposed = negatives.new_empty((2, anchors, words_per_row(positions)))
    config = _triton.configuration(transpose_negatives_kernel, negatives)
    _triton.launch(
        transpose_negatives_kernel,
        (pairs.stages, triton.cdiv(pairs.stage_columns, config["BLOCK_COLUMNS"])),
        *(negatives, *transposed, lists.slot_ranges, pairs.state, positions, anchors, words, transposed.shape[2]),
        *(pairs.stage_columns, slot_capacity),
        **config,
    )
    _triton.launch(
        list_negatives_kernel,
        (positions,),
        *(negatives, *transposed, lists.slot_ranges, lists.sampled_ranges, lists.sampled_columns, lists.slots),
        *(pairs.state, words, transposed.shape[2], len(lists.slots), _longest_list(pairs)),
        **_triton.configuration(list_negatives_kernel, negatives),
    )


def count_and_list(pairs: Pairs, counts: Tensor) -> None:
    rows, words = pairs.positives.shape
    ranges, columns = pairs.lists[:2] if pairs.lists is not None else (pairs.state, counts)
    _triton.launch(
        list_positives_kernel,
        (rows,),
        *(*_masks(pairs), counts, ranges, columns, pairs.state, pairs.anchors, words, pairs.group, pairs.first),
        len(columns),
        HAS_SPECIFIC=pairs.specific is not None,
        SAMPLED=pairs.negatives is not None,
        LISTED=pairs.lists is not None,
        **_part(pairs),
        **_triton.configuration(list_positives_kernel, counts),
    )


def weigh(
    pairs: Pairs, counts: Tensor, specific_weight: Tensor, variant: str, reweight: bool, keep_specific_only: bool
) -> None:
    _triton.launch(
        contrastive_weigh_kernel,
        (len(counts) // pairs.group,),
        *(counts, specific_weight, pairs.weights, pairs.state, pairs.group),
        JOINT=variant == "joint",
        REWEIGHT=reweight,
        KEEP_SPECIFIC_ONLY=keep_specific_only,
        **_triton.configuration(contrastive_weigh_kernel, counts),
    )


def greatest_square(z: Tensor) -> Tensor:
    square = z.new_zeros((), dtype=torch.int32)
    config = _triton.configuration(contrastive_square_kernel, z)
    grid = (triton.cdiv(len(z), config["BLOCK_ROWS"]),)
    _triton.launch(contrastive_square_kernel, grid, z, square, *z.shape, **config)
    return square.view(torch.float32)


def blocks_parts(z: Tensor, pairs: Pairs, within: bool) -> int:
    config = _products(contrastive_blocks_fwd_kernel, z)
    tiles = triton.cdiv(pairs.group + 31 if within else len(z), config["BLOCK_COLUMNS"])
    return min(tiles, triton.cdiv(_PROGRAMS, _row_blocks(pairs, config["BLOCK_ROWS"], within)))


def blocks_forward(z: Tensor, pairs: Pairs, within: bool, scale: float, square: Tensor, parts: Tensor) -> None:
    config = _products(contrastive_blocks_fwd_kernel, z)
    _triton.launch(
        contrastive_blocks_fwd_kernel,
        (_row_blocks(pairs, config["BLOCK_ROWS"], within), len(parts)),
        *(z, *_masks(pairs), pairs.state, square, parts, scale, *_sizes(z), pairs.positives.shape[1], pairs.group),
        *(pairs.first, len(pairs.positives)),
        **_block_constants(z, pairs, within),
        **_part(pairs),
        **config,
    )


def sampled_forward(z: Tensor, pairs: Pairs, scale: float, log_sums: Tensor) -> None:
    lists = pairs.required_lists
    config = _products(sampled_rows_fwd_kernel, z)
    _triton.launch(
        sampled_rows_fwd_kernel,
        (pairs.group, triton.cdiv(len(z) // pairs.group, config["BLOCK_ROWS"])),
        *(z, lists.sampled_columns, lists.sampled_ranges, pairs.state, log_sums, scale, *_sizes(z), pairs.group),
        PRECISION=_triton.precision(z),
        **config,
    )


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
    losses = parts.new_empty(len(z))
    ranges, columns = pairs.lists[:2] if pairs.lists is not None else (pairs.state, pairs.positives)
    given = (parts, parts if within is None else within, parts if log_sums is None else log_sums)
    _triton.launch(
        contrastive_rows_fwd_kernel,
        (len(z),),
        *(z, *_masks(pairs), columns, ranges, pairs.state, pairs.weights, square, *given, rows, losses),
        *(scale, loss_scale, *_sizes(z), pairs.positives.shape[1], pairs.group, len(given[0]), len(given[1])),
        HAS_SPECIFIC=pairs.specific is not None,
        LISTED=pairs.lists is not None,
        **_whole_rows(contrastive_rows_fwd_kernel, z),
    )
    return losses


def scale_rows(
    rows: Tensor, grad_losses: Tensor, temperature: float, reach: Reach | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    branches, anchors, _ = rows.shape
    least, greatest = rows.aminmax(dim=1)
    if reach is not None:
        greatest[:, 1:].addcmul_(greatest[:, 1:], reach[0], value=reach[1])
    numbers, (shifts, factors) = torch.empty_like(rows), rows.new_empty((2, branches))
    config = _triton.configuration(contrastive_scale_kernel, rows)
    _triton.launch(
        contrastive_scale_kernel,
        (triton.cdiv(anchors, config["BLOCK_ANCHORS"]), branches),
        *(rows, least, greatest, grad_losses, numbers, shifts, factors, anchors, 1 / temperature),
        *(routes.MOST_APART, routes.GREATEST_G / 4),
        BRANCHES=branches,
        **config,
    )
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
    config = _products(contrastive_blocks_bwd_kernel, z)
    blocks = _row_blocks(pairs, config["BLOCK_ROWS"], within)
    positives_t, specific_t = pairs.transposed or (pairs.positives, pairs.specific)
    specific_t = positives_t if specific_t is None else specific_t
    _triton.launch(
        contrastive_blocks_bwd_kernel,
        (blocks, triton.cdiv(sums.shape[1], config["BLOCK_GRAD"])),
        *(z, *_masks(pairs), positives_t, specific_t, pairs.state, numbers, shift, factor, sums, scale, *_sizes(z)),
        *(sums.shape[1], pairs.positives.shape[1], positives_t.shape[1], pairs.group),
        *(pairs.first, len(pairs.positives)),
        SYMMETRIC=symmetric,
        **_block_constants(z, pairs, within),
        **_part(pairs),
        **config,
    )


def staged_rows(z: Tensor, group: int) -> int:
    return 1


def sampled_backward(
    z: Tensor, pairs: Pairs, stage: int, scale: float, numbers: Tensor, sums: Tensor, staged: Tensor
) -> None:
    lists = pairs.required_lists
    images = len(z) // pairs.group
    piece = (*_sizes(z), pairs.group, *pairs.columns_of(stage))
    constants = {"PIECE": pairs.stages > 1, "PRECISION": _triton.precision(z)}
    config = _products(sampled_rows_bwd_kernel, z)
    _triton.launch(
        sampled_rows_bwd_kernel,
        (pairs.group, triton.cdiv(images, config["BLOCK_ROWS"]), triton.cdiv(z.shape[1], config["BLOCK_GRAD"])),
        *(z, lists.sampled_columns, lists.sampled_ranges, pairs.state, numbers, sums, scale, *piece),
        **constants,
        **config,
    )
    config = _products(sampled_columns_bwd_kernel, z)
    longest = min(_longest_list(pairs), pairs.stage_columns)
    _triton.launch(
        sampled_columns_bwd_kernel,
        (pairs.group, triton.cdiv(longest, config["BLOCK_COLUMNS"]), triton.cdiv(z.shape[1], config["BLOCK_GRAD"])),
        *(z, lists.sampled_columns, lists.slots, lists.sampled_ranges, pairs.state, numbers, staged, scale, *piece),
        **constants,
        **config,
    )


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
    lists, (first, last) = pairs.required_lists, pairs.columns_of(stage)
    given = (sums if staged is None else staged, sums if factor is None else factor)
    _triton.launch(
        contrastive_rows_bwd_kernel,
        (last - first,),
        *(z, *_masks(pairs), lists.columns, lists.ranges, lists.slot_ranges, pairs.state, numbers, *given, sums, out),
        *(scale, z.shape[1], out.shape[1], pairs.positives.shape[1], pairs.group, first),
        GATHERED=staged is not None,
        LAST=factor is not None,
        HAS_SPECIFIC=pairs.specific is not None,
        **_whole_rows(contrastive_rows_bwd_kernel, z),
    )


def _longest_list(pairs: Pairs) -> int:
    """Of a position, above what is expected of it as in ``routes.sampled_capacity``."""
    expected = len(pairs.required_lists.slots) / pairs.group
    return math.ceil(expected + 10 * math.sqrt(expected) + 64)


def _masks(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """A, S and R bit-packed; A again for what is missing, for the kernels do not read it then."""
    specific, negatives = (pairs.positives if mask is None else mask for mask in (pairs.specific, pairs.negatives))
    return pairs.positives, specific, negatives


def _sizes(z: Tensor) -> tuple[int, int]:
    """N and D."""
    return len(z), z.shape[1]


def _block_constants(z: Tensor, pairs: Pairs, within: bool) -> dict[str, Any]:
    return {
        "WITHIN": within,
        "HAS_SPECIFIC": pairs.specific is not None,
        "SAMPLED": pairs.negatives is not None,
        "PRECISION": _triton.precision(z),
    }


def _part(pairs: Pairs) -> dict[str, bool]:
    """PART for a part of the anchors: the kernels of all anchors are compiled without."""
    return {"PART": True} if len(pairs.positives) < pairs.anchors else {}


def _row_blocks(pairs: Pairs, rows: int, within: bool) -> int:
    if within:
        return pairs.anchors // pairs.group * triton.cdiv(pairs.group + 31, rows)
    return triton.cdiv(pairs.first % 32 + len(pairs.positives), rows)


def _products(kernel: Any, z: Tensor) -> dict[str, Any]:
    """The configuration of a kernel of products, for rows of z: WHOLE if a program holds all of their features."""
    config = _triton.configuration(kernel, z)
    config["BLOCK_GRAD"] = min(config["BLOCK_GRAD"], triton.next_power_of_2(z.shape[1]))
    return config | {"WHOLE": config["BLOCK_GRAD"] >= z.shape[1]}


def _whole_rows(kernel: Any, z: Tensor) -> dict[str, Any]:
    """The configuration of a kernel that keeps whole rows in registers: those of more features have more warps."""
    config = _triton.configuration(kernel, z)
    features = triton.next_power_of_2(z.shape[1])
    warps = max(1, min(16, features // config.pop("WARP_D")))
    return config | {"BLOCK_D": features, "num_warps": warps * config["num_warps"]}


_this = sys.modules[__name__]
prepare = functools.partial(routes.prepare, _this)
forward = functools.partial(routes.forward, _this)
backward = functools.partial(routes.backward, _this)
