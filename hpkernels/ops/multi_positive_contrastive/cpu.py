"""CPU kernels of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

Pairs are covered by blocks, whose logits are matrix products, or one by one where they are sampled or positives. Three
routes give the same result, and the one with the least work is taken: "pairs", pairs alone; "images", a block for each
image, which holds most positives, and pairs across images; "blocks", blocks of all pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.cost import contrastive_route
from hpkernels.ops import _checks as check
from hpkernels.ops._blocks import blocks
from hpkernels.ops.hidden_positives.bits import as_bits, words_per_row
from hpkernels.ops.multi_positive_contrastive.reference import loss_of_statistics, prepare, stacked

__all__ = ["backward", "forward", "prepare", "supports"]

_SIDE = 1024  # anchors of a block at the most: whole images, or a part of one


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
    anchors = len(branches[0])
    if specific_weight == 0:
        specific = None  # it adds nothing, and must not have a say in the route
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    relations = (*_contiguous(positives, specific), drawn)
    kernels, route = torch.ops.hpkernels_cpu, choose_route(*relations)
    results = []
    for z in branches:
        vectors = z.detach().to(accumulate).contiguous()
        sums, counts = vectors.new_zeros((3, anchors)), vectors.new_zeros((2, anchors), dtype=torch.int64)
        sums[0] = -torch.inf
        for block, columns, products, mirrored in _blocks(vectors, route, anchors_per_image):
            tiles = [(block.start, columns.start, products)]
            if mirrored:
                tiles.append((columns.start, block.start, products.T.clone(memory_format=torch.contiguous_format)))
            for row, column, tile in tiles:
                kernels.contrastive_block_forward(tile, row, column, 1 / temperature, *relations, sums, counts)
        if route != "blocks":
            kernels.contrastive_pairs_forward(vectors, route == "images", 1 / temperature, *relations, sums, counts)
        loss, statistics = loss_of_statistics(  # type: ignore[call-arg]  # the rows' number is not known
            sums[0],
            *counts.to(accumulate),
            *sums[1:],
            specific_weight,
            anchors_per_image=anchors_per_image,
            scale=scale,
            variant=variant,
            reweight=reweight,
            keep_specific_only=keep_specific_only,
        )
        results.append((loss + (vectors * 0).sum(), statistics))  # of 0, or of NaN if z is not finite
    return stacked(results)


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
    anchors = len(branches[0])
    if not rows[..., 3].any():  # as in forward
        specific = None
    positives, specific = _contiguous(positives, specific)
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    positives_t = positives if symmetric else _transposed(positives, anchors)
    specific_t = specific if symmetric or specific is None else _transposed(specific, anchors)
    relations = (positives, positives_t, specific, specific_t, drawn)
    kernels, route = torch.ops.hpkernels_cpu, choose_route(positives, specific, drawn)
    drawn_t = None if route == "pairs" else _transposed(drawn, anchors)
    grads = []
    for grad_loss, z, statistics in zip(grad_losses, branches, rows.mT.contiguous(), strict=True):
        vectors = z.detach().to(rows.dtype).contiguous()
        grad_z = torch.zeros_like(vectors)
        for block, columns, products, mirrored in _blocks(vectors, route, anchors_per_image):
            at = (block.start, columns.start)
            kernels.contrastive_block_backward(products, *at, 1 / temperature, *relations, drawn_t, statistics)
            kernels.multiply(products, vectors[columns], grad_z[block], True)
            if mirrored:
                kernels.multiply(products.T, vectors[block], grad_z[columns], True)
        if route != "blocks":
            across = route == "images"
            kernels.contrastive_pairs_backward(vectors, across, 1 / temperature, *relations, statistics, grad_z)
        grads.append((grad_z * grad_loss).to(z.dtype))
    return grads


def _negative_bits(negatives: Tensor | None, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """R bit-packed, (G, ceil(N / 32)) int32."""
    return _drawn(int(seed), rows, columns, rate) if negatives is None else as_bits(negatives)


@functools.lru_cache(maxsize=1)  # forward and backward of a step draw the same
def _drawn(seed: int, rows: int, columns: int, rate: float) -> Tensor:
    bits = torch.empty((rows, words_per_row(columns)), dtype=torch.int32, device="cpu")
    torch.ops.hpkernels_cpu.draw_negatives(seed, columns, rate, bits)
    return bits


def _contiguous(positives: Tensor, specific: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return positives.contiguous(), None if specific is None else specific.contiguous()


def _transposed(bits: Tensor, columns: int) -> Tensor:
    transposed = bits.new_empty((columns, words_per_row(len(bits))))
    torch.ops.hpkernels_cpu.transpose_bits(bits, columns, transposed)
    return transposed


def choose_route(positives: Tensor, specific: Tensor | None, negatives: Tensor) -> str:
    """The route with the least work: "pairs", "images" or "blocks"."""
    counts = torch.ops.hpkernels_cpu.contrastive_count_pairs(positives, specific, negatives)
    return contrastive_route(len(positives), len(negatives), *counts)


def _blocks(z: Tensor, route: str, anchors_per_image: int) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """The blocks of a route: rows, columns, products, and whether the block stands for its mirror image as well.

    Each block is overwritten by the next. Columns are whole images, or a part of one.
    """
    if route == "pairs":
        return
    kernels, images = torch.ops.hpkernels_cpu, blocks(slice(0, len(z)), anchors_per_image)
    buffer = z.new_empty(min(len(z), _SIDE) ** 2)
    for scope in images if route == "images" else [slice(0, len(z))]:
        parts = _parts(scope, anchors_per_image)
        for last, columns in enumerate(parts):
            for part in parts[: last + 1]:
                shape = (part.stop - part.start, columns.stop - columns.start)
                products = buffer[: shape[0] * shape[1]].view(shape)
                if part == columns:
                    kernels.square_products(z[part], products)
                else:
                    kernels.multiply(z[part], z[columns].T, products, False)
                yield part, columns, products, part != columns


def _parts(scope: slice, anchors_per_image: int) -> list[slice]:
    """Some images cut into parts of up to `_SIDE` anchors."""
    if anchors_per_image <= _SIDE:
        return blocks(scope, _SIDE // anchors_per_image * anchors_per_image)
    pieces = -(-anchors_per_image // _SIDE)
    size = -(-anchors_per_image // pieces)
    return [part for image in blocks(scope, anchors_per_image) for part in blocks(image, size)]
