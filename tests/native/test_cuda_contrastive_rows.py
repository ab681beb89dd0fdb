"""The CUDA kernels of the loss that put together what is known of each anchor, and add listed pairs."""

from __future__ import annotations

import pytest
import torch
from contrastive_lists import listed, slots_of

from hpkernels import _native
from hpkernels.ops._bits import pack_bits
from hpkernels.ops._cuda import aligned_rows

DEVICE = "cpu" if _native.EMULATED else "cuda"
IMAGES, GROUP, SCALE, LOSS_SCALE = 7, 11, 1.7, 1.5
ANCHORS = IMAGES * GROUP
kernels = torch.ops.hpkernels_cuda

pytestmark = pytest.mark.skipif(
    not _native.LIBRARIES["_C_cuda"].ok, reason=f"needs the CUDA kernels: {_native.LIBRARIES['_C_cuda'].reason}"
)


class Problem:
    """Symmetric A and S, lists of their pairs of two images, and R."""

    def __init__(self, generator, dim=24, dtype=torch.float32, specific=True, group=GROUP, anchors=ANCHORS, rate=0.3):
        self.generator, self.group, self.anchors = generator, group, anchors
        self.z = torch.randn(anchors, dim, generator=generator).to(DEVICE, dtype) / dim**0.5
        self.rows = aligned_rows(self.z)
        self.agnostic, self.task = (self.symmetric(rate) for _ in range(2))
        if not specific:
            self.task = torch.zeros_like(self.task)
        image = torch.arange(anchors, device=DEVICE) // group
        self.across = image[:, None] != image
        for mask in (self.agnostic, self.task):  # an anchor with an empty list
            mask[5] = mask[:, 5] = False
        self.drawn = (torch.rand(group, anchors, generator=generator) < 0.4).to(DEVICE)
        self.lists = listed((self.agnostic | self.task) & self.across, generator)
        self.state = torch.tensor([0, IMAGES - 1, IMAGES - 3, 0, 0, 0], device=DEVICE)
        self.bits = (pack_bits(self.agnostic), pack_bits(self.task) if specific else None, pack_bits(self.drawn), group)

    def symmetric(self, rate):
        mask = torch.rand(self.anchors, self.anchors, generator=self.generator) < rate
        return (mask | mask.T).to(DEVICE)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def of_listed(self):
        """Logits, and A, S and Den of the listed pairs."""
        z = self.z.double()
        agnostic, task = self.agnostic & self.across, self.task & self.across
        denominator = agnostic & ~self.drawn.repeat(self.anchors // self.group, 1)
        return SCALE * z @ z.T, agnostic, task, denominator

    def forward(self, parts, within=None, log_sums=None, square=1.0, lists=True):
        """The statistics and the parts of the loss; `self.weights` are made up."""
        self.weights = self.random(self.anchors, 4).abs()
        rows = torch.full((self.anchors, 4), torch.nan, device=DEVICE)
        losses = torch.full((kernels.contrastive_rows_parts(self.anchors),), torch.nan, device=DEVICE)
        square = torch.tensor(square, device=DEVICE)
        ranges, columns = self.lists if lists else (None, None)
        of_rows = (self.weights, self.state, ranges, columns, SCALE, LOSS_SCALE, square)
        kernels.contrastive_rows_forward(self.rows, *self.bits, *of_rows, parts, within, log_sums, rows, losses)
        return rows, losses

    def check(self, found, log_sums, agnostic, task):
        """Of all that is known of an anchor, (n, N), (N,) and (N,) float64."""
        rows, losses = found
        log_denominator = log_sums.logsumexp(dim=0)
        log_denominator = log_denominator.where(log_denominator > -torch.inf, 0)
        counts, weights = self.weights.double().split(2, dim=1)
        pulls = weights * LOSS_SCALE / self.state[1:3].clamp(min=1)
        push = (pulls * counts).sum(dim=1)
        expected = torch.cat((log_denominator[:, None], push[:, None], pulls), dim=1)
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-5)
        loss = (push * log_denominator - pulls[:, 0] * agnostic - pulls[:, 1] * task).sum()
        torch.testing.assert_close(losses.double().sum(), loss, rtol=1e-5, atol=1e-4)

    def parts(self, count):
        """Made-up parts, of which the anchors 5 and 6 have no denominator."""
        parts = self.random(count, 3, self.anchors)
        parts[:, 0, 5:7] = -torch.inf
        parts[0, 0, 8] = -torch.inf
        return parts


