"""The C++ epilogue of `contrastive`: bits of the pairs of a block, then statistics and g in one read of its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops._bits import words_per_row
from hpkernels.ops.contrastive.problem import Problem, Tile
from hpkernels.ops.contrastive.reference import vectors
from hpkernels.ops.contrastive.relations import Relation

__all__ = ["gradient", "pair_bytes", "pairs", "prepare", "statistics", "supports", "vectors", "whole_rows"]


class _TilePairs(NamedTuple):
    positives: Tensor  # (R, words) int32
    denominator: Tensor  # (R, words) int32
    weights: Tensor | None  # (R, C)


def pair_bytes(problem: Problem) -> int:
    """The product, two bits, and a weight where positives have some."""
    size = problem.scale.element_size()
    return size if problem.positives.weights is None else 2 * size


def prepare(problem: Problem) -> tuple[Relation, Relation]:
    """The relations with the labels of keys by column: (C, K)."""
    positives, excluded = (
        pairs if pairs.key_ids is None else pairs._replace(key_ids=pairs.key_ids.T.contiguous())
        for pairs in (problem.positives, problem.excluded)
    )
    return positives, excluded


def pairs(products: Tensor, tile: Tile, problem: Problem, prepared: tuple[Relation, Relation]) -> _TilePairs:
    """Turn products into logits, and find the pairs."""
    rows, columns = products.shape
    bits = torch.empty((2, rows, words_per_row(columns)), dtype=torch.int32)
    weights = None if problem.positives.weights is None else torch.empty_like(products)
    torch.ops.hpkernels_cpu.contrastive_pairs(
        products, tile.rows.start, tile.columns.start, *_relations(problem, prepared), *bits, weights
    )
    return _TilePairs(bits[0], bits[1], weights)


def statistics(
    logits: Tensor, tile: Tile, problem: Problem, pairs: _TilePairs, rows: Tensor, columns: Tensor | None
) -> None:
    """Add those of a tile to the statistics of its rows (R, 4) and columns (C, 4)."""
    torch.ops.hpkernels_cpu.contrastive_statistics(logits, *pairs, problem.inside, rows, columns)


def gradient(
    logits: Tensor, tile: Tile, problem: Problem, pairs: _TilePairs, rows: Tensor, columns: Tensor | None
) -> Tensor:
    """g (R, C), in the place of the logits."""
    by_number = None if columns is None else columns.T.contiguous()
    torch.ops.hpkernels_cpu.contrastive_gradient(logits, *pairs, problem.inside, rows, by_number)
    return logits


def whole_rows(
    products: Tensor,
    tile: Tile,
    problem: Problem,
    prepared: tuple[Relation, Relation],
    coefficients: Tensor,
    rows: Tensor,
) -> Tensor:
    """The statistics of rows that are complete, and g in the place of the products, while a row is in the cache."""
    torch.ops.hpkernels_cpu.contrastive_whole_rows(
        products, tile.rows.start, *_relations(problem, prepared), problem.inside, coefficients, rows
    )
    return products


def _relations(problem: Problem, prepared: tuple[Relation, Relation]) -> tuple[Any, ...]:
    """What the kernels that find pairs take of the problem."""
    positives, excluded = prepared
    rules = (problem.own, problem.triangle, problem.decoupled, problem.exclude_positives)
    return *positives, *excluded[:-1], len(problem.all_keys), *rules, float(problem.scale), problem.key_bias
