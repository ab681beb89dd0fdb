"""Triton kernels on packed bits: the drawn negatives, transposes, and lists of the columns of a row's set bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops.hidden_positives.bits import words_per_row


@triton.jit
def bits_at(bits, rows, words, columns, inside):
    """Whether the bits of (rows, columns), of broadcastable shapes, are set; False unless `inside`."""
    word = tl.load(bits + rows.to(tl.int64) * words + (columns >> 5), mask=inside, other=0)
    return ((word >> (columns & 31)) & 1) != 0


@triton.jit
def tile_of_words(bits, rows, words, first, COLUMNS: tl.constexpr):
    """The words of a tile (rows, COLUMNS) of bits from column `first` on, both multiples of 32; 0 for rows of -1."""
    word = first // 32 + tl.arange(0, COLUMNS // 32)
    inside = (rows >= 0)[:, None] & (word < words)[None, :]
    return tl.load(bits + rows.to(tl.int64)[:, None] * words + word[None, :], mask=inside, other=0)


@triton.jit
def bits_of(words):
    """The bits of words (R, W) as (R, 32 W) bool."""
    is_set = ((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0
    return tl.reshape(is_set, (words.shape[0], 32 * words.shape[1]))


@triton.jit
def population_count(words):
    """The number of set bits of each int32 word (Warren, Hacker's Delight, 5-1)."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x + (x >> 8) + (x >> 16) + (x >> 24)) & 0x3F).to(tl.int32)


@triton.jit
def low_bits(count):
    """Words whose lowest `count` bits are set, none for less than 0 and all for more than 32."""
    kept = tl.minimum(tl.maximum(count, 0), 32).to(tl.int64)
    return ((tl.full((), 1, tl.int64) << kept) - 1).to(tl.int32)


@triton.jit(do_not_specialize=["columns", "words", "threshold"])
def draw_negatives_kernel(bits, seed, columns, words, threshold, BLOCK_WORDS: tl.constexpr):
    """Bit j of row i is set if word j % 4 of Philox(counter (j // 4, i, 0, 0), seed) < threshold, j < columns.

    Grid (rows, blocks of words). Bytes: writes 4 a word; 8 Philox blocks a word.
    """
    row = tl.program_id(0)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    block = tl.arange(0, 8)
    counter = (8 * word[:, None] + block[None, :]).to(tl.uint32)
    zero = counter * 0
    first, second, third, fourth = tl.philox(tl.load(seed), counter, zero + row.to(tl.uint32), zero, zero)
    nibbles = (first.to(tl.int64) < threshold).to(tl.int32) | ((second.to(tl.int64) < threshold).to(tl.int32) << 1)
    nibbles |= (third.to(tl.int64) < threshold).to(tl.int32) << 2
    nibbles |= (fourth.to(tl.int64) < threshold).to(tl.int32) << 3
    drawn = tl.sum(nibbles << (4 * block)[None, :], axis=1) & low_bits(columns - 32 * word)
    tl.store(bits + row.to(tl.int64) * words + word, drawn, mask=word < words)


@triton.jit(do_not_specialize=["rows", "columns", "words", "words_transposed"])
def transpose_bits_kernel(
    bits, transposed, rows, columns, words, words_transposed, BLOCK_COLUMNS: tl.constexpr, BLOCK_WORDS: tl.constexpr
):
    """transposed[j] has bit i set where bits[i] has bit j.

    Grid (blocks of columns j, blocks of words of i). Bytes: reads each word for 32 columns, from cache but once; writes
    4 a word.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = column < columns
    gathered = tl.zeros((BLOCK_COLUMNS, BLOCK_WORDS), tl.int32)
    for bit in range(32):
        row = 32 * word[None, :] + bit
        is_set = bits_at(bits, row, words, column[:, None], inside[:, None] & (row < rows))
        gathered |= is_set.to(tl.int32) << bit
    at = transposed + column.to(tl.int64)[:, None] * words_transposed + word[None, :]
    tl.store(at, gathered, mask=inside[:, None] & (word < words_transposed)[None, :])


@triton.jit
def listed_words(first, second, row, word, words, group, HAS_SECOND: tl.constexpr, ACROSS: tl.constexpr):
    """Words of a row of `first`, or `second` as well; with ACROSS only columns outside of the row's group."""
    at = row.to(tl.int64) * words + word
    found = tl.load(first + at, mask=word < words, other=0)
    if HAS_SECOND:
        found |= tl.load(second + at, mask=word < words, other=0)
    if ACROSS:
        start = row // group * group
        found &= ~low_bits(start + group - 32 * word) | low_bits(start - 32 * word)
    return found


@triton.jit(do_not_specialize=["words", "group"])
def count_bits_kernel(
    first, second, counts, words, group, HAS_SECOND: tl.constexpr, ACROSS: tl.constexpr, BLOCK_WORDS: tl.constexpr
):
    """counts[i]: the number of set bits of row i, as `listed_words` has them. Grid (rows,). Bytes: reads the rows."""
    row = tl.program_id(0)
    counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        counted += population_count(listed_words(first, second, row, word, words, group, HAS_SECOND, ACROSS))
    tl.store(counts + row, tl.sum(counted, axis=0))


@triton.jit(do_not_specialize=["capacity", "words", "group"])
def list_bits_kernel(
    first, second, offsets, enabled, columns, capacity, words, group,
    HAS_SECOND: tl.constexpr, ACROSS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """columns[offsets[i]:]: the columns of the set bits of row i, ascending, if enabled.

    Grid (rows,). Bytes: reads the rows, writes 4 a set bit. A round for each set bit of the word that has most.
    """
    if tl.load(enabled) == 0:
        return
    row = tl.program_id(0)
    end = tl.load(offsets + row)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        found = listed_words(first, second, row, word, words, group, HAS_SECOND, ACROSS)
        sizes = population_count(found)
        at = end + tl.cumsum(sizes, axis=0) - sizes
        for _ in range(tl.max(sizes, axis=0)):
            lowest = population_count((found & -found) - 1)
            tl.store(columns + at, 32 * word + lowest, mask=(found != 0) & (at < capacity))
            found &= found - 1
            at += 1
        end += tl.sum(sizes, axis=0)


def draw(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """The drawn negatives R bit-packed, (rows, ceil(columns / 32)) int32."""
    words = words_per_row(columns)
    bits = torch.empty((rows, words), dtype=torch.int32, device=seed.device)
    config = _triton.configuration(draw_negatives_kernel, bits)
    grid = (rows, triton.cdiv(words, config["BLOCK_WORDS"]))
    _triton.launch(draw_negatives_kernel, grid, bits, seed, columns, words, int(rate * 2**32), **config)
    return bits


def transpose(bits: Tensor, columns: int) -> Tensor:
    """The transpose of packed bits (R, ceil(columns / 32)), (columns, ceil(R / 32)) int32."""
    rows, words = bits.shape
    transposed = bits.new_empty((columns, words_per_row(rows)))
    config = _triton.configuration(transpose_bits_kernel, bits)
    grid = (triton.cdiv(columns, config["BLOCK_COLUMNS"]), triton.cdiv(transposed.shape[1], config["BLOCK_WORDS"]))
    _triton.launch(transpose_bits_kernel, grid, bits, transposed, rows, columns, words, transposed.shape[1], **config)
    return transposed


def count(first: Tensor, second: Tensor | None = None, group: int | None = None) -> Tensor:
    """Set bits of each row of one mask, or of the union of two, outside of the row's `group`, (R,) int32."""
    first = first.contiguous()
    rows, words = first.shape
    counts = first.new_empty(rows)
    config = _triton.configuration(count_bits_kernel, first)
    constants = {"HAS_SECOND": second is not None, "ACROSS": group is not None}
    arguments = (first, first if second is None else second, counts, words, group or 1)
    _triton.launch(count_bits_kernel, (rows,), *arguments, **constants, **config)
    return counts


def offsets_of(counts: Tensor) -> Tensor:
    """Where each row's list starts and the last one ends, (R + 1,) int64."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def columns_of(
    first: Tensor,
    offsets: Tensor,
    enabled: Tensor,
    capacity: int,
    second: Tensor | None = None,
    group: int | None = None,
) -> Tensor:
    """The lists of the set bits that `count` counts, one after another, (capacity,) int32, if `enabled`."""
    rows, words = first.shape
    columns = first.new_empty(capacity)
    config = _triton.configuration(list_bits_kernel, first)
    constants = {"HAS_SECOND": second is not None, "ACROSS": group is not None}
    arguments = (first, first if second is None else second, offsets, enabled, columns, capacity, words, group or 1)
    _triton.launch(list_bits_kernel, (rows,), *arguments, **constants, **config)
    return columns
