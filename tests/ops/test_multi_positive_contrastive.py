from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from bad_options import wrong_options
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import contrastive

import hpkernels
from hpkernels import PositiveMask, backends, multi_positive_contrastive
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.multi_positive_contrastive import registration
from hpkernels.testing import (
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    random_problem,
    row_errors,
    unchanged,
)

OP = "multi_positive_contrastive"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
EXACT_CASES = available_cases(OP, (torch.float64,))
GOLDENS = ("joint_allneg", "joint_medium", "joint_noreweight", "joint_small", "joint_warmup", "separate")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_variant = pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"variant": variant, "reweight": reweight}, id=f"{variant}{'-reweighted' * reweight}")
        for variant in ("joint", "separate")
        for reweight in (False, True)
    ],
)


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Batch:
    """z and sparse asymmetric masks; the last image has no positives, and the first three anchors are special.

    Anchor 0 has no positives, anchors 1 and 2 have one specific positive only, and anchor 1 has no negatives either.
    """

    def __init__(self, case, images=3, height=3, width=4, dim=6, density=0.2, rate=0.2, length=1.0, seed=0):
        self.group = height * width
        size = images * self.group
        generator = torch.Generator().manual_seed(seed)

        def mask(rows, rate):
            return torch.rand(rows, size, generator=generator) < rate

        problem = random_problem(seed, images=images, height=height, width=width, dim=dim, dtype=torch.float64)
        self.z = (length * problem.z).to(case.device, case.dtype)
        self.agnostic, self.task, self.negative = mask(size, density), mask(size, density), mask(self.group, rate)
        for positives in (self.agnostic, self.task):
            positives.fill_diagonal_(False)
            positives[0] = False
            if images > 1:
                positives[-self.group :] = False
        self.agnostic[1:3], self.task[1:3] = False, torch.arange(size) == 0
        if size > 1:
            self.negative[1 % self.group] = False
        self.positives, self.specific = (
            PositiveMask.from_dense(mask.to(case.device)) for mask in (self.agnostic, self.task)
        )
        self.negatives = self.negative.to(case.device)
        self.options = {"anchors_per_image": self.group, "temperature": 0.3, "base_temperature": 0.07}

    def loss(self, z, lam=0.4, **options):
        options = {"negatives": self.negatives, **self.options, **options}
        return multi_positive_contrastive(z, self.positives, specific=self.specific, specific_weight=lam, **options)

    def oracle(self, dtype, lam=0.4, negative=None, **options):
        """The loss and its gradient in `dtype`, on the CPU."""
        z = self.z.cpu().to(dtype).requires_grad_()
        negative = self.negative if negative is None else negative
        loss = contrastive(z, self.agnostic, self.task, lam, negative, **{**self.options, **options})
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    def loss_and_gradient(self, **options):
        z = self.z.detach().requires_grad_()
        loss = self.loss(z, **options)
        return loss.detach(), torch.autograd.grad(loss, z)[0]


@each_case
@each_variant
@given(
    images=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    dim=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    rate=st.sampled_from([0.0, 0.1, 1.0]),
    lam=st.sampled_from([0.0, 0.7, 2.0]),
    keep_specific_only=st.booleans(),
    seed=st.integers(0, 9),
)
@example(3, 3, 4, 6, 0.2, 0.2, 0.4, False, 0)
@example(3, 3, 4, 6, 0.2, 0.0, 0.4, True, 0)
@example(5, 1, 13, 1, 0.1, 0.1, 1.0, False, 1)
@example(1, 1, 1, 1, 1.0, 1.0, 1.0, True, 0)
def test_matches_reference(case, variant, images, height, width, dim, density, rate, lam, keep_specific_only, seed):
    batch = Batch(case, images, height, width, dim, density, rate, seed=seed)
    options = {**variant, "keep_specific_only": keep_specific_only}
    loss, _ = batch.loss_and_gradient(lam=lam, **options, backend=case.backend)
    exact, _ = batch.oracle(torch.float64, lam, **options)
    plain, _ = batch.oracle(values_dtype(case.dtype), lam, **options)
    assert loss.shape == () and loss.dtype == values_dtype(case.dtype) and loss.device == batch.z.device
    # A loss is a difference of logits / 0.07: where it is 0, as of one pair, their rounding is left.
    rounding = torch.finfo(loss.dtype).eps * (10 * exact.abs().item() + 2 / 0.07)
    assert_rows_close(loss, exact, plain, eps=rounding)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("case", available_cases(OP, (torch.float64, torch.float32)), ids=str)
