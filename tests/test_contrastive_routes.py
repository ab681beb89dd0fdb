"""What the GPU backends of `multi_positive_contrastive` share: what is found once a call, and the two routes."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpkernels import PositiveMask, backends, multi_positive_contrastive
from hpkernels.launches import recorded
from hpkernels.ops import _cuda
from hpkernels.ops._bits import pack_bits, unpack_bits
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive import reference, routes
from hpkernels.testing import assert_rows_close, available_cases, random_problem, row_errors

OP = "multi_positive_contrastive"
CASES = [case for case in available_cases(OP, _cuda.DTYPES) if case.backend in ("cuda", "triton")]
BACKENDS = {case.backend: case for case in CASES}
pytestmark = pytest.mark.skipif(not CASES, reason="neither the CUDA nor the Triton kernels can run here")
SEED, TEMPERATURE = 3, 0.3
VARIANTS = [("joint", False, False), ("joint", True, True), ("separate", False, False), ("separate", True, False)]


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def case(request):
    return request.param


def _each():
    """Every case, on CUDA by either engine; bfloat16 runs the code of float16."""
    for case in CASES:
        deep = [pytest.mark.deep] if case.dtype == torch.bfloat16 and case.device == "cpu" else []
        for engine in ("sm_80", "sm_90a") if case.backend == "cuda" and case.dtype != torch.float32 else ("",):
            yield pytest.param((case, engine), id=f"{case}-{engine}".rstrip("-"), marks=deep)


@pytest.fixture(params=_each())
def each(request, monkeypatch):
    case, engine = request.param
    if engine == "sm_90a":
        request.getfixturevalue("hopper")
    else:
        monkeypatch.setenv("HPKERNELS_SM90", "0")
    return case


@pytest.fixture
def allow_lists(monkeypatch):
    """``allow_lists(density)``: list positives up to a density, or go through blocks for None."""

    def allow(density):
        monkeypatch.setattr(routes, "lists_may_be_faster", lambda *_: density is not None)
        monkeypatch.setattr(routes, "MOST_LISTED_DENSITY", density)

    return allow


class Relations:
    """A and S of `images` images of `group` anchors, some of which have no positives, and R."""

    def __init__(self, device, images, group, rate, specific=True, symmetric=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        anchors = images * group
        image = torch.arange(anchors) // group
        density = torch.where(image[:, None] == image, 0.1, 0.02)
        masks = [torch.rand(density.shape, generator=generator) < density for _ in range(1 + specific)]
        alone = torch.rand(anchors, generator=generator) < 0.1
        alone[:group] = True  # a whole image
        for number, mask in enumerate(masks):
            if symmetric:
                mask |= mask.T.clone()
            without = alone.roll(number * group)
            mask &= ~(without[:, None] | without)
            mask.fill_diagonal_(False)
        self.dense = masks if specific else [*masks, None]
        self.bits = [None if mask is None else pack_bits(mask).to(device) for mask in self.dense]
        self.across = image[:, None] != image
        self.anchors, self.group, self.rate, self.device = anchors, group, rate, device
        self.symmetric = symmetric
        self.seed, self.weight = torch.tensor(SEED, device=device), torch.tensor(0.5, device=device)
        self.drawn = bernoulli(torch.tensor(SEED), group, anchors, rate)

    def prepare(self, backend, weighting=VARIANTS[0], row_bytes=64, negatives=None):
        kernels = backends.implementation(OP, backend)
        given = (*self.bits, self.weight, negatives, self.seed, self.group, self.rate)
        prepared = kernels.prepare(*given, *weighting, self.symmetric, row_bytes)
        return routes._pairs(prepared, *self.bits, negatives, self.group)


def listed(ranges, columns):
    """The lists of the rows, one after another."""
    return [columns[start:end].tolist() for start, end in ranges.tolist()]


def columns_of(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


# Rows of less than a word; of several words that do not end with an image; of whole fours of words.
@pytest.mark.parametrize(("images", "group"), [(3, 5), (2, 70), (4, 32)])
@pytest.mark.parametrize("specific", [False, True])
def test_counts_and_lists(case, allow_lists, images, group, specific):
    allow_lists(1.0)
    relations = Relations(case.device, images, group, 0.2, specific)
    agnostic, task = relations.dense
    task = torch.zeros_like(agnostic) if task is None else task
    pairs = relations.prepare(case.backend)
    assert torch.equal(unpack_bits(pairs.negatives.cpu(), relations.anchors), relations.drawn)
    counts = torch.stack((agnostic, task)).sum(dim=2).T
    assert torch.equal(pairs.weights[:, :2].cpu(), counts.float())
    lists = pairs.lists
    assert listed(lists.ranges, lists.columns) == columns_of((agnostic | task) & relations.across)
    assert listed(lists.sampled_ranges, lists.sampled_columns) == columns_of(relations.drawn)
    of_all, of_sampled = (int(mask.sum()) for mask in ((agnostic | task) & relations.across, relations.drawn))
    assert pairs.state.tolist()[:1] + pairs.state.tolist()[3:] == [0, of_all, of_sampled, of_sampled]


@pytest.mark.parametrize("words", [130, 131, 530, 532])
def test_long_lists(case, allow_lists, words):
    """Of some positions alone, but of more words than a warp, and a block, reads at a time; and of whole fours."""
    if case.backend == "triton" and case.device == "cpu":
        words //= 32  # which are more than the interpreted program reads at a time
    allow_lists(1.0)
    anchors, group, rate = 32 * words - 8, 2, 0.02
    positives = torch.zeros(anchors, words, dtype=torch.int32, device=case.device)
    prepared = routes.empty(positives, None, group, rate, True, 1)
    kernels, seed = backends.implementation(OP, case.backend), torch.tensor(SEED, device=case.device)
    prepared[0] = kernels.draw(seed, group, anchors, rate)
    pairs = routes._pairs(prepared, positives, None, None, group)
    pairs.state.zero_()
    kernels.list_sampled(pairs, pairs.stage_capacity(rate))
    drawn = bernoulli(torch.tensor(SEED), group, anchors, rate)
    assert listed(pairs.lists.sampled_ranges, pairs.lists.sampled_columns) == columns_of(drawn)
    assert pairs.state[0] == 0 and pairs.state[4] == drawn.sum()


# Rows of one word, of less and more than a block draws at a time.
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 128), (2, 8300)])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.9999, 1.0])
def test_draw(case, shape, rate):
    for seed in (2**40 + 7, 2**63 - 1, -5):
        seed = torch.tensor(seed, device=case.device)
        drawn = backends.implementation(OP, case.backend).draw(seed, *shape, rate)
        assert torch.equal(drawn, pack_bits(bernoulli(seed, *shape, rate)))


# Less and more than a tile of the transpose of R; columns staged at once, and some at a time.
@pytest.mark.parametrize(("images", "group", "row_bytes"), [(4, 45, 1), (2, 140, 1), (4, 45, 2**31 // 400)])
def test_slots(case, allow_lists, images, group, row_bytes):
    """Each column has as many places as positions have drawn it, which follow one another, in the positions' order."""
    allow_lists(1.0)
    relations = Relations(case.device, images, group, rate=0.2 if group < 100 else 0.05)
    pairs = relations.prepare(case.backend, row_bytes=row_bytes)
    assert (pairs.stages > 1) == (row_bytes > 1)
    slots = listed(pairs.lists.sampled_ranges, pairs.lists.slots)
    taken = [[] for _ in range(relations.anchors)]
    for columns, of_position in zip(columns_of(relations.drawn), slots, strict=True):
        for column, slot in zip(columns, of_position, strict=True):
            taken[column].append(slot)
    assert taken == [list(range(*places)) for places in pairs.lists.slot_ranges.tolist()]
    for stage in range(pairs.stages):
        of_stage = [slot for column in range(*pairs.columns_of(stage)) for slot in taken[column]]
        assert sorted(of_stage) == list(range(len(of_stage)))
        assert int(pairs.state[5 + stage]) == len(of_stage) <= pairs.stage_capacity(relations.rate)


