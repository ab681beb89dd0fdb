"""The kernels of the Triton backend of `multi_positive_contrastive`, one by one and by each of the two routes."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import resources
from hpkernels import backends
from hpkernels.ops import _triton
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives.bits import pack_bits
from hpkernels.ops.multi_positive_contrastive import reference, routes
from hpkernels.testing import assert_rows_close, available_cases, random_problem
from hpkernels.testing.launches import recorded

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _triton.DTYPES) if case.backend == "triton"]
pytestmark = pytest.mark.skipif(not CASES, reason="Triton is not installed: there are no kernels to test")
DEVICE = CASES[0].device if CASES else "cpu"
SEED, RATE, TEMPERATURE = 3, 0.2, 0.3
UNUSED = torch.empty(0)  # the seed where nothing is drawn


@pytest.fixture
def kernels():
    return backends.implementation(OP, "triton")


@pytest.fixture
def route(monkeypatch):
    """``route(density, stages)``: allow lists up to a density, None: not at all, with so many stages."""

    def allow(density, stages=1):
        made = routes.empty

        def empty(*arguments):
            prepared = made(*arguments)
            if len(prepared) > 3:
                prepared[2] = prepared[2].new_empty(5 + stages)
            return prepared

        monkeypatch.setattr(routes, "empty", empty)
        monkeypatch.setattr(routes, "lists_may_pay", lambda *_: density is not None)
        monkeypatch.setattr(routes, "MOST_LISTED_DENSITY", density)

    return allow


def random_bits(rows, columns, rate=0.3, seed=0):
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < rate).to(DEVICE)


def symmetric_bits(count, rate, seed=0):
    """With some anchors that are positives of their own."""
    mask = random_bits(count, count, rate, seed)
    return mask | mask.T


def prepared_pairs(kernels, positives, specific, group, negatives=None, variant="joint", **options):
    """What `routes.prepare` makes of dense masks, as the kernels take it."""
    masks = [None if mask is None else pack_bits(mask) for mask in (positives, specific, negatives)]
    rate = 1.0 if negatives is None and "rate" not in options else options.get("rate", RATE)
    prepared = kernels.prepare(
        *(masks[0], masks[1], torch.tensor(0.5, device=DEVICE), masks[2], torch.tensor(SEED, device=DEVICE)),
        *(group, rate, variant, options.get("reweight", False), options.get("keep_specific_only", False)),
        *(options.get("symmetric", True), 64),
    )
    return routes._pairs(prepared, masks[0], masks[1], masks[2], group)


def lists_of(ranges, columns):
    return [columns[start:end].tolist() for start, end in ranges.tolist()]


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
def test_drawn_negatives_are_the_same_bits(kernels, rate, seed):
    seed = torch.tensor(seed, device=DEVICE)
    assert torch.equal(kernels.draw(seed, 5, 171, rate), pack_bits(bernoulli(seed, 5, 171, rate)))


@pytest.mark.parametrize(("group", "images"), [(1, 40), (15, 4), (70, 2)])
@pytest.mark.parametrize("with_specific", [False, True])
def test_counts_and_lists_of_positives(kernels, route, group, images, with_specific):
    route(1.0)
    anchors = group * images
    positives = symmetric_bits(anchors, 0.1)
    specific = symmetric_bits(anchors, 0.1, seed=1) if with_specific else None
    image = torch.arange(anchors, device=DEVICE) // group
    either = positives | specific if with_specific else positives
    pairs = prepared_pairs(kernels, positives, specific, group, rate=RATE)
    across = either & (image[:, None] != image)
    assert lists_of(*pairs.lists[:2]) == [row.nonzero().flatten().tolist() for row in across]
    assert pairs.state[0] == 0 and pairs.state[3] == across.sum()
    assert sorted(pairs.lists.ranges.flatten().tolist()) == sorted(
        [0, *pairs.lists.ranges[:, 1].tolist(), *pairs.lists.ranges[:, 1].tolist()][: 2 * anchors]
    ) or pairs.lists.ranges.min() == 0


@pytest.mark.parametrize(("group", "images"), [(1, 40), (15, 4), (70, 3)])
@pytest.mark.parametrize("stages", [1, 3])
def test_lists_and_slots_of_sampled_negatives(kernels, route, group, images, stages):
    route(1.0, stages)
    anchors = group * images
    pairs = prepared_pairs(kernels, symmetric_bits(anchors, 0.1), None, group, rate=RATE)
    drawn = bernoulli(torch.tensor(SEED, device=DEVICE), group, anchors, RATE)
    lists = pairs.lists
    assert lists_of(lists.sampled_ranges, lists.sampled_columns) == [row.nonzero().flatten().tolist() for row in drawn]
    assert pairs.state[4] == drawn.sum()
    earlier = drawn.int().cumsum(dim=0) - drawn.int()
    sizes = drawn.sum(dim=0)
    assert torch.equal(lists.slot_ranges[:, 1] - lists.slot_ranges[:, 0], sizes)
    for position, (start, end) in enumerate(lists.sampled_ranges.tolist()):
        columns = lists.sampled_columns[start:end].long()
        expected = lists.slot_ranges[columns, 0] + earlier[position, columns]
        assert torch.equal(lists.slots[start:end].long(), expected)
    for stage, columns in enumerate(torch.arange(anchors, device=DEVICE).split(pairs.stage_columns)):
        taken = [slot for start, end in lists.slot_ranges[columns].tolist() for slot in range(start, end)]
        assert sorted(taken) == list(range(pairs.state[5 + stage]))


@pytest.mark.parametrize("what", ["positives", "negatives", "slots"])
def test_what_does_not_fit_is_not_listed(kernels, route, monkeypatch, what):
    route(0.0 if what == "positives" else 1.0)
    anchors = 60
    if what != "positives":
        sizes = {"negatives": anchors, "slots": 4 * anchors}
        calls = []

        def capacity(positions, columns, rate):
            calls.append(columns)
            return 30 if (len(calls) == 1) == (what == "negatives") else sizes["slots"] * 10

        monkeypatch.setattr(routes, "sampled_capacity", capacity)
    pairs = prepared_pairs(kernels, symmetric_bits(anchors, 0.1), None, 15, rate=RATE)
    assert pairs.state[0] == 1


@pytest.mark.parametrize("sampled", ["drawn", "given", "all"])
def test_counts_of_anchors(kernels, route, sampled):
    """Den may be empty, and has not the anchor itself even if that is a positive of its own."""
    route(None)
    anchors, group = 60, 15
    positives, specific = random_bits(anchors, anchors, 0.05), random_bits(anchors, anchors, 0.05, seed=1)
    given = random_bits(group, anchors, 0.02, seed=2)
    negatives = {"drawn": bernoulli(torch.tensor(SEED, device=DEVICE), group, anchors, RATE), "given": given}
    drawn = negatives.get(sampled, torch.ones_like(given))
    denominator = (positives | drawn.repeat(anchors // group, 1)).fill_diagonal_(False)
    counts = torch.empty((anchors, 3), dtype=torch.int32, device=DEVICE)
    options = {"rate": RATE if sampled == "drawn" else 1.0}
    pairs = prepared_pairs(kernels, positives, specific, group, given if sampled == "given" else None, **options)
    kernels.count_and_list(pairs, counts)
    expected = torch.stack([mask.sum(dim=1) for mask in (positives, specific, denominator)], dim=1)
    assert torch.equal(counts.long(), expected)
    assert pairs.state[0] == 1  # blocks are taken


@pytest.mark.parametrize("variant", ["joint", "separate"])
@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("keep_specific_only", [False, True])
def test_weights_of_anchors(kernels, route, variant, reweight, keep_specific_only):
    route(None)
    group, images = 20, 5
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (group * images, 3), generator=generator, dtype=torch.int32)
    counts[:group, 0] = 0  # an image without A, one without S, one without Den
    counts[group : 2 * group, 1] = 0
    counts[2 * group : 3 * group, 2] = 0
    empty = torch.zeros(group * images, group * images, dtype=torch.bool, device=DEVICE)
    pairs = prepared_pairs(kernels, empty, empty, group)
    pairs.state.zero_()
    kernels.weigh(pairs, counts.to(DEVICE), torch.tensor(0.3, device=DEVICE), variant, reweight, keep_specific_only)
    options = {"anchors_per_image": group, "variant": variant, "reweight": reweight}
    agnostic, task, usable = counts.double().unbind(dim=1)
    _, pull, specific_pull = reference.anchor_coefficients(
        agnostic, task, usable > 0, 0.3, scale=1.0, keep_specific_only=keep_specific_only, **options
    )
    _, first, second = pairs.state[:3].cpu()
    weights = pairs.weights.cpu().double()
    assert torch.equal(weights[:, :2], counts[:, :2].double())
    torch.testing.assert_close(weights[:, 2] / first.clamp(min=1), pull, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[:, 3] / second.clamp(min=1), specific_pull, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greatest_square(kernels, case):
    z = torch.randn(37, 48, generator=torch.Generator().manual_seed(0)).to(case.device, case.dtype)
    torch.testing.assert_close(kernels.greatest_square(z).double(), z.double().square().sum(dim=1).max(), rtol=1e-6, atol=0)
    assert kernels.greatest_square(z * 0) == 0
    z[5] = torch.finfo(case.dtype).max
    expected = min(z[5].double().square().sum().item(), torch.finfo(torch.float32).max)
    torch.testing.assert_close(kernels.greatest_square(z).item(), expected, rtol=1e-6, atol=0)
    for flaw in (torch.nan, torch.inf, -torch.inf):
        z[36, 47] = flaw
        assert kernels.greatest_square(z).isnan()


def test_scaled_rows(kernels):
    """One branch whose log-denominators are near one another, one with some far apart, one without any gradient."""
    rows = torch.rand(3, 70, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows[0, :, 0] *= 39
    rows[1, :, 0] *= 90
    rows[2, :, 1:] = 0
    grads = torch.tensor([2.0, -3.0, 1.0], device=DEVICE)
    numbers, shifts, factors = kernels.scale_rows(rows, grads, TEMPERATURE)
    assert shifts.isnan().tolist() == [False, True, False]
    assert torch.equal(shifts[0], rows[0, :, 0].max()) and (numbers[0, :, 0] == shifts[0]).all()
    assert torch.equal(numbers[1, :, 0], rows[1, :, 0])
    greatest = rows[:2, :, 1:].amax(dim=(1, 2)).double()
    divisor = greatest / (routes.GREATEST_G / 4)
    torch.testing.assert_close(factors[:2].double(), divisor * grads[:2] / TEMPERATURE, rtol=1e-6, atol=0)
    base, push, *pulls = numbers[:2].double().unbind(dim=2)
    logs, *expected = rows[:2].double().unbind(dim=2)
    torch.testing.assert_close(push * (logs - base).exp(), expected[0] / divisor[:, None], rtol=1e-5, atol=0)
    for actual, exact in zip(pulls, expected[1:], strict=True):
        torch.testing.assert_close(actual, exact / divisor[:, None], rtol=1e-6, atol=0)
    assert (numbers[2, :, 1:] == 0).all() and factors[2].isfinite()


class Loss:
    """Masks with few positives across images, and the loss by each route."""

    def __init__(self, case, images, height, width, dim, symmetric=True, scale=1.0):
        problem = random_problem(
            images=images, height=height, width=width, dim=dim, dtype=case.dtype, device=case.device
        )
        self.z, self.group, size = problem.z * scale, problem.anchors_per_image, len(problem.z)
        masks = random_bits(size, size, 0.05), random_bits(size, size, 0.05, seed=1)
        self.masks = [mask | mask.T if symmetric else mask for mask in masks]
        self.symmetric = symmetric
        self.options = {"variant": "joint", "reweight": True, "keep_specific_only": False}
        self.rate = RATE

    def of(self, branches, kernels, symmetric=None, negatives=None):
        """The losses, row statistics and gradients of some branches, and the state of the lists."""
        symmetric = self.symmetric if symmetric is None else symmetric
        masks = [pack_bits(mask) for mask in self.masks]
        seed, weight = torch.tensor(SEED, device=DEVICE), torch.tensor(0.5, device=DEVICE)
        row_bytes = branches[0].shape[1] * branches[0].element_size()
        prepared = kernels.prepare(
            *(*masks, weight, negatives, seed, self.group, self.rate, *self.options.values(), symmetric, row_bytes)
        )
        losses, rows = kernels.forward(branches, *masks, negatives, prepared, self.group, TEMPERATURE, 1.5)
        grads = torch.full_like(losses, 2.0)
        given = (grads, branches, *masks, negatives, prepared, rows, self.group, TEMPERATURE, self.rate, symmetric)
        return losses, rows, kernels.backward(*given), prepared[2]

    def expected(self, dtype, negatives=None):
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        if negatives is None:
            negatives = bernoulli(torch.tensor(SEED), self.group, len(leaf), self.rate)
        options = {"anchors_per_image": self.group, "temperature": TEMPERATURE, "scale": 1.5} | self.options
        masks = [mask.cpu() for mask in self.masks]
        loss, rows = reference.contrastive_loss(leaf, *masks, 0.5, negatives.cpu(), **options)
        return loss.detach(), rows.detach().T, torch.autograd.grad(2 * loss, leaf)[0]

    def check(self, losses, rows, grads, _, negatives=None):
        for dense in (None, negatives):
            exact = self.expected(torch.float64, dense)
            plain = self.expected(torch.float32, dense)
        (loss,), (statistics,), (grad,) = losses, rows, grads
        assert_rows_close(loss, exact[0], plain[0])
        assert_rows_close(statistics.T, exact[1].T, plain[1].T)
        assert_rows_close(grad, exact[2], plain[2].to(self.z.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("density", "blocks"),
    [
        pytest.param(1.0, 0, id="lists"),
        pytest.param(0.0, 1, id="too-many-for-lists"),
        pytest.param(None, 1, id="blocks"),
    ],
)
def test_routes_agree(kernels, case, route, density, blocks):
    route(density)
    loss = Loss(case, images=4, height=2, width=5, dim=20)
    found = loss.of([loss.z], kernels)
    assert found[3][0] == blocks
    loss.check(*found)


@pytest.mark.parametrize("density", [1.0, None])
@pytest.mark.parametrize("scale", [0.01, 8.0])
def test_short_and_long_rows(kernels, route, density, scale):
    """Log-sums with a fixed base and with a running maximum; log-denominators near one another and far apart."""
    route(density)
    loss = Loss(CASES[0], images=3, height=3, width=5, dim=20, scale=scale)
    shifts = kernels.scale_rows(loss.of([loss.z], kernels)[1], torch.ones(1, device=DEVICE), TEMPERATURE)[1]
    assert shifts.isnan().item() == (scale > 1)
    loss.check(*loss.of([loss.z], kernels))


@pytest.mark.parametrize("negatives", ["drawn", "given", "all"])
def test_masks_that_are_not_symmetric(kernels, route, negatives):
    route(1.0)
    loss = Loss(CASES[0], images=3, height=3, width=12, dim=20, symmetric=False)
    if negatives == "all":
        loss.rate = 1.0
    given = random_bits(loss.group, len(loss.z), 0.1, seed=4) if negatives == "given" else None
    loss.check(*loss.of([loss.z], kernels, negatives=given), negatives=given)


@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.deep), None])
def test_branches_share_what_does_not_depend_on_them(kernels, route, density):
    route(density)
    loss = Loss(CASES[0], images=3, height=3, width=12, dim=6)
    other = loss.z.flip(0)
    losses, rows, grads, _ = loss.of([loss.z, other], kernels)
    for index, branch in enumerate((loss.z, other)):
        (alone,), (statistics,), (grad,), _ = loss.of([branch], kernels)
        assert torch.equal(alone, losses[index]) and torch.equal(grad, grads[index])
        assert torch.equal(statistics, rows[index])


@pytest.mark.parametrize("stages", [2, 5])
def test_columns_are_staged_in_turn(kernels, route, stages):
    """With positions of several words, and columns that no stage divides."""
    route(1.0, stages)
    loss = Loss(CASES[-1], images=2, height=5, width=7, dim=6)
    loss.check(*loss.of([loss.z], kernels))


def test_launches_of_a_loss(kernels, route):
    """Two branches with S, by lists."""
    route(1.0)
    loss = Loss(CASES[0], images=2, height=4, width=4, dim=16)
    with recorded(run=True) as launches:
        loss.of([loss.z, loss.z], kernels)
    assert len(launches) == 5 + 2 * 5 + 1 + 2 * 5


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
    loss.check(*loss.of([loss.z], kernels))


@pytest.mark.parametrize(("images", "grid"), [(25088, (1, 2)), (784, (8, 8)), (64, (28, 28))])
def test_gradients_of_columns_are_split_over_enough_programs(kernels, images, grid):
    """Also where there are few patch positions, each of which has a list and many images."""
    group = math.prod(grid)
    anchors = images * group
    z = torch.empty((anchors, 512), dtype=torch.float16, device="meta")
    masks = torch.empty((anchors, math.ceil(anchors / 32)), dtype=torch.int32, device="meta")
    prepared = routes.empty(masks, None, group, 0.02, True, 1024)
    pairs = routes._pairs(prepared, masks, None, None, group)
    staged = z.new_empty((pairs.stage_capacity(0.02), 1, 512))
    with recorded("sm_90") as launches:
        kernels.sampled_backward(z, pairs, 0, 1.0, pairs.weights, pairs.weights, staged)
    _, columns = launches
    assert columns.name == "sampled_columns_bwd_kernel" and math.prod(columns.grid) >= 128
    tiles = math.ceil(1.1 * 0.02 * anchors / columns.constants["BLOCK_COLUMNS"])
    assert columns.grid[1] <= tiles
