"""The route that all backends of `contrastive` share: blocks of anchors, whose logits are a product of the library.

Of a block of anchors and all keys, S = A K^T is computed in the accumulation's dtype. An epilogue turns it into
statistics of its rows (and columns), and then into g (see ``reference.py``), which two products take back to anchors
and keys. So no more than a block is in memory, and D has no limit. The epilogues are plain PyTorch (``reference.py``),
C++ (``cpu.py``) and Triton (``triton.py``).

The loss of the anchors alone, reduced to a number, needs one pass: the statistics of a row are complete within its
block, and its gradient is that of the loss but for one factor, which is known in the end. So S is computed once,
forward, and backward multiplies what is kept by a number. Both directions, and losses one by one, take two passes. So
do symmetric relations of anchors that are their own keys, but both passes compute pairs i < j alone, in both directions
at once: two thirds of the arithmetic of one pass over all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hpkernels.cost import CHUNK_BYTES_ON_CPU, CHUNK_BYTES_ON_GPU
from hpkernels.ops._blocks import blocks
from hpkernels.ops.contrastive.problem import Problem, Tile

_FEW_ROWS, _MORE = 256, 4
"""Products with fewer rows wait for memory: they may have so many times the workspace."""
_GREATEST_G = 2.0**14
"""What g may be, of the 65504 of float16, in which small coefficients would lose their digits."""


class Epilogue(Protocol):
    """What a backend does with products. Statistics and numbers are those of ``reference.py``.

    It may also have ``whole_rows(products, tile, problem, prepared, coefficients, rows) -> g``: all of it in one go for
    rows that are complete and have no statistics yet, which fills `rows` (R, 4), for anchors whose losses count
    `coefficients` (R,) each.
    """

    def vectors(self, rows: Tensor) -> Tensor:
        """Anchors or keys as they are multiplied: contiguous, of a dtype that products are exact enough in."""

    def pair_bytes(self, problem: Problem) -> int:
        """What a pair of a block takes, its product included."""

    def prepare(self, problem: Problem) -> Any:
        """What is found of the relations once, for all tiles."""

    def pairs(self, products: Tensor, tile: Tile, problem: Problem, prepared: Any) -> Any:
        """What the other two need to know of the pairs of a tile. Products (R, C) become logits, or do so in them."""

    def statistics(
        self, logits: Tensor, tile: Tile, problem: Problem, pairs: Any, rows: Tensor, columns: Tensor | None
    ) -> None:
        """Add those of a tile to the statistics of its rows (R, 4) and columns (C, 4)."""

    def gradient(
        self, logits: Tensor, tile: Tile, problem: Problem, pairs: Any, rows: Tensor, columns: Tensor | None
    ) -> Tensor:
        """g (R, C) in the dtype of the vectors, from the numbers of rows (R, 4) and columns (C, 4). May be `logits`."""


class Needs(NamedTuple):
    """Which gradients are asked for."""

    anchors: bool
    keys: bool
    temperature: bool
    key_bias: bool


class Gradients(NamedTuple):
    """Of anchors (N, D), keys (K, D), temperature () and key_bias (K,), in the accumulation's dtype, or None."""

    anchors: Tensor | None
    keys: Tensor | None
    temperature: Tensor | None
    key_bias: Tensor | None


def statistics(kernels: Epilogue, problem: Problem, both: bool) -> tuple[Tensor, Tensor | None]:
    """The statistics of all anchors (N, 4), and with `both` of all keys (K, 4)."""
    rows = empty_statistics(problem, len(problem.anchors))
    columns = empty_statistics(problem, len(problem.all_keys)) if both else None
    prepared = kernels.prepare(problem)
    of_columns = rows if problem.triangle else columns
    for tile, logits in _products(kernels, problem):
        pairs = kernels.pairs(logits, tile, problem, prepared)
        mirrored = None if of_columns is None else of_columns[tile.columns]
        kernels.statistics(logits, tile, problem, pairs, rows[tile.rows], mirrored)
    return rows, columns


def empty_statistics(problem: Problem, count: int) -> Tensor:
    """Those of no pairs, (count, 4)."""
    none = [-torch.inf, -torch.inf if problem.inside else 0.0, 0.0, 0.0]
    of_columns = [problem.scale.new_full((count,), value) for value in none]
    return torch.stack(of_columns, dim=1)


