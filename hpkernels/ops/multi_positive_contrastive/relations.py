"""Dense blocks of the bit-packed relations A, S and R, and of Den, which is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpkernels.ops.hidden_positives.bits import unpack_bits, words_of
from hpkernels.ops.multi_positive_contrastive.negatives import negative_bits

Transposed = tuple[Tensor, Tensor | None]
"""Of the transposes of A and S, S or None, some rows bit-packed (R, words)."""

Block = tuple[Tensor, Tensor | None, Tensor]
"""Of A, S and Den, bool."""


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