@pytest.mark.parametrize("what", ["positives", "sampled", "slots"])
def test_what_does_not_fit_is_left_out(case, allow_lists, what, monkeypatch):
    """Nothing is written beyond the lists, and the state says that they are not complete."""
    allow_lists(0.001 if what == "positives" else 1.0)
    if what == "sampled":
        monkeypatch.setattr(routes, "sampled_capacity", lambda *_: 40)
    if what == "slots":
        monkeypatch.setattr(routes.Pairs, "stage_capacity", lambda *_: 40)
    empty = routes.empty

    def guarded(*arguments):
        tensors = empty(*arguments)
        for place in (4, 6, 7):  # the columns, the sampled columns and the slots
            whole = torch.full((len(tensors[place]) + 64,), -7, dtype=torch.int32, device=case.device)
            kept.append(whole)
            tensors[place] = whole[: len(tensors[place])]
        return tensors

    kept = []
    monkeypatch.setattr(routes, "empty", guarded)
    relations = Relations(case.device, images=3, group=40, rate=0.2)
    pairs = relations.prepare(case.backend)
    assert pairs.state[0] == 1
    assert all((whole[-64:] == -7).all() for whole in kept)


def _weightings():
    """Every weighting and rate with few anchors; one with more than a block has."""
    several = [(3, 7, weighting, rate) for weighting in VARIANTS for rate in (0.0, 0.1, 1.0)]
    return [*several, (1, 300, VARIANTS[1], 0.1)]


