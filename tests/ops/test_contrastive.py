from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import example, given
from hypothesis import strategies as st

from hpkernels import Labels, PairLists, contrastive
from hpkernels.ops.contrastive import chunked
from hpkernels.ops.contrastive.reference import contrastive_loss
from hpkernels.testing import (
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    row_errors,
    unchanged,
)
from tests.ops.bad_pairs import wrong_arguments
from tests.ops.contrastive_batch import (
    OP,
    OPTIONS,
    A,
    Batch,
    K,
    L,
    each_case,
    each_exact_case,
    each_option,
    lists_of,
    moved,
    values_dtype,
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Problems of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "rows_of_block", lambda problem, pair_bytes: 32)
        yield


def assert_close(batch, actual, gradients=True):
    exact, plain = batch.oracle(torch.float64), batch.oracle(values_dtype(batch.case.dtype))
    rounding = torch.finfo(values_dtype(batch.case.dtype)).eps * (10 * exact[0].abs().max().item() + 4 / 0.3)
    assert actual[0].dtype == values_dtype(batch.case.dtype) and actual[0].shape == exact[0].shape
    assert_rows_close(actual[0], exact[0], plain[0], eps=rounding)
    for name, gradient in actual[1].items() if gradients else ():
        expected, of_plain = exact[1][name], plain[1][name].to(gradient.dtype)
        assert gradient.dtype == getattr(batch, name).dtype
        # A temperature's or a bias's gradient is a sum of terms that cancel.
        scale = {"temperature": exact[0].abs().sum().item(), "key_bias": 1.0}.get(name)
        eps = None if scale is None else 30 * torch.finfo(gradient.dtype).eps * scale + batch.rounding_of_g(name)
        assert_rows_close(gradient, expected, of_plain, eps=eps)


@each_case
@given(
    anchors=st.integers(1, 70),
    keys=st.integers(1, 70),
    dim=st.integers(1, 9),
    classes=st.sampled_from([1, 3, 40]),
    name=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 9),
)
@example(37, 45, 6, 5, "plain", 0)
@example(33, 33, 6, 5, "own", 0)
@example(3, 65, 2, 2, "weights", 1)
@example(65, 32, 1, 3, "both-inside-lists", 1)
@example(1, 1, 1, 1, "own", 0)
def test_matches_reference(case, anchors, keys, dim, classes, name, seed):
    sizes = {"anchors": anchors, "keys": keys, "dim": dim, "classes": classes, "seed": seed}
    batch = Batch(case, **sizes, **OPTIONS[name])
    assert_close(batch, batch.result(), gradients=False)
    # The dense specification is the oracle's formula.
    options = {key: value for key, value in batch.options.items() if key not in ("exclude", "anchor_weight")}
    names = {"positive_aggregation": "inside", "denominator": "decoupled"}
    flags = {
        names.get(key, key): value in ("inside", "negatives") if key in names else value
        for key, value in options.items()
    }
    inputs = batch.inputs("cpu", torch.float64)
    weight = batch.options.get("anchor_weight")
    dense = contrastive_loss(
        inputs.pop("anchors"), inputs.pop("keys", None), batch.weights, batch.excluded, **flags, **inputs,
        anchor_weight=None if weight is None else weight.cpu(),
    )  # fmt: skip
    torch.testing.assert_close(dense.detach(), batch.oracle(torch.float64)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float64, torch.float32)), ids=str)
def test_golden(case, golden):
    """The published loss with all negatives: weights A + lambda S, anchors by their share of their image's pairs."""
    data = golden("ghp_joint_allneg")
    meta, size, group = data.meta, len(data.z), data.meta["grid"] ** 2

    def pairs(features, threshold):
        features = features.double()
        return (features @ features.T > torch.minimum(threshold[:, None], threshold)).fill_diagonal_(False)

    agnostic = pairs(data.features, data.threshold)
    weights = agnostic.double() + meta["lam"] * pairs(data.specific, data.threshold_specific)
    mass = weights.sum(dim=1) * agnostic.any(dim=1)
    share = mass / mass.view(-1, group).sum(dim=1).repeat_interleave(group) / (size / group)
    scale = meta["temperature"] / 0.07
    branches = [z.to(case.device, case.dtype).requires_grad_() for z in (data.z, data.z_mix)]
    losses = [
        contrastive(
            z,
            positives=moved(lists_of(weights.to(case.dtype)), case.device),
            temperature=meta["temperature"],
            anchor_weight=share.to(case.device),
            reduction="sum",
            backend=case.backend,
        )
        for z in branches
    ]
    loss = scale * sum(losses) / 2
    loss.backward()
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss.detach().double().cpu(), data.loss, rtol=tolerance, atol=0)
    for z, expected in zip(branches, (data.grad_z, data.grad_z_mix), strict=True):
        largest = expected.norm(dim=1).max()
        assert (row_errors(z.grad, expected) <= tolerance * expected.norm(dim=1) + 1e-3 * tolerance * largest).all()