def test_golden(case, name, golden):
    data = golden(f"ghp_{name}")
    meta = data.meta

    def positives(features, threshold):
        features = features.double()
        limit = torch.minimum(threshold[:, None], threshold)
        return PositiveMask.from_dense((features @ features.T > limit).to(case.device))

    branches = [data.z, data.z_mix] if meta["loss_version"] == 1 else [data.z]
    branches = [z.to(case.device, case.dtype).requires_grad_() for z in branches]
    losses = [
        multi_positive_contrastive(
            z,
            positives(data.features, data.threshold),
            specific=positives(data.specific, data.threshold_specific),
            specific_weight=meta["lam"],
            anchors_per_image=meta["grid"] ** 2,
            temperature=meta["temperature"],
            base_temperature=0.07,
            negatives=data.negative_mask.to(case.device),
            variant="joint" if meta["loss_version"] == 1 else "separate",
            reweight=bool(meta["reweighting"]),
            backend=case.backend,
        )
        for z in branches
    ]
    loss = sum(losses) / len(losses)
    loss.backward()
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss.detach().double().cpu(), data.loss, rtol=tolerance, atol=0)
    for z, expected in zip(branches, (data.grad_z, data.grad_z_mix), strict=False):
        largest = expected.norm(dim=1).max()
        assert (row_errors(z.grad, expected) <= tolerance * expected.norm(dim=1) + 1e-3 * tolerance * largest).all()


@each_case
@each_variant
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lam": 0.0}, id="lambda-0"),
        pytest.param({"lam": 0.4}, id="lambda-0.4"),
        pytest.param({"lam": 0.4, "keep_specific_only": True}, id="keep-specific-only"),
        pytest.param({"lam": 0.4, "anchors_per_image": None, "base_temperature": None}, id="one-segment"),
        pytest.param({"lam": 0.4, "length": 30.0, "temperature": 0.07}, id="long-rows"),
    ],
)
def test_gradients(case, variant, options):
    options = dict(options)
    batch = Batch(case, length=options.pop("length", 1.0))
    whole = options.get("anchors_per_image", batch.group) is None  # one segment: a row of negatives for each anchor
    negative = batch.negative.repeat(3, 1) if whole else batch.negative
    options = {**variant, **options}
    _, grad = batch.loss_and_gradient(**options, negatives=negative.to(case.device), backend=case.backend)
    _, exact = batch.oracle(torch.float64, negative=negative, **options)
    _, plain = batch.oracle(values_dtype(case.dtype), negative=negative, **options)
    assert grad.dtype == case.dtype and exact.any()
    assert_rows_close(grad, exact, plain.to(case.dtype))


@each_variant
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_gradcheck(case, variant):
    batch = Batch(case, images=2, height=2, width=3, dim=3)
    z = batch.z.requires_grad_()
    assert torch.autograd.gradcheck(partial(batch.loss, **variant, backend=case.backend), z)
    weighted = partial(batch.loss, lam=0.0, seed=3, negatives=None, negative_rate=0.5, backend=case.backend)
    assert torch.autograd.gradcheck(lambda z: 3 * weighted(z, **variant).exp(), z)