@pytest.mark.parametrize(("images", "group", "weighting", "rate"), _weightings(), ids=str)
def test_weights(case, images, group, weighting, rate):
    """With the numbers of pairs they give the coefficients of the reference, whatever the images' number and size."""
    variant, reweight, keep_specific_only = weighting
    relations = Relations(case.device, images, group, rate)
    pairs = relations.prepare(case.backend, weighting)
    agnostic, task = relations.dense
    drawn = relations.drawn.repeat(images, 1).fill_diagonal_(False)
    expected = reference.anchor_coefficients(
        *(mask.sum(dim=1).double() for mask in (agnostic, task)),
        (agnostic | drawn.logical_and(~torch.eye(len(drawn), dtype=torch.bool))).any(dim=1),
        0.5,
        anchors_per_image=group,
        scale=1.5,
        variant=variant,
        reweight=reweight,
        keep_specific_only=keep_specific_only,
    )
    of_agnostic, of_task, *factors = pairs.weights.cpu().double().T
    kept = pairs.state[1:3].cpu().clamp(min=1)
    pull, pull_specific = (1.5 * factor / count for factor, count in zip(factors, kept, strict=True))
    found = (pull * of_agnostic + pull_specific * of_task, pull, pull_specific)
    for of_anchors, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(of_anchors, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", _cuda.DTYPES)
def test_greatest_square(case, dtype):
    kernels = backends.implementation(OP, case.backend)
    z = torch.randn(70, 48, generator=torch.Generator().manual_seed(0)).to(case.device, dtype)
    expected = z.cpu().double().square().sum(dim=1).max()
    torch.testing.assert_close(kernels.greatest_square(z).cpu().double(), expected, rtol=1e-6, atol=0)
    for number, found in ((torch.inf, torch.nan), (-torch.inf, torch.nan), (torch.nan, torch.nan)):
        other = z.clone()
        other[69, 47] = number
        torch.testing.assert_close(kernels.greatest_square(other).item(), found, equal_nan=True)
    if dtype != torch.float16:
        z[3, 5] = 1e30  # finite, and its square is not
        assert kernels.greatest_square(z) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("apart", [0.5, 500.0])
def test_scaled_rows(case, apart):
    kernels = backends.implementation(OP, case.backend)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 70, 4, generator=generator) * torch.tensor([apart, 1e-6, 1e-7, 1e-9])
    grad_losses = torch.tensor([3.0, -0.5])
    given = (rows.to(case.device), grad_losses.to(case.device))
    numbers, shifts, factors = (found.cpu().double() for found in kernels.scale_rows(*given, TEMPERATURE))
    largest = rows[..., 1:].amax().double() / (routes.GREATEST_G / 4)
    torch.testing.assert_close(factors, largest * grad_losses.double() / TEMPERATURE)
    torch.testing.assert_close(numbers[..., 2:], rows[..., 2:].double() / largest)
    assert torch.equal(shifts.isnan(), torch.full((2,), apart > 100))
    if apart < 100:
        assert torch.equal(shifts, rows[..., 0].amax(dim=1).double())
        assert torch.equal(numbers[..., 0], shifts[:, None].expand(-1, 70))
    pushes = numbers[..., 1] * (rows[..., 0].double() - numbers[..., 0]).exp()
    torch.testing.assert_close(pushes, rows[..., 1].double() / largest, rtol=1e-6, atol=0)
    rows[1, 3, 2] = torch.nan
    assert all(found.isnan().any() for found in kernels.scale_rows(rows.to(case.device), given[1], TEMPERATURE)[::2])


