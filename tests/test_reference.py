"""The backend `reference` goes through blocks of rows: the results of the dense specification, in little memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

import hpkernels
from hpkernels import PositiveMask
from hpkernels.ops import _blocks
from hpkernels.ops._bits import as_bits, unpack_bits
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives import reference as discovery
from hpkernels.ops.hidden_positives import rows_of
from hpkernels.ops.local_propagation import reference as propagation
from hpkernels.ops.masked_topk import reference as ranking
from hpkernels.ops.multi_positive_contrastive import reference as contrastive
from hpkernels.ops.multi_positive_contrastive.relations import negative_bits

IMAGES, PATCHES = 5, 14
N = IMAGES * PATCHES  # 70: two blocks of 32 rows and a ragged one

# Single rows or the 32 of a word; some more of them, but not all; one block.
each_workspace = pytest.mark.parametrize("workspace", [1, 64 * 24 * N, 2**28], ids=["least", "some", "whole"])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Use the workspace of the test's parameter."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "workspace" in parameters.params:
        monkeypatch.setattr(_blocks, "WORKSPACE", parameters.params["workspace"])


def exact(*shape, generator):
    """Numbers whose products are exact, so that no pair depends on the order of a sum; ties are the rule."""
    return torch.randint(-8, 9, shape, generator=generator) / 8.0


def mask_of(density, generator):
    return (torch.rand(N, N, generator=generator) < density).fill_diagonal_(False)


@pytest.mark.parametrize(
    ("workspace", "arguments", "expected"),
    [
        (100, (10, 30), [3, 3, 3, 1]),
        (100, (4, 1000), [1] * 4),  # a row at least
        (100, (4, 1), [4]),
        (100, (70, 1, 32), [70]),
        (2**28, (70, 2**20), [32, 32, 6]),  # on the CPU
        (70, (70, 1, 32), [64, 6]),
        (1, (70, 1, 32), [32, 32, 6]),  # or a word of them
    ],
)
def test_blocks_fit_the_workspace(workspace, arguments, expected):
    rows, *others = arguments
    found = _blocks.row_blocks(torch.empty(rows), *others)
    assert [block.stop - block.start for block in found] == expected
    edges = [0, *itertools.accumulate(expected)]
    assert [(block.start, block.stop) for block in found] == list(itertools.pairwise(edges))


@each_workspace
@pytest.mark.parametrize("k", [1, 3, 40])
def test_masked_topk(workspace, k, generator):
    query, pool = exact(N, 6, generator=generator), exact(40, 6, generator=generator)
    mask = torch.rand(N, 40, generator=generator) < 0.5
    groups = torch.randint(-1, 3, (N,), generator=generator), torch.randint(-1, 3, (40,), generator=generator)
    query, pool = query.double().requires_grad_(), pool.double().requires_grad_()
    expected, places = ranking.top_products(query, pool, k, mask, *groups)
    options = {"mask": mask, "query_group": groups[0], "pool_group": groups[1]}
    values, indices = hpkernels.masked_topk(query, pool, k, **options, backend="reference")
    assert torch.equal(values, expected) and torch.equal(indices, places)
    cotangent = torch.randn(N, k, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(result, (query, pool), cotangent) for result in (values, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@each_workspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_hidden_positives(workspace, dtype, generator):
    features = exact(N, 6, generator=generator).to(dtype)
    threshold = exact(N, generator=generator).to(torch.promote_types(dtype, torch.float32))
    for symmetric in (True, False):
        dense = discovery.positives(features, threshold, symmetric)
        assert 0.2 < dense.double().mean() < 0.8
        found = hpkernels.hidden_positives(features, threshold, symmetric=symmetric, backend="reference")
        assert torch.equal(found.bits, as_bits(dense))
    keys, key_threshold = features[:45].flip(0), threshold[:45]
    dense = discovery.positives_between(features, keys, threshold, key_threshold)
    assert 0.1 < dense.double().mean() < 0.8
    found = hpkernels.hidden_positives(features, threshold, keys=keys, key_threshold=key_threshold, backend="reference")
    assert torch.equal(found.bits, as_bits(dense))


@each_workspace
def test_pairs_are_decided_once(workspace, generator):
    """Where rounding decides, which depends on the place of a product in a block, both directions agree."""
    features = normalize(torch.randn(N, 33, generator=generator))
    products = (features @ features.T).fill_diagonal_(-1)
    found = hpkernels.hidden_positives(features, products.amax(dim=1), backend="reference").to_dense()
    assert torch.equal(found, found.T) and not found.diagonal().any()


NEGATIVES = {"drawn": 0.2, "all": 1.0, "none": 0.0, "given": None}


@each_workspace
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
@pytest.mark.parametrize("variant", ["joint", "separate"])
def test_contrastive_loss(workspace, negatives, symmetric, variant, generator):
    agnostic, task = mask_of(0.1, generator), mask_of(0.1, generator)
    if symmetric:
        agnostic, task = agnostic | agnostic.T, task | task.T
    agnostic[:PATCHES] = agnostic[:, :PATCHES] = False  # anchors without positives, and where nothing is drawn
    z = [normalize(torch.randn(N, 5, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    seed, rate, weight = torch.tensor(3), NEGATIVES[negatives], torch.tensor(0.7, dtype=torch.float64)
    given = torch.rand(PATCHES, N, generator=generator) < 0.2 if rate is None else None
    drawn = bernoulli(seed, PATCHES, N, rate) if given is None else given
    options = {"anchors_per_image": PATCHES, "variant": variant, "reweight": True, "keep_specific_only": True}
    dense = [
        contrastive.contrastive_loss(branch, agnostic, task, weight, drawn, temperature=0.3, **options) for branch in z
    ]
    losses, rows = torch.ops.hpkernels.multi_positive_contrastive(
        *z, as_bits(agnostic), as_bits(task), weight, given, seed, [], PATCHES, 0.3, 1.0, rate or 0.0,
        variant, True, True, symmetric, None, 0, "reference",
    )  # fmt: skip
    expected = torch.stack([loss for loss, _ in dense])
    assert (expected > 0.1).all()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows, torch.stack([statistics for _, statistics in dense]), rtol=1e-12, atol=1e-14)
    cotangent = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gradients = (torch.autograd.grad(result, z, cotangent) for result in (losses, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@each_workspace
def test_local_propagation(workspace, generator):
    query, key = torch.randn(2, 3, 2, 31, 4, generator=generator, dtype=torch.float64)
    code = torch.randn(3, 7, 5, 6, generator=generator, dtype=torch.float64)

    def run():
        leaf = code.clone().requires_grad_()
        weights = hpkernels.local_propagation_weights(query, key, (5, 6), backend="reference")
        mixed = hpkernels.apply_local_propagation(leaf, weights, backend="reference")
        return weights, mixed, *torch.autograd.grad(mixed, leaf, code)

    found = run()
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(_blocks, "WORKSPACE", 2**28)
        torch.testing.assert_close(found, run(), rtol=1e-12, atol=1e-12)
    # The gradient is the transposed stencil: <mixed, code> as a quadratic form of code, written with either.
    torch.testing.assert_close((found[1] * code).sum(), (found[2] * code).sum())


@each_workspace
def test_masks(workspace, generator):
    dense, labels = torch.rand(N, N, generator=generator) < 0.3, torch.randint(4, (N,), generator=generator)
    mask = PositiveMask.from_dense(dense)
    dense.fill_diagonal_(False)
    assert torch.equal(mask.to_dense(), dense) and torch.equal(mask.T.to_dense(), dense.T)
    assert torch.equal(mask.count(), dense.sum(dim=1))
    equal = (labels[:, None] == labels).fill_diagonal_(False)
    assert torch.equal(PositiveMask.from_labels(labels).to_dense(), equal)


@each_workspace
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_negatives(workspace, rate):
    seed = torch.tensor(5)
    assert torch.equal(unpack_bits(negative_bits(None, seed, 9, N, rate), N), bernoulli(seed, 9, N, rate))


def test_threads_do_not_race():
    """Many queries whose gradients go to few rows of the pool: the same bits every time."""
    generator = torch.Generator().manual_seed(0)
    query, grad = torch.randn(20000, 64, generator=generator), torch.randn(20000, 4, generator=generator)
    indices = torch.randint(16, (20000, 4), generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [ranking.backward(grad, indices, query, query[:16])[1] for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_deterministic():
    inputs = hpkernels.testing.random_problem(0, images=2, height=7, width=7)
    first, second = (ghp_gradients(inputs) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def ghp_gradients(problem):
    z, z_mixed = (value.clone().requires_grad_() for value in (problem.z, problem.z_mixed))
    sources = {"specific": problem.specific, "specific_pool": problem.specific_pool, "specific_weight": 0.5}
    loss = hpkernels.ghp_contrastive(
        z, problem.features, problem.pool, **sources, z_mixed=z_mixed, negative_rate=0.1, seed=0,
        anchors_per_image=problem.anchors_per_image, backend="reference",
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (z, z_mixed))


def test_no_value_is_read(monkeypatch):
    """On fake tensors, which have none: reading one would raise, and so would a tensor made on the CPU."""
    monkeypatch.setattr(_blocks, "WORKSPACE", 32 * 24 * N)
    with FakeTensorMode():
        z, scalar = torch.empty(N, 5, device="cuda"), torch.empty((), device="cuda")
        values, indices = ranking.forward(z, z[:9], 3)
        assert [grad.shape for grad in ranking.backward(values, indices, z, z[:9])] == [(N, 5), (9, 5)]
        bits = discovery.forward(z, values[:, 0])
        assert bits.shape == (N, 3) and bits.device.type == "cuda"
        for first in (None, 9):
            rows = discovery.between(z[9:40], z, values[9:40, 0], values[:, 0], True, first)
            assert rows.shape == (31, 3) and rows.device.type == "cuda"
        draw = None, scalar.long(), [], PATCHES
        losses, rows = contrastive.forward([z], bits, bits, scalar, *draw, 0.3, 1.0, 0.2, "separate", True, True)
        (grad,) = contrastive.backward(losses, [z], bits, bits, *draw[:3], rows, PATCHES, 0.3, 0.2, symmetric=False)
        assert grad.shape == z.shape and grad.device.type == "cuda"
        query, code = torch.empty(1, 2, 30, 4, device="cuda"), torch.empty(1, 5, 5, 6, device="cuda")
        weights = propagation.weights_forward(query, query, 5, 6, 28.0, 0.1, 0.9, 3, 0)
        assert propagation.apply_backward(propagation.apply_forward(code, weights), weights).shape == code.shape


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("packed_mask", (torch.zeros(40, 40, dtype=torch.bool), False)),
        ("equal_label_bits", (torch.arange(40) % 3, torch.arange(40) > 3)),
        ("equal_label_bits", (torch.arange(40) % 3, torch.arange(40) > 3, torch.arange(9) % 2, torch.arange(9) > 2)),
        ("transposed_bits", (torch.ones(40, 3, dtype=torch.int32), 70)),
        ("counted_bits", (torch.ones(40, 2, dtype=torch.int32),)),
        ("drawn_negatives", (torch.tensor(0), 7, 40, 0.5)),
    ],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.hpkernels, op).default, arguments)


ANCHORS = 1600
PAIRS = ANCHORS**2  # bytes of a bool matrix of all pairs


@pytest.fixture
def peak_of(monkeypatch):
    """``peak_of(call)``: the most bytes that a call holds at a time on the CPU, of all it allocates, results included.

    With half of `PAIRS` as the workspace.
    """
    monkeypatch.setattr(_blocks, "WORKSPACE", PAIRS // 2)

    def measure(call):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = call()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        assert result is not None and events
        return max(itertools.accumulate(event.nbytes() for event in events))

    return measure


def test_the_profiler_sees_all_pairs(peak_of):
    assert PAIRS <= peak_of(lambda: torch.zeros(PAIRS, dtype=torch.uint8).clone()[:1].clone()) < 2.1 * PAIRS


def test_no_matrix_of_all_pairs(peak_of):
    """What a call allocates fits the workspace, besides packed bits and some numbers an anchor."""
    problem = hpkernels.testing.random_problem(0, images=16, height=10, width=10, dim=8, feature_dim=8, pool_size=16)
    rows, backend = problem.z, {"backend": "reference"}
    mask = PositiveMask.from_labels(torch.arange(ANCHORS) % 100)
    directed, dense = PositiveMask(mask.bits, ANCHORS), mask.to_dense()
    labels, limits = torch.zeros(ANCHORS, dtype=torch.int64), torch.zeros(ANCHORS)
    tokens = torch.randn(1, 2, ANCHORS, 4)

    def supcon():
        z = rows.clone().requires_grad_()
        loss = hpkernels.multi_positive_contrastive(z, directed, **backend)
        return torch.autograd.grad(loss, z)

    def weights():
        return hpkernels.local_propagation_weights(tokens, tokens, (40, 40), prefix_tokens=0, **backend)

    calls = {  # and how many masks they make
        "loss of directed masks": (supcon, 0),
        "the whole loss": (lambda: ghp_gradients(problem), 2),
        "local propagation": (weights, 0),
        "ranking": (lambda: hpkernels.masked_topk(rows, rows, 8, **backend), 0),
        "keys": (lambda: hpkernels.hidden_positives(rows, limits, keys=rows, **backend), 1),
        "rows": (lambda: rows_of(rows[99:], limits[99:], rows, limits, 99, **backend), 1),
        "labels": (lambda: PositiveMask.from_labels(labels), 1),
        "labels of keys": (lambda: PositiveMask.from_labels(labels, key_labels=labels), 1),
        "packing": (lambda: PositiveMask.from_dense(dense), 1),
        "transpose": (lambda: directed.T, 1),
        "count": (mask.count, 0),
    }
    peaks = {name: (peak_of(call) - masks * mask.nbytes) / _blocks.WORKSPACE for name, (call, masks) in calls.items()}
    assert all(0.2 < peak < 1.15 for peak in peaks.values()), peaks
