"""The bit-packed N x N relation "is a positive of" that discovery writes and the loss reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives.bits import (
    counted_bits,
    equal_label_bits,
    pack_bits,
    packed_mask,
    transposed_bits,
    unpack_bits,
    words_per_row,
)


class PositiveMask:
    """Which pairs of N anchors are positives, one bit a pair. An anchor is never its own positive.

    ``a | b`` and ``a & b`` are positives of either and of both, ``a == b`` compares all pairs, ``len(a)`` is N, ``a.T``
    the transpose. Masks are saved by ``torch.save`` and loaded with ``weights_only=True``.

    Attributes:
        bits: (N, ceil(N / 32)) int32; pair (i, j) is bit ``j % 32`` of word ``bits[i, j // 32]``, padding bits are 0.
        anchors: N.
        symmetric: whether the mask is known to be its own transpose, which saves the loss from making the transpose.
        ignored: (N,) bool, the anchors that have no positives and take no part in anyone's denominator; None: none.

    Raises:
        TypeError, ValueError: `bits` or `ignored` is not a tensor of that dtype and shape; on the CPU, outside of what
            traces, also for bits in the padding and on the diagonal.
    """

    def __init__(self, bits: Tensor, anchors: int, *, symmetric: bool = False, ignored: Tensor | None = None) -> None:
        op = "PositiveMask"
        check.integer(op, "anchors", anchors, 1)
        check.tensor(op, "bits", bits, (anchors, words_per_row(anchors)), (torch.int32,))
        check.flag(op, "symmetric", symmetric)
        if ignored is not None:
            check.tensor(op, "ignored", ignored, (anchors,), check.BOOLEAN)
            check.same(op, "ignored", ignored, "bits", bits, dtype=False)
        if check.readable(bits):
            check_bits(bits)
        self.bits = bits
        self.anchors = anchors
        self.symmetric = symmetric
        self.ignored = ignored

    @classmethod
    def from_dense(cls, mask: Tensor) -> PositiveMask:
        """Pack a (N, N) bool mask, which need not be symmetric; its diagonal is ignored.

        Raises:
            TypeError, ValueError: `mask` is not a square bool matrix.
        """
        check.tensor("PositiveMask.from_dense", "mask", mask, ("N", "N"), check.BOOLEAN)
        anchors = mask.shape[0]
        check.tensor("PositiveMask.from_dense", "mask", mask, (anchors, anchors), check.BOOLEAN)
        bits: Tensor = packed_mask(mask, False)
        return cls(bits, anchors)

    @classmethod
    def from_labels(cls, labels: Tensor, ignore_index: int | Iterable[int] | None = None) -> PositiveMask:
        """Make anchors with equal labels (N,) of any integer dtype positives of each other.

        Args:
            labels: (N,). An anchor with a negative label has no positives, and is a negative of all others.
            ignore_index: a label or several, 255 for example, whose anchors take no part: they have no positives, and
                are in no denominator. It may be negative.

        Raises:
            TypeError, ValueError: `labels` is not an integer vector, or `ignore_index` not one or more integers.
        """
        op = "PositiveMask.from_labels"
        check.tensor(op, "labels", labels, ("N",), check.ANY_INTEGER)
        signed = labels.dtype.is_signed
        labels, anchors = labels.long(), labels.shape[0]  # of uint64 the bits, which stay different
        known = (labels >= 0) | (not signed)
        ignored = None
        if ignore_index is not None:
            plain = ignore_index.tolist() if hasattr(ignore_index, "tolist") else ignore_index  # of PyTorch and NumPy
            several = plain if isinstance(plain, Iterable) else (plain,)
            ignored = torch.zeros_like(labels, dtype=torch.bool)
            for label in several:
                ignored |= labels == check.integer(op, "ignore_index", label, -(2**63), 2**63 - 1)
            known &= ~ignored
        bits: Tensor = equal_label_bits(labels, known)
        return cls(bits, anchors, symmetric=True, ignored=ignored)

    def to_dense(self) -> Tensor:
        """The mask as a (N, N) bool tensor."""
        return unpack_bits(self.bits, self.anchors)

    def count(self) -> Tensor:
        """The number of positives of each anchor, (N,) int64."""
        counts: Tensor = counted_bits(self.bits)
        return counts

    def to(self, device: torch.device | str) -> PositiveMask:
        """The mask on another device.

        Raises:
            TypeError: `device` is something else.
        """
        if not isinstance(device, str | torch.device):
            raise TypeError(f"PositiveMask.to: `device` must be a torch.device or its name, got {device!r}")
        ignored = None if self.ignored is None else self.ignored.to(device)
        return PositiveMask(self.bits.to(device), self.anchors, symmetric=self.symmetric, ignored=ignored)

    def ignoring(self, ignored: Tensor) -> PositiveMask:
        """The mask without the anchors where `ignored` (N,) bool is True, besides those that it ignores already.

        Raises:
            TypeError, ValueError: `ignored` is not such a vector.
        """
        check.tensor("PositiveMask.ignoring", "ignored", ignored, (self.anchors,), check.BOOLEAN)
        check.same("PositiveMask.ignoring", "ignored", ignored, "bits", self.bits, dtype=False)
        ignored = ignored if self.ignored is None else ignored | self.ignored
        bits = (self.bits & pack_bits(~ignored[None])).masked_fill_(ignored[:, None], 0)
        return PositiveMask(bits, self.anchors, symmetric=self.symmetric, ignored=ignored)

    @property
    def T(self) -> PositiveMask:  # noqa: N802 (as a tensor has it)
        """The transpose: (i, j) where this mask has (j, i)."""
        if self.symmetric:
            return self
        bits: Tensor = transposed_bits(self.bits)
        return PositiveMask(bits, self.anchors, ignored=self.ignored)

    def __or__(self, other: PositiveMask) -> PositiveMask:
        return self._combined(other, torch.bitwise_or)

    def __and__(self, other: PositiveMask) -> PositiveMask:
        return self._combined(other, torch.bitwise_and)

    def _combined(self, other: Any, combine: Any) -> PositiveMask:
        if not isinstance(other, PositiveMask):
            return NotImplemented  # type: ignore[no-any-return]
        if other.anchors != self.anchors:
            raise ValueError(f"PositiveMask: both masks must have {self.anchors} anchors, got one of {other.anchors}")
        check.same("PositiveMask", "bits of the second mask", other.bits, "bits of the first", self.bits)
        symmetric = self.symmetric and other.symmetric
        result = PositiveMask(combine(self.bits, other.bits), self.anchors, symmetric=symmetric)
        for ignored in (self.ignored, other.ignored):
            result = result if ignored is None else result.ignoring(ignored)
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PositiveMask):
            return NotImplemented
        if self.anchors != other.anchors or self.device != other.device:
            return False
        none = torch.zeros((), dtype=torch.bool, device=self.device).expand(self.anchors)
        ignored = (none if mask.ignored is None else mask.ignored for mask in (self, other))
        return torch.equal(self.bits, other.bits) and torch.equal(*ignored)

    __hash__ = None  # type: ignore[assignment]  # as of everything that compares by its content

    def __len__(self) -> int:
        return self.anchors

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("bits", "anchors", "symmetric", "ignored")}
        return state | {"anchors": int(self.anchors)}  # NumPy's integers are not read with weights_only=True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # which checks what came from a file

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.anchors, self.anchors

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


def check_bits(bits: Tensor) -> None:
    """Check that padding and diagonal are clear, which the kernels take for granted.

    Raises:
        ValueError: they are not.
    """
    anchors = len(bits)
    used = anchors % 32
    if used and (bits[:, -1] & (-1 << used)).any():
        raise ValueError(f"PositiveMask: `bits` must be 0 beyond column {anchors - 1}, got a set bit in the padding")
    own = torch.arange(anchors, device=bits.device)
    if ((bits[own, own // 32] >> (own % 32)) & 1).any():
        raise ValueError("PositiveMask: `bits` must be 0 on the diagonal, got an anchor that is its own positive")


torch.serialization.add_safe_globals([PositiveMask])
