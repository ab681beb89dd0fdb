"""The two routes of the Triton backend of `multi_positive_contrastive`, and the packed bits that they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import resources
from hpkernels import PositiveMask, backends
from hpkernels.ops import _triton
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives.bits import pack_bits, population_count, unpack_bits
from hpkernels.ops.multi_positive_contrastive import lists, reference
from hpkernels.testing import assert_rows_close, available_cases, random_problem
from hpkernels.testing.launches import Sizes, kernel_calls, recorded

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _triton.DTYPES) if case.backend == "triton"]
pytestmark = pytest.mark.skipif(not CASES, reason="Triton is not installed: there are no kernels to test")
DEVICE = CASES[0].device if CASES else "cpu"
SEED, RATE, TEMPERATURE = 3, 0.2, 0.3


@pytest.fixture
def kernels():
    return backends.implementation(OP, "triton")


@pytest.fixture
def bits():
    from hpkernels.ops.multi_positive_contrastive import triton_bits

    return triton_bits


def random_bits(rows, columns, rate=0.3, seed=0):
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < rate).to(DEVICE)


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
def test_drawn_negatives_are_the_same_bits(bits, rate, seed):
    seed = torch.tensor(seed, device=DEVICE)
    assert torch.equal(bits.draw(seed, 5, 171, rate), pack_bits(bernoulli(seed, 5, 171, rate)))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 31), (70, 150)])
def test_transpose(bits, rows, columns):
    mask = random_bits(rows, columns)
    assert torch.equal(bits.transpose(pack_bits(mask), columns), pack_bits(mask.T))


@pytest.mark.parametrize("group", [None, 1, 15, 60])
@pytest.mark.parametrize("two_masks", [False, True])
def test_counts_and_lists(bits, group, two_masks):
    first, second = random_bits(60, 60), random_bits(60, 60, seed=1)
    image = torch.arange(60, device=DEVICE) // (group or 1)
    expected = (first | second if two_masks else first) & ((image[:, None] != image) | (group is None))
    masks = pack_bits(first), pack_bits(second) if two_masks else None
    counts = bits.count(*masks, group)
    assert torch.equal(counts.long(), expected.sum(dim=1))
    offsets, enabled = bits.offsets_of(counts), torch.ones((), dtype=torch.int32, device=DEVICE)
    listed = bits.columns_of(masks[0], offsets, enabled, int(counts.sum()), masks[1], group)
    assert torch.equal(listed.long(), expected.nonzero()[:, 1])


class Loss:
    """Symmetric masks with few positives across images, and the loss by each route."""

    def __init__(self, case, images, height, width, dim):
        problem = random_problem(
            images=images, height=height, width=width, dim=dim, dtype=case.dtype, device=case.device
        )
        self.z, self.group, size = problem.z, problem.anchors_per_image, len(problem.z)
        masks = random_bits(size, size, 0.05), random_bits(size, size, 0.05, seed=1)
        self.masks = [(mask | mask.T).fill_diagonal_(False) for mask in masks]

    def of(self, branches, kernels, symmetric=True):
        """The losses and gradients of some branches."""
        seed = torch.tensor(SEED, device=self.z.device)
        masks = [PositiveMask.from_dense(mask).bits for mask in self.masks]
        weight = torch.tensor(0.5, device=self.z.device)
        options = (self.group, TEMPERATURE, 1.5, RATE, "joint", True, False)
        losses, rows = kernels.forward(branches, *masks, weight, None, seed, *options)
        options = (self.group, TEMPERATURE, RATE, symmetric)
        grad_losses = torch.full_like(losses, 2.0)
        return losses, kernels.backward(grad_losses, branches, *masks, None, seed, rows, *options)

    def by(self, kernels, symmetric=True):
        """The loss and gradient of z."""
        (loss,), (grad,) = self.of([self.z], kernels, symmetric)
        return loss, grad

    def expected(self, dtype):
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        negatives = bernoulli(torch.tensor(SEED), self.group, len(leaf), RATE)
        options = {"anchors_per_image": self.group, "temperature": TEMPERATURE, "scale": 1.5, "reweight": True}
        loss, _ = reference.contrastive_loss(leaf, *(mask.cpu() for mask in self.masks), 0.5, negatives, **options)
        return loss.detach(), torch.autograd.grad(2 * loss, leaf)[0]

    def check(self, loss, grad):
        (exact, exact_grad), (plain, plain_grad) = self.expected(torch.float64), self.expected(torch.float32)
        assert_rows_close(loss, exact, plain)
        assert_rows_close(grad, exact_grad, plain_grad.to(self.z.dtype))


@pytest.fixture
def route(kernels, monkeypatch):
    """``route(density)``: allow lists up to a density; returns a list of what `enabled` is in the calls that follow."""

    def allow(density):
        monkeypatch.setattr(lists, "lists_may_pay", lambda *_: density is not None)
        monkeypatch.setattr(lists, "MOST_LISTED_DENSITY", density)
        enabled, forward = [], kernels._blocks_forward

        def spy(pairs, z, scale, within):
            enabled.append(int(pairs.enabled))
            return forward(pairs, z, scale, within)

        monkeypatch.setattr(kernels, "_blocks_forward", spy)
        return enabled

    return allow


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("density", "enabled"),
    [
        pytest.param(1.0, [1, 1], id="lists"),
        pytest.param(0.0, [0, 0], id="too-many-for-lists"),
        pytest.param(None, [0], id="blocks"),
    ],
)
def test_routes_agree(kernels, case, route, density, enabled):
    taken = route(density)
    loss = Loss(case, images=4, height=2, width=5, dim=20)
    loss.check(*loss.by(kernels))
    assert taken == enabled


@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.deep), None])
def test_branches_share_what_does_not_depend_on_them(kernels, bits, route, density):
    route(density)
    loss = Loss(CASES[0], images=3, height=3, width=12, dim=6)
    other = loss.z.flip(0)

    def run(*branches):
        with recorded(run=True) as launches:
            losses, grads = loss.of(branches, kernels)
        return losses, grads, [launch.name for launch in launches if hasattr(bits, launch.name)]

    losses, grads, shared = run(loss.z, other)
    assert "draw_negatives_kernel" in shared
    for index, branch in enumerate((loss.z, other)):
        (alone,), (grad,), names = run(branch)
        assert torch.equal(alone, losses[index]) and torch.equal(grad, grads[index])
        assert names == shared


@pytest.mark.deep
def test_lists_of_many_positions_are_staged_in_turn(kernels, route, monkeypatch):
    """Positions of several words, gradients staged a word at a time; and by blocks where masks may not be symmetric."""
    monkeypatch.setattr(lists, "_STAGED_BYTES", 1)
    loss = Loss(CASES[-1], images=2, height=5, width=7, dim=6)
    route(1.0)
    value, grad = loss.by(kernels)
    loss.check(value, grad)
    same_value, by_blocks = loss.by(kernels, symmetric=False)
    assert torch.equal(value, same_value)
    loss.check(value, by_blocks)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.deep), "sm_90"])
@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.deep), None])
def test_configurations_of_gpus(kernels, route, monkeypatch, arch, density):
    """Tiles as on a GPU, several of them; on a GPU only those that its shared memory has room for."""
    if DEVICE == "cuda":
        room = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
        if room < resources.SHARED_LIMIT[arch]:
            pytest.skip(f"programs for {arch} may take more than the {room} bytes of shared memory of this GPU")
    monkeypatch.setattr(_triton, "architecture", lambda device: arch)
    route(density)
    loss = Loss(CASES[0], images=3, height=7, width=8, dim=72)
    loss.check(*loss.by(kernels))


@pytest.mark.parametrize(("images", "grid"), [(25088, (1, 2)), (784, (8, 8)), (64, (28, 28))])
def test_gradients_of_columns_are_split_over_enough_programs(images, grid):
    """Also where there are few patch positions, each of which has a list and many images."""
    with recorded("sm_90") as launches:
        kernel_calls(OP, torch.float16, "meta", Sizes(images=images, grid=grid))["sampled"]()
    grids = [launch.grid for launch in launches if launch.name == "sampled_columns_bwd_kernel"]
    assert grids and all(math.prod(grid) >= 128 for grid in grids)
    tiles = math.ceil(0.02 * images * math.prod(grid) / 32)
    assert all(splits <= tiles for _, splits, _ in grids)


def test_counts_of_all_bits(bits):
    mask = random_bits(3, 64, 1.0)
    packed = pack_bits(mask)
    assert bits.count(packed).tolist() == population_count(packed).tolist() == [64] * 3
    assert torch.equal(unpack_bits(packed, 64), mask)
