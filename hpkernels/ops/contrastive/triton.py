"""The Triton epilogue of `contrastive`: a kernel each finds statistics of rows, of columns, and g (see ``chunked.py``).

Products are not rewritten as logits: the kernels scale them, add the bias and find which pairs count while they read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._bits import words_of, words_per_row
from hpkernels.ops._triton import supports
from hpkernels.ops.contrastive.problem import Problem, Tile
from hpkernels.ops.contrastive.relations import Relation
from hpkernels.ops.contrastive.triton_pairs import tile_list_kernel
from hpkernels.ops.contrastive.triton_tiles import (
    tile_columns_kernel,
    tile_gradient_kernel,
    tile_parts_kernel,
    tile_rows_kernel,
)

__all__ = ["gradient", "pair_bytes", "pairs", "prepare", "statistics", "supports", "vectors"]


class Ids(NamedTuple):
    """The labels of a relation, low and high halves (C, 2, N) and (C, 2, K) int32, or None.

    Neighbours lie side by side, four to a load like the products, so that threads exchange none. Negative labels are -1
    of anchors and -2 of keys: a pair takes no further comparison.
    """

    anchors: Tensor | None
    keys: Tensor | None


class Words(NamedTuple):
    """Bits (., stride) int32 of a relation; those of a tile begin at a row and a word. None: it has none."""

    words: Tensor | None = None
    stride: int = 0
    row: int = 0
    word: int = 0


class Pairs(NamedTuple):
    """What the kernels find the pairs of a tile in: labels and bits of both relations, weights (R, C) of positives."""

    positive_ids: Ids
    excluded_ids: Ids
    positive_words: Words
    excluded_words: Words
    weights: Tensor | None


def vectors(rows: Tensor) -> Tensor:
    """Anchors or keys as they are, contiguous: products of half precision are summed in float32."""
    return rows.detach().contiguous()


def pair_bytes(problem: Problem) -> int:
    """The product, g where that is of another dtype, and a weight where positives have some."""
    size, of_g = problem.scale.element_size(), problem.anchors.element_size()
    return size + (0 if of_g == size else of_g) + (0 if problem.positives.weights is None else size)


def prepare(problem: Problem) -> tuple[Ids, Ids]:
    """The labels of the positives and of what is excluded."""
    return _ids(problem.positives), _ids(problem.excluded)


def pairs(products: Tensor, tile: Tile, problem: Problem, prepared: tuple[Ids, Ids]) -> Pairs:
    """What tells the pairs of a tile; products stay as they are."""
    weights = None
    if problem.positives.weights is not None:
        weights = _listed(problem.positives, tile, products.new_zeros(tile.shape, dtype=torch.int32), True)
        weights = weights.view(torch.float32)
    words = [_words(relation, tile) for relation in (problem.positives, problem.excluded)]
    return Pairs(*prepared, *words, weights)


def statistics(
    products: Tensor, tile: Tile, problem: Problem, pairs: Pairs, rows: Tensor, columns: Tensor | None
) -> None:
    """Add those of a tile to the statistics of its rows (R, 4) and columns (C, 4)."""
    config = _triton.configuration(tile_rows_kernel, products)
    row_blocks = triton.cdiv(tile.shape[0], config["BLOCK_ROWS"])
    parts = triton.cdiv(tile.shape[1], config["BLOCK_COLUMNS"] * config["STEPS"])
    _along(tile_rows_kernel, config, row_blocks * parts, parts, products, tile, problem, pairs, rows)
    if columns is not None:
        config = _triton.configuration(tile_columns_kernel, products)
        column_blocks = triton.cdiv(tile.shape[1], config["BLOCK_COLUMNS"])
        parts = triton.cdiv(tile.shape[0], config["BLOCK_ROWS"] * config["STEPS"])
        _along(tile_columns_kernel, config, column_blocks * parts, parts, products, tile, problem, pairs, columns)


def gradient(
    products: Tensor, tile: Tile, problem: Problem, pairs: Pairs, rows: Tensor, columns: Tensor | None
) -> Tensor:
    """g (R, C) in the dtype of the vectors, from the numbers of rows (R, 4) and columns (C, 4); float32 in place."""
    dtype = problem.anchors.dtype
    grad = products if dtype == products.dtype else torch.empty_like(products, dtype=dtype)
    config = _triton.configuration(tile_gradient_kernel, grad)
    row_blocks, column_blocks = map(triton.cdiv, tile.shape, (config["BLOCK_ROWS"], config["BLOCK_COLUMNS"]))
    _triton.launch(
        tile_gradient_kernel,
        (row_blocks * column_blocks,),
        *_inputs(products, tile, problem, pairs),
        *(rows.contiguous(), None if columns is None else columns.contiguous(), grad),
        **_constants(problem),
        **config,
    )
    return grad


def _ids(relation: Relation) -> Ids:
    if relation.anchor_ids is None or relation.key_ids is None:
        return Ids(None, None)
    return Ids(_halves(relation.anchor_ids, -1), _halves(relation.key_ids, -2))


def _halves(ids: Tensor, none: int) -> Tensor:
    """Labels (count, C) int64 as (C, 2, count) int32, the negative ones as `none`."""
    return ids.where(ids >= 0, none).view(torch.int32).unflatten(1, (-1, 2)).permute(1, 2, 0).contiguous()


def _words(relation: Relation, tile: Tile) -> Words:
    """The bits of a mask, with those of lists without weights."""
    of_tile = words_of(tile.columns)
    if relation.offsets is None or relation.weights is not None:
        if relation.bits is None:
            return Words()
        return Words(relation.bits, relation.bits.shape[1], tile.rows.start, of_tile.start)
    if relation.bits is None:
        words = relation.offsets.new_zeros((tile.shape[0], words_per_row(tile.shape[1])), dtype=torch.int32)
    else:
        words = relation.bits[tile.rows, of_tile].clone(memory_format=torch.contiguous_format)
    return Words(_listed(relation, tile, words, False), words.shape[1])


def _listed(relation: Relation, tile: Tile, found: Tensor, weighted: bool) -> Tensor:
    """`found` with the listed pairs of a tile, as bits or as weights seen as int32."""
    indices, offsets, weights = relation.indices, relation.offsets, relation.weights
    assert indices is not None and offsets is not None
    _triton.launch(
        tile_list_kernel,
        (tile.shape[0],),
        *(indices, offsets, weights.view(torch.int32) if weighted and weights is not None else None, found),
        *(len(indices), tile.rows.start, tile.columns.start, tile.shape[1], words_per_row(tile.shape[1])),
        **_triton.configuration(tile_list_kernel, indices),
    )
    return found


def _along(
    kernel: Any,
    config: dict[str, int],
    programs: int,
    part_count: int,
    products: Tensor,
    tile: Tile,
    problem: Problem,
    pairs: Pairs,
    statistics: Tensor,
) -> None:
    """Add what a kernel finds along rows or columns, in parts, to their statistics (length, 4)."""
    length = len(statistics)
    parts = products.new_empty((4, part_count, length))
    inputs = _inputs(products, tile, problem, pairs)
    _triton.launch(kernel, (programs,), *inputs, parts, part_count, **_constants(problem), **config)
    config = _triton.configuration(tile_parts_kernel, parts)
    grid = (triton.cdiv(length, config["BLOCK_LENGTH"]),)
    _triton.launch(tile_parts_kernel, grid, parts, statistics, part_count, length, INSIDE=problem.inside, **config)


def _inputs(products: Tensor, tile: Tile, problem: Problem, pairs: Pairs) -> tuple[Any, ...]:
    """What the kernels that read products take first."""
    return (
        *(products, problem.scale, problem.key_bias, pairs.weights),
        *_relation(pairs.positive_ids, pairs.positive_words),
        *_relation(pairs.excluded_ids, pairs.excluded_words),
        *(*tile.shape, tile.rows.start, tile.columns.start, len(problem.anchors), len(problem.all_keys), problem.own),
    )


def _relation(ids: Ids, words: Words) -> tuple[Any, ...]:
    return *ids, 0 if ids.anchors is None else len(ids.anchors), *words


def _constants(problem: Problem) -> dict[str, bool]:
    return {
        "OWN": problem.own >= 0,
        "TRIANGLE": problem.triangle,
        "DECOUPLED": problem.decoupled,
        "EXCLUDE_POSITIVES": problem.exclude_positives,
        "INSIDE": problem.inside,
    }
