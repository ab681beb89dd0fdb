"""The CUDA kernels of the loss that make bits and lists, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from hpkernels import _native
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives.bits import pack_bits
from hpkernels.ops.multi_positive_contrastive import cuda_bits as bits

DEVICE = "cpu" if _native.EMULATED else "cuda"

pytestmark = pytest.mark.skipif(
    not _native.LIBRARIES["_C_cuda"].ok, reason=f"needs the CUDA kernels: {_native.LIBRARIES['_C_cuda'].reason}"
)


def random_mask(generator, rows, columns, rate=0.1):
    return (torch.rand(rows, columns, generator=generator) < rate).to(DEVICE)


def outside(rows, columns, group):
    """(rows, columns) bool: which columns are not of the row's own group."""
    return torch.arange(rows)[:, None] // group != torch.arange(columns) // group


def columns_in_order(mask):
    return mask.nonzero()[:, 1].int()


# Rows of one word, of less and more than a block draws at a time.
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 128), (2, 8300)])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.9999, 1.0])
def test_draw(shape, rate):
    seed = torch.tensor(2**40 + 7, device=DEVICE)
    expected = bernoulli(seed, *shape, rate)
    drawn, counts = bits.draw(seed, *shape, rate)
    assert torch.equal(drawn, pack_bits(expected))
    assert torch.equal(counts, expected.sum(dim=1, dtype=torch.int32))


# Parts of a block of 32 x 32 bits, of a tile of 256 x 256, several tiles in either direction.
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (256, 256), (40, 600), (600, 40), (290, 270)])
def test_transpose(shape, generator):
    mask = random_mask(generator, *shape, rate=0.4)
    assert torch.equal(bits.transpose(pack_bits(mask), shape[1]), pack_bits(mask.T))


# A warp reads 4096 columns at a time; rows of multiples of 128 columns by 16 bytes.
@pytest.mark.parametrize("shape", [(1, 1), (10, 33), (9, 128), (3, 8320), (3, 9000), (520, 520), (640, 640)])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("group", [None, 1, 40, 77])
def test_lists(shape, second, group, generator):
    rows, columns = shape
    mask, other = random_mask(generator, *shape), random_mask(generator, *shape)
    expected = (mask | other if second else mask) & (
        True if group is None else outside(rows, columns, group).to(DEVICE)
    )
    first, second = pack_bits(mask), pack_bits(other) if second else None
    counts = bits.count(first, second, group)
    assert torch.equal(counts, expected.sum(dim=1, dtype=torch.int32))
    listed = int(expected.sum())
    enabled = torch.ones((), dtype=torch.int32, device=DEVICE)
    offsets = bits.offsets_of(counts, enabled, listed)
    assert enabled == 1
    lists = bits.columns_of(first, offsets, enabled, listed, second, group)
    assert torch.equal(lists, columns_in_order(expected))


@pytest.mark.parametrize("words", [slice(0, 4), slice(4, 8), slice(4, 6), slice(3, 8)])
@pytest.mark.parametrize("columns", [256, 288])
def test_count_of_some_words(columns, words, generator):
    mask = random_mask(generator, 20, columns)
    counts = bits.count(pack_bits(mask)[:, words])
    assert torch.equal(counts, mask[:, 32 * words.start : 32 * words.stop].sum(dim=1, dtype=torch.int32))


# A block sums 8192 counts at a time; the sums leave 32 bits.
@pytest.mark.parametrize("rows", [1, 15, 513, 8192, 17000])
def test_offsets(rows, generator):
    counts = torch.randint(0, 2**20, (rows,), generator=generator, dtype=torch.int32).to(DEVICE)
    expected = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    assert torch.equal(bits.offsets_of(counts), expected)
    total = int(expected[-1])
    for before, capacity, after in [(1, total, 1), (1, total - 1, 0), (0, total, 0)]:
        enabled = torch.tensor(before, dtype=torch.int32, device=DEVICE)
        assert torch.equal(bits.offsets_of(counts, enabled, capacity), expected)
        assert enabled == after


def test_no_list_overflows(generator):
    """Nothing is written beyond the room for columns, and nothing at all where lists are not enabled."""
    mask = random_mask(generator, 60, 300)
    expected = columns_in_order(mask)
    offsets = bits.offsets_of(mask.sum(dim=1, dtype=torch.int32))
    for enabled, written in [(1, len(expected) // 2), (0, 0)]:
        room = torch.full((len(expected),), -1, dtype=torch.int32, device=DEVICE)
        columns = room[: len(expected) // 2]
        enabled = torch.tensor(enabled, dtype=torch.int32, device=DEVICE)
        torch.ops.hpkernels_cuda.contrastive_list_bits(pack_bits(mask), None, 0, offsets, enabled, columns)
        assert torch.equal(room[:written], expected[:written])
        assert (room[written:] == -1).all()
