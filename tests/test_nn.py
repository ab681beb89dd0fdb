from __future__ import annotations

import math

import pytest
import torch

import hpkernels
from hpkernels import BackendUnavailableError
from hpkernels.nn import HiddenPositiveLoss, LocalPropagation, ReferencePool
from hpkernels.testing import helpful_error, random_problem, unchanged


def test_reference_pool_keeps_normalised_vectors():
    pool = ReferencePool(5, 3)
    assert not pool.vectors.any()
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 7
    with unchanged(vectors):
        pool.fill(vectors)
    torch.testing.assert_close(pool(), vectors / vectors.norm(dim=1, keepdim=True))
    assert pool() is pool.vectors
    assert not pool().requires_grad and list(pool.parameters()) == []


def test_reference_pool_takes_other_dtypes_and_no_gradient():
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for given in (vectors.half(), vectors.double(), vectors.clone().requires_grad_()):
        pool = ReferencePool(5, 3)
        pool.fill(given)
        assert pool().dtype == torch.float32 and not pool().requires_grad
        torch.testing.assert_close(pool().norm(dim=1), torch.ones(5))
    pool = ReferencePool(5, 3).half()
    pool.fill(vectors)
    assert pool().dtype == torch.float16


def test_reference_pool_is_saved_with_the_model():
    pool, other = ReferencePool(5, 3), ReferencePool(5, 3)
    pool.fill(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert list(pool.state_dict()) == ["vectors"]
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other(), pool())


@pytest.mark.parametrize(
    ("error", "argument", "got", "arguments"),
    [
        (ValueError, "size", "0", (0, 3)),
        (TypeError, "size", "float 5.0", (5.0, 3)),
        (ValueError, "dim", "-1", (5, -1)),
        (TypeError, "dim", "bool True", (5, True)),
    ],
)
def test_reference_pool_errors(error, argument, got, arguments):
    with helpful_error(error, "ReferencePool", argument, got):
        ReferencePool(*arguments)


@pytest.mark.parametrize(
    ("error", "got", "vectors"),
    [
        (TypeError, "list", [[1.0]]),
        (TypeError, "int64", torch.ones(5, 3).long()),
        (ValueError, "shape (4, 3)", torch.ones(4, 3)),
        (ValueError, "shape (5, 4)", torch.ones(5, 4)),
        (ValueError, "nan in row 0", torch.full((5, 3), math.nan)),
    ],
)
def test_reference_pool_fill_errors(error, got, vectors):
    pool = ReferencePool(5, 3)
    with helpful_error(error, "ReferencePool.fill", "vectors", got):
        pool.fill(vectors)
    assert not pool.vectors.any()


LOSS_SETTINGS = {
    "temperature": 0.4,
    "base_temperature": 0.1,
    "negative_rate": 0.3,
    "variant": "separate",
    "reweight": False,
    "keep_specific_only": True,
    "symmetric": False,
}


@pytest.mark.parametrize("name", [None, *LOSS_SETTINGS])
def test_hidden_positive_loss_is_the_op(name):
    """With the defaults, and with each setting changed, which must reach the op."""
    problem = random_problem(images=3, pool_size=9)
    settings = {} if name is None else {name: LOSS_SETTINGS[name]}
    tensors = (problem.z, problem.features, problem.pool)
    options = {
        "specific": problem.specific,
        "specific_pool": problem.specific_pool,
        "specific_weight": 0.7,
        "z_mixed": problem.z_mixed,
        "seed": 3,
    }
    module = HiddenPositiveLoss(problem.anchors_per_image, **settings)
    expected = hpkernels.ghp_contrastive(*tensors, **options, anchors_per_image=problem.anchors_per_image, **settings)
    assert torch.equal(module(*tensors, **options), expected)
    negatives = torch.rand(20, 60, generator=torch.Generator().manual_seed(0)) < 0.5
    explicit = module(*tensors, **options, negatives=negatives)
    assert explicit != expected
    assert torch.equal(
        explicit,
        hpkernels.ghp_contrastive(
            *tensors, **options, negatives=negatives, anchors_per_image=problem.anchors_per_image, **settings
        ),
    )
    assert f"anchors_per_image={problem.anchors_per_image}" in repr(module)
    assert all(f"{key}={value!r}" in repr(module) for key, value in settings.items())
    assert not module.state_dict()


