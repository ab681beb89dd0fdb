"""What the Triton kernels of `multi_positive_contrastive` have of their own: tiles, pieces of lists, launches."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from benchmarks.compiled import resources
from hpkernels import backends
from hpkernels.launches import recorded
from hpkernels.ops import _triton
from hpkernels.ops._bits import pack_bits
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive import reference, routes
from hpkernels.testing import assert_rows_close, available_cases, random_problem

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _triton.DTYPES) if case.backend == "triton"]
pytestmark = pytest.mark.skipif(not CASES, reason="Triton is not installed: there are no kernels to test")
DEVICE = CASES[0].device if CASES else "cpu"
SEED, RATE, TEMPERATURE = 3, 0.1, 0.3


@pytest.fixture
def kernels():
    return backends.implementation(OP, "triton")


@pytest.fixture
def route(monkeypatch):
    """``route(density)``: allow lists up to a density, or go through blocks for None."""

    def allow(density):
        monkeypatch.setattr(routes, "lists_may_be_faster", lambda *_: density is not None)
        monkeypatch.setattr(routes, "MOST_LISTED_DENSITY", density)

    return allow


class Loss:
    """The loss of symmetric masks, in which some anchors are positives of their own, and its gradient."""

    def __init__(self, case, images, group, dim, own=True):
        problem = random_problem(images=images, height=1, width=group, dim=dim, dtype=case.dtype, device=case.device)
        self.z, self.group, size = problem.z, group, len(problem.z)
        generator = torch.Generator().manual_seed(0)
        masks = (torch.rand(2, size, size, generator=generator) < 0.05).to(DEVICE)
        self.masks = [mask | mask.T for mask in masks]
        if not own:
            self.masks = [mask.fill_diagonal_(False) for mask in self.masks]

    def of(self, branches, kernels):
        """The losses, row statistics and gradients of some branches."""
        masks, row_bytes = [pack_bits(mask) for mask in self.masks], self.z.shape[1] * self.z.element_size()
        weight, *drawn = torch.tensor(0.5, device=DEVICE), None, torch.tensor(SEED, device=DEVICE)
        weighting, sizes = ("joint", True, False), (self.group, TEMPERATURE)
        pairs = kernels.prepare(*masks, weight, *drawn, self.group, RATE, *weighting, True, row_bytes)
        losses, rows = kernels.forward(branches, *masks, weight, *drawn, pairs, *sizes, 1.5, RATE, *weighting)
        upstream = torch.full_like(losses, 2.0)
        return losses, rows, kernels.backward(upstream, branches, *masks, *drawn, pairs, rows, *sizes, RATE, True)

    def expected(self, dtype):
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        drawn = bernoulli(torch.tensor(SEED), self.group, len(leaf), RATE)
        options = {"anchors_per_image": self.group, "temperature": TEMPERATURE, "scale": 1.5, "reweight": True}
        loss, rows = reference.contrastive_loss(leaf, *(mask.cpu() for mask in self.masks), 0.5, drawn, **options)
        return loss.detach(), rows.detach(), torch.autograd.grad(2 * loss, leaf)[0]

    def check(self, kernels):
        """Compare each row with the reference in float64."""
        (loss,), (rows,), (grad,) = self.of([self.z], kernels)
        exact, plain = self.expected(torch.float64), self.expected(torch.float32)
        assert_rows_close(loss, exact[0], plain[0])
        assert_rows_close(rows, exact[1], plain[1])
        assert_rows_close(grad, exact[2], plain[2].to(self.z.dtype))


# Images that begin anywhere in a word, and tiles that hold parts of two of them.
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("density", [1.0, None])
def test_anchors_that_are_their_own_positives(kernels, case, route, density):
    route(density)
    Loss(case, images=4, group=19, dim=20).check(kernels)


def test_pieces_of_lists(kernels, route, monkeypatch):
    """Columns staged some at a time, by rows of more words than one."""
    route(1.0)
    monkeypatch.setattr(routes, "_STAGED_BYTES", 20000)
    Loss(CASES[-1], images=2, group=45, dim=16).check(kernels)


def test_a_list_that_is_too_long(kernels, route, monkeypatch):
    """Programs of the columns' gradients are launched for as many blocks as the longest list may have."""
    route(1.0)
    monkeypatch.setattr(kernels, "_longest_list", lambda pairs: 5)
    loss = Loss(CASES[0], images=3, group=12, dim=16)
    with recorded(run=True) as launches:
        loss.check(kernels)
    state = next(launch for launch in launches if launch.name == "sampled_rows_bwd_kernel").arguments[3]
    assert state[0] == 1


@pytest.mark.parametrize(("density", "count"), [(1.0, 26), (None, 12)])
def test_launches_of_two_branches(kernels, route, density, count):
    """Of kernels; PyTorch adds a zero and a sum a call, a zero a branch, a stack and a reduction."""
    route(density)
    z = torch.empty((64, 16), dtype=torch.float16, device="meta")
    masks = torch.empty((64, 2), dtype=torch.int32, device="meta")
    scalar, seed = torch.empty((), device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    drawn, weighting = (None, seed), ("joint", True, False)
    with recorded("sm_90") as launches:
        pairs = kernels.prepare(masks, masks, scalar, *drawn, 16, RATE, *weighting, True, 32)
        losses, rows = kernels.forward([z, z], masks, masks, scalar, *drawn, pairs, 16, 0.3, 1.0, RATE, *weighting)
        kernels.backward(losses, [z, z], masks, masks, *drawn, pairs, rows, 16, 0.3, RATE, True)
    assert len(launches) == count


def test_a_compiled_graph_has_lists_for_any_number_of_anchors():
    """What holds of the sizes it was traced with are inequalities."""
    shapes = ShapeEnv()
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    bits = torch.empty((64 * 196, 64 * 196 // 32), dtype=torch.int32, device="meta")
    with FakeTensorMode(shape_env=shapes) as mode:
        masks = mode.from_tensor(bits, symbolic_context=dynamic)
        found = routes.empty(masks, None, 196, 0.02, True, 1024)
    assert len(found) == 3 + len(routes.Lists._fields)
    assert shapes.guards and not [guard.expr for guard in shapes.guards if isinstance(guard.expr, sympy.Eq)]


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
    Loss(CASES[0], images=3, group=56, dim=72).check(kernels)


@pytest.mark.parametrize("dim", [16, 72, 512, 640, 1500])
def test_blocks_are_no_wider_than_rows(kernels, dim):
    """Of features; rows that are too long for one block of them are not WHOLE, and take more warps in registers."""
    z = torch.empty(
        (64, kernels.aligned_rows(torch.empty((1, dim), dtype=torch.float16)).shape[1]), dtype=torch.float16
    )
    with recorded("sm_90"):
        products = kernels._products(kernels.sampled_rows_bwd_kernel, z)
        of_rows = kernels._whole_rows(kernels.contrastive_rows_bwd_kernel, z)
    assert products["BLOCK_GRAD"] == min(512, 2 ** math.ceil(math.log2(dim))) and products["WHOLE"] == (dim <= 512)
    assert of_rows["BLOCK_D"] >= dim and of_rows["num_warps"] == {640: 2, 1500: 4}.get(dim, 1)