@each_case
def test_opcheck(case):
    batch = Batch(case, dim=3)
    weight = torch.full((), 0.4, dtype=values_dtype(case.dtype), device=case.device)
    seed = torch.full((), 7, device=case.device)
    prepare = torch.ops.hpkernels.contrastive_pairs.default
    forward = torch.ops.hpkernels.multi_positive_contrastive.default
    backward = torch.ops.hpkernels.multi_positive_contrastive_backward.default
    z_mixed, weighting = batch.z.flip(0), ("joint", True, False, False)
    for specific, negatives, others in ((None, None, [None]), (batch.specific.bits, batch.negatives, [None, z_mixed])):
        masks, drawn = (batch.positives.bits, specific), (negatives, seed)
        pairs = prepare(*masks, weight, *drawn, 12, 0.1, *weighting, 12, 36, 0, case.backend)
        drawn = (*drawn, pairs)
        settings = (12, 0.3, 1.5, 0.1, *weighting, None, 0, case.backend)
        for other in others:
            for z in (batch.z, batch.z.detach().clone().requires_grad_()):
                torch.library.opcheck(forward, (z, other, *masks, weight, *drawn, *settings))
            losses, rows = forward(batch.z, other, *masks, weight, *drawn, *settings)
            relations = (*masks, *drawn, rows)
            torch.library.opcheck(
                backward,
                (torch.ones_like(losses), batch.z, other, *relations, 12, 0.3, 0.1, False, None, None, 0, case.backend),
            )
    # A part: the last two images, whose transposes may be anything.
    part, transposed = [mask[12:] for mask in masks], [mask[:24] for mask in masks]
    of_part = (*part, weight, negatives, seed, 12, 0.1, *weighting, 12, 36, 12, case.backend)
    torch.library.opcheck(prepare, of_part)
    drawn = (negatives, seed, prepare(*of_part))
    images = registration.images_of(drawn[2], case.backend)
    settings = (12, 0.3, 1.5, 0.1, *weighting, images, 12, case.backend)
    torch.library.opcheck(forward, (batch.z, other, *part, weight, *drawn, *settings))
    constants = (12, 0.3, 0.1, False, *transposed, 12, case.backend)
    torch.library.opcheck(backward, (torch.ones_like(losses), batch.z, other, *part, *drawn, rows, *constants))


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_layouts(case, layout):
    batch = Batch(case)
    expected = batch.loss_and_gradient(backend=case.backend)
    batch.z, batch.negatives = (memory_layouts(value)[layout] for value in (batch.z, batch.negatives))
    for mask in (batch.positives, batch.specific):
        mask.bits = memory_layouts(mask.bits)[layout]
    torch.testing.assert_close(batch.loss_and_gradient(backend=case.backend), expected, rtol=1e-12, atol=1e-12)

    row = batch.z[:1].detach().clone().requires_grad_()
    loss = batch.loss(row.expand(36, -1), backend=case.backend)
    (grad,) = torch.autograd.grad(loss, row)
    repeated = row.detach().repeat(36, 1).requires_grad_()
    same = batch.loss(repeated, backend=case.backend)
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)
    (rows_grad,) = torch.autograd.grad(same, repeated)
    torch.testing.assert_close(grad, rows_grad.sum(dim=0, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_compile(case):
    def run(z, positives, specific, negatives, lam, seed):
        return multi_positive_contrastive(
            z,
            PositiveMask(positives, z.shape[0]),
            specific=PositiveMask(specific, z.shape[0]),
            specific_weight=lam,
            anchors_per_image=12,
            negatives=negatives,
            negative_rate=0.2,
            seed=seed,
            backend=case.backend,
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def check(images, explicit):
        batch = Batch(case, images=images)
        negatives = batch.negatives if explicit else None
        lam, seed = (torch.tensor(value, device=case.device) for value in (0.4, 5))
        results = []
        for function in (compiled, run):
            z = batch.z.clone().requires_grad_()
            loss = function(z, batch.positives.bits, batch.specific.bits, negatives, lam, seed)
            loss.backward()
            results.append((loss.detach(), z.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    for explicit in (False, True):
        check(3, explicit)
        check(6, explicit)  # compiled again, now for any number of images
    with torch.compiler.set_stance("fail_on_recompile"):
        check(9, True)


def test_cuda_graph(cuda_graph):
    for case in available_cases(OP, (torch.float32, torch.float16)):
        if case.device == "cuda":
            batch = Batch(case)
            seed = torch.tensor(3, device="cuda")
            for options in ({"lam": 0.4}, {"lam": 0.0, "negatives": None, "negative_rate": 0.3, "seed": seed}):
                call = partial(batch.loss_and_gradient, **options, backend=case.backend)
                cuda_graph(call, batch.z, batch.positives.bits)


@each_case
def test_deterministic(case):
    batch = Batch(case, images=4, height=5, width=5)

    def run(seed):
        return batch.loss_and_gradient(negatives=None, negative_rate=0.3, seed=seed, backend=case.backend)

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert run(1)[0] != run(2)[0]
    torch.testing.assert_close(run(1), run(torch.tensor(1, device=case.device)), rtol=0, atol=0)
    # The draw is that of the published generator, also in backward.
    drawn = bernoulli(torch.tensor(1, device=case.device), 25, 100, 0.3)
    torch.testing.assert_close(run(1), batch.loss_and_gradient(negatives=drawn, backend=case.backend), rtol=0, atol=0)
    # Without a seed PyTorch's generator governs.
    torch.manual_seed(0)
    first, other = run(None), run(None)
    torch.manual_seed(0)
    torch.testing.assert_close(first, run(None), rtol=0, atol=0)
    assert first[0] != other[0]


@each_case
@each_variant
def test_edge_cases(case, variant):
    run = partial(Batch.loss_and_gradient, **variant, backend=case.backend)
    # No positives at all, whatever the negatives; one anchor alone: nothing to learn, and no NaN.
    for batch in (Batch(case, density=0.0, images=1), Batch(case, images=1, height=1, width=1)):
        batch.specific = batch.positives = PositiveMask.from_dense(torch.zeros_like(batch.agnostic).to(case.device))
        loss, grad = run(batch)
        assert loss == 0 and not grad.any()
    # Without negatives and with a single positive, the positive is the whole denominator: log p = 0.
    batch = Batch(case, images=1)
    single = torch.zeros(12, 12, dtype=torch.bool, device=case.device)
    single[2, 5] = True
    batch.positives, batch.specific, batch.negatives = PositiveMask.from_dense(single), None, None
    loss, grad = run(batch, lam=0.0, negative_rate=0.0)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-3)
    # Every pair a positive, with and without negatives: the same denominator, hence the same loss.
    batch.positives = PositiveMask.from_dense(torch.ones_like(single))
    everything = run(batch, lam=0.0, negative_rate=0.0)
    torch.testing.assert_close(run(batch, lam=0.0, negative_rate=1.0), everything, rtol=0, atol=0)
    assert everything[0] > 0
    # The rates 0 and 1 are the masks of all False and all True.
    batch = Batch(case)
    for rate in (0.0, 1.0):
        mask = torch.full_like(batch.negatives, bool(rate))
        drawn = run(batch, negatives=None, negative_rate=rate)
        torch.testing.assert_close(drawn, run(batch, negatives=mask), rtol=0, atol=0)


Z, POSITIVES = torch.eye(4, 3), PositiveMask.from_dense(torch.ones(4, 4, dtype=torch.bool))
WEIGHT = torch.tensor(0.5)


def wrong_masks(name):
    return [
        pytest.param(
            TypeError, name, "a tensor of torch.float32", {name: POSITIVES.to_dense().float()}, id=f"{name}-float"
        ),
        pytest.param(ValueError, name, "bool of shape (3, 3)", {name: torch.ones(3, 3).bool()}, id=f"{name}-dense"),
        pytest.param(ValueError, name, "int64 of shape (3,)", {name: torch.ones(3).long()}, id=f"{name}-labels"),
        pytest.param(
            ValueError,
            name,
            "5",
            {name: PositiveMask.from_labels(torch.arange(5))},
            id=f"{name}-other-number-of-anchors",
        ),
        pytest.param(ValueError, name, "meta", {name: POSITIVES.to("meta")}, id=f"{name}-device"),
    ]


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    [
        pytest.param(TypeError, "z", "list", {"z": [[1.0]]}, id="z-list"),
        pytest.param(TypeError, "z", "int64 of shape (4, 3)", {"z": Z.long()}, id="z-int"),
        pytest.param(ValueError, "z", "float32 of shape (3,)", {"z": Z[0]}, id="z-rank-1"),
        pytest.param(ValueError, "z", "float32 of shape (1, 4, 3)", {"z": Z[None]}, id="z-rank-3"),
        pytest.param(ValueError, "z", "float32 of shape (0, 3)", {"z": Z[:0]}, id="z-empty-N"),
        pytest.param(ValueError, "z", "float32 of shape (4, 0)", {"z": Z[:, :0]}, id="z-empty-D"),
        pytest.param(ValueError, "z", "nan in row 2", {"z": Z.index_fill(0, torch.tensor([2]), math.nan)}, id="z-nan"),
        pytest.param(ValueError, "z", "inf in row 0", {"z": Z / 0}, id="z-inf"),
        pytest.param(ValueError, "z", "a loss of nan", {"z": torch.full_like(Z, 1e30)}, id="z-large"),
        pytest.param(
            ValueError, "z", "a loss of", {"z": torch.full_like(Z, 10), "temperature": 1e-37}, id="z-large-logits"
        ),
        pytest.param(TypeError, "positives", "NoneType", {"positives": None}, id="positives-none"),
        *wrong_masks("positives"),
        *wrong_masks("specific"),
        pytest.param(
            ValueError, "specific_weight", "0.5", {"specific": None, "specific_weight": 0.5}, id="weight-alone"
        ),
        pytest.param(
            ValueError, "specific_weight", "a tensor", {"specific": None, "specific_weight": WEIGHT}, id="tensor-alone"
        ),
        *wrong_options(),
    ],
)
def test_errors(error, argument, got, options):
    valid = {"z": Z, "positives": POSITIVES, "specific": POSITIVES, "specific_weight": 0.5}
    with helpful_error(error, OP, argument, got):
        multi_positive_contrastive(**{**valid, **options})


@each_case
def test_inputs_untouched(case):
    batch = Batch(case)
    lam, seed = (torch.tensor(value, device=case.device) for value in (0.4, 5))
    with unchanged(batch.z, batch.positives.bits, batch.specific.bits, batch.negatives, lam, seed):
        batch.loss_and_gradient(lam=lam, backend=case.backend)
        batch.loss_and_gradient(lam=lam, negatives=None, negative_rate=0.3, seed=seed, backend=case.backend)


@each_case
def test_autocast(case):
    batch = Batch(case, dim=24)
    expected = batch.loss_and_gradient(backend=case.backend)
    with torch.autocast(case.device, torch.bfloat16):
        actual = batch.loss_and_gradient(backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_unavailable_backend():
    with pytest.raises(hpkernels.BackendUnavailableError, match=rf"^{OP}: backend 'cuda' is not available: \w+"):
        multi_positive_contrastive(Z.double(), POSITIVES, backend="cuda")


@each_case
def test_second_differentiation(case):
    batch = Batch(case)
    z = batch.z.requires_grad_()
    loss = batch.loss(z, backend=case.backend)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{OP}: double backward is not supported"):
        grad.sum().backward()
    for retain_graph in (True, False):
        z.grad = None
        loss.backward(retain_graph=retain_graph)
        torch.testing.assert_close(z.grad, grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_case
@each_variant
def test_lambda_as_number_or_tensor(case, variant):
    batch = Batch(case, images=2, height=2)
    run = partial(batch.loss_and_gradient, **variant, backend=case.backend)
    for lam in (0.0, 0.375):
        for dtype in (torch.float16, torch.float32, torch.float64):
            tensor = torch.tensor(lam, dtype=dtype, device=case.device)
            torch.testing.assert_close(run(lam=tensor), run(lam=lam), rtol=0, atol=0)
    with_zero = run(lam=0.0)
    batch.specific = None
    torch.testing.assert_close(run(lam=0.0), with_zero, rtol=0, atol=0)


@each_case
def test_image_without_a_kept_anchor_is_left_out(case):
    batch = Batch(case, images=2)  # the second image has no positives
    alone, grad = batch.loss_and_gradient(backend=case.backend)
    merged = batch.loss_and_gradient(
        anchors_per_image=24, negatives=batch.negatives.repeat(2, 1), reweight=False, backend=case.backend
    )
    torch.testing.assert_close(merged, (alone, grad))
    assert alone > 0 and grad.isfinite().all()


@each_case
def test_keep_specific_only(case):
    batch = Batch(case)
    batch.negatives = torch.ones_like(batch.negatives)
    batch.positives = PositiveMask.from_dense(torch.zeros_like(batch.agnostic).to(case.device))
    dropped, _ = batch.loss_and_gradient(backend=case.backend)
    kept, grad = batch.loss_and_gradient(keep_specific_only=True, backend=case.backend)
    assert dropped == 0 and kept > 0 and grad.any()
    # Alone, the specific positives count as the agnostic ones would: lambda cancels in the mean.
    batch.positives, batch.specific = batch.specific, None
    # (unlike S, A also enters the denominator, but here that is everything anyway)
    loss, alone = batch.loss_and_gradient(lam=0.0, backend=case.backend)
    torch.testing.assert_close(kept, loss)
    assert (row_errors(grad, alone) <= 4 * torch.finfo(case.dtype).eps * alone.double().norm(dim=1).max().cpu()).all()


@each_variant
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_empty_denominator_contributes_nothing(case, variant):
    batch = Batch(case)
    batch.negatives = torch.zeros_like(batch.negatives)  # anchor 1 has a specific positive and nothing to compare with
    batch.negative = batch.negatives.cpu()
    loss, grad = batch.loss_and_gradient(**variant, keep_specific_only=True, backend=case.backend)
    exact, exact_grad = batch.oracle(torch.float64, **variant, keep_specific_only=True)
    torch.testing.assert_close(loss.cpu(), exact)
    torch.testing.assert_close(grad.cpu(), exact_grad)


@each_variant
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_adding_a_constant_to_all_logits_changes_nothing(case, variant):
    batch = Batch(case)
    loss, grad = batch.loss_and_gradient(**variant, backend=case.backend)
    batch.z = torch.cat((batch.z, torch.full_like(batch.z[:, :1], 5.0)), dim=1)  # adds 25 / temperature
    shifted, shifted_grad = batch.loss_and_gradient(**variant, backend=case.backend)
    torch.testing.assert_close(shifted, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(shifted_grad[:, :-1], grad, rtol=1e-9, atol=1e-12)


@each_case
@each_variant
def test_long_rows_stay_finite(case, variant):
    batch = Batch(case, length=1e3)
    loss, grad = batch.loss_and_gradient(**variant, temperature=0.07, backend=case.backend)
    exact, _ = batch.oracle(torch.float64, **variant, temperature=0.07)
    torch.testing.assert_close(loss.double().cpu(), exact, rtol=1e-4, atol=0)
    assert grad.isfinite().all()


@each_case
def test_supervised_contrastive(case):
    """With positives from labels and the defaults: L_out of Khosla et al. (NeurIPS 2020), equation 2."""
    problem = random_problem(images=1, height=4, width=6, dtype=case.dtype, device=case.device)
    labels = torch.arange(24) % 5
    labels[7] = 9  # an anchor without positives is left out of the mean
    z = problem.z.requires_grad_()
    loss = multi_positive_contrastive(z, PositiveMask.from_labels(labels.to(case.device)), backend=case.backend)

    def supervised(z):
        terms = []
        for i in range(24):
            others = [a for a in range(24) if a != i]
            same = [p for p in others if labels[p] == labels[i]]
            if same:
                denominator = torch.logsumexp(torch.stack([z[i] @ z[a] / 0.07 for a in others]), dim=0)
                terms.append(-sum(z[i] @ z[p] / 0.07 - denominator for p in same) / len(same))
        return sum(terms) / len(terms)

    def with_gradient(dtype):
        leaf = z.detach().cpu().to(dtype).requires_grad_()
        value = supervised(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    (exact, exact_grad), (plain, plain_grad) = with_gradient(torch.float64), with_gradient(values_dtype(case.dtype))
    assert_rows_close(loss, exact, plain)
    loss.backward()
    assert_rows_close(z.grad, exact_grad, plain_grad.to(case.dtype))


@each_case
def test_base_temperature_scales(case):
    batch = Batch(case)
    loss, grad = batch.loss_and_gradient(base_temperature=None, backend=case.backend)
    scaled, scaled_grad = batch.loss_and_gradient(base_temperature=0.15, backend=case.backend)
    torch.testing.assert_close((scaled, scaled_grad), (loss * 2, grad * 2))


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_bad_values_make_the_loss_nan_where_they_cannot_be_read(case):
    batch = Batch(case)

    @torch.compile(fullgraph=True, backend="eager")
    def run(z, lam):
        return batch.loss(z, lam=lam, backend=case.backend)

    lam = torch.tensor(0.4, device=case.device)
    torch.testing.assert_close(run(batch.z, lam), batch.loss(batch.z, backend=case.backend))
    for bad in (-lam, lam * math.nan, lam * math.inf):
        assert run(batch.z, bad).isnan()
    # An anchor that is nobody's positive or negative, and has none.
    batch.positives = batch.specific = PositiveMask.from_labels(torch.arange(-1, 35, device=case.device) // 2)
    batch.negatives = torch.zeros_like(batch.negatives)
    assert run(batch.z, lam).isfinite()
    unused = batch.z.clone()
    unused[0, 0] = math.nan
    assert run(unused, lam).isnan()


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("masked", ["positives", "specific"])
def test_ignored_anchors_take_no_part(case, rate, masked):
    anchors = 40
    generator = torch.Generator().manual_seed(0)
    z = random_problem(0, images=1, height=5, width=8, dim=6, dtype=torch.float64).z
    labels = torch.randint(3, (anchors,), generator=generator)
    labels[::4] = 255
    kept = (labels != 255).nonzero()[:, 0]
    others = torch.rand(anchors, anchors, generator=generator) < 0.3
    drawn = bernoulli(torch.tensor(5), anchors, anchors, rate)

    def gradient(z, labels, others, **options):
        z = z.to(case.device).requires_grad_()
        masks = {
            "positives": PositiveMask.from_labels(labels, ignore_index=255).to(case.device),
            "specific": PositiveMask.from_dense(others).to(case.device),
        }
        if masked == "specific":
            masks = {"positives": masks["specific"], "specific": masks["positives"]}
        loss = multi_positive_contrastive(z, **masks, specific_weight=0.5, backend=case.backend, **options)
        return loss.item(), torch.autograd.grad(loss, z)[0].cpu()

    loss, grad = gradient(z, labels, others, negative_rate=rate, seed=5)
    given, grad_given = gradient(z, labels, others, negatives=drawn.to(case.device))
    alone = (z[kept], labels[kept], others[kept][:, kept])
    expected, grad_expected = gradient(*alone, negatives=drawn[kept][:, kept].to(case.device))
    assert loss == pytest.approx(expected, rel=1e-12) and given == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grad[kept], grad_expected)
    torch.testing.assert_close(grad_given, grad)
    assert not grad[labels == 255].any()


@each_case
def test_labels_and_dense_masks_are_taken_as_masks(case):
    z = Batch(case).z
    labels = torch.arange(len(z), device=case.device) % 3
    dense = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool, device=case.device)
    expected = multi_positive_contrastive(z, PositiveMask.from_labels(labels), backend=case.backend)
    for positives in (labels, labels.to(torch.uint8), dense):
        assert torch.equal(multi_positive_contrastive(z, positives, backend=case.backend), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("case", available_cases(OP, (torch.float16,)), ids=str)
def test_small_coefficients_keep_their_digits(case, rate, symmetric):
    """Rows as of an image with many anchors beside one with few, in a batch of tens of thousands.

    There g is a thousandth, the push of a row, times the probability of one of so many. Both are given here as
    statistics, so that few anchors do.
    """
    generator = torch.Generator().manual_seed(0)
    anchors, group, dim = 84, 12, 8
    z = torch.nn.functional.normalize(torch.randn(anchors, dim, generator=generator), dim=1).to(case.device, case.dtype)
    mask = torch.rand(anchors, anchors, generator=generator) < 0.1
    mask = (mask | mask.T).fill_diagonal_(False) if symmetric else mask.fill_diagonal_(False)
    bits = PositiveMask.from_dense(mask.to(case.device)).bits
    log_denominator = torch.full((anchors,), math.log(50176.0))
    push = torch.where(torch.arange(anchors) < group, 1.0, 1e-3)
    pull = torch.where(torch.arange(anchors) < group, 1e-2, 1e-7)
    rows = torch.stack((log_denominator, push, pull, torch.zeros(anchors)), dim=1)[None].to(case.device)
    settings, weighting = (group, 0.6, rate, symmetric), ("joint", True, False)

    def gradient(backend, z, rows):
        kernels = backends.implementation(OP, backend)
        seed, grad_losses = torch.tensor(3, device=z.device), torch.full((1,), 2.0**17, device=z.device)
        relations, weight = (bits.to(z.device), None), torch.zeros((), device=z.device)
        row_bytes = dim * z.element_size()
        pairs = kernels.prepare(*relations, weight, None, seed, group, rate, *weighting, symmetric, row_bytes)
        (grad,) = kernels.backward(grad_losses.to(rows.dtype), [z], *relations, None, seed, pairs, rows, *settings)
        return grad.cpu().double()

    expected = gradient("reference", z.double(), rows.double())
    errors = row_errors(gradient(case.backend, z, rows), expected) / expected.norm(dim=1)
    assert errors.max() < 2e-3, f"row {int(errors.argmax())} by {errors.max():.2e}"