# Rows of up to 32, 64 and 128 chunks of 16 bytes, which stay in registers, and longer ones; parts of a chunk.
CASES = [(torch.float32, dim) for dim in (1, 4, 70, 200, 500, 600, 1030)]
CASES += [(dtype, dim) for dtype in (torch.float16, torch.bfloat16) for dim in (3, 200, 500, 1000, 1100)]


@pytest.mark.parametrize(("dtype", "dim"), CASES)
@pytest.mark.parametrize("specific", [False, True])
def test_forward_with_lists(dtype, dim, specific, generator):
    problem = Problem(generator, dim, dtype, specific)
    within, log_sums = problem.parts(2), problem.random(ANCHORS)
    log_sums[5:7] = -torch.inf
    unwritten = torch.full((3, 3, ANCHORS), torch.nan, device=DEVICE)
    found = problem.forward(unwritten, within, log_sums)
    logits, agnostic, task, denominator = problem.of_listed()
    of_listed = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    log_sums = torch.cat((within[:, 0].double(), log_sums[None], of_listed[None]))
    sums = [within[:, i].double().sum(dim=0) + (logits * mask).sum(dim=1) for i, mask in ((1, agnostic), (2, task))]
    problem.check(found, log_sums, *sums)
    assert found[0][5, 0] == 0


@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize("lists", [True, False])
def test_forward_of_blocks(count, lists, generator):
    """Where lists do not fit, and where there are none."""
    problem = Problem(generator)
    problem.state[:3] = torch.tensor([int(lists), 0, 1])
    parts = problem.parts(count)
    unwritten = [torch.full(shape, torch.nan, device=DEVICE) for shape in ((2, 3, ANCHORS), (ANCHORS,))]
    found = problem.forward(parts, *(unwritten if lists else (None, None)), lists=lists)
    log_sums, *sums = parts.double().unbind(dim=1)
    problem.check(found, log_sums, *(part.sum(dim=0) for part in sums))


def test_forward_without_negatives_of_its_own(generator):
    """No R: every other anchor is a negative, and there are no lists."""
    problem = Problem(generator)
    problem.bits = (*problem.bits[:2], None, GROUP)
    parts = problem.parts(2)
    log_sums, *sums = parts.double().unbind(dim=1)
    problem.check(problem.forward(parts, lists=False), log_sums, *(part.sum(dim=0) for part in sums))


