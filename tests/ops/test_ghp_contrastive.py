from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from bad_options import wrong_options
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracles import contrastive, similar_pairs
from torch.utils._python_dispatch import TorchDispatchMode

import hpkernels
from hpkernels import backends, ghp_contrastive
from hpkernels.ops._philox import bernoulli
from hpkernels.testing import (
    Case,
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    random_problem,
    row_errors,
    unchanged,
)

OP = "ghp_contrastive"
PARTS = ("masked_topk", "hidden_positives", "multi_positive_contrastive")
GOLDENS = ("joint_allneg", "joint_medium", "joint_noreweight", "joint_small", "joint_warmup", "separate")


def cases(*dtypes):
    """The cases that all parts of the op can run."""
    return [
        case for case in available_cases(PARTS[0], dtypes) if all(case in available_cases(op, dtypes) for op in PARTS)
    ]


CASES = cases(torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXACT_CASES = cases(torch.float64)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_variant = pytest.mark.parametrize("variant", ["joint", "separate"])


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Step:
    """The arguments of one training step, and the loss by the op and by the equations."""

    def __init__(self, case, images=2, height=3, width=4, dim=6, feature_dim=9, pool_size=7, seed=0):
        sizes = {"images": images, "height": height, "width": width}
        problem = random_problem(
            seed, **sizes, dim=dim, feature_dim=feature_dim, pool_size=pool_size, dtype=case.dtype, device=case.device
        )
        self.z, self.z_mixed = problem.z, problem.z_mixed
        self.group = problem.anchors_per_image
        negatives = torch.rand(self.group, len(self.z), generator=torch.Generator().manual_seed(seed)) < 0.2
        self.constants = {
            "features": problem.features,
            "pool": problem.pool,
            "specific": problem.specific,
            "specific_pool": problem.specific_pool,
            "negatives": negatives.to(case.device),
        }
        self.settings = {"specific_weight": 0.4, "anchors_per_image": self.group, "temperature": 0.5}

    def loss(self, z, z_mixed, **options):
        return ghp_contrastive(z, z_mixed=z_mixed, **{**self.constants, **self.settings, **options})

    def loss_and_gradients(self, **options):
        z, z_mixed = (value.detach().requires_grad_() for value in (self.z, self.z_mixed))
        loss = self.loss(z, z_mixed, **options)
        return loss.detach(), *torch.autograd.grad(loss, (z, z_mixed))

    def positives(self, symmetric=True):
        """Both relations in float64, and whether no pair is so close to its limit that rounding decides about it."""
        relations, decided = [], True
        for name, pool in (("features", "pool"), ("specific", "specific_pool")):
            rows, references = self.constants[name].cpu().double(), self.constants[pool].cpu().double()
            threshold = torch.stack([max(row @ reference for reference in references) for row in rows])
            pairs, margin = similar_pairs(rows, threshold, symmetric)
            relations.append(pairs)
            # Products of unit vectors with one dimension are exact.
            decided &= rows.shape[1] == 1 or bool(margin.fill_diagonal_(1.0).abs().min() > 1e-7)
        return relations, decided

    def oracle(self, dtype, **options):
        """The loss and gradients with logits in `dtype`; positives are always those of float64."""
        settings = {"base_temperature": 0.07, "reweight": True, **self.settings, **options}
        relations, _ = self.positives(settings.pop("symmetric", True))
        lam, negatives = settings.pop("specific_weight"), self.constants["negatives"].cpu()
        branches = [value.detach().cpu().to(dtype).requires_grad_() for value in (self.z, self.z_mixed)]
        losses = [contrastive(z, *relations, lam, negatives, **settings) for z in branches]
        loss = sum(losses) / 2
        return loss.detach(), *torch.autograd.grad(loss, branches)


class RecordedOps(TorchDispatchMode):
    """Collects the calls of hpkernels' own ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hpkernels":
            self.calls.append((function, [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]))
        return function(*args, **(kwargs or {}))


@each_case
@each_variant
@given(
    images=st.integers(1, 4),
    height=st.integers(1, 4),
    width=st.integers(1, 5),
    dim=st.integers(2, 9),
    feature_dim=st.integers(2, 9),
    pool_size=st.integers(1, 9),
    lam=st.sampled_from([0.0, 0.7]),
    reweight=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
@example(2, 3, 4, 6, 9, 7, 0.4, True, True, 0)
@example(2, 3, 4, 6, 9, 7, 0.4, True, False, 0)
@example(3, 1, 11, 1, 1, 1, 1.0, False, True, 0)
@example(1, 1, 1, 1, 1, 1, 1.0, True, True, 0)
def test_matches_reference(
    case, variant, images, height, width, dim, feature_dim, pool_size, lam, reweight, symmetric, seed
):
    step = Step(case, images, height, width, dim, feature_dim, pool_size, seed)
    assume(step.positives(symmetric)[1])
    options = {"specific_weight": lam, "variant": variant, "reweight": reweight, "symmetric": symmetric}
    loss, _, _ = step.loss_and_gradients(**options, backend=case.backend)
    exact, *_ = step.oracle(torch.float64, **options)
    plain, *_ = step.oracle(values_dtype(case.dtype), **options)
    assert loss.shape == () and loss.dtype == values_dtype(case.dtype) and loss.device == step.z.device
    # A loss is a difference of logits / 0.07: where it is 0, as of one pair, their rounding is left.
    rounding = torch.finfo(loss.dtype).eps * (10 * exact.abs().item() + 2 / 0.07)
    assert_rows_close(loss, exact, plain, eps=rounding)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("case", cases(torch.float64, torch.float32), ids=str)
def test_golden(case, name, golden):
    data = golden(f"ghp_{name}")
    meta = data.meta
    joint = meta["loss_version"] == 1
    features, pool, specific, specific_pool = (
        value.to(case.device, case.dtype) for value in (data.features, data.pool, data.specific, data.pool_specific)
    )
    z, z_mixed = (value.to(case.device, case.dtype).requires_grad_() for value in (data.z, data.z_mix))
    loss = ghp_contrastive(
        z,
        features,
        pool,
        specific=specific,
        specific_pool=specific_pool,
        specific_weight=meta["lam"],
        z_mixed=z_mixed if joint else None,
        anchors_per_image=meta["grid"] ** 2,
        temperature=meta["temperature"],
        negatives=data.negative_mask.to(case.device),
        variant="joint" if joint else "separate",
        reweight=bool(meta["reweighting"]),
        backend=case.backend,
    )
    loss.backward()
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss.detach().double().cpu(), data.loss, rtol=tolerance, atol=0)
    for leaf, expected in [(z, data.grad_z), (z_mixed, data.grad_z_mix)][: 2 if joint else 1]:
        largest = expected.norm(dim=1).max()
        assert (row_errors(leaf.grad, expected) <= tolerance * expected.norm(dim=1) + 1e-3 * tolerance * largest).all()
    assert joint or z_mixed.grad is None


@each_case
@each_variant
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "own"])
@pytest.mark.parametrize("reweight", [False, True], ids=["mean", "reweighted"])
def test_gradients(case, variant, reweight, symmetric):
    step = Step(case)
    relations, decided = step.positives(symmetric)
    assert decided and all(torch.equal(relation, relation.T) == symmetric for relation in relations)
    options = {"variant": variant, "reweight": reweight, "symmetric": symmetric}
    _, *actual = step.loss_and_gradients(**options, backend=case.backend)
    _, *exact = step.oracle(torch.float64, **options)
    _, *plain = step.oracle(values_dtype(case.dtype), **options)
    for grad, exact_grad, plain_grad in zip(actual, exact, plain, strict=True):
        assert grad.dtype == case.dtype and exact_grad.any()
        assert_rows_close(grad, exact_grad, plain_grad.to(case.dtype))


@each_variant
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_gradcheck(case, variant):
    step = Step(case, height=2, width=3, dim=3)
    leaves = (step.z.requires_grad_(), step.z_mixed.requires_grad_())
    assert torch.autograd.gradcheck(partial(step.loss, variant=variant, backend=case.backend), leaves)
    drawn = partial(step.loss, variant=variant, negatives=None, negative_rate=0.3, seed=4, backend=case.backend)
    assert torch.autograd.gradcheck(drawn, leaves)
    assert torch.autograd.gradcheck(partial(drawn, symmetric=False), leaves)


@each_case
def test_opcheck(case):
    """The op is composed of registered ops: each is called as often as needed, with arguments it must get right."""
    step = Step(case)
    with RecordedOps() as recorded:
        step.loss_and_gradients(backend=case.backend)
    names = [op.name() for op, _ in recorded.calls]
    assert {name: names.count(name) for name in names} == {
        "hpkernels::masked_topk": 2,
        "hpkernels::hidden_positives": 2,
        "hpkernels::contrastive_pairs": 1,
        "hpkernels::multi_positive_contrastive": 1,
        "hpkernels::multi_positive_contrastive_backward": 1,
    }
    for op, args in dict(recorded.calls).items():
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_layouts(case, layout):
    step = Step(case)
    expected = step.loss_and_gradients(backend=case.backend)
    step.z, step.z_mixed = (memory_layouts(value)[layout] for value in (step.z, step.z_mixed))
    step.constants = {name: memory_layouts(value)[layout] for name, value in step.constants.items()}
    torch.testing.assert_close(step.loss_and_gradients(backend=case.backend), expected, rtol=1e-12, atol=1e-12)

    step.constants["pool"] = step.constants["pool"][:1].expand(5, -1)
    expanded = step.loss_and_gradients(backend=case.backend)
    step.constants["pool"] = step.constants["pool"].contiguous()
    torch.testing.assert_close(step.loss_and_gradients(backend=case.backend), expanded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases(torch.float32), ids=str)
def test_compile(case):
    group, settings = 12, {"negative_rate": 0.2, "temperature": 0.5, "backend": case.backend}

    def run(z, z_mixed, features, pool, specific, specific_pool, lam, seed):
        return ghp_contrastive(
            z,
            features,
            pool,
            specific=specific,
            specific_pool=specific_pool,
            specific_weight=lam,
            z_mixed=z_mixed,
            anchors_per_image=group,
            seed=seed,
            **settings,
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def check(images, pool_size):
        step = Step(case, images=images, pool_size=pool_size)
        constants = [step.constants[name] for name in ("features", "pool", "specific", "specific_pool")]
        lam, seed = (torch.tensor(value, device=case.device) for value in (0.4, 5))
        results = []
        for function in (compiled, run):
            leaves = [value.clone().requires_grad_() for value in (step.z, step.z_mixed)]
            loss = function(*leaves, *constants, lam, seed)
            loss.backward()
            results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    check(2, 7)
    check(3, 9)  # compiled again, now for any sizes
    with torch.compiler.set_stance("fail_on_recompile"):
        check(5, 8)


def test_cuda_graph(cuda_graph):
    for case in cases(torch.float32, torch.float16):
        if case.device == "cuda":
            step = Step(case)
            seed = torch.tensor(3, device="cuda")
            options = {"negatives": None, "negative_rate": 0.3, "seed": seed, "backend": case.backend}
            call = partial(step.loss_and_gradients, **options)
            cuda_graph(call, step.z, step.z_mixed, step.constants["features"], step.constants["specific"])


@each_case
def test_deterministic(case):
    step = Step(case, images=4, height=5, width=5)

    def run(seed, **options):
        return step.loss_and_gradients(
            **{"negatives": None, "negative_rate": 0.3, "seed": seed, "backend": case.backend, **options}
        )

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert run(1)[0] != run(2)[0]
    drawn = bernoulli(torch.tensor(1, device=case.device), 25, 100, 0.3)  # one draw for both branches
    torch.testing.assert_close(run(1), run(None, negatives=drawn), rtol=0, atol=0)
    torch.manual_seed(0)
    first, other = run(None), run(None)
    torch.manual_seed(0)
    torch.testing.assert_close(first, run(None), rtol=0, atol=0)
    assert first[0] != other[0]


@each_case
@each_variant
def test_edge_cases(case, variant):
    step = Step(case, images=3)
    run = partial(step.loss_and_gradients, variant=variant, backend=case.backend)
    # References that are better than any pair of anchors: no positives, nothing to learn.
    itself = {"pool": step.constants["features"], "specific_pool": step.constants["specific"]}
    loss, grad, grad_mixed = run(**itself)
    assert loss == 0 and not grad.any() and not grad_mixed.any()
    # The opposite of every anchor's direction as the only reference: every pair is a positive.
    step.constants["features"] = step.constants["features"].abs()
    everything = run(pool=-step.constants["features"].mean(dim=0, keepdim=True), specific_weight=0.0, negative_rate=0.0)
    assert everything[0] > 0 and all(value.isfinite().all() for value in everything)
    # One anchor alone.
    one = {name: step.constants[name][:1] for name in ("features", "specific")}
    pools = {name: step.constants[name] for name in ("pool", "specific_pool")}
    loss = ghp_contrastive(step.z[:1], **one, **pools, anchors_per_image=1, variant=variant, backend=case.backend)
    assert loss == 0
    # The second branch is averaged in, so that the same branch twice is that branch.
    single = ghp_contrastive(step.z, **{**step.constants, **step.settings}, variant=variant, backend=case.backend)
    step.z_mixed = step.z
    torch.testing.assert_close(run()[0], single)


Z = torch.eye(4, 3)
FEATURES, POOL = torch.eye(4, 5), torch.ones(2, 5)


def source_errors(name, pool_name):
    rows = [
        (TypeError, name, FEATURES.tolist(), "list"),
        (TypeError, name, FEATURES.long(), "int64 of shape (4, 5)"),
        (TypeError, name, FEATURES.half(), "float32"),
        (ValueError, name, FEATURES[0], "shape (5,)"),
        (ValueError, name, FEATURES[:3], "shape (3, 5)"),
        (ValueError, name, FEATURES[:, :0], "shape (4, 0)"),
        (ValueError, name, FEATURES * math.nan, "nan in row 0"),
        (ValueError, name, FEATURES.clone().requires_grad_(), "requires_grad=True"),
        (TypeError, pool_name, POOL.tolist(), "list"),
        (TypeError, pool_name, POOL.bool(), "bool of shape (2, 5)"),
        (TypeError, pool_name, POOL.double(), "float64"),
        (ValueError, pool_name, POOL[0], "shape (5,)"),
        (ValueError, pool_name, POOL[:, :4], "shape (2, 4)"),
        (ValueError, pool_name, POOL[:0], "shape (0, 5)"),
        (ValueError, pool_name, POOL.to("meta"), "meta"),
        (ValueError, pool_name, POOL * math.inf, "inf in row 0"),
        (ValueError, pool_name, POOL.clone().requires_grad_(), "requires_grad=True"),
    ]
    # Features of another dtype than the pool's are reported about the pool, which has to follow them.
    return [
        pytest.param(error, pool_name if got == "float32" else argument, got, {argument: value}, id=f"{argument}-{got}")
        for error, argument, value, got in rows
    ]


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    [
        pytest.param(TypeError, "z", "NoneType", {"z": None}, id="z-none"),
        pytest.param(TypeError, "z", "int64 of shape (4, 3)", {"z": Z.long()}, id="z-int"),
        pytest.param(ValueError, "z", "float32 of shape (3,)", {"z": Z[0]}, id="z-rank-1"),
        pytest.param(ValueError, "z", "float32 of shape (0, 3)", {"z": Z[:0]}, id="z-empty-N"),
        pytest.param(ValueError, "z", "float32 of shape (4, 0)", {"z": Z[:, :0]}, id="z-empty-D"),
        pytest.param(ValueError, "z", "nan in row 3", {"z": Z.index_fill(0, torch.tensor([3]), math.nan)}, id="z-nan"),
        *source_errors("features", "pool"),
        *source_errors("specific", "specific_pool"),
        pytest.param(TypeError, "pool", "NoneType", {"pool": None}, id="pool-none"),
        pytest.param(ValueError, "features", "meta", {"features": FEATURES.to("meta")}, id="features-device"),
        pytest.param(ValueError, "specific", "meta", {"specific": FEATURES.to("meta")}, id="specific-device"),
        pytest.param(ValueError, "specific_pool", "None", {"specific_pool": None}, id="specific-alone"),
        pytest.param(ValueError, "specific", "None", {"specific": None}, id="specific-pool-alone"),
        pytest.param(TypeError, "z_mixed", "list", {"z_mixed": [1.0]}, id="z_mixed-list"),
        pytest.param(TypeError, "z_mixed", "int64", {"z_mixed": Z.long()}, id="z_mixed-int"),
        pytest.param(TypeError, "z_mixed", "float16", {"z_mixed": Z.half()}, id="z_mixed-dtype"),
        pytest.param(ValueError, "z_mixed", "shape (4, 2)", {"z_mixed": Z[:, :2]}, id="z_mixed-D"),
        pytest.param(ValueError, "z_mixed", "shape (3, 3)", {"z_mixed": Z[:3]}, id="z_mixed-N"),
        pytest.param(ValueError, "z_mixed", "shape (3,)", {"z_mixed": Z[0]}, id="z_mixed-rank"),
        pytest.param(ValueError, "z_mixed", "meta", {"z_mixed": Z.to("meta")}, id="z_mixed-device"),
        pytest.param(ValueError, "z_mixed", "inf in row 0", {"z_mixed": Z / 0}, id="z_mixed-inf"),
        pytest.param(
            ValueError, "specific_weight", "0.5", {"specific": None, "specific_pool": None}, id="weight-alone"
        ),
        pytest.param(
            ValueError,
            "specific_weight",
            "a tensor",
            {"specific": None, "specific_pool": None, "specific_weight": torch.tensor(0.0)},
            id="weight-tensor-alone",
        ),
        pytest.param(TypeError, "anchors_per_image", "NoneType None", {"anchors_per_image": None}, id="anchors-none"),
        pytest.param(TypeError, "symmetric", "int 0", {"symmetric": 0}, id="symmetric-int"),
        *wrong_options(),
    ],
)
def test_errors(error, argument, got, options):
    valid = {
        "z": Z,
        "features": FEATURES,
        "pool": POOL,
        "specific": FEATURES,
        "specific_pool": POOL,
        "specific_weight": 0.5,
        "anchors_per_image": 4,
    }
    with helpful_error(error, OP, argument, got):
        ghp_contrastive(**{**valid, **options})


@each_case
def test_inputs_untouched(case):
    step = Step(case)
    lam, seed = (torch.tensor(value, device=case.device) for value in (0.4, 5))
    with unchanged(step.z, step.z_mixed, *step.constants.values(), lam, seed):
        step.loss_and_gradients(specific_weight=lam, backend=case.backend)
        step.loss_and_gradients(specific_weight=lam, negatives=None, seed=seed, backend=case.backend)


@each_case
def test_autocast(case):
    step = Step(case, dim=24, feature_dim=32, images=4)
    expected = step.loss_and_gradients(backend=case.backend)
    with torch.autocast(case.device, torch.bfloat16):
        actual = step.loss_and_gradients(backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_case
@pytest.mark.parametrize("branch", [0, 1], ids=["z", "z_mixed"])
def test_gradient_of_one_branch(case, branch):
    """Backward computes what is asked for alone, the same bits as if it were both."""
    step = Step(case)
    _, *both = step.loss_and_gradients(backend=case.backend)
    leaves = [step.z.detach(), step.z_mixed.detach()]
    leaf = leaves[branch].requires_grad_()
    loss = step.loss(*leaves, backend=case.backend)
    with RecordedOps() as recorded:
        (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(grad, both[branch])
    [(_, (_, z, z_mixed, *_))] = recorded.calls
    assert torch.equal(z, leaf) and z_mixed is None


def test_unavailable_backend():
    with pytest.raises(hpkernels.BackendUnavailableError, match=rf"^{OP}: backend 'cuda' is not available: \w+"):
        ghp_contrastive(Z.double(), FEATURES.double(), POOL.double(), anchors_per_image=4, backend="cuda")


@each_case
def test_second_differentiation(case):
    step = Step(case)
    z = step.z.requires_grad_()
    loss = step.loss(z, None, backend=case.backend)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^multi_positive_contrastive: double backward is not supported"):
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
    step = Step(case)
    run = partial(step.loss_and_gradients, variant=variant, backend=case.backend)
    for lam in (0.0, 0.375):
        tensor = torch.tensor(lam, device=case.device)
        torch.testing.assert_close(run(specific_weight=tensor), run(specific_weight=lam), rtol=0, atol=0)
    without = run(specific_weight=0.0, specific=None, specific_pool=None)
    torch.testing.assert_close(run(specific_weight=0.0), without, rtol=0, atol=0)


@pytest.mark.parametrize("case", cases(torch.float32), ids=str)
def test_float_zero_skips_specific_discovery(case):
    step = Step(case)
    for lam, discoveries in ((0.0, 1), (0.4, 2), (torch.tensor(0.0, device=case.device), 2)):
        with RecordedOps() as recorded:
            step.loss(step.z, None, specific_weight=lam, backend=case.backend)
        assert [op.name() for op, _ in recorded.calls].count("hpkernels::hidden_positives") == discoveries


@each_case
def test_keep_specific_only(case):
    """With references that no pair of features beats, only specific positives are left."""
    step = Step(case)
    options = {"pool": step.constants["features"], "backend": case.backend}
    assert step.loss_and_gradients(**options)[0] == 0
    loss, grad, _ = step.loss_and_gradients(**options, keep_specific_only=True)
    assert loss > 0 and grad.any()


@each_case
def test_features_may_have_another_dtype_than_z(case):
    """Backbones run in half precision beside projections in float32; each source keeps its own."""
    step = Step(case)
    expected = step.loss_and_gradients(backend="reference")
    for name in ("features", "pool"):
        step.constants[name] = step.constants[name].double()
    actual = step.loss_and_gradients(backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_cases_are_those_of_all_parts():
    assert Case("reference", "cpu", torch.float32) in CASES


@pytest.mark.parametrize("case", cases(torch.float32), ids=str)
@pytest.mark.parametrize("name", ["z", "z_mixed", "features", "pool", "specific", "specific_pool"])
def test_bad_values_make_the_loss_nan_where_they_cannot_be_read(case, name):
    step = Step(case)

    @torch.compile(fullgraph=True, backend="eager")
    def run(z, z_mixed, constants):
        return ghp_contrastive(z, z_mixed=z_mixed, **constants, **step.settings, backend=case.backend)

    given = {"z": step.z, "z_mixed": step.z_mixed, **step.constants}
    for bad in (1.0, math.nan, math.inf):
        given[name] = given[name].clone()
        given[name][-1, 0] *= bad
        loss = run(given["z"], given["z_mixed"], {key: given[key] for key in step.constants})
        assert loss.isfinite() if bad == 1.0 else loss.isnan()


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")], ids="-".join)
def test_each_source_has_a_backend_that_takes_it(dtypes, monkeypatch):
    """`auto` falls back for one source alone; a backend asked for by name is refused before anything runs."""
    step = Step(Case("reference", "cpu", torch.float32))
    for name, dtype in zip(
        ("features", "pool", "specific", "specific_pool"), (d for d in dtypes for _ in "ab"), strict=True
    ):
        step.constants[name] = step.constants[name].to(getattr(torch, dtype))
    expected = step.loss(step.z, None, backend="reference")

    ran = []

    def forward(*args):
        ran.append(args[0].dtype)
        return backends.implementation("masked_topk", "reference").forward(*args)

    def supports(device, dtype):
        return backends.Availability(dtype == torch.float32, "it takes float32 only")

    monkeypatch.setattr(backends, "_modules", dict(backends._modules))
    backends.register("masked_topk", "cpu", SimpleNamespace(supports=supports, forward=forward))
    torch.testing.assert_close(step.loss(step.z, None), expected)
    assert ran == [torch.float32]
    for op in ("hidden_positives", "multi_positive_contrastive"):
        backends.register(op, "cpu", backends.implementation(op, "reference"))
    ran.clear()
    pattern = rf"^{OP}: backend 'cpu' is not available: it takes float32 only"
    with pytest.raises(hpkernels.BackendUnavailableError, match=pattern):
        step.loss(step.z, None, backend="cpu")
    assert ran == []


def test_pools_are_cast_under_autocast():
    problem = random_problem(0, images=2, height=3, width=4, dim=6)
    features = problem.features.bfloat16()

    def loss(pool):
        sources = {"specific": features, "specific_pool": pool, "specific_weight": 0.5}
        return ghp_contrastive(problem.z, features, pool, **sources, anchors_per_image=12, seed=0)

    with pytest.raises(TypeError, match="`pool` must have the dtype of `features`"):
        loss(problem.pool)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(problem.pool)
        top = hpkernels.masked_topk(features, problem.pool)
    assert torch.equal(cast, loss(problem.pool.bfloat16()))
    assert torch.equal(top.values, hpkernels.masked_topk(features, problem.pool.bfloat16()).values)
