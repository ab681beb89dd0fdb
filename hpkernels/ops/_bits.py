"""Packing of boolean matrices into 32-bit words: column j is bit ``j % 32`` of word ``j // 32`` of its row.

What goes over a whole matrix is a custom op, because a loop over blocks of rows would make N a constant of a compiled
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._blocks import row_blocks


def words_per_row(columns: int) -> int:
    """The number of 32-bit words that hold `columns` bits."""
    return (columns + 31) // 32


def words_of(columns: slice) -> slice:
    """The words that hold `columns`, which start at a multiple of 32."""
    return slice(columns.start // 32, words_per_row(columns.stop))


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a (R, C) bool matrix into (R, ceil(C / 32)) int32 words, which takes a copy of it."""
    rows, columns = mask.shape
    words = words_per_row(columns)
    bytes_of_bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, 32 * words - columns)).view(rows, 4 * words, 8)
    # Byte by byte, then seen as words: this needs no int64 temporaries, and the little-endian order of the bytes is
    # that of every platform PyTorch runs kernels on.
    packed = (bytes_of_bits * _bit_values(mask)).sum(dim=2, dtype=torch.uint8)
    return packed.view(torch.int32)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """The (R, `columns`) bool matrix that `pack_bits` packed."""
    packed = bits.contiguous().view(torch.uint8)
    return (packed[..., None] & _bit_values(bits)).ne_(0).view(torch.bool).flatten(1)[:, :columns]


def bits_of_columns(bits: Tensor, columns: slice) -> Tensor:
    """The bits (R, ceil(C / 32)) of C columns of a packed matrix, which may start anywhere."""
    shift, words = columns.start % 32, words_per_row(columns.stop - columns.start)
    held = bits[:, words_of(columns)]
    part = held[:, :words].clone()
    if shift:
        # The sign would be shifted in; and the lowest bits of a word are the highest of the one before.
        part = (part >> shift) & ((1 << (32 - shift)) - 1)
        following = held[:, 1 : words + 1]
        part[:, : following.shape[1]] |= following << (32 - shift)
    if used := (columns.stop - columns.start) % 32:
        part[:, -1] &= (1 << used) - 1
    return part


def population_count(bits: Tensor) -> Tensor:
    """The number of set bits in each row of (R, W) int32 words, as (R,) int64."""
    octets = bits.contiguous().view(torch.uint8)
    octets = octets - ((octets >> 1) & 0x55)
    octets = (octets & 0x33) + ((octets >> 2) & 0x33)
    return ((octets + (octets >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)


def _bit_values(like: Tensor) -> Tensor:
    return (1 << torch.arange(8, device=like.device)).to(torch.uint8)


def as_bits(mask: Tensor) -> Tensor:
    """The words of a bool matrix, or `mask` itself if it is packed already."""
    packed: Tensor = mask if mask.dtype == torch.int32 else packed_mask(mask, True)
    return packed


@torch.library.custom_op(
    "hpkernels::packed_mask", mutates_args=(), schema="(Tensor mask, bool with_diagonal) -> Tensor"
)
def packed_mask(mask: Tensor, with_diagonal: bool) -> Tensor:
    """The bits (R, ceil(C / 32)) of a bool matrix (R, C), or of what is not on its diagonal."""
    rows, columns = mask.shape
    bits = mask.new_empty((rows, words_per_row(columns)), dtype=torch.int32)
    for block in row_blocks(mask, 4 * columns):
        part = mask[block].clone()
        if not with_diagonal:
            part.diagonal(block.start).fill_(False)
        bits[block] = pack_bits(part)
    return bits


@packed_mask.register_fake
def _(mask: Tensor, with_diagonal: bool) -> Tensor:
    return mask.new_empty((mask.shape[0], words_per_row(mask.shape[1])), dtype=torch.int32)


@torch.library.custom_op(
    "hpkernels::equal_label_bits",
    mutates_args=(),
    schema="(Tensor labels, Tensor known, Tensor? key_labels=None, Tensor? key_known=None) -> Tensor",
)
def equal_label_bits(
    labels: Tensor, known: Tensor, key_labels: Tensor | None = None, key_known: Tensor | None = None
) -> Tensor:
    """The bits of the pairs with equal `labels` (N,), where they are `known` (N,).

    Pairs of anchors and keys with `key_labels` (K,), where they are `key_known` (K,) as well; or else pairs of two
    different anchors.
    """
    of_columns = labels if key_labels is None else key_labels
    columns = len(of_columns)
    bits = labels.new_empty((len(labels), words_per_row(columns)), dtype=torch.int32)
    for block in row_blocks(labels, 4 * columns):
        equal = (labels[block, None] == of_columns) & known[block, None]
        if key_known is None:
            equal.diagonal(block.start).fill_(False)
        else:
            equal &= key_known
        bits[block] = pack_bits(equal)
    return bits


@equal_label_bits.register_fake
def _(labels: Tensor, known: Tensor, key_labels: Tensor | None = None, key_known: Tensor | None = None) -> Tensor:
    columns = (labels if key_labels is None else key_labels).shape[0]
    return labels.new_empty((labels.shape[0], words_per_row(columns)), dtype=torch.int32)


@torch.library.custom_op(
    "hpkernels::transposed_bits", mutates_args=(), schema="(Tensor bits, SymInt columns) -> Tensor"
)
def transposed_bits(bits: Tensor, columns: int) -> Tensor:
    """The bits (C, ceil(R / 32)) of the transpose of a packed matrix (R, `columns`)."""
    result = bits.new_empty((columns, words_per_row(len(bits))))
    for block in row_blocks(result, 4 * len(bits), multiple=32):
        dense = unpack_bits(bits[:, words_of(block)], block.stop - block.start)
        result[block] = pack_bits(dense.T)
    return result


@transposed_bits.register_fake
def _(bits: Tensor, columns: int) -> Tensor:
    return bits.new_empty((columns, words_per_row(bits.shape[0])))


@torch.library.custom_op("hpkernels::counted_bits", mutates_args=(), schema="(Tensor bits) -> Tensor")
def counted_bits(bits: Tensor) -> Tensor:
    """The number of set bits in each row of (R, W) int32 words, as (R,) int64."""
    blocks = row_blocks(bits, 48 * bits.shape[1])
    return torch.cat([population_count(bits[block]) for block in blocks])


@counted_bits.register_fake
def _(bits: Tensor) -> Tensor:
    return bits.new_empty(bits.shape[:1], dtype=torch.int64)
