"""Triton kernels before any logit: the drawn negatives, the numbers of pairs, and lists of their columns.

Each row takes its place in a list by one atomic addition of its length, so a kernel that counts also lists. Where the
rows are in memory depends on the order in which programs run; what a row holds does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton_functions import bits_at, low_bits, population_count


@triton.jit
def take_places(state, length, count, capacity):
    """Where `count` more entries begin in a list whose length is state[length]; state[0] = 1 if they do not fit."""
    first = tl.atomic_add(state + length, count.to(tl.int64), sem="relaxed")
    tl.store(state, 1, mask=first + count > capacity)
    return first


@triton.jit
def words_across(words_of_row, row, word, group):
    """Words of a row without the columns of the row's own image."""
    start = row // group * group
    return words_of_row & (~low_bits(start + group - 32 * word) | low_bits(start - 32 * word))


@triton.jit
def listed_words(positives, specific, row, word, words, group, HAS_SPECIFIC: tl.constexpr):
    """Words of A or S of a row, in other images."""
    at = row.to(tl.int64) * words + word
    found = tl.load(positives + at, mask=word < words, other=0)
    if HAS_SPECIFIC:
        found |= tl.load(specific + at, mask=word < words, other=0)
    return words_across(found, row, word, group)


@triton.jit(do_not_specialize=["columns", "words", "threshold"])
def draw_negatives_kernel(bits, seed, columns, words, threshold, BLOCK_WORDS: tl.constexpr):
    """Bit j of row i = word j % 4 of Philox(counter (j // 4, i, 0, 0), seed) < threshold, for j < columns.

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


@triton.jit(do_not_specialize=["rows", "columns", "words", "words_transposed", "stage_columns", "capacity"])
def transpose_negatives_kernel(
    negatives, transposed, below, slot_ranges, state, rows, columns, words, words_transposed, stage_columns, capacity,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Bit p of transposed[j] = bit j of negatives[p]; below[j, w] = how many are set in words before w.

    Column j takes as many places of its stage as it has set bits: slot_ranges[j]. Grid (stages, blocks of columns).
    Bytes: reads each word for 32 columns, from cache but once; writes 8 a word.
    """
    stage = tl.program_id(0)
    column = stage * stage_columns + tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < tl.minimum((stage + 1) * stage_columns, columns)
    counted = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for start in range(0, words_transposed, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        gathered = tl.zeros((BLOCK_WORDS, BLOCK_COLUMNS), tl.int32)
        for bit in range(32):
            row = (32 * word + bit)[:, None]
            is_set = bits_at(negatives, row, words, column[None, :], inside[None, :] & (row < rows))
            gathered |= is_set.to(tl.int32) << bit
        sizes = population_count(gathered)
        at = column.to(tl.int64)[None, :] * words_transposed + word[:, None]
        kept = inside[None, :] & (word < words_transposed)[:, None]
        tl.store(transposed + at, gathered, mask=kept)
        tl.store(below + at, counted[None, :] + tl.cumsum(sizes, axis=0) - sizes, mask=kept)
        counted += tl.sum(sizes, axis=0)
    ends = take_places(state, 5 + stage, tl.sum(counted, axis=0), capacity) + tl.cumsum(counted, axis=0)
    tl.store(slot_ranges + 2 * column, ends - counted, mask=inside)
    tl.store(slot_ranges + 2 * column + 1, ends, mask=inside)


@triton.jit(do_not_specialize=["words", "words_transposed", "capacity", "longest"])
def list_negatives_kernel(
    negatives, transposed, below, slot_ranges, ranges, columns, slots, state, words, words_transposed,
    capacity, longest, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """columns = those of the set bits of each position; slots = the place of each in its column's range.

    state[0] = 1 also if a list is longer than `longest`. Grid (positions,). Bytes: reads the rows, and 16 a set bit;
    writes 8 a set bit.
    """
    position = tl.program_id(0)
    row = negatives + position.to(tl.int64) * words
    counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        counted += population_count(tl.load(row + word, mask=word < words, other=0))
    count = tl.sum(counted, axis=0)
    end = take_places(state, 4, count, capacity)
    tl.store(state, 1, mask=count > longest)
    tl.store(ranges + 2 * position, end)
    tl.store(ranges + 2 * position + 1, end + count)
    if end + count <= capacity:
        earlier = low_bits(position % 32)
        for start in range(0, words, BLOCK_WORDS):
            word = start + tl.arange(0, BLOCK_WORDS)
            found = tl.load(row + word, mask=word < words, other=0)
            sizes = population_count(found)
            at = end + tl.cumsum(sizes, axis=0) - sizes
            for _ in range(tl.max(sizes, axis=0)):
                column = 32 * word + population_count((found & -found) - 1)  # of the lowest set bit
                of_column = column.to(tl.int64) * words_transposed + position // 32
                own = tl.load(transposed + of_column, mask=found != 0, other=0) & earlier
                slot = tl.load(slot_ranges + 2 * column, mask=found != 0, other=0) + population_count(own)
                slot += tl.load(below + of_column, mask=found != 0, other=0)
                tl.store(columns + at, column, mask=found != 0)
                tl.store(slots + at, slot.to(tl.int32), mask=found != 0)
                found &= found - 1
                at += 1
            end += tl.sum(sizes, axis=0)


@triton.jit(do_not_specialize=["anchors", "words", "group", "first", "capacity"])
def list_positives_kernel(
    positives, specific, negatives, counts, ranges, columns, state, anchors, words, group, first, capacity,
    HAS_SPECIFIC: tl.constexpr, SAMPLED: tl.constexpr, LISTED: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    PART: tl.constexpr = False,
):  # fmt: skip
    """counts (R, 3) = the sizes of A_i, S_i and Den_i. With LISTED columns = A or S in other images; else state[0] = 1.

    Rows of a PART are of anchors from `first` on. Grid (R,). Bytes: reads the rows, again from cache where they are
    listed; writes 4 a listed column. A round for each set bit of the word that has most.
    """
    row = tl.program_id(0)
    agnostic_counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    specific_counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    denominator_counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    listed_counted = tl.zeros((BLOCK_WORDS,), tl.int32)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        at = row.to(tl.int64) * words + word
        agnostic = tl.load(positives + at, mask=word < words, other=0)
        agnostic_counted += population_count(agnostic)
        found = agnostic
        if HAS_SPECIFIC:
            task = tl.load(specific + at, mask=word < words, other=0)
            specific_counted += population_count(task)
            found |= task
        if SAMPLED:
            drawn = tl.load(negatives + (row % group).to(tl.int64) * words + word, mask=word < words, other=0)
            anchor = row
            if PART:
                anchor += first
            own = tl.where(word == anchor // 32, tl.full((), 1, tl.int32) << (anchor % 32), 0)
            denominator_counted += population_count((agnostic | drawn) & ~own)
        if LISTED:
            listed_counted += population_count(words_across(found, row, word, group))
    tl.store(counts + 3 * row, tl.sum(agnostic_counted, axis=0))
    tl.store(counts + 3 * row + 1, tl.sum(specific_counted, axis=0))
    if SAMPLED:
        tl.store(counts + 3 * row + 2, tl.sum(denominator_counted, axis=0))
    else:
        tl.store(counts + 3 * row + 2, anchors - 1)
    if LISTED:
        count = tl.sum(listed_counted, axis=0)
        end = take_places(state, 3, count, capacity)
        tl.store(ranges + 2 * row, end)
        tl.store(ranges + 2 * row + 1, end + count)
        if end + count <= capacity:
            for start in range(0, words, BLOCK_WORDS):
                word = start + tl.arange(0, BLOCK_WORDS)
                found = listed_words(positives, specific, row, word, words, group, HAS_SPECIFIC)
                sizes = population_count(found)
                at = end + tl.cumsum(sizes, axis=0) - sizes
                for _ in range(tl.max(sizes, axis=0)):
                    tl.store(columns + at, 32 * word + population_count((found & -found) - 1), mask=found != 0)
                    found &= found - 1
                    at += 1
                end += tl.sum(sizes, axis=0)
    else:
        tl.store(state, 1, mask=row == 0)
