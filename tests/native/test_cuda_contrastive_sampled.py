"""The CUDA kernels of the sampled negatives of the loss, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from contrastive_lists import Sampled

from hpkernels import _native
from hpkernels.ops import _cuda
from hpkernels.testing import available_cases

CASES = [case for case in available_cases("masked_topk", _cuda.DTYPES) if case.backend == "cuda"]

pytestmark = pytest.mark.skipif(not CASES, reason=f"needs the CUDA kernels: {_native.LIBRARIES['_C_cuda'].reason}")


# Images for one block and for two; lists for one tile and for several; rows of a part and of several parts of what the
# engines have at a time.
SHAPES = [(3, 5, 24, 0.5), (70, 3, 200, 0.8), (66, 2, 330, 0.5), (9, 40, 130, 0.3)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(engine, case, shape):
    Sampled(case, *shape).check_forward()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(engine, case, shape):
    Sampled(case, *shape).check_backward()


@pytest.mark.parametrize("stages", [2, 5])
def test_stages(one_case, stages):
    Sampled(one_case, 9, 40, 72, 0.3, stages).check_backward()


def test_the_same_again(one_case):
    found = [Sampled(one_case, *SHAPES[1]).check_backward() for _ in range(2)]
    assert all(torch.equal(a[~a.isnan()], b[~b.isnan()]) for a, b in zip(*found, strict=True))


def test_lists_that_do_not_fit(one_case):
    problem = Sampled(one_case, *SHAPES[0])
    problem.state[0] = 1
    found = problem.log_sums(torch.zeros(problem.anchors, device=one_case.device))
    sums, staged = torch.zeros(problem.rows.shape, device=one_case.device), problem.room(0).zero_()
    problem.backward(0, sums, staged)
    assert not found.any() and not sums.any() and not staged.any()


def test_long_rows(one_case):
    """Longer than what the engine for sm_90a takes."""
    Sampled(one_case, 5, 6, 700, 0.5).check_backward()
