"""CUDA kernels on packed bits: the drawn negatives, transposes, and lists of the columns of a row's set bits."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops.hidden_positives.bits import words_per_row

_kernels = torch.ops.hpkernels_cuda


def draw(seed: Tensor, rows: int, columns: int, rate: float) -> tuple[Tensor, Tensor]:
    """The drawn negatives R bit-packed, (rows, ceil(columns / 32)) int32, and the number in each row, int32."""
    bits = torch.empty((rows, words_per_row(columns)), dtype=torch.int32, device=seed.device)
    counts = bits.new_empty(rows)
    _kernels.contrastive_draw_negatives(seed, columns, int(rate * 2**32), bits, counts)
    return bits, counts


def transpose(bits: Tensor, columns: int) -> Tensor:
    """The transpose of packed bits (R, ceil(columns / 32)), (columns, ceil(R / 32)) int32."""
    transposed = bits.new_empty((columns, words_per_row(len(bits))))
    _kernels.contrastive_transpose_bits(bits, transposed)
    return transposed


def count(first: Tensor, second: Tensor | None = None, group: int | None = None) -> Tensor:
    """Set bits of each row of one mask, or of the union of two, outside of the row's `group`, (R,) int32.

    A mask may be some of the words of the rows of another, but of two both must be.
    """
    counts = first.new_empty(len(first))
    _kernels.contrastive_count_bits(first, second, group or 0, counts)
    return counts


def offsets_of(counts: Tensor, enabled: Tensor | None = None, capacity: int = 0) -> Tensor:
    """Where each row's list starts and the last one ends, (R + 1,) int64.

    `enabled`, a 0-d int32, is set to 0 if that is beyond `capacity`, and else left as it is.
    """
    offsets = counts.new_empty(len(counts) + 1, dtype=torch.int64)
    _kernels.contrastive_list_offsets(counts, capacity, offsets, enabled)
    return offsets


def columns_of(
    first: Tensor,
    offsets: Tensor,
    enabled: Tensor,
    capacity: int,
    second: Tensor | None = None,
    group: int | None = None,
) -> Tensor:
    """The lists of the set bits that `count` counts, one after another, (capacity,) int32, if `enabled`."""
    columns = first.new_empty(capacity)
    _kernels.contrastive_list_bits(first, second, group or 0, offsets, enabled, columns)
    return columns
