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
from hpkernels.ops._bits import as_bits, words_per_row
from hpkernels.ops._blocks import blocks
from hpkernels.ops.multi_positive_contrastive import reference
from hpkernels.ops.multi_positive_contrastive.reference import images_of, loss_of_statistics, stacked
from hpkernels.ops.multi_positive_contrastive.relations import Transposed

__all__ = ["backward", "forward", "images_of", "prepare", "supports"]

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
    images: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The losses (branches,) and row statistics (branches, R, 4), for bit-packed positives (R, ceil(N / 32))."""
    (accumulate,) = check.accumulation(branches[0].dtype)
    anchors, own = len(branches[0]), slice(first, first + len(positives))
    if specific_weight == 0:
        specific = None  # it adds nothing, and must not have a say in the route
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    relations = (anchors, first, *_contiguous(positives, specific), drawn)
    kernels, route = torch.ops.hpkernels_cpu, choose_route(*relations[2:], anchors, first)
    results = []
    for z in branches:
        vectors = z.detach().to(accumulate).contiguous()
        sums, counts = (
            vectors.new_zeros((3, len(positives))),
            positives.new_zeros((2, len(positives)), dtype=torch.int64),
        )
        sums[0] = -torch.inf
        for block, columns, products, mirrored in _blocks(vectors, own, route, anchors_per_image):
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
            images=images,
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
    transposed: Transposed | None = None,
    first: int = 0,
) -> list[Tensor]:
    """The gradients of the branches from their row statistics; logits and negatives are computed again.

    Which rows and statistics are given, and which gradients returned, is as in the reference.
    """
    anchors, own = len(branches[0]), slice(first, first + len(positives))
    if not rows[..., 3].any():  # as in forward
        specific = None
    positives, specific = _contiguous(positives, specific)
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    if symmetric:
        positives_t, specific_t = positives, specific
    elif transposed is not None:
        positives_t, specific_t = _contiguous(*transposed)
    else:
        positives_t = _transposed(positives, anchors)
        specific_t = None if specific is None else _transposed(specific, anchors)
    specific_t = None if specific is None else specific_t
    relations = (anchors, first, positives, positives_t, specific, specific_t, drawn)
    kernels, route = torch.ops.hpkernels_cpu, choose_route(positives, specific, drawn, anchors, first)
    drawn_t = None if route == "pairs" else _transposed(drawn, anchors)
    grads = []
    for grad_loss, z, statistics in zip(grad_losses, branches, rows.mT.contiguous(), strict=True):
        vectors = z.detach().to(rows.dtype).contiguous()
        grad_z = vectors.new_zeros((len(positives), vectors.shape[1]))
        for block, columns, products, mirrored in _blocks(vectors, own, route, anchors_per_image):
            at = (block.start, columns.start)
            kernels.contrastive_block_backward(products, *at, 1 / temperature, *relations, drawn_t, statistics)
            kernels.multiply(products, vectors[columns], grad_z[_shifted(block, -first)], True)
            if mirrored:
                kernels.multiply(products.T, vectors[block], grad_z[_shifted(columns, -first)], True)
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


prepare = functools.partial(reference.prepare, bits_of=_negative_bits)


def _contiguous(positives: Tensor, specific: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return positives.contiguous(), None if specific is None else specific.contiguous()


def _transposed(bits: Tensor, columns: int) -> Tensor:
    transposed = bits.new_empty((columns, words_per_row(len(bits))))
    torch.ops.hpkernels_cpu.transpose_bits(bits, columns, transposed)
    return transposed


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def choose_route(
    positives: Tensor, specific: Tensor | None, negatives: Tensor, anchors: int | None = None, first: int = 0
) -> str:
    """The route with the least work: "pairs", "images" or "blocks"; of a part of N `anchors` as if all were so."""
    rows = len(positives)
    anchors = rows if anchors is None else anchors
    counts = torch.ops.hpkernels_cpu.contrastive_count_pairs(anchors, first, positives, specific, negatives)
    return contrastive_route(anchors, len(negatives), *(count * anchors / rows for count in counts))


def _blocks(z: Tensor, own: slice, route: str, anchors_per_image: int) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """The blocks of a route: rows, columns, products, and whether the block stands for its mirror image as well.

    Each block is overwritten by the next. Rows are among those of `own`; columns are whole images, or a part of one.
    """
    if route == "pairs":
        return
    kernels, images = torch.ops.hpkernels_cpu, blocks(own, anchors_per_image)
    buffer = z.new_empty(min(len(z), _SIDE) ** 2)

    def block(rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        products = buffer[: shape[0] * shape[1]].view(shape)
        if rows == columns:
            kernels.square_products(z[rows], products)
        else:
            kernels.multiply(z[rows], z[columns].T, products, False)
        return products

    for scope in images if route == "images" else [own]:
        parts = _parts(scope, anchors_per_image)
        for last, columns in enumerate(parts):
            for part in parts[: last + 1]:
                yield part, columns, block(part, columns), part != columns
    if route == "blocks":
        for others in (slice(0, own.start), slice(own.stop, len(z))):
            for columns in _parts(others, anchors_per_image):
                for part in _parts(own, anchors_per_image):
                    yield part, columns, block(part, columns), False


def _parts(scope: slice, anchors_per_image: int) -> list[slice]:
    """Some images cut into parts of up to `_SIDE` anchors."""
    if anchors_per_image <= _SIDE:
        return blocks(scope, _SIDE // anchors_per_image * anchors_per_image)
    pieces = -(-anchors_per_image // _SIDE)
    size = -(-anchors_per_image // pieces)
    return [part for image in blocks(scope, anchors_per_image) for part in blocks(image, size)]
