"""What only the CPU backend has: routes that agree, threads that do not matter, memory that does not grow as N²."""

import subprocess
import sys

import pytest
import torch

import hpkernels
from hpkernels import PositiveMask
from hpkernels.backends import availability
from hpkernels.ops.hidden_positives.bits import pack_bits
from hpkernels.ops.multi_positive_contrastive import cpu
from hpkernels.testing import assert_rows_close, random_problem

OPS = ("masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation")
ROUTES = ("rows", "images", "blocks")


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
    assert cpu.choose_route(PositiveMask.from_labels(few).bits, None, none) == "rows"
    assert cpu.choose_route(PositiveMask.from_labels(torch.arange(600) // 100).bits, None, none) == "images"
    assert cpu.choose_route(PositiveMask.from_labels(many).bits, None, all_pairs) == "blocks"


def test_threads_do_not_matter(route):
    problem = random_problem(1, images=4, height=9, width=8, dim=33)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(problem, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


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
