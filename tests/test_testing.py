from __future__ import annotations

import math

import pytest
import torch

import hpkernels
from hpkernels import backends
from hpkernels.testing import (
    Case,
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    random_problem,
    row_errors,
    unchanged,
)


def test_row_errors_are_norms_of_rows():
    expected = torch.zeros(3, 2, 2, dtype=torch.float64)
    actual = expected.clone()
    actual[1] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    actual[2, 0, 0] = -3.0
    assert row_errors(actual, expected).tolist() == [0.0, 2.0, 3.0]
    assert row_errors(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])).tolist() == [0.0, 2.0]
    assert row_errors(torch.tensor(1.5), torch.tensor(1.0)).tolist() == [0.5]


def test_row_errors_are_computed_in_float64():
    actual = torch.tensor([[1.0]], dtype=torch.float16)
    expected = torch.tensor([[1.0 + 1e-12]], dtype=torch.float64)
    assert row_errors(actual, expected).item() == pytest.approx(1e-12, rel=1e-3)


def test_row_errors_of_infinities_and_nan():
    inf, nan = math.inf, math.nan
    errors = row_errors(torch.tensor([inf, -inf, inf, nan, 0.0, nan]), torch.tensor([inf, -inf, -inf, 0.0, nan, nan]))
    assert errors[:3].tolist() == [0.0, 0.0, inf]
    assert errors[3:].isnan().all()


def test_row_errors_refuses_other_shapes():
    with helpful_error(ValueError, "row_errors", "actual", "(2, 1)"):
        row_errors(torch.zeros(2, 1), torch.zeros(2))


EXACT = torch.linspace(1, 2, 3000, dtype=torch.float64).view(1000, 3)


def test_rows_as_good_as_plain_pass():
    plain = EXACT.float()
    assert_rows_close(plain, EXACT, plain)
    assert_rows_close(EXACT, EXACT, EXACT)
    noisy = EXACT + 1e-3
    assert_rows_close(EXACT - 2.9e-3, EXACT, noisy)
    with pytest.raises(AssertionError):
        assert_rows_close(EXACT - 3.1e-3, EXACT, noisy)
    assert_rows_close(EXACT - 3.1e-3, EXACT, noisy, factor=4)


