"""The CUDA kernels of the sampled negatives of the loss, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from contrastive_lists import listed, slots_of

from hpkernels import _native
from hpkernels.ops import _cuda
from hpkernels.testing import available_cases

CASES = [case for case in available_cases("masked_topk", _cuda.DTYPES) if case.backend == "cuda"]
SCALE = 1.7
kernels = torch.ops.hpkernels_cuda

pytestmark = pytest.mark.skipif(not CASES, reason=f"needs the CUDA kernels: {_native.LIBRARIES['_C_cuda'].reason}")


class Problem:
    """Drawn columns of each position; a position without any, and one with all."""

    def __init__(self, case, images, group, dim, rate, stages=1):
        self.generator, self.group, self.anchors = torch.Generator().manual_seed(dim), group, images * group
        z = torch.randn(self.anchors, dim, generator=self.generator) / dim**0.5
        self.rows = _cuda.aligned_rows(z.to(case.device, case.dtype))
        drawn = torch.rand(group, self.anchors, generator=self.generator) < rate
        drawn[-1] = True
        drawn[0] = False
        image = torch.arange(self.anchors) // group
        self.across = (drawn.repeat(images, 1) & (image[:, None] != image)).to(case.device)
        self.lists = listed(drawn.to(case.device), self.generator)
        slots = slots_of(*self.lists, self.anchors, stages, self.generator)
        self.slots, self.slot_ranges, self.taken = slots
        self.state = torch.zeros(6, dtype=torch.int64, device=case.device)
        self.numbers = torch.rand(self.anchors, 4, generator=self.generator).to(case.device)
        self.numbers[:, 1] *= 2.0**10
        width = -(-self.anchors // stages)
        self.stages = [(first, min(first + width, self.anchors)) for first in range(0, self.anchors, width)]

    def logits(self):
        rows = self.rows.double()
        return SCALE * rows @ rows.T

    def log_sums(self, found):
        inputs = (self.rows, self.group, *self.lists, self.state, SCALE)
        kernels.contrastive_sampled_forward(*inputs, found)
        return found

    def backward(self, stage, sums, staged):
        lists = (*self.lists, self.slots, self.state, *self.stages[stage])
        kernels.contrastive_sampled_backward(self.rows, self.group, *lists, SCALE, self.numbers, sums, staged)

    def room(self, stage):
        """For what is staged, and for a place more."""
        shape = (self.taken[stage] + 1, kernels.contrastive_staged_rows(self.rows, self.group), self.rows.shape[1])
        return torch.full(shape, torch.nan, device=self.rows.device, dtype=self.rows.dtype)

    def check_backward(self):
        """Each gradient within the rounding of its summands; returns what was found."""
        r, f = self.numbers.double()[:, :2, None].unbind(dim=1)
        g = (f * (self.logits() - r).exp()).where(self.across, 0)
        rows = self.rows.double()
        epsilon = max(torch.finfo(self.rows.dtype).eps, 4e-6)
        sums = torch.randn(rows.shape, generator=self.generator).to(rows.device)
        found = []
        for stage, (first, last) in enumerate(self.stages):
            before, staged = sums.double(), self.room(stage)
            self.backward(stage, sums, staged)
            assert staged[-1].isnan().all()
            of_stage = g[:, first:last]
            summands = of_stage.abs() @ rows[first:last].abs() + before.abs()
            assert ((sums.double() - before - of_stage @ rows[first:last]).abs() <= epsilon * summands).all()
            columns = torch.stack(
                [staged[slice(*self.slot_ranges[column])].double().sum(dim=(0, 1)) for column in range(first, last)]
            )
            assert ((columns - of_stage.T @ rows).abs() <= epsilon * (of_stage.T.abs() @ rows.abs()) + 1e-9).all()
            found += [sums.clone(), staged]
        return found


# Images for one block and for two; lists for one tile and for several; rows of a part and of several parts of what the
# engines have at a time.
SHAPES = [(3, 5, 24, 0.5), (70, 3, 200, 0.8), (66, 2, 330, 0.5), (9, 40, 130, 0.3)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(engine, case, shape):
    problem = Problem(case, *shape)
    found = problem.log_sums(torch.full((problem.anchors,), torch.nan, device=case.device))
    expected = problem.logits().masked_fill(~problem.across, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (found[:: problem.group] == -torch.inf).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(engine, case, shape):
    Problem(case, *shape).check_backward()


@pytest.mark.parametrize("stages", [2, 5])
def test_stages(one_case, stages):
    Problem(one_case, 9, 40, 72, 0.3, stages).check_backward()


def test_the_same_again(one_case):
    found = [Problem(one_case, *SHAPES[1]).check_backward() for _ in range(2)]
    assert all(torch.equal(a[~a.isnan()], b[~b.isnan()]) for a, b in zip(*found, strict=True))


def test_lists_that_do_not_fit(one_case):
    problem = Problem(one_case, *SHAPES[0])
    problem.state[0] = 1
    found = problem.log_sums(torch.zeros(problem.anchors, device=one_case.device))
    sums, staged = torch.zeros(problem.rows.shape, device=one_case.device), problem.room(0).zero_()
    problem.backward(0, sums, staged)
    assert not found.any() and not sums.any() and not staged.any()


def test_long_rows(one_case):
    """Longer than what the engine for sm_90a takes."""
    Problem(one_case, 5, 6, 700, 0.5).check_backward()
