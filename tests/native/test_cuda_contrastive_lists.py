"""The CUDA kernels of the loss that need no tensor cores: bits, lists, and pairs by lists, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from hpkernels import _native
from hpkernels.ops._cuda import aligned_rows
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


class Problem:
    """Symmetric A and S of the pairs of two images, lists of them, and R; `anchors` of `group` an image."""

    def __init__(self, generator, anchors, group, dim, dtype=torch.float32, specific=True, rate=0.3):
        self.anchors, self.group, self.scale = anchors, group, 1.7
        self.z = torch.randn(anchors, dim, generator=generator).to(DEVICE, dtype) / dim**0.5
        self.agnostic, self.task = (self.symmetric(generator, rate) for _ in range(2))
        if not specific:
            self.task = torch.zeros_like(self.task)
        self.agnostic[5], self.task[5] = False, False  # an anchor with an empty list
        self.agnostic[:, 5], self.task[:, 5] = False, False
        self.drawn = random_mask(generator, group, anchors, 0.4)
        positives, specific = pack_bits(self.agnostic), pack_bits(self.task) if specific else None
        offsets = bits.offsets_of(bits.count(positives, specific, group))
        enabled = torch.ones((), dtype=torch.int32, device=DEVICE)
        columns = bits.columns_of(positives, offsets, enabled, int(offsets[-1]), specific, group)
        self.arguments = [positives, specific, pack_bits(self.drawn), columns, offsets, enabled, self.scale]

    def symmetric(self, generator, rate):
        mask = random_mask(generator, self.anchors, self.anchors, rate).triu(1)
        return (mask | mask.T) & outside(self.anchors, self.anchors, self.group).to(DEVICE)

    def disabled(self):
        *arguments, _, scale = self.arguments
        return [*arguments, torch.zeros((), dtype=torch.int32, device=DEVICE), scale]

    def logits_and_denominator(self):
        z = self.z.double()
        return self.scale * z @ z.T, self.agnostic & ~self.drawn.repeat(self.anchors // self.group, 1)


# Rows of up to 32, 64 and 128 chunks of 16 bytes, which stay in registers, and longer ones; parts of a chunk.
CASES = [(torch.float32, dim) for dim in (1, 4, 70, 200, 500, 600, 1030)]
CASES += [(dtype, dim) for dtype in (torch.float16, torch.bfloat16) for dim in (3, 200, 500, 1000, 1100)]


@pytest.mark.parametrize(("dtype", "dim"), CASES)
@pytest.mark.parametrize("specific", [False, True])
def test_pairs_forward(dtype, dim, specific, generator):
    problem = Problem(generator, 77, 11, dim, dtype, specific)
    part = torch.full((5, problem.anchors), torch.nan, device=DEVICE)
    torch.ops.hpkernels_cuda.contrastive_pairs_forward(aligned_rows(problem.z), *problem.arguments, part)
    logits, denominator = problem.logits_and_denominator()
    expected = torch.stack(
        (
            logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1),
            problem.agnostic.sum(dim=1),
            problem.task.sum(dim=1),
            (logits * problem.agnostic).sum(dim=1),
            (logits * problem.task).sum(dim=1),
        )
    )
    torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)
    assert part[0, 5] == -torch.inf


@pytest.mark.parametrize(("dtype", "dim"), CASES)
@pytest.mark.parametrize("specific", [False, True])
def test_pairs_backward(dtype, dim, specific, generator):
    problem = Problem(generator, 77, 11, dim, dtype, specific)
    numbers = torch.rand(4, problem.anchors, generator=generator).to(DEVICE)
    log_denominator, push, pull, pull_specific = numbers.double()[:, :, None]
    logits, denominator = problem.logits_and_denominator()
    g = push * (logits - log_denominator).exp().where(denominator, 0)
    g = g - pull * problem.agnostic - pull_specific * problem.task
    before = torch.randn(problem.anchors, dim, generator=generator).to(DEVICE)
    expected = before.double() + (g + g.T) @ problem.z.double()
    for padding in (0, -dim % 4):  # rows of the gradient at any place, and at multiples of 16 bytes
        grad = torch.nn.functional.pad(before, (0, padding))
        torch.ops.hpkernels_cuda.contrastive_pairs_backward(aligned_rows(problem.z), *problem.arguments, numbers, grad)
        torch.testing.assert_close(grad[:, :dim].double(), expected, rtol=1e-5, atol=2e-5)


def test_long_lists(generator):
    """Several times 32 columns, large logits."""
    problem = Problem(generator, 200, 4, 8, rate=0.7)
    problem.z *= 40
    part = torch.empty((5, problem.anchors), device=DEVICE)
    torch.ops.hpkernels_cuda.contrastive_pairs_forward(problem.z, *problem.arguments, part)
    logits, denominator = problem.logits_and_denominator()
    assert logits.max() > 1000
    expected = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(part[0].double(), expected, rtol=1e-6, atol=1e-3)


def test_pairs_that_are_not_enabled(generator):
    problem = Problem(generator, 22, 11, 8)
    part, grad = torch.zeros(5, 22, device=DEVICE), torch.zeros(22, 8, device=DEVICE)
    torch.ops.hpkernels_cuda.contrastive_pairs_forward(problem.z, *problem.disabled(), part)
    numbers = torch.ones(4, 22, device=DEVICE)
    torch.ops.hpkernels_cuda.contrastive_pairs_backward(problem.z, *problem.disabled(), numbers, grad)
    assert not part.any() and not grad.any()


def test_nan_reaches_the_log_sums(generator):
    problem = Problem(generator, 77, 11, 24)
    problem.z[7, 20] = torch.nan
    part = torch.zeros(5, problem.anchors, device=DEVICE)
    torch.ops.hpkernels_cuda.contrastive_pairs_forward(problem.z, *problem.arguments, part)
    _, denominator = problem.logits_and_denominator()
    expected = denominator[:, 7].clone()
    expected[7] = denominator[7].any()
    assert torch.equal(part[0].isnan(), expected)