def test_forward_of_long_lists(generator):
    """Several times 32 columns, large logits."""
    problem = Problem(generator, 8, group=4, anchors=200, rate=0.7)
    problem.z *= 40
    problem.rows = aligned_rows(problem.z)
    nothing = torch.zeros(1, 3, 200, device=DEVICE)
    nothing[0, 0] = -torch.inf
    rows, _ = problem.forward(nothing, nothing, nothing[0, 0].contiguous())
    logits, _, _, denominator = problem.of_listed()
    assert logits.max() > 1000
    expected = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    expected[5] = 0
    torch.testing.assert_close(rows[:, 0].double(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("square", [torch.finfo(torch.float32).max, torch.nan])
def test_square_that_is_not_finite(square, generator):
    problem = Problem(generator)
    _, losses = problem.forward(problem.parts(2), square=square, lists=False)
    assert losses.isnan().sum() == (square != square)


def test_nan_reaches_the_statistics(generator):
    problem = Problem(generator)
    problem.z[7, 20] = torch.nan
    problem.rows = aligned_rows(problem.z)
    within = problem.parts(1).clamp(min=-10)
    rows, _ = problem.forward(within, within, within[0, 0].contiguous())
    _, _, _, denominator = problem.of_listed()
    expected = denominator[:, 7].clone()
    expected[7] = denominator[7].any()
    assert torch.equal(rows[:, 0].isnan(), expected)


class Gradients(Problem):
    """Also made-up numbers, sums and staged rows."""

    def __init__(self, generator, *arguments, of_place=1, stages=1, **options):
        super().__init__(generator, *arguments, **options)
        self.numbers = torch.rand(self.anchors, 4, generator=generator).to(DEVICE)
        self.sums = self.random(*self.rows.shape)
        lists = listed(self.drawn, generator)
        _, self.slot_ranges, taken = slots_of(*lists, self.anchors, stages, generator)
        self.staged = [self.random(places, of_place, self.rows.shape[1]).to(self.z.dtype) for places in taken]

    def backward(self, columns, staged, factor, out):
        ranges = (*self.lists, self.slot_ranges, *columns)
        inputs = (self.rows, *self.bits, self.state, *ranges, SCALE, self.numbers)
        kernels.contrastive_rows_backward(*inputs, self.sums, staged, factor, out)

    def staged_sums(self, columns, staged):
        """(N, D) float64, 0 for other columns."""
        sums = torch.zeros(self.rows.shape, dtype=torch.float64, device=DEVICE)
        for column in range(*columns):
            first, end = self.slot_ranges[column].tolist()
            sums[column] = staged[first:end].double().sum(dim=(0, 1))
        return sums

    def of_lists(self):
        r, f, pull, specific = self.numbers.double().T[:, :, None]
        logits, agnostic, task, denominator = self.of_listed()
        g = f * (logits - r).exp().where(denominator, 0) - pull * agnostic - specific * task
        return (g + g.T) @ self.rows.double()


# What a rounding of the result to its dtype may differ by.
def tolerance(dtype):
    return {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 2e-5}


@pytest.mark.parametrize(("dtype", "dim"), CASES)
@pytest.mark.parametrize("specific", [False, True])
def test_backward(dtype, dim, specific, generator):
    problem = Gradients(generator, dim, dtype, specific, of_place=2 if specific else 1)
    everything, (staged,), factor = (0, ANCHORS), problem.staged, torch.tensor(0.3, device=DEVICE)
    expected = 0.3 * (problem.sums.double() + problem.staged_sums(everything, staged) + problem.of_lists())
    out = torch.full((ANCHORS, dim), torch.nan, device=DEVICE, dtype=dtype)
    problem.backward(everything, staged, factor, out)
    torch.testing.assert_close(out.double(), expected[:, :dim], **tolerance(dtype))


@pytest.mark.parametrize("dim", [70, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_of_stages(dim, dtype, generator):
    problem = Gradients(generator, dim, dtype, stages=3)
    expected = problem.sums.double()
    for first, staged in zip(range(0, ANCHORS, 26), problem.staged, strict=True):
        columns = (first, min(first + 26, ANCHORS))
        expected += problem.staged_sums(columns, staged)
        problem.backward(columns, staged, None, problem.sums)
        torch.testing.assert_close(problem.sums.double(), expected, **tolerance(torch.float32))
    out, factor = torch.full_like(problem.z, torch.nan), torch.tensor(2.0, device=DEVICE)
    expected = 2 * (problem.sums.double() + problem.of_lists())
    problem.backward((0, ANCHORS), None, factor, out)
    torch.testing.assert_close(out.double(), expected[:, :dim], **tolerance(dtype))


def test_backward_that_does_not_fit(generator):
    problem = Gradients(generator)
    problem.state[0] = 1
    before, out = problem.sums.clone(), torch.zeros_like(problem.z)
    problem.backward((0, ANCHORS), problem.staged[0], torch.tensor(1.0, device=DEVICE), out)
    problem.backward((0, ANCHORS), problem.staged[0], None, problem.sums)
    assert not out.any() and torch.equal(problem.sums, before)
