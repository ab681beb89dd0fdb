"""The ops under what traces and transforms programs: right, or one sentence, never an answer that is silently wrong."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import normalize

import hpkernels

N, D = 24, 8


def program(op):
    """A function of z (N, D) alone that calls `op`, all else being made inside."""

    def call(z):
        features, pool = torch.eye(N, D) + 0.1, torch.eye(5, D) + 0.2
        if op == "masked_topk":
            return hpkernels.masked_topk(z, pool, 2).values.sum()
        if op == "hidden_positives":
            return hpkernels.hidden_positives(z, torch.full((N,), 0.5)).count().sum()
        if op == "multi_positive_contrastive":
            positives = hpkernels.PositiveMask.from_labels(torch.arange(N) % 3)
            return hpkernels.multi_positive_contrastive(z, positives)
        if op == "ghp_contrastive":
            return hpkernels.ghp_contrastive(z, features, pool[:1], anchors_per_image=6, seed=0)
        code, weights = z.T.reshape(1, D, 4, 6), torch.full((1, 9, 4, 6), 0.2)
        if op == "apply_local_propagation":
            return hpkernels.apply_local_propagation(code, weights).square().sum()
        tokens = torch.eye(N, 8).expand(1, 2, N, 8)
        return hpkernels.local_propagation(code, tokens, tokens, prefix_tokens=0).square().sum()

    return call


OPS = (
    "masked_topk",
    "hidden_positives",
    "multi_positive_contrastive",
    "ghp_contrastive",
    "apply_local_propagation",
    "local_propagation",
)


@pytest.fixture
def z():
    return normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op, z):
    for differentiate in (
        lambda: torch.func.jvp(program(op), (z,), (z,)),
        lambda: torch.func.jacfwd(program(op))(z),
    ):
        with pytest.raises(NotImplementedError, match=rf"^{op}: .* not supported"):
            differentiate()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"^{op}: forward-mode derivatives"):
        program(op)(forward_ad.make_dual(z, z))


@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_are_refused(op, z):
    with pytest.raises(NotImplementedError, match=rf"^{op}: torch.vmap is not supported, call the op once for each"):
        torch.vmap(program(op))(z.expand(3, N, D))
    with pytest.raises(NotImplementedError, match=rf"^{op}: torch.func.grad and its like are not supported"):
        torch.func.grad(program(op))(z)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces(op, mode, z):
    traced = make_fx(program(op), tracing_mode=mode)(z)
    torch.testing.assert_close(traced(z.flip(0)), program(op)(z.flip(0)))


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_have_the_shape_of_real_ones(op, z):
    with FakeTensorMode() as mode:
        fake = program(op)(mode.from_tensor(z))
    real = program(op)(z)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


SETTINGS = {
    "temperature": lambda z, value: hpkernels.multi_positive_contrastive(
        z, hpkernels.PositiveMask.from_labels(torch.arange(N) % 3), temperature=value, base_temperature=2 * value
    ),
    "specific_weight": lambda z, value: hpkernels.ghp_contrastive(
        z, z, z[:2], specific=z, specific_pool=z[:2], specific_weight=value, anchors_per_image=6, seed=0
    ),
    "negative_rate": lambda z, value: hpkernels.ghp_contrastive(
        z, z, z[:2], negative_rate=value, anchors_per_image=6, seed=0
    ),
    "sigma": lambda z, value: hpkernels.local_propagation(
        z.T.reshape(1, D, 4, 6), z.expand(1, 2, N, D), z.expand(1, 2, N, D), sigma=value, prefix_tokens=0
    ),
    "quantiles": lambda z, value: hpkernels.local_propagation_weights(
        z.expand(1, 2, N, D), z.expand(1, 2, N, D), (4, 6), quantiles=(value, 1 - value), prefix_tokens=0
    ),
}


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.deep), True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_from_step_to_step_compiles(setting, dynamic, z):
    call = SETTINGS[setting]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # Lambda rises at every step, so it must not be a constant of the graph; the others are, of up to eight graphs.
    for step in range(1, 20 if setting == "specific_weight" else 4):
        torch.testing.assert_close(compiled(z, step / 40), call(z, step / 40))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_default_device_has_no_part(backend, z):
    """A program may make its new tensors on a GPU by default, and yet call the ops with tensors on the CPU."""
    features, pool, tokens, labels = torch.eye(N, D), torch.eye(1, D), torch.rand(1, 2, N, 8), torch.arange(N) % 3
    threshold = torch.full((N,), 0.5)

    def losses():
        yield hpkernels.masked_topk(z.detach(), features, 2, backend=backend).values.sum()
        yield hpkernels.hidden_positives(z.detach(), threshold, backend=backend).T.count().sum()
        yield hpkernels.ghp_contrastive(z, features, pool, anchors_per_image=6, seed=0, backend=backend)
        for rate, variant in ((1.0, "joint"), (0.2, "joint"), (0.2, "separate")):
            for positives in (labels, hpkernels.PositiveMask.from_labels(labels, ignore_index=1)):
                yield hpkernels.multi_positive_contrastive(
                    z, positives, negative_rate=rate, variant=variant, seed=0, backend=backend
                )
        yield hpkernels.local_propagation(code, tokens, tokens, prefix_tokens=0, backend=backend).square().sum()

    def results():
        for loss in losses():
            yield loss.item()
            if loss.requires_grad:
                yield torch.autograd.grad(loss, z)[0]

    z.requires_grad_()
    code = z.T.reshape(1, D, 4, 6)
    expected = list(results())
    with torch.device("meta"):
        found = list(results())
    assert len(found) == len(expected) > 10
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, expected, strict=True))


def test_masks_of_many_sizes_are_compiled_once():
    def numbers(labels):
        mask = hpkernels.PositiveMask.from_labels(labels, ignore_index=1)
        return mask.count(), (mask & mask.T).count()

    compiled = torch.compile(numbers, backend="eager", fullgraph=True)
    for n in range(20, 34):  # more than Dynamo compiles a function anew
        labels = torch.arange(n) % 3
        assert all(map(torch.equal, compiled(labels), numbers(labels)))


def test_masks_of_labels_take_no_part_in_functionalization(z):
    loss = torch.func.functionalize(lambda z: hpkernels.multi_positive_contrastive(z, torch.arange(N) % 3))(z)
    assert torch.equal(loss, hpkernels.multi_positive_contrastive(z, torch.arange(N) % 3))
