"""The bit-packed N x N relation "is a positive of" that discovery writes and the loss reads."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives.bits import pack_bits, population_count, unpack_bits, words_per_row

_LABEL_ROWS = 1024  # rows of labels compared at a time, so that no (N, N) tensor is built


class PositiveMask:
    """Which pairs of N anchors are positives, one bit a pair. An anchor is never its own positive.

    Attributes:
        bits: (N, ceil(N / 32)) int32; pair (i, j) is bit ``j % 32`` of word ``bits[i, j // 32]``, padding bits are 0.
        anchors: N.
        symmetric: whether the mask is known to be its own transpose, which saves the loss from making the transpose.

    Raises:
        TypeError, ValueError: `bits` is not an int32 tensor of that shape.
    """

    def __init__(self, bits: Tensor, anchors: int, *, symmetric: bool = False) -> None:
        check.integer("PositiveMask", "anchors", anchors, 1)
        check.tensor("PositiveMask", "bits", bits, (anchors, words_per_row(anchors)), (torch.int32,))
        self.bits = bits
        self.anchors = anchors
        self.symmetric = symmetric

    @classmethod
    def from_dense(cls, mask: Tensor) -> PositiveMask:
        """Pack a (N, N) bool mask, which need not be symmetric; its diagonal is ignored.

        Raises:
            TypeError, ValueError: `mask` is not a square bool matrix.
        """
        check.tensor("PositiveMask.from_dense", "mask", mask, ("N", "N"), check.BOOLEAN)
        anchors = mask.shape[0]
        check.tensor("PositiveMask.from_dense", "mask", mask, (anchors, anchors), check.BOOLEAN)
        diagonal = torch.eye(anchors, dtype=torch.bool, device=mask.device)
        return cls(pack_bits(mask & ~diagonal), anchors)

    @classmethod
    def from_labels(cls, labels: Tensor) -> PositiveMask:
        """Make anchors with equal labels (N,) int64 positives of each other; a negative label has no positives.

        Raises:
            TypeError, ValueError: `labels` is not an int64 vector.
        """
        check.tensor("PositiveMask.from_labels", "labels", labels, ("N",), check.INTEGER)
        anchors = labels.shape[0]
        bits = labels.new_empty((anchors, words_per_row(anchors)), dtype=torch.int32)
        columns = torch.arange(anchors, device=labels.device)
        for start in range(0, anchors, _LABEL_ROWS):
            rows = columns[start : start + _LABEL_ROWS, None]
            equal = (labels[rows] == labels) & (labels[rows] >= 0) & (rows != columns)
            bits[start : start + _LABEL_ROWS] = pack_bits(equal)
        return cls(bits, anchors, symmetric=True)

    def to_dense(self) -> Tensor:
        """The mask as a (N, N) bool tensor."""
        return unpack_bits(self.bits, self.anchors)

    def count(self) -> Tensor:
        """The number of positives of each anchor, (N,) int64."""
        return population_count(self.bits)

    def to(self, device: torch.device | str) -> PositiveMask:
        """The mask on another device."""
        return PositiveMask(self.bits.to(device), self.anchors, symmetric=self.symmetric)

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """The memory that the packed bits take."""
        return self.bits.numel() * self.bits.element_size()

    def __repr__(self) -> str:
        return f"PositiveMask({self.anchors} anchors, {self.nbytes} bytes, device='{self.device}')"
