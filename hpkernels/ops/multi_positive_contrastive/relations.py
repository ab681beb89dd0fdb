"""The bit-packed relations: R as given or drawn, and dense blocks of A, S and of Den, which is made of A and R."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpkernels.ops._bits import as_bits, pack_bits, unpack_bits, words_of, words_per_row
from hpkernels.ops._blocks import row_blocks
from hpkernels.ops._philox import bernoulli

Transposed = tuple[Tensor, Tensor | None]
"""Of the transposes of A and S, S or None, some rows bit-packed (R, words)."""

Block = tuple[Tensor, Tensor | None, Tensor]
"""Of A, S and Den, bool."""


def negative_bits(negatives: Tensor | None, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """R, (G, ceil(N / 32)) int32: `negatives` as they are or packed, or `rows` x `columns` drawn with `rate`."""
    drawn: Tensor = drawn_negatives(seed, rows, columns, rate) if negatives is None else as_bits(negatives)
    return drawn


# A custom op for the reason that those of _bits.py have.
@torch.library.custom_op(
    "hpkernels::drawn_negatives",
    mutates_args=(),
    schema="(Tensor seed, SymInt rows, SymInt columns, float rate) -> Tensor",
)
def drawn_negatives(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """The bits of ``bernoulli(seed, rows, columns, rate)``."""
    if rate in (0, 1):
        alike = torch.full((1, columns), rate == 1, dtype=torch.bool, device=seed.device)
        return pack_bits(alike).expand(rows, -1).contiguous()
    bits = seed.new_empty((rows, words_per_row(columns)), dtype=torch.int32)
    for block in row_blocks(bits, 32 * columns):
        bits[block] = pack_bits(bernoulli(seed, block.stop - block.start, columns, rate, block.start))
    return bits


@drawn_negatives.register_fake
def _(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    return seed.new_empty((rows, words_per_row(columns)), dtype=torch.int32)


def negatives_of(negatives: Tensor | None, seed: Tensor, group: int, anchors: int, rate: float) -> Tensor:
    """R bit-packed; one row that stands for all if they are alike."""
    return negative_bits(negatives, seed, 1 if rate in (0, 1) else group, anchors, rate)


@dataclass(frozen=True)
class Relations:
    """A, S and R bit-packed, of which Den and dense blocks are made; A and S have the rows of some anchors."""

    positives: Tensor
    specific: Tensor | None
    negatives: Tensor
    anchors: int
    first: int
    transposed: Transposed | None = None

    def anchors_at(self, rows: slice) -> slice:
        """Which anchors have these rows."""
        return slice(self.first + rows.start, self.first + rows.stop)

    def of_rows(self, rows: slice) -> Block:
        """A_ij, S_ij and Den_ij for i in `rows`, (rows, N) each."""
        positions = torch.arange(rows.start, rows.stop, device=self.negatives.device) % len(self.negatives)
        drawn = unpack_bits(self.negatives[positions], self.anchors)
        agnostic = unpack_bits(self.positives[rows], self.anchors)
        task = None if self.specific is None else unpack_bits(self.specific[rows], self.anchors)
        return agnostic, task, self._without_own(agnostic | drawn, rows)

    def of_columns(self, rows: slice, of_rows: Block | None) -> Block:
        """A_ji, S_ji and Den_ji for i in `rows`, (rows, N) each; A and S are those `of_rows` if they are symmetric."""
        if of_rows is not None:
            agnostic, task, _ = of_rows
        elif self.transposed is not None:
            of_a, of_s = self.transposed
            agnostic = unpack_bits(of_a[rows], self.anchors)
            task = None if of_s is None else unpack_bits(of_s[rows], self.anchors)
        else:
            agnostic = _columns(self.positives, rows)
            task = None if self.specific is None else _columns(self.specific, rows)
        drawn = _columns(self.negatives, self.anchors_at(rows)).repeat(1, self.anchors // len(self.negatives))
        return agnostic, task, self._without_own(agnostic | drawn, rows)

    def _without_own(self, pairs: Tensor, rows: slice) -> Tensor:
        """`pairs` (rows, N) without those of an anchor and itself."""
        pairs.diagonal(self.first + rows.start).fill_(False)
        return pairs


def _columns(bits: Tensor, columns: slice) -> Tensor:
    """Some columns of a packed matrix, as rows: (columns, R) bool."""
    before = columns.start % 32
    whole = slice(columns.start - before, columns.stop)
    return unpack_bits(bits[:, words_of(whole)], whole.stop - whole.start)[:, before:].T.contiguous()
