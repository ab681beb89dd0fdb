"""Packing of boolean matrices into 32-bit words: column j is bit ``j % 32`` of word ``j // 32`` of its row."""

from __future__ import annotations

import torch
from torch import Tensor


def words_per_row(columns: int) -> int:
    """The number of 32-bit words that hold `columns` bits."""
    return (columns + 31) // 32


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a (R, C) bool matrix into (R, ceil(C / 32)) int32 words."""
    rows, columns = mask.shape
    words = words_per_row(columns)
    bytes_of_bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, 32 * words - columns)).view(rows, 4 * words, 8)
    # Byte by byte, then seen as words: this needs no int64 temporaries, and the little-endian order of the bytes is
    # that of every platform PyTorch runs kernels on.
    packed = (bytes_of_bits * _bit_values(mask)).sum(dim=2, dtype=torch.uint8)
    return packed.view(torch.int32)


def as_bits(mask: Tensor) -> Tensor:
    """The words of a bool matrix, or `mask` itself if it is packed already."""
    return mask if mask.dtype == torch.int32 else pack_bits(mask)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """The (R, `columns`) bool matrix that `pack_bits` packed."""
    packed = bits.contiguous().view(torch.uint8)
    return ((packed[..., None] & _bit_values(bits)) != 0).flatten(1)[:, :columns]


def population_count(bits: Tensor) -> Tensor:
    """The number of set bits in each row of (R, W) int32 words, as (R,) int64."""
    octets = bits.contiguous().view(torch.uint8)
    octets = octets - ((octets >> 1) & 0x55)
    octets = (octets & 0x33) + ((octets >> 2) & 0x33)
    return ((octets + (octets >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)


def _bit_values(like: Tensor) -> Tensor:
    return (1 << torch.arange(8, device=like.device)).to(torch.uint8)