def test_hidden_positive_loss_trains():
    problem = random_problem(images=3, pool_size=9)
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, 16)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.03)
    module = HiddenPositiveLoss(problem.anchors_per_image, temperature=0.1)
    losses = []
    for _ in range(10):
        z = torch.nn.functional.normalize(projection(problem.z), dim=1)
        loss = module(z, problem.features, problem.pool, seed=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_hidden_positive_loss_passes_the_backend_on():
    problem = random_problem(dtype=torch.float64)
    module = HiddenPositiveLoss(problem.anchors_per_image, backend="cuda")
    with pytest.raises(BackendUnavailableError):
        module(problem.z, problem.features, problem.pool)


@pytest.mark.parametrize(
    "settings",
    [{}, {"sigma": 3.0}, {"quantiles": (0.3, 0.6)}, {"window": 5}, {"prefix_tokens": 0}],
    ids=lambda settings: next(iter(settings), "defaults"),
)
def test_local_propagation_is_the_op(settings):
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(2, 3, 4, 5, generator=generator)
    tokens = 20 + settings.get("prefix_tokens", 1)
    query, key = torch.randn(2, 2, 2, tokens, 6, generator=generator)
    module = LocalPropagation(**settings)
    mixed = module(code, query, key)
    assert torch.equal(mixed, hpkernels.local_propagation(code, query, key, **settings))
    if "prefix_tokens" not in settings:
        assert torch.equal(mixed, LocalPropagation()(code, query, key)) == (not settings)
    assert all(f"{key}={value!r}" in repr(module) for key, value in settings.items())
    assert not module.state_dict()


def test_local_propagation_passes_the_backend_on():
    code, tokens = torch.ones(1, 2, 2, 2, dtype=torch.float64), torch.ones(1, 1, 5, 3, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError):
        LocalPropagation(backend="cuda")(code, tokens, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 5e3, 5e5, 1e25, 1e38])
def test_pool_has_unit_rows_at_any_scale(dtype, scale):
    vectors = torch.rand(3, 16) * scale
    vectors[1] = 0
    pool = ReferencePool(3, 16).to(dtype)
    pool.fill(vectors)
    torch.testing.assert_close(pool().double().norm(dim=1), torch.tensor([1.0, 0, 1]).double(), atol=1e-2, rtol=0)


def test_pool_must_be_filled():
    pool = ReferencePool(3, 4)
    with pytest.raises(RuntimeError, match="ReferencePool: the pool must be filled before use"):
        pool()
    pool.fill(torch.eye(3, 4))
    other = ReferencePool(3, 4)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other(), pool())


@pytest.mark.parametrize(
    ("error", "argument", "got", "settings"),
    [
        (ValueError, "anchors_per_image", "0", {"anchors_per_image": 0}),
        (TypeError, "anchors_per_image", "float 4.0", {"anchors_per_image": 4.0}),
        (ValueError, "temperature", "0", {"temperature": 0}),
        (ValueError, "base_temperature", "-1", {"base_temperature": -1}),
        (ValueError, "negative_rate", "1.5", {"negative_rate": 1.5}),
        (ValueError, "variant", "'both'", {"variant": "both"}),
        (TypeError, "reweight", "int 1", {"reweight": 1}),
        (TypeError, "keep_specific_only", "str 'no'", {"keep_specific_only": "no"}),
        (TypeError, "symmetric", "int 0", {"symmetric": 0}),
        (ValueError, "backend", "'gpu'", {"backend": "gpu"}),
    ],
)
def test_hidden_positive_loss_checks_its_settings_when_made(error, argument, got, settings):
    with helpful_error(error, "HiddenPositiveLoss", argument, got):
        HiddenPositiveLoss(**{"anchors_per_image": 4} | settings)


@pytest.mark.parametrize(
    ("error", "argument", "got", "settings"),
    [
        (ValueError, "sigma", "0", {"sigma": 0}),
        (ValueError, "quantiles", "(0.9, 0.1)", {"quantiles": (0.9, 0.1)}),
        (TypeError, "quantiles", "0.5", {"quantiles": 0.5}),
        (ValueError, "window", "4", {"window": 4}),
        (ValueError, "prefix_tokens", "-1", {"prefix_tokens": -1}),
        (ValueError, "backend", "'gpu'", {"backend": "gpu"}),
    ],
)
def test_local_propagation_checks_its_settings_when_made(error, argument, got, settings):
    with helpful_error(error, "LocalPropagation", argument, got):
        LocalPropagation(**settings)


def test_settings_are_attributes_that_can_be_changed():
    state = torch.get_rng_state()
    problem = random_problem()
    module = HiddenPositiveLoss(problem.anchors_per_image, temperature=0.4, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)  # to check the settings draws no seed
    assert (module.temperature, module.variant, module.backend) == (0.4, "joint", "reference")
    before = module(problem.z, problem.features, problem.pool, seed=0)
    module.temperature = 0.1
    assert module(problem.z, problem.features, problem.pool, seed=0) != before
    assert "temperature=0.1" in repr(module)
    assert LocalPropagation(window=5).window == 5


def test_a_pool_that_is_emptied_again_raises():
    pool = hpkernels.nn.ReferencePool(4, 6)
    pool.fill(torch.eye(4, 6))
    assert torch.equal(pool(), torch.eye(4, 6))
    pool.load_state_dict({"vectors": torch.zeros(4, 6)})
    with pytest.raises(RuntimeError, match="the pool must be filled before use"):
        pool()
    assert torch.compile(pool, backend="eager", fullgraph=True)().isnan().all(), "where nothing can be raised"
    pool.fill(torch.eye(4, 6))
    assert torch.equal(torch.compile(pool, backend="eager", fullgraph=True)(), torch.eye(4, 6))
    assert pool.to("meta")().device.type == "meta"