def merged(first: Tensor, second: Tensor, inside: bool) -> Tensor:
    """The statistics (N, 4) of anchors with two sets of keys, from those with either."""
    add_pulls = torch.logaddexp if inside else torch.add
    log_denominator = torch.logaddexp(first[:, 0], second[:, 0])
    pull = add_pulls(first[:, 1], second[:, 1])
    return torch.stack((log_denominator, pull, first[:, 2] + second[:, 2], first[:, 3] + second[:, 3]), dim=1)


def one_pass(kernels: Epilogue, problem: Problem, weight: Tensor | None, needs: Needs) -> tuple[Tensor, Gradients]:
    """The statistics (N, 4), and the gradients of ``sum_i weight_i L_i``."""
    rows = empty_statistics(problem, len(problem.anchors))
    prepared, sums = kernels.prepare(problem), _Sums(kernels, problem, needs)
    coefficients = rows.new_ones(len(rows)) if weight is None else weight
    whole_rows = getattr(kernels, "whole_rows", None)
    for tile, products in _products(kernels, problem):
        if whole_rows is not None:
            g = whole_rows(products, tile, problem, prepared, coefficients[tile.rows], rows[tile.rows])
            sums.add(tile, g)
            continue
        pairs = kernels.pairs(products, tile, problem, prepared)
        kernels.statistics(products, tile, problem, pairs, rows[tile.rows], None)
        numbers = numbers_of(rows[tile.rows], coefficients[tile.rows], problem.inside)
        sums.add(tile, sums.gradient(products, tile, pairs, numbers, None, coefficients.amax()))
    return rows, sums.gradients()


def two_pass(kernels: Epilogue, problem: Problem, rows: Tensor, columns: Tensor | None, needs: Needs) -> Gradients:
    """The gradients from the numbers of all anchors (N, 4) and, of the other direction, of all keys (K, 4)."""
    prepared, sums = kernels.prepare(problem), _Sums(kernels, problem, needs)
    of_columns = rows if problem.triangle else columns
    # Of each direction |g| is at most the push.
    greatest = rows[:, 1].abs().amax()
    if of_columns is not None:
        greatest = greatest + of_columns[:, 1].abs().amax()
    for tile, logits in _products(kernels, problem):
        pairs = kernels.pairs(logits, tile, problem, prepared)
        mirrored = None if of_columns is None else of_columns[tile.columns]
        sums.add(tile, sums.gradient(logits, tile, pairs, rows[tile.rows], mirrored, greatest))
    return sums.gradients()


def nothing_of(vectors: Tensor) -> Tensor:
    """0, or NaN if a number is not finite: without a sum, which may overflow where no product does."""
    least, greatest = torch.aminmax(vectors.detach())
    return (least - least) + (greatest - greatest)


def kept(statistics: Tensor) -> Tensor:
    """Which anchors have positives and a denominator, (N,) bool; True for those whose logits are NaN."""
    return (statistics[:, 2] > 0) & (statistics[:, 0] != -torch.inf)


def losses_of(statistics: Tensor, inside: bool) -> Tensor:
    """L (N,), 0 for what is not kept."""
    log_denominator, pull, mass, _ = statistics.unbind(dim=1)
    mean = pull - mass.log() if inside else pull / mass
    return (log_denominator - mean).where(kept(statistics), 0)


def numbers_of(statistics: Tensor, coefficients: Tensor, inside: bool) -> Tensor:
    """shift, push, pull_shift and pull (N, 4) of anchors whose losses count `coefficients` (N,) each."""
    log_denominator, pull, mass, _ = statistics.unbind(dim=1)
    counts = kept(statistics)
    push = coefficients.where(counts, 0)
    of_pull = (pull.where(counts, 0), push) if inside else (torch.zeros_like(push), push / mass.where(counts, 1))
    return torch.stack((log_denominator.where(counts, 0), push, *of_pull), dim=1)