class Loss:
    """The loss of a few images with few positives across them, and its gradient."""

    def __init__(self, case, dim, rate, images=3, group=7 * 15, symmetric=True, negatives=None, specific=True):
        self.relations = Relations(case.device, images, group, rate, specific, symmetric)
        problem = random_problem(images=images, height=1, width=group, dim=dim, dtype=case.dtype, device=case.device)
        self.z, self.negatives, self.backend = problem.z, negatives, case.backend

    def of(self, *branches, upstream=None):
        """The losses and the gradients of some branches; twice these unless `upstream` (branches,) is given."""
        kernels, relations = backends.implementation(OP, self.backend), self.relations
        given = None if self.negatives is None else self.negatives.to(self.z.device)
        drawn, weighting = (given, relations.seed), ("joint", True, False)
        row_bytes = self.z.shape[1] * self.z.element_size()
        pairs = kernels.prepare(
            *(*relations.bits, relations.weight, *drawn, relations.group, relations.rate),
            *(*weighting, relations.symmetric, row_bytes),
        )
        options = (relations.group, TEMPERATURE, 1.5, relations.rate, *weighting)
        losses, rows = kernels.forward([*branches], *relations.bits, relations.weight, *drawn, pairs, *options)
        options = (relations.group, TEMPERATURE, relations.rate, relations.symmetric)
        upstream = torch.full_like(losses, 2.0) if upstream is None else upstream
        return losses, kernels.backward(upstream, [*branches], *relations.bits, *drawn, pairs, rows, *options)

    def expected(self, dtype):
        leaf = self.z.detach().cpu().to(dtype).requires_grad_()
        drawn = self.relations.drawn if self.negatives is None else self.negatives
        options = {
            "anchors_per_image": self.relations.group,
            "temperature": TEMPERATURE,
            "scale": 1.5,
            "reweight": True,
        }
        loss, _ = reference.contrastive_loss(leaf, *self.relations.dense, 0.5, drawn, **options)
        return loss.detach(), torch.autograd.grad(2 * loss, leaf)[0]

    def check(self):
        """Compare with the reference, and a second time with the first, bit by bit."""
        (loss,), (grad,) = self.of(self.z)
        (exact, exact_grad), (plain, plain_grad) = self.expected(torch.float64), self.expected(torch.float32)
        assert_rows_close(loss, exact, plain)
        assert_rows_close(grad, exact_grad, plain_grad.to(self.z.dtype))
        again, (grad_again,) = self.of(self.z)
        assert torch.equal(again[0], loss) and torch.equal(grad_again, grad)
        return loss, grad


def several_tiles(case, rate):
    """Rows of several steps of a product, with more features than a block has sums of. Interpreted tiles are small."""
    if case.backend == "triton" and case.device == "cpu":
        return Loss(case, 72, rate, images=4, group=14)
    return Loss(case, {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}[case.dtype], rate)


@pytest.mark.parametrize("density", [1.0, 0.0, None], ids=["lists", "too-many-for-lists", "blocks"])
def test_routes_agree(allow_lists, each, density):
    allow_lists(density)
    several_tiles(each, 0.05).check()


def test_every_other_anchor_is_a_negative(each):
    several_tiles(each, 1.0).check()


def test_masks_that_are_not_symmetric(case):
    negatives = torch.rand(20, 60, generator=torch.Generator().manual_seed(1)) < 0.3
    sizes = {"images": 3, "group": 20, "symmetric": False}
    Loss(case, 20, 1.0, **sizes, negatives=negatives).check()
    Loss(case, 20, 1.0, **sizes).check()
    Loss(case, 20, 0.05, **sizes, specific=False).check()


def test_gradients_are_staged_in_turn(case, allow_lists, monkeypatch):
    """Some columns at a time; of more images than one staged row sums."""
    allow_lists(1.0)
    loss = Loss(case, 20, 0.2, images=70, group=2)
    value, grad = loss.check()
    monkeypatch.setattr(routes, "_STAGED_BYTES", 8000)
    assert loss.relations.prepare(case.backend, row_bytes=80).stages > 2
    same_value, same_grad = loss.check()
    assert torch.equal(value, same_value)
    torch.testing.assert_close(grad, same_grad)


def test_the_last_stage_has_columns(case, allow_lists, monkeypatch):
    """Stages are of whole words, so that there may be fewer of them than bytes alone ask for."""
    allow_lists(1.0)
    monkeypatch.setattr(routes, "_STAGED_BYTES", 1500)
    Loss(case, 4, 0.2, images=3, group=20).check()


def test_staged_sums_do_not_overflow(case, allow_lists):
    """In float16: all images have the same row at a position, whose negatives are few, so that each counts."""
    allow_lists(1.0)
    images, group, dim = 40, 2, 4
    z = torch.zeros(images * group, dim)
    z[:, 1:] = torch.nn.functional.normalize(torch.randn(len(z), 3, generator=torch.Generator().manual_seed(0)), dim=1)
    z[::group] = torch.tensor([1.0, 0, 0, 0])
    labels = torch.arange(len(z)) // 2
    options = {"anchors_per_image": group, "temperature": 0.07, "negative_rate": 0.02, "seed": 0, "reweight": True}

    def gradient(z, backend):
        leaf = z.detach().to(case.device).requires_grad_()
        loss = multi_positive_contrastive(leaf, labels.to(case.device), backend=backend, **options)
        return torch.autograd.grad(loss * 256, leaf)[0].cpu().double()

    for length in (1.0, 4.0):
        found, expected = (
            gradient((length * z).half(), case.backend),
            gradient((length * z).half().double(), "reference"),
        )
        assert row_errors(found, expected).max() < 3e-3 * expected.norm(dim=1).max()