@each_case
@each_option
def test_gradients(case, options):
    batch = Batch(case, **options)
    actual = batch.result()
    assert all(gradient.any() for gradient in actual[1].values())
    assert_close(batch, actual)


@each_exact_case
@each_option
def test_gradcheck(case, options):
    batch = Batch(case, anchors=5, keys=6, dim=3, classes=2, **options)
    inputs = batch.inputs()

    def call(*values):
        return batch.call(**dict(zip(inputs, values, strict=True))).exp()

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@each_exact_case
@pytest.mark.parametrize("name", ["own", "both", "weights", "each"])
def test_opcheck(case, name, monkeypatch):
    seen = {}
    from hpkernels.ops.contrastive import registration

    for op in ("contrastive", "contrastive_backward", "contrastive_scaled"):
        original = getattr(registration, op)

        def record(*arguments, op=op, original=original):
            seen[op] = arguments
            return original(*arguments)

        monkeypatch.setattr(registration, op, record)
    Batch(case, **OPTIONS[name]).result()
    assert len(seen) == 2
    for op, arguments in list(seen.items()):  # opcheck makes calls as well
        plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, list(arguments))
        torch.library.opcheck(getattr(torch.ops.hpkernels, op).default, tuple(plain))
        if op == "contrastive":
            torch.library.opcheck(getattr(torch.ops.hpkernels, op).default, arguments)


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@each_exact_case
def test_layouts(case, layout):
    for name in ("both", "weights", "own-lists"):
        batch = Batch(case, **OPTIONS[name])
        expected = batch.result()

        def laid_out(pairs):
            if isinstance(pairs, tuple):
                return tuple(map(laid_out, pairs))
            for field, value in vars(pairs).items():
                if isinstance(value, torch.Tensor):
                    object.__setattr__(pairs, field, memory_layouts(value)[layout])
            return pairs

        batch.positives, batch.options["exclude"] = (
            laid_out(batch.positives),
            laid_out(batch.options.get("exclude", ())),
        )
        batch.options["exclude"] = batch.options["exclude"] or None
        for field in ("anchors", "keys", "key_bias"):
            if getattr(batch, field) is not None:
                setattr(batch, field, memory_layouts(getattr(batch, field))[layout])
        torch.testing.assert_close(batch.result(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_compile(case):
    def run(anchors, keys, key_bias, temperature, anchor_ids, key_ids, offsets, indices, both):
        return contrastive(
            anchors,
            keys,
            positives=(Labels(anchor_ids, key_ids), PairLists(offsets, indices)),
            temperature=temperature,
            key_bias=key_bias,
            both_directions=both,
            return_statistics=True,
            backend=case.backend,
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def check(anchors, both):
        batch = Batch(case, anchors=anchors, keys=2 * anchors, lists=True, key_bias=True)
        labels, lists = batch.positives
        results = []
        for function in (compiled, run):
            inputs = batch.inputs()
            values = [inputs[name] for name in ("anchors", "keys", "key_bias", "temperature")]
            pairs = (labels.anchor_ids, labels.key_ids, lists.offsets, lists.indices)
            loss, statistics = function(*values, *pairs, both)
            loss.backward()
            results.append((loss.detach(), *statistics[: 4 if both else 2], *(value.grad for value in values)))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    for both in (False, True):
        check(20, both)
        check(33, both)  # compiled again, now for any number of anchors
    with torch.compiler.set_stance("fail_on_recompile"):
        check(40, True)


def test_cuda_graph(cuda_graph):
    for case in available_cases(OP, (torch.float32, torch.float16)):
        if case.device == "cuda":
            for options in OPTIONS.values():
                batch = Batch(case, **options)
                cuda_graph(batch.result, batch.anchors)


@each_case
@pytest.mark.parametrize("name", ["own", "both", "weights"])
def test_deterministic(case, name):
    batch = Batch(case, anchors=70, **OPTIONS[name])
    torch.testing.assert_close(batch.result(), batch.result(), rtol=0, atol=0)


@each_case
def test_edge_cases(case):
    run = partial(contrastive, backend=case.backend)
    rows = Batch(case).anchors

    def differentiated(*vectors, **options):
        leaves = [value.detach().requires_grad_() for value in vectors]
        loss = run(*leaves, **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaves)

    one = torch.zeros(1, dtype=torch.int64, device=case.device)
    # One anchor alone, nothing listed, everything excluded, no positive among the labels: nothing to learn, and no NaN.
    none = torch.full((37,), -1, device=case.device)
    nothing = PairLists(torch.zeros(38, dtype=torch.int64, device=case.device), one[:0])
    everything = Labels(torch.zeros_like(none))
    for options in (
        {"positives": Labels(none)},
        {"positives": nothing},
        {"positives": nothing, "exclude": nothing},
        {"positives": everything, "exclude": everything},
        {"positives": everything, "denominator": "negatives"},
    ):
        for reduction in ("mean", "sum", "none"):
            for aggregation in ("outside", "inside"):
                setting = {"reduction": reduction, "positive_aggregation": aggregation}
                loss, (gradient,) = differentiated(rows, **options, **setting)
                assert not loss.any() and not gradient.any()
    loss, gradients = differentiated(rows[:1], positives=Labels(one))
    assert loss == 0 and not gradients[0].any()
    # A single pair is its own denominator: log p = 0. One key, many keys, one anchor.
    loss, gradients = differentiated(rows[:1], rows[1:2], positives=Labels(one))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients)
    # Excluded keys might as well not be there.
    labels = torch.arange(37, device=case.device) % 4
    keys = rows.flip(0)
    ignored = torch.where(labels == 3, 0, -1)
    expected = run(rows, keys[labels != 3], positives=Labels(labels, labels[labels != 3]))
    actual = run(rows, keys, positives=Labels(labels), exclude=Labels(torch.zeros_like(labels), ignored))
    torch.testing.assert_close(actual, expected)
    # Numbers whose sum overflows, which no logit does: a key that is masked by its bias, long anchors and short keys.
    bias = torch.zeros(37, device=case.device, dtype=values_dtype(case.dtype))
    bias[5:9] = torch.finfo(bias.dtype).min
    kept = torch.tensor([*range(5), *range(9, 37)], device=case.device)
    masked = run(rows, keys, positives=Labels(labels, labels.where(bias == 0, -1)), key_bias=bias)
    torch.testing.assert_close(masked, run(rows, keys[kept], positives=Labels(labels, labels[kept])))
    # Logits in the hundreds neither overflow nor lose the gradient.
    long = Batch(case, length=30.0)
    if case.dtype == torch.float64:  # whose oracle rounds as much
        torch.testing.assert_close(long.result(), long.oracle(torch.float64), rtol=1e-9, atol=1e-9, check_device=False)
    else:
        assert_close(long, long.result())


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    wrong_arguments(),
)
def test_errors(error, argument, got, options):
    with helpful_error(error, OP, argument, got):
        contrastive(**{"anchors": A, "keys": K, "positives": L, **options})


@each_case
@pytest.mark.parametrize("name", ["own-lists", "both", "weights"])
def test_inputs_untouched(case, name):
    batch = Batch(case, **OPTIONS[name])

    def tensors(pairs):
        parts = pairs if isinstance(pairs, tuple) else (pairs,)
        return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]

    relations = [*tensors(batch.positives), *tensors(batch.options.get("exclude", ()))]
    vectors = [value for value in (batch.anchors, batch.keys, batch.key_bias, batch.temperature) if value is not None]
    with unchanged(*vectors, *relations):
        batch.result()


@each_case
def test_autocast(case):
    batch = Batch(case, dim=24)
    expected = batch.result()
    with torch.autocast(case.device, torch.bfloat16):
        torch.testing.assert_close(batch.result(), expected, rtol=0, atol=0)
        # Keys of another dtype are cast, as PyTorch's own functions would have it.
        mixed = {**batch.inputs(), "keys": batch.keys.detach().to(torch.bfloat16)}
        rounded = {**batch.inputs(), "keys": batch.keys.detach().to(torch.bfloat16).to(case.dtype)}
        torch.testing.assert_close(batch.call(**mixed), batch.call(**rounded), rtol=0, atol=0)