def test_one_wrong_row_fails_and_is_named():
    actual = EXACT.float()
    actual[417, 1] += 1e-4
    actual[3] += 2e-6
    assert (actual - EXACT).norm() / EXACT.norm() < 1e-5  # what a whole-tensor ratio would let pass
    with pytest.raises(
        AssertionError, match=r"^2 of 1000 rows are wrong; the worst is row 417: error 1.00e-04, allowed"
    ):
        assert_rows_close(actual, EXACT, EXACT.float(), eps=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails(bad):
    actual = EXACT.float()
    actual[5, 2] = bad
    for eps in (None, 1e9):
        with pytest.raises(AssertionError, match="worst is row 5"):
            assert_rows_close(actual, EXACT, EXACT.float(), eps=eps)
    # A plain result that broke too excuses nothing.
    with pytest.raises(AssertionError, match="worst is row 5"):
        assert_rows_close(actual, EXACT, actual)


def test_equal_infinities_pass_and_do_not_loosen_the_rest():
    exact = torch.tensor([[1.0, -math.inf], [1.0, 1.0]], dtype=torch.float64)
    assert_rows_close(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="worst is row 1"):
        assert_rows_close(exact.float() + torch.tensor([[0.0], [1e-4]]), exact, exact.float())


def test_default_slack_is_a_few_roundings():
    for dtype, slack in ((torch.float64, 1e-14), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        exact = torch.ones(2, 1, dtype=torch.float64)
        assert_rows_close(exact.to(dtype), exact, exact)
        wrong = exact.to(dtype) + 2 * slack
        with pytest.raises(AssertionError):
            assert_rows_close(wrong, exact, exact)


def test_slack_of_a_row_does_not_grow_with_the_largest_row_in_half_precision():
    exact = torch.tensor([[1.0], [1e-3]], dtype=torch.float64)
    with pytest.raises(AssertionError, match="worst is row 1"):
        assert_rows_close(torch.tensor([[1.0], [2e-3]], dtype=torch.float16), exact, exact.half())


def test_scalars_are_one_row():
    exact = torch.tensor(2.0, dtype=torch.float64)
    assert_rows_close(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="^1 of 1 rows"):
        assert_rows_close(exact.float() + 1e-3, exact, exact.float())


def test_problem_has_the_sizes_asked_for():
    problem = random_problem(images=3, height=2, width=5, dim=7, feature_dim=11, pool_size=13, dtype=torch.float64)
    shapes = {
        "z": (30, 7),
        "z_mixed": (30, 7),
        "features": (30, 11),
        "pool": (13, 11),
        "specific": (30, 7),
        "specific_pool": (13, 7),
    }
    for name, shape in shapes.items():
        value = getattr(problem, name)
        assert value.shape == shape and value.dtype == torch.float64 and not value.requires_grad
        torch.testing.assert_close(value.norm(dim=1), torch.ones(shape[0], dtype=torch.float64))
    assert (problem.images, problem.height, problem.width, problem.anchors_per_image) == (3, 2, 5, 10)
    assert random_problem(images=1, height=1, width=1, dim=1, feature_dim=1, pool_size=1).z.shape == (1, 1)
    assert random_problem(device="meta").z.device.type == "meta"


def test_problem_is_governed_by_its_seed():
    before = torch.random.get_rng_state()
    first, again, other = random_problem(1), random_problem(1), random_problem(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    half = random_problem(1, dtype=torch.float16)
    for name in ("z", "z_mixed", "features", "pool", "specific", "specific_pool"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
        torch.testing.assert_close(getattr(half, name).float(), getattr(first, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_problem_has_positives_and_other_pairs(seed):
    problem = random_problem(seed, images=4, height=6, width=7, pool_size=48)
    for rows, pool in ((problem.features, problem.pool), (problem.specific, problem.specific_pool)):
        threshold = hpkernels.masked_topk(rows, pool).values[:, 0]
        positives = hpkernels.hidden_positives(rows, threshold)
        assert 0.005 < positives.to_dense().double().mean() < 0.25
    # Patches of an image are more alike than patches of different images.
    image = torch.arange(168) // 42
    similarity = problem.features @ problem.features.T
    own = image[:, None] == image
    assert similarity[own & ~torch.eye(168, dtype=torch.bool)].mean() > similarity[~own].mean() + 0.05


def test_available_cases(monkeypatch):
    dtypes = (torch.float32, torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Case("reference", "cpu", torch.float64) in available_cases("masked_topk", dtypes)
    assert [case for case in available_cases("masked_topk", dtypes) if case.device != "cpu"] == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Case("reference", "cuda", torch.float64) in available_cases("masked_topk", dtypes)

    def only_half(op, backend, device_type, dtype):
        return backends.Availability(backend == "triton" and dtype == torch.float16, "")

    monkeypatch.setattr(backends, "availability", only_half)
    found = available_cases("masked_topk", (torch.float32, torch.float16))
    assert [str(case) for case in found] == ["triton-cpu-float16", "triton-cuda-float16"]
    with helpful_error(ValueError, "available_cases", "op", "'topk'"):
        available_cases("topk", dtypes)


@pytest.mark.parametrize(
    "value", [torch.arange(24.0).view(2, 3, 4), torch.arange(5), torch.tensor(3.0), torch.eye(3, 4) > 0], ids=str
)
def test_memory_layouts(value):
    layouts = memory_layouts(value)
    assert list(layouts) == ["reversed", "strided", "offset"]
    for copy in layouts.values():
        assert torch.equal(copy, value) and copy.dtype == value.dtype
        assert copy.data_ptr() != value.data_ptr()
    assert layouts["offset"].storage_offset() > 0
    if value.dim() > 1:
        assert not layouts["reversed"].is_contiguous() and not layouts["strided"].is_contiguous()


def test_unchanged_sees_every_write():
    first, second = torch.zeros(3), torch.tensor([math.nan, 1.0])
    with unchanged(first, second):
        first + 1
    with pytest.raises(AssertionError, match="tensor 1 was modified"), unchanged(first, second):
        second.mul_(1)
    with pytest.raises(AssertionError, match="tensor 0 was modified"), unchanged(first, second):
        first.detach().numpy()[1] = 5.0  # raises no version, as a kernel's write through a pointer
    with pytest.raises(AssertionError, match="tensor 1 was modified"), unchanged(first, second):
        second.numpy()[1] = math.nan
    leaf = torch.ones(2, requires_grad=True)
    with unchanged(leaf):
        leaf.sum().backward()


def test_helpful_error_demands_type_op_argument_and_value():
    def fail(error=ValueError, message="op: `k` must be at least 1, got 0"):
        with helpful_error(ValueError, "op", "k", "0"):
            raise error(message)

    fail()
    for wrong in (
        {"error": TypeError},
        {"error": type("Special", (ValueError,), {})},
        {"message": "other: `k` must be at least 1, got 0"},
        {"message": "op: `n` must be at least 1, got 0"},
        {"message": "op: k must be at least 1, got 0"},
        {"message": "op: `k` must not be 0"},
        {"message": "op: `k` must be at least 0, got 1"},
    ):
        with pytest.raises(AssertionError):
            fail(**wrong)
    with pytest.raises(AssertionError, match="nothing was raised"), helpful_error(ValueError, "op", "k", "0"):
        pass