@pytest.mark.parametrize("density", [1.0, None])
def test_branches_are_as_by_themselves(case, allow_lists, density):
    allow_lists(density)
    loss = Loss(case, 6, 0.2, images=3, group=12)
    other = loss.z.flip(0)
    losses, grads = loss.of(loss.z, other)
    for index, branch in enumerate((loss.z, other)):
        (alone,), (grad,) = loss.of(branch)
        assert torch.equal(alone, losses[index]) and torch.equal(grad, grads[index])


def test_gradients_of_losses_that_are_not_contiguous(case):
    loss = Loss(case, 6, 0.2, images=3, group=12)
    branches = (loss.z, loss.z.flip(0))
    _, expected = loss.of(*branches)
    assert all(grad.any() for grad in expected)
    numbers = torch.tensor([2.0, 9.0, 2.0], device=case.device)
    for upstream in (numbers[0].expand(2), numbers[::2]):
        _, grads = loss.of(*branches, upstream=upstream)
        assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("density", [1.0, None])
@pytest.mark.parametrize("length", [0.01, 8.0, 20.0])
def test_rows_of_any_length(case, allow_lists, density, length):
    """Log-denominators that share a shift, and those that are too far apart for that."""
    allow_lists(density)
    loss = Loss(case, 20, 0.1, images=3, group=12)
    loss.z = (
        torch.nn.functional.normalize(loss.z, dim=1) * length ** torch.linspace(0, 1, len(loss.z)).to(loss.z)[:, None]
    )
    loss.check()


@pytest.mark.parametrize("density", [1.0, None])
def test_infinite_logits_are_not_silent(case, allow_lists, density):
    allow_lists(density)
    loss = Loss(case, 20, 0.05, images=3, group=12)
    loss.z[20, 3] = torch.nan
    losses, (grad,) = loss.of(loss.z)
    assert losses.isnan() and grad.isnan().any(dim=1).all()


@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_gradients_of_uneven_images_in_float16(case, rate):
    """Of two images one keeps two anchors and the other all: the rows of this have coefficients far below the rest."""
    group = 64 if case.backend == "triton" and case.device == "cpu" else 512  # of which a 500th
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2 * group, 16, generator=generator, dtype=torch.float64), dim=1)
    z = z.half().to(case.device)
    mask = torch.zeros(2 * group, 2 * group, dtype=torch.bool, device=case.device)
    mask[group:, group:] = True
    mask[0, 1] = mask[1, 0] = True
    positives = PositiveMask.from_dense(mask)

    def gradient(z, backend):
        leaf = z.detach().requires_grad_()
        settings = {"anchors_per_image": group, "temperature": 0.4, "reweight": True, "seed": 0}
        loss = multi_positive_contrastive(leaf, positives, negative_rate=rate, backend=backend, **settings)
        (grad,) = torch.autograd.grad(loss * 2**14, leaf)
        return grad.cpu().double()

    expected = gradient(z.double(), "reference")
    errors = row_errors(gradient(z, case.backend), expected) / expected.norm(dim=1).clamp(min=1e-30)
    assert errors.max() < 1e-3, f"row {int(errors.argmax())} by {errors.max():.2e}"


class Launches(TorchDispatchMode):
    """Counts what PyTorch and the CUDA library launch, but for the tensors that are only made or seen otherwise."""

    NONE = re.compile(r"empty|detach|select|slice|view|unbind|expand|alias|as_strided|_parts$|staged_rows$|unsqueeze")
    SEVERAL = {"hpkernels_cuda::contrastive_list_sampled": 3, "hpkernels_cuda::contrastive_sampled_backward": 2}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split(".")[0]
        self.count += 0 if self.NONE.search(name) else self.SEVERAL.get(name, 1)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != torch.bfloat16], ids=str)
def test_a_call_has_few_launches(case, allow_lists):
    """At most 40, forward and backward of two branches, with positives of both kinds."""
    allow_lists(1.0)
    loss = Loss(case, 32, 0.1, images=3, group=12)
    branches = (loss.z, loss.z.flip(0))
    with recorded() as of_triton, Launches() as launches:  # which are not made: the interpreter's own are none
        loss.of(*branches)
    assert 20 < launches.count + len(of_triton) <= 40
