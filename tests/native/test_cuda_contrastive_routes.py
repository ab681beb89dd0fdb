"""The routes of the CUDA backend of `multi_positive_contrastive` across strips, tiles and blocks of features."""

from __future__ import annotations

import pytest
import torch

from hpkernels import PositiveMask, backends, multi_positive_contrastive
from hpkernels.ops import _cuda
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive import lists, reference
from hpkernels.testing import assert_rows_close, available_cases, random_problem, row_errors

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _cuda.DTYPES) if case.backend == "cuda"]
pytestmark = pytest.mark.skipif(
    not CASES, reason=backends.availability(OP, "cuda", "cuda" if torch.cuda.is_available() else "cpu").reason
)
SEED, TEMPERATURE, GROUP = 3, 0.3, 7 * 15


@pytest.fixture
def kernels():
    return backends.implementation(OP, "cuda")


class Loss:
    """The loss of three images with few positives across them."""

    def __init__(self, case, dim, rate, symmetric=True, negatives=None):
        problem = random_problem(images=3, height=7, width=15, dim=dim, dtype=case.dtype, device=case.device)
        self.z, self.rate, self.symmetric, self.negatives = problem.z, rate, symmetric, negatives
        generator = torch.Generator().manual_seed(0)
        image = torch.arange(len(self.z)) // GROUP
        density = torch.where(image[:, None] == image, 0.1, 0.01)
        masks = [torch.rand(density.shape, generator=generator) < density for _ in range(2)]
        self.masks = [(mask | mask.T if symmetric else mask).fill_diagonal_(False) for mask in masks]

    def by(self, kernels):
        """The loss and the gradient."""
        seed = torch.tensor(SEED, device=self.z.device)
        masks = [PositiveMask.from_dense(mask.to(self.z.device)).bits for mask in self.masks]
        weight = torch.tensor(0.5, device=self.z.device)
        given = None if self.negatives is None else self.negatives.to(self.z.device)
        options = (GROUP, TEMPERATURE, 1.5, self.rate, "joint", True, False)
        losses, rows = kernels.forward([self.z], *masks, weight, given, seed, *options)
        options = (GROUP, TEMPERATURE, self.rate, self.symmetric)
        (grad,) = kernels.backward(torch.full_like(losses, 2.0), [self.z], *masks, given, seed, rows, *options)
        return losses[0], grad

    def expected(self, dtype):
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        drawn = bernoulli(torch.tensor(SEED), GROUP, len(leaf), self.rate) if self.negatives is None else self.negatives
        options = {"anchors_per_image": GROUP, "temperature": TEMPERATURE, "scale": 1.5, "reweight": True}
        loss, _ = reference.contrastive_loss(leaf, *self.masks, 0.5, drawn, **options)
        return loss.detach(), torch.autograd.grad(2 * loss, leaf)[0]

    def check(self, kernels):
        """Compare with the reference, and a second time with the first, bit by bit."""
        loss, grad = self.by(kernels)
        (exact, exact_grad), (plain, plain_grad) = self.expected(torch.float64), self.expected(torch.float32)
        assert_rows_close(loss, exact, plain)
        assert_rows_close(grad, exact_grad, plain_grad.to(self.z.dtype))
        return loss, grad


# Rows of several steps of a product, and more features than a block has sums of.
LONG = {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_blocks(kernels, engine, case, rate, monkeypatch):
    monkeypatch.setattr(lists, "lists_may_pay", lambda *_: False)
    Loss(case, LONG[case.dtype], rate).check(kernels)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("density", [1.0, 0.0], ids=["lists", "too many for lists"])
def test_lists(kernels, case, density, monkeypatch):
    monkeypatch.setattr(lists, "lists_may_pay", lambda *_: True)
    monkeypatch.setattr(lists, "MOST_LISTED_DENSITY", density)
    Loss(case, LONG[case.dtype], 0.05).check(kernels)


def test_masks_that_are_not_symmetric(kernels, one_case):
    negatives = torch.rand(GROUP, 3 * GROUP, generator=torch.Generator().manual_seed(1)) < 0.3
    Loss(one_case, 20, 1.0, symmetric=False, negatives=negatives).check(kernels)
    Loss(one_case, 20, 1.0, symmetric=False).check(kernels)


def test_gradients_are_staged_in_turn(kernels, monkeypatch):
    monkeypatch.setattr(lists, "lists_may_pay", lambda *_: True)
    monkeypatch.setattr(lists, "MOST_LISTED_DENSITY", 1.0)
    loss = Loss(CASES[-1], 20, 0.05)
    value, grad = loss.by(kernels)
    monkeypatch.setattr(lists, "_STAGED_BYTES", 1)
    same_value, same_grad = loss.check(kernels)
    assert torch.equal(value, same_value)
    torch.testing.assert_close(grad, same_grad)
    again = loss.by(kernels)
    assert torch.equal(again[0], same_value) and torch.equal(again[1], same_grad)


def test_infinite_logits_are_not_silent(kernels):
    loss = Loss(CASES[0], 20, 0.05)
    loss.z[40, 3] = torch.nan
    assert loss.by(kernels)[0].isnan()


@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_gradients_of_uneven_images_in_float16(rate):
    """Of two images one keeps two anchors and the other all: the rows of this have coefficients a 500th of the rest."""
    group, device = 512, CASES[0].device
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2 * group, 16, generator=generator, dtype=torch.float64), dim=1)
    z = z.half().to(device)
    mask = torch.zeros(2 * group, 2 * group, dtype=torch.bool, device=device)
    mask[group:, group:] = True
    mask[0, 1] = mask[1, 0] = True

    def gradient(z, backend):
        leaf = z.detach().requires_grad_()
        settings = {"anchors_per_image": group, "temperature": 0.4, "reweight": True, "seed": 0}
        loss = multi_positive_contrastive(leaf, mask, negative_rate=rate, backend=backend, **settings)
        (grad,) = torch.autograd.grad(loss * 2**14, leaf)
        return grad.cpu().double()

    expected = gradient(z.double(), "reference")
    errors = row_errors(gradient(z, "cuda"), expected) / expected.norm(dim=1)
    assert errors.max() < 1e-3, f"row {int(errors.argmax())} by {errors.max():.2e}"
