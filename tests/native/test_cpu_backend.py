"""What only the CPU backend has: routes that agree, threads that do not matter, memory that does not grow as N²."""

import subprocess
import sys

import pytest
import torch

import hpkernels
from hpkernels import PositiveMask
from hpkernels.backends import availability
from hpkernels.ops import _checks as check
from hpkernels.ops import _coarse
from hpkernels.ops._bits import pack_bits
from hpkernels.ops.hidden_positives import cpu as discovery
from hpkernels.ops.masked_topk import cpu as topk
from hpkernels.ops.multi_positive_contrastive import cpu
from hpkernels.testing import assert_rows_close, random_problem

OPS = ("masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation")
ROUTES = ("pairs", "images", "blocks")


@pytest.mark.parametrize("op", OPS)
def test_is_built(op):
    ok, reason = availability(op, "cpu")
    assert ok, f"the tests need the compiled kernels: {reason}"


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    monkeypatch.setattr(cpu, "choose_route", lambda *_: request.param)
    return request.param


def loss_and_gradients(problem, backend, **options):
    z, z_mixed = (value.clone().requires_grad_() for value in (problem.z, problem.z_mixed))
    loss = hpkernels.ghp_contrastive(
        z,
        problem.features,
        problem.pool,
        specific=problem.specific,
        specific_pool=problem.specific_pool,
        specific_weight=0.7,
        z_mixed=z_mixed,
        anchors_per_image=problem.anchors_per_image,
        seed=11,
        backend=backend,
        **options,
    )
    loss.backward()
    return loss.detach(), z.grad, z_mixed.grad


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("variant", ["joint", "separate"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 5), (2, 8, 8), (5, 3, 11)], ids=str)
def test_routes_agree_with_the_reference(route, shape, variant, rate):
    images, height, width = shape
    problem = random_problem(2, images=images, height=height, width=width, dim=9, dtype=torch.float64)
    options = {"variant": variant, "negative_rate": rate}
    torch.testing.assert_close(
        loss_and_gradients(problem, "cpu", **options),
        loss_and_gradients(problem, "reference", **options),
        rtol=1e-9,
        atol=1e-12,
    )


def test_routes_take_relations_that_are_not_symmetric(route):
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(44, 6, generator=generator, dtype=torch.float64))
    masks = [PositiveMask.from_dense(torch.rand(44, 44, generator=generator) < 0.1) for _ in range(2)]
    negatives = torch.rand(11, 44, generator=generator) < 0.2
    results = []
    for backend in ("cpu", "reference"):
        own = z.clone().requires_grad_()
        loss = hpkernels.multi_positive_contrastive(
            own,
            masks[0],
            specific=masks[1],
            specific_weight=0.3,
            anchors_per_image=11,
            negatives=negatives,
            backend=backend,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, own)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_single_precision_is_as_good_as_plain_pytorch(route):
    problem = random_problem(4, images=3, height=7, width=6, dim=40, feature_dim=32)
    exact = random_problem(4, images=3, height=7, width=6, dim=40, feature_dim=32, dtype=torch.float64)
    _, *grads = loss_and_gradients(problem, "cpu")
    _, *plain = loss_and_gradients(problem, "reference")
    _, *wanted = loss_and_gradients(exact, "reference")
    for grad, expected, by_pytorch in zip(grads, wanted, plain, strict=True):
        assert_rows_close(grad, expected, by_pytorch, factor=4)