def _products(kernels: Epilogue, problem: Problem) -> Iterator[tuple[Tile, Tensor]]:
    """Blocks of anchors with their keys, and their products; each is overwritten by the next."""
    anchors, keys, accumulate = problem.anchors, problem.all_keys, problem.scale.dtype
    count = len(keys)
    rows = rows_of_block(problem, kernels.pair_bytes(problem))
    buffer = anchors.new_empty(min(rows, len(anchors)) * count, dtype=accumulate)
    for block in blocks(slice(0, len(anchors)), rows):
        tile = Tile(block, slice(block.start if problem.triangle else 0, count))
        products = buffer[: tile.shape[0] * tile.shape[1]].view(tile.shape)
        _set_product(products, anchors[block], keys[tile.columns].T)
        yield tile, products


def rows_of_block(problem: Problem, pair_bytes: int) -> int:
    """How many anchors make a block, a multiple of 32."""
    workspace = CHUNK_BYTES_ON_CPU if problem.anchors.device.type == "cpu" else CHUNK_BYTES_ON_GPU
    words, more_words = (size // (pair_bytes * len(problem.all_keys)) // 32 for size in (workspace, _MORE * workspace))
    return 32 * max(1, words, min(more_words, _FEW_ROWS // 32))


class _Sums:
    """Gradients while blocks add to them."""

    def __init__(self, kernels: Epilogue, problem: Problem, needs: Needs) -> None:
        self._kernels, self._problem, self._needs = kernels, problem, needs
        scale = problem.scale
        # The gradient of the temperature is a sum over the products of anchors, or keys, with their gradients.
        by_keys = needs.keys and problem.keys is not None
        self._anchors = self._keys = self._bias = None
        if needs.anchors or (needs.temperature and not by_keys):
            make = scale.new_zeros if problem.keys is None else scale.new_empty
            self._anchors = make(problem.anchors.shape)
        if by_keys:
            self._keys = scale.new_empty(problem.all_keys.shape)
        if needs.key_bias:
            self._bias = scale.new_zeros(len(problem.all_keys))
        self._factor: Tensor | None = None

    def gradient(
        self, logits: Tensor, tile: Tile, pairs: Any, rows: Tensor, columns: Tensor | None, greatest: Tensor
    ) -> Tensor:
        """g of a block, from the numbers of its rows and columns; no |g| is above `greatest`."""
        problem = self._problem
        if problem.anchors.dtype == torch.float16:
            self._factor = _GREATEST_G / greatest.where(greatest > 0, 1)
            of_g = torch.stack((torch.ones_like(self._factor), self._factor)).repeat(2)
            rows, columns = rows * of_g, None if columns is None else columns * of_g
        return self._kernels.gradient(logits, tile, problem, pairs, rows, columns)

    def add(self, tile: Tile, g: Tensor) -> None:
        """Add the gradients of a block."""
        problem = self._problem
        of_rows, of_columns = problem.anchors[tile.rows], problem.all_keys[tile.columns]
        if self._anchors is not None and problem.keys is not None:
            _set_product(self._anchors[tile.rows], g, of_columns)
        elif self._anchors is not None:
            _add_product(self._anchors[tile.rows], g, of_columns)
            _add_product(self._anchors[tile.columns], g.T, of_rows)
        if self._keys is not None:
            add = _add_product if tile.rows.start else _set_product
            add(self._keys[tile.columns], g.T, of_rows)
        if self._bias is not None:
            self._bias[tile.columns] += g.sum(dim=0, dtype=self._bias.dtype)

    def gradients(self) -> Gradients:
        """Those that were asked for."""
        problem, scale = self._problem, self._problem.scale
        if self._factor is not None:
            for sums in (self._anchors, self._keys, self._bias):
                if sums is not None:
                    sums /= self._factor
        for sums in (self._anchors, self._keys):
            if sums is not None:
                sums *= scale
        temperature = None
        if self._needs.temperature:
            vectors, sums = (problem.anchors, self._anchors) if self._keys is None else (problem.keys, self._keys)
            assert vectors is not None and sums is not None
            # Of vectors that are anchors and keys, each pair is in the sum twice.
            products = torch.linalg.vecdot(vectors.to(sums.dtype), sums).sum()
            temperature = products * -scale / (2 if problem.keys is None else 1)
        anchors = self._anchors if self._needs.anchors else None
        return Gradients(anchors, self._keys, temperature, self._bias)


def _set_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cpu":  # whose products of half precision are of half precision
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif left.device.type == "cpu":
        out.addmm_(left.to(out.dtype), right.to(out.dtype))
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
