"""The bit-packed relation "is a positive of" that discovery writes and the loss reads: N x N, or anchors x keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hpkernels.ops import _checks as check
from hpkernels.ops._bits import (
    counted_bits,
    equal_label_bits,
    pack_bits,
    packed_mask,
    transposed_bits,
    unpack_bits,
    words_per_row,
)


class PositiveMask:
    """Which pairs are positives, one bit a pair: of N anchors with each other, or of N anchors and K keys.

    Among anchors the mask is square, and an anchor is never its own positive. Between anchors and keys, which are a set
    of their own, any pair may be a positive, also where K is N.

    ``a | b`` and ``a & b`` are positives of either and of both, ``a == b`` compares all pairs, ``len(a)`` is N, ``a.T``
    the transpose, of keys and anchors. Masks are saved by ``torch.save`` and loaded with ``weights_only=True``.

    Attributes:
        bits: (N, ceil(N / 32)) int32; pair (i, j) is bit ``j % 32`` of word ``bits[i, j // 32]``, padding bits are 0.
            With keys (N, ceil(K / 32)).
        anchors: N.
        keys: K; None: the anchors are each other's keys, and the mask is square.
        symmetric: whether the mask is known to be its own transpose, which saves the loss from making the transpose.
        ignored: (N,) bool, the anchors that have no positives and take no part in anyone's denominator; None: none.
            Square masks alone can have them.

    Raises:
        TypeError, ValueError: `bits` or `ignored` is not a tensor of that dtype and shape; `symmetric` or `ignored` is
            set and so is `keys`; on the CPU, outside of what traces, also for bits in the padding and on the diagonal
            of a square mask.
    """

    def __init__(
        self,
        bits: Tensor,
        anchors: int,
        *,
        keys: int | None = None,
        symmetric: bool = False,
        ignored: Tensor | None = None,
    ) -> None:
        op = "PositiveMask"
        check.integer(op, "anchors", anchors, 1)
        if keys is not None:
            check.integer(op, "keys", keys, 1)
        check.tensor(op, "bits", bits, (anchors, words_per_row(anchors if keys is None else keys)), (torch.int32,))
        check.flag(op, "symmetric", symmetric)
        if keys is not None and symmetric:
            raise ValueError(f"{op}: `symmetric` must be False where there are keys, got True")
        if ignored is not None:
            if keys is not None:
                raise ValueError(f"{op}: `ignored` must be None where there are keys: it is for square masks only")
            check.tensor(op, "ignored", ignored, (anchors,), check.BOOLEAN)
            check.same(op, "ignored", ignored, "bits", bits, dtype=False)
        if check.readable(bits):
            check_bits(bits, keys)
        self.bits = bits
        self.anchors = anchors
        self.keys = keys
        self.symmetric = symmetric
        self.ignored = ignored

    @classmethod
    def from_dense(cls, mask: Tensor, *, keys: bool = False) -> PositiveMask:
        """Pack a (N, N) bool mask, which need not be symmetric; its diagonal is ignored.

        With ``keys=True`` a (N, K) bool mask of anchors and keys, with all of its pairs.

        Raises:
            TypeError, ValueError: `mask` is not a bool matrix, or is not square and has no keys.
        """
        op = "PositiveMask.from_dense"
        check.flag(op, "keys", keys)
        check.tensor(op, "mask", mask, ("N", "K" if keys else "N"), check.BOOLEAN)
        anchors, columns = mask.shape
        if not keys and anchors != columns:
            raise ValueError(
                f"{op}: `mask` must be of shape ({anchors}, {anchors}), or come with keys=True for"
                f" anchors x keys, got bool of shape ({anchors}, {columns})"
            )
        bits: Tensor = packed_mask(mask, keys)
        return cls(bits, anchors, keys=columns if keys else None)

    @classmethod
    def from_labels(
        cls, labels: Tensor, ignore_index: int | Iterable[int] | None = None, *, key_labels: Tensor | None = None
    ) -> PositiveMask:
        """Make anchors with equal labels (N,) of any integer dtype positives of each other, or keys theirs.

        Args:
            labels: (N,). An anchor with a negative label has no positives, and is a negative of all others.
            ignore_index: a label or several, 255 for example, whose anchors take no part: they have no positives, and
                are in no denominator. It may be negative. For square masks only.
            key_labels: (K,) of any integer dtype: the mask is one of anchors x keys, whose equal labels make a pair
                positive. A key with a negative label is no one's positive.

        Raises:
            TypeError, ValueError: `labels` or `key_labels` is not an integer vector, or `ignore_index` not one or more
                integers; `ignore_index` and `key_labels` are both given.
        """
        op = "PositiveMask.from_labels"
        check.tensor(op, "labels", labels, ("N",), check.ANY_INTEGER)
        labels, known = _comparable(labels)
        if key_labels is not None:
            check.tensor(op, "key_labels", key_labels, ("K",), check.ANY_INTEGER)
            check.same(op, "key_labels", key_labels, "labels", labels, dtype=False)
            if ignore_index is not None:
                raise ValueError(
                    f"{op}: `ignore_index` must be None where there are `key_labels`: anchors are ignored in square"
                    f" masks only, got {ignore_index!r}"
                )
            between: Tensor = equal_label_bits(labels, known, *_comparable(key_labels))
            return cls(between, labels.shape[0], keys=key_labels.shape[0])
        ignored = None
        if ignore_index is not None:
            plain = ignore_index.tolist() if hasattr(ignore_index, "tolist") else ignore_index  # of PyTorch and NumPy
            several = plain if isinstance(plain, Iterable) else (plain,)
            ignored = torch.zeros_like(labels, dtype=torch.bool)
            for label in several:
                ignored |= labels == check.integer(op, "ignore_index", label, -(2**63), 2**63 - 1)
            known &= ~ignored
        bits: Tensor = equal_label_bits(labels, known)
        return cls(bits, labels.shape[0], symmetric=True, ignored=ignored)

    def to_dense(self) -> Tensor:
        """The mask as a (N, N) bool tensor, or (N, K)."""
        return unpack_bits(self.bits, self.shape[1])

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
        return PositiveMask(
            self.bits.to(device), self.anchors, keys=self.keys, symmetric=self.symmetric, ignored=ignored
        )

    def ignoring(self, ignored: Tensor) -> PositiveMask:
        """The mask without the anchors where `ignored` (N,) bool is True, besides those that it ignores already.

        Raises:
            TypeError, ValueError: `ignored` is not such a vector, or the mask has keys.
        """
        if self.keys is not None:
            raise ValueError(f"PositiveMask.ignoring: the mask must be a square one, got one of {self._sizes()}")
        check.tensor("PositiveMask.ignoring", "ignored", ignored, (self.anchors,), check.BOOLEAN)
        check.same("PositiveMask.ignoring", "ignored", ignored, "bits", self.bits, dtype=False)
        ignored = ignored if self.ignored is None else ignored | self.ignored
        bits = (self.bits & pack_bits(~ignored[None])).masked_fill_(ignored[:, None], 0)
        return PositiveMask(bits, self.anchors, symmetric=self.symmetric, ignored=ignored)

    @property
    def T(self) -> PositiveMask:  # noqa: N802 (as a tensor has it)
        """The transpose: (i, j) where this mask has (j, i), and the keys are the anchors."""
        if self.symmetric:
            return self
        anchors, keys = self.shape
        bits: Tensor = transposed_bits(self.bits, keys)
        return PositiveMask(bits, keys, keys=None if self.keys is None else anchors, ignored=self.ignored)

    def __or__(self, other: PositiveMask) -> PositiveMask:
        return self._combined(other, torch.bitwise_or)

    def __and__(self, other: PositiveMask) -> PositiveMask:
        return self._combined(other, torch.bitwise_and)

    def _combined(self, other: Any, combine: Any) -> PositiveMask:
        if not isinstance(other, PositiveMask):
            return NotImplemented  # type: ignore[no-any-return]
        if (other.anchors, other.keys) != (self.anchors, self.keys):
            raise ValueError(f"PositiveMask: both masks must have {self._sizes()}, got one of {other._sizes()}")
        check.same("PositiveMask", "bits of the second mask", other.bits, "bits of the first", self.bits)
        symmetric = self.symmetric and other.symmetric
        result = PositiveMask(combine(self.bits, other.bits), self.anchors, keys=self.keys, symmetric=symmetric)
        for ignored in (self.ignored, other.ignored):
            result = result if ignored is None else result.ignoring(ignored)
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PositiveMask):
            return NotImplemented
        if (self.anchors, self.keys, self.device) != (other.anchors, other.keys, other.device):
            return False
        none = torch.zeros((), dtype=torch.bool, device=self.device).expand(self.anchors)
        ignored = (none if mask.ignored is None else mask.ignored for mask in (self, other))
        return torch.equal(self.bits, other.bits) and torch.equal(*ignored)

    __hash__ = None  # type: ignore[assignment]  # as of everything that compares by its content

    def __len__(self) -> int:
        return self.anchors

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("bits", "symmetric", "ignored")}
        # NumPy's integers are not read with weights_only=True.
        return state | {"anchors": int(self.anchors), "keys": None if self.keys is None else int(self.keys)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # which checks what came from a file

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N), or (N, K)."""
        return self.anchors, self.anchors if self.keys is None else self.keys

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """The memory that the packed bits take."""
        return self.bits.numel() * self.bits.element_size()

    def __repr__(self) -> str:
        return f"PositiveMask({self._sizes()}, {self.nbytes} bytes, device='{self.device}')"

    def _sizes(self) -> str:
        return f"{self.anchors} anchors" if self.keys is None else f"{self.anchors} anchors x {self.keys} keys"


def _comparable(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as int64, and which of them may be equal to others; of uint64 the bits, which stay different."""
    return labels.long(), (labels.long() >= 0) | (not labels.dtype.is_signed)


def check_bits(bits: Tensor, keys: int | None = None) -> None:
    """Check that padding, and without keys the diagonal, are clear, which the kernels take for granted.

    Raises:
        ValueError: they are not.
    """
    columns = len(bits) if keys is None else keys
    used = columns % 32
    if used and (bits[:, -1] & (-1 << used)).any():
        raise ValueError(f"PositiveMask: `bits` must be 0 beyond column {columns - 1}, got a set bit in the padding")
    if keys is not None:
        return
    own = torch.arange(columns, device=bits.device)
    if ((bits[own, own // 32] >> (own % 32)) & 1).any():
        raise ValueError("PositiveMask: `bits` must be 0 on the diagonal, got an anchor that is its own positive")


torch.serialization.add_safe_globals([PositiveMask])