def test_route_follows_the_work():
    few, many = (torch.arange(600) // group for group in (2, 200))
    none, all_pairs = pack_bits(torch.zeros(100, 600, dtype=torch.bool)), pack_bits(torch.ones(100, 600).bool())
    assert cpu.choose_route(PositiveMask.from_labels(few).bits, None, none) == "pairs"
    assert cpu.choose_route(PositiveMask.from_labels(torch.arange(600) // 100).bits, None, none) == "images"
    assert cpu.choose_route(PositiveMask.from_labels(many).bits, None, all_pairs) == "blocks"


@pytest.mark.parametrize("side", [1, 5, 12, 30])
def test_blocks_may_be_cut_in_any_way(route, side, monkeypatch):
    problem = random_problem(3, images=5, height=3, width=4, dim=9, dtype=torch.float64)
    expected = loss_and_gradients(problem, "reference")
    monkeypatch.setattr(cpu, "_SIDE", side)
    torch.testing.assert_close(loss_and_gradients(problem, "cpu"), expected, rtol=1e-9, atol=1e-12)


def test_threads_do_not_matter(route):
    problem = random_problem(1, images=4, height=9, width=8, dim=33)
    assert_independent_of_threads(lambda: loss_and_gradients(problem, "cpu"))


def test_threads_do_not_matter_to_other_ops():
    problem = random_problem(1, images=2, height=9, width=8, feature_dim=33, pool_size=100)
    code, tokens = torch.rand(2, 33, 9, 8), torch.rand(2, 2, 73, 5)

    def results():
        top = hpkernels.masked_topk(problem.features, problem.pool, k=7, backend="cpu")
        positives = hpkernels.hidden_positives(problem.features, top.values[:, 0], backend="cpu")
        return *top, positives.bits, hpkernels.local_propagation(code, tokens, tokens.flip(1), backend="cpu")

    assert_independent_of_threads(results)


def assert_independent_of_threads(compute):
    """Assert that the results have the same bits for several numbers of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_runs_in_inference_mode(route):
    problem = random_problem(1, images=4, height=9, width=8, dim=33)
    options = {"anchors_per_image": 72, "seed": 1, "backend": "cpu"}
    expected = hpkernels.ghp_contrastive(problem.z, problem.features, problem.pool, **options)
    with torch.inference_mode():
        loss = hpkernels.ghp_contrastive(problem.z, problem.features, problem.pool, **options)
    assert torch.equal(loss, expected)


@pytest.fixture(params=["int8", "float32"])
def precision(request, monkeypatch):
    """Coarse products of this precision."""
    monkeypatch.setattr(_coarse, "int8_is_fast", lambda: request.param == "int8")
    return request.param


def rows_of(kind, count, generator):
    """Rows (count, 40) with pairs of equal rows among them."""
    rows = torch.randn(count, 40, generator=generator)
    if kind == "alike":  # far more so than int8 can tell
        rows = rows[:1] + 1e-4 * rows
    elif kind == "outliers":
        rows[:, 7] *= 100
    elif kind in ("tiny", "huge"):
        rows *= {"tiny": 1e-30, "huge": 1e15}[kind]
    rows[count // 2 :] = rows[: count - count // 2]
    return rows


each_kind = pytest.mark.parametrize("kind", ["normal", "alike", "outliers", "tiny", "huge"])


def test_products_may_overflow(precision, generator, monkeypatch):
    monkeypatch.setattr(check, "readable", lambda value: False)  # as under torch.compile: else they are refused
    query, pool = 1e25 * rows_of("normal", 10, generator), 1e25 * rows_of("normal", 40, generator)
    values, indices = hpkernels.masked_topk(query, pool, 3, backend="cpu")
    positive = (query.double() @ pool.double().T > 0).int().sort(dim=1, descending=True, stable=True)
    assert (values == torch.inf).all() and torch.equal(indices, positive.indices[:, :3])
    mask = hpkernels.hidden_positives(pool, torch.full((40,), 3e38), backend="cpu")
    assert torch.equal(mask.to_dense(), (pool.double() @ pool.double().T > 0).fill_diagonal_(False))


@each_kind
@pytest.mark.parametrize("k", [1, 5, 70])
def test_topk_is_exact(precision, kind, k, generator, monkeypatch):
    monkeypatch.setattr(topk, "_TILE", 20 * 150)  # several blocks of queries
    query, pool = rows_of(kind, 90, generator), rows_of(kind, 150, generator)
    values, indices = hpkernels.masked_topk(query, pool, k, backend="cpu")
    exact = (query.double() @ pool.double().T).float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, exact.values[:, :k]) and torch.equal(indices, exact.indices[:, :k])


@each_kind
def test_discovery_is_exact(precision, kind, generator, monkeypatch):
    monkeypatch.setattr(discovery, "_ROWS", 32)
    monkeypatch.setattr(discovery, "_COLUMNS", 64)
    features = rows_of(kind, 210, generator)
    products = (features.double() @ features.double().T).float()
    threshold = products[:, 0].contiguous()  # so that some products equal their thresholds, which is not above them
    for symmetric, limit in ((True, torch.minimum(threshold[:, None], threshold)), (False, threshold[:, None])):
        expected = (products > limit).fill_diagonal_(False)
        mask = hpkernels.hidden_positives(features, threshold, symmetric=symmetric, backend="cpu")
        assert torch.equal(mask.to_dense(), expected)
        limits = threshold[50:], threshold if symmetric else torch.full_like(threshold, -torch.inf)
        assert torch.equal(discovery.between(features[50:], features, *limits, symmetric, 50), mask.bits[50:])
    keys, of_keys = features[:130], threshold[:130] - 0.1
    expected = products[:, :130] > torch.maximum(threshold[:, None], of_keys)
    mask = hpkernels.hidden_positives(features, threshold, keys=keys, key_threshold=of_keys, backend="cpu")
    assert torch.equal(mask.to_dense(), expected)


def test_precision_follows_what_int8_leaves_undecided(generator, monkeypatch):
    monkeypatch.setattr(_coarse, "int8_is_fast", lambda: True)
    for kind, expected in (("normal", True), ("alike", False)):
        rows = rows_of(kind, 300, generator)
        products = _coarse.CoarseProducts(rows, rows, 300 * 300)
        tile = products.tile(slice(0, 300), slice(0, 300))
        assert tile.dtype == torch.int32
        threshold = rows.norm(dim=1) ** 2
        bits = torch.empty(300, 10, dtype=torch.int32)
        pack = torch.ops.hpkernels_cpu.hidden_positives_pack
        products.took(pack(tile, 0, 0, rows, products.left.stats, threshold, True, bits), tile)
        assert (products.tile(slice(0, 300), slice(0, 300)).dtype == torch.int32) == expected


def test_symmetric_relations_need_no_transpose(monkeypatch):
    transposed = []
    original = cpu._transposed
    monkeypatch.setattr(cpu, "_transposed", lambda bits, columns: transposed.append(columns) or original(bits, columns))
    labels = torch.arange(60) % 7
    dense = PositiveMask.from_labels(labels).to_dense()
    for mask, times in ((PositiveMask.from_labels(labels), 1), (PositiveMask.from_dense(dense), 2)):
        transposed.clear()
        z = torch.nn.functional.normalize(torch.randn(60, 5)).requires_grad_()
        hpkernels.multi_positive_contrastive(z, mask, backend="cpu").backward()
        assert len(transposed) == times  # of the negatives, and of positives that are not known to be symmetric


def test_branches_share_what_does_not_depend_on_them(route, monkeypatch):
    called = []
    for name in ("choose_route", "_negative_bits", "_transposed"):
        original = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, n=name, f=original: called.append(n) or f(*args))
    problem = random_problem(1, images=4, height=3, width=4, dim=5)
    counts = []
    for z_mixed in (None, problem.z_mixed.requires_grad_()):
        called.clear()
        hpkernels.ghp_contrastive(
            problem.z.clone().requires_grad_(),
            problem.features,
            problem.pool,
            z_mixed=z_mixed,
            anchors_per_image=12,
            backend="cpu",
        ).backward()
        counts.append({name: called.count(name) for name in called})
    once_each_way = {"choose_route": 2, "_negative_bits": 2}
    assert counts[0] == counts[1] == once_each_way | ({} if route == "pairs" else {"_transposed": 1})


def test_memory_does_not_grow_with_the_pairs():
    script = """
import resource, torch, hpkernels
from hpkernels.testing import random_problem
problem = random_problem(images=16, height=28, width=28, dim=32, feature_dim=32, pool_size=1024)
z = problem.z.requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hpkernels.ghp_contrastive(z, problem.features, problem.pool, anchors_per_image=784, backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    mebibytes = float(subprocess.check_output([sys.executable, "-c", script], text=True))
    # One N x N float32 matrix would be 600 MiB; the packed mask and its transpose are 19 MiB each.
    assert mebibytes < 150
