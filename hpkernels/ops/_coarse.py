"""Coarse products on the CPU: products of rows rounded to int8, with a bound on how far each is from the exact one.

    x = scale * q + r  and y likewise:
    |<x, y> - scale_x scale_y <q_x, q_y>| <= |r_x| |y| + |scale_x q_x| |r_y|

`masked_topk` and `hidden_positives` decide by them where that is safe, and compute the inner product, summed in float64
and rounded to float32, of the other pairs: results do not depend on how coarse the products are, only time does.
Processors without fast int8 products, and rows that int8 is too coarse for, take float32 products in the same way;
float64 rows take float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels import _native

_INT8_FEATURES = range(16, 2**17)
"""D for int8: 127² times as many is the most that an int32 sum holds, and few are not worth rounding (and with D = 1
PyTorch's int8 product is wrong: it mistakes transposed rows for others)."""
_MOST_UNDECIDED = 1 / 16
"""Share of pairs that int8 may leave undecided: with many more, float32 products of all would take less time."""


class CoarseRows(NamedTuple):
    """Rows and what their coarse products need.

    Attributes:
        rows: (N, D) float32 or float64, contiguous.
        codes: (N, D) q, int8 or the rows themselves.
        stats: (3, N) scale, norm and error of each row (``csrc/common/coarse_products.h``).
    """

    rows: Tensor
    codes: Tensor
    stats: Tensor


class CoarseProducts:
    """Products between blocks of two sets of rows, in int8 until that leaves too much undecided."""

    def __init__(self, left: Tensor, right: Tensor, tile: int) -> None:
        """Products of blocks of `left` (N, D) and `right` (M, D) of the same dtype, at most `tile` at a time."""
        self._sets = (left.contiguous(), right.contiguous())
        self._tile = tile
        self._use(_int8_allowed and int8_is_fast() and left.dtype == torch.float32 and left.shape[1] in _INT8_FEATURES)

    def _use(self, int8: bool) -> None:
        left, right = self._sets
        self.left = coarse_rows(left, int8)
        self.right = self.left if right is left else coarse_rows(right, int8)
        self._int8 = int8
        self._buffer = left.new_empty(self._tile, dtype=torch.int32 if int8 else left.dtype)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The products of some rows of both; the next call overwrites them."""
        left, right = self.left.codes[rows], self.right.codes[columns]
        products = self._buffer[: len(left) * len(right)].view(len(left), len(right))
        multiply = torch._int_mm if self._int8 else torch.mm
        return multiply(left, right.T, out=products)

    def took(self, undecided: int, products: Tensor) -> None:
        """Hear how many inner products a tile took, and go on in float32 if they were too many."""
        if self._int8 and undecided > _MOST_UNDECIDED * products.numel():
            self._use(int8=False)


def coarse_rows(rows: Tensor, int8: bool) -> CoarseRows:
    """Round rows (N, D), contiguous, or keep them as they are."""
    stats = rows.new_empty((3, len(rows)))
    if not int8:
        torch.ops.hpkernels_cpu.coarse_unrounded(rows, stats)
        return CoarseRows(rows, rows, stats)
    codes = torch.empty_like(rows, dtype=torch.int8)
    torch.ops.hpkernels_cpu.coarse_int8(rows, codes, stats)
    return CoarseRows(rows, codes, stats)


_int8_allowed = True


@contextmanager
def without_int8() -> Iterator[None]:
    """Inside the ``with`` block coarse products are float32, as on processors without fast int8 products."""
    global _int8_allowed
    _int8_allowed, before = False, _int8_allowed
    try:
        yield
    finally:
        _int8_allowed = before


@functools.cache
def int8_is_fast() -> bool:
    """Whether this processor has instructions for int8 products, and the CPU kernels are there to ask."""
    return _native.LIBRARIES["_C"].ok and bool(torch.ops.hpkernels_cpu.has_int8_products())
