from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import contrastive_of_pairs
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hpkernels
from hpkernels import ContrastiveStatistics, Labels, PairLists, PositiveMask, backends, contrastive
from hpkernels.ops.contrastive import chunked, fused
from hpkernels.ops.contrastive.arguments import arguments_of
from hpkernels.ops.contrastive.reference import contrastive_loss
from hpkernels.testing import (
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    row_errors,
    unchanged,
)

OP = "contrastive"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
EXACT_CASES = available_cases(OP, (torch.float64,))
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_exact_case = pytest.mark.parametrize("case", EXACT_CASES, ids=str)

OPTIONS = {
    "plain": {},
    "own": {"own": True},
    "own-inside-decoupled": {"own": True, "positive_aggregation": "inside", "denominator": "negatives"},
    "own-lists": {"own": True, "lists": True, "excluding": "lists"},
    "own-each": {"own": True, "excluding": "labels", "reduction": "none"},
    "both": {"both_directions": True, "key_bias": True, "excluding": "mask", "exclude_positives": False},
    "both-inside-lists": {"both_directions": True, "positive_aggregation": "inside", "lists": True, "reduction": "sum"},
    "weights": {"lists": True, "weighted": True, "key_bias": True, "excluding": "labels", "denominator": "negatives"},
    "sum": {"reduction": "sum", "excluding": "lists", "exclude_positives": False, "positive_aggregation": "inside"},
    "each": {"reduction": "none", "lists": True, "weighted": True, "key_bias": True},
}
ROWS_OF_BLOCK = chunked.rows_of_block  # before it is replaced by what makes several of small problems
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Problems of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "rows_of_block", lambda problem, pair_bytes: 32)
        yield


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def lists_of(weights, weighted=True):
    """The pairs of positive weight (N, K), the keys of each anchor in descending order."""
    taken = weights > 0
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), taken.sum(dim=1).cumsum(0)))
    rows, columns = taken.flip(1).nonzero().T
    columns = weights.shape[1] - 1 - columns
    return PairLists(offsets, columns, weights[rows, columns] if weighted else None)


def moved(pairs, device):
    if isinstance(pairs, tuple):
        return tuple(moved(part, device) for part in pairs)
    if isinstance(pairs, PositiveMask):
        return pairs.to(device)
    fields = {name: value if value is None else value.to(device) for name, value in vars(pairs).items()}
    return type(pairs)(**fields)


class Batch:
    """Anchors 0 and 1 have no positives, key 0 is nobody's; of weighted lists some weights are 0."""

    def __init__(
        self, case, own=False, lists=False, weighted=False, key_bias=False, excluding=None, anchors=37, keys=45, dim=6,
        classes=5, length=1.0, seed=0, **options,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        keys = anchors if own else keys

        def random(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        def vectors(count):
            rows = normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64))
            return (length * rows).to(case.device, case.dtype)

        self.case, self.options = case, {"temperature": 0.3, **options}
        self.anchors, self.keys = vectors(anchors), None if own else vectors(keys)
        anchor_ids = torch.randint(classes, (anchors,), generator=generator)
        key_ids = anchor_ids.clone() if own else torch.randint(classes, (keys,), generator=generator)
        anchor_ids[:2], key_ids[:1] = -1, -2
        key_ids = anchor_ids if own else key_ids
        self.weights = ((anchor_ids[:, None] == key_ids) & (key_ids >= 0)).double()
        self.positives = Labels(anchor_ids, None if own else key_ids)
        if lists:
            listed = random(anchors, keys).where(random(anchors, keys) < 0.2, 0.0) * 2
            listed = listed if weighted else (listed > 0).double()
            listed[:2] = 0
            self.weights = torch.maximum(self.weights, listed)
            self.positives = (self.positives, lists_of(listed.to(values_dtype(case.dtype)), weighted))
            self.weights = self.weights.to(values_dtype(case.dtype)).double()
        self.excluded = torch.zeros(anchors, keys, dtype=torch.bool)
        if excluding == "labels":
            documents = [torch.randint(9, (count, 2), generator=generator) for count in (anchors, keys)]
            documents[1] = documents[0] if own else documents[1]
            self.excluded = (documents[0][:, None] == documents[1]).any(dim=2)
            exclude = Labels(documents[0], None if own else documents[1])
        elif excluding is not None:
            self.excluded = random(anchors, keys) < 0.3
            if own:
                self.excluded.fill_diagonal_(False)
            exclude = lists_of(self.excluded.double(), weighted=False) if excluding == "lists" else self._mask(own)
        if excluding is not None:
            self.options["exclude"] = moved(exclude, case.device)
        self.positives = moved(self.positives, case.device)
        accumulate = values_dtype(case.dtype)
        self.key_bias = (random(keys) - 0.5).to(case.device, accumulate) if key_bias else None
        if options.get("reduction") != "none" and not own:
            self.options["anchor_weight"] = random(anchors).to(case.device, accumulate)
        self.temperature = torch.tensor(self.options.pop("temperature"), device=case.device, dtype=accumulate)
        self.cotangent = random(anchors).to(accumulate) if options.get("reduction") == "none" else torch.tensor(1.5)

    def _mask(self, own):
        return PositiveMask.from_dense(self.excluded) if own else PositiveMask.from_dense(self.excluded, keys=True)

    def inputs(self, device=None, dtype=None):
        """Leaves: anchors, keys, temperature and bias, those that there are."""
        values = {
            "anchors": self.anchors,
            "keys": self.keys,
            "temperature": self.temperature,
            "key_bias": self.key_bias,
        }
        return {
            name: value.detach().to(device or value.device, dtype or value.dtype).requires_grad_()
            for name, value in values.items()
            if value is not None
        }

    def rounding_of_g(self, name):
        """What sums over g may be off where it is rounded to half precision, as Triton's is."""
        if self.case.backend != "triton" or self.case.dtype == torch.float32:
            return 0.0
        losses = len(self.anchors) if self.options.get("reduction") in ("sum", "none") else 1.5
        longest = self.anchors.double().norm(dim=1).max().item() ** 2 / self.temperature.item() ** 2
        return 2 * torch.finfo(self.case.dtype).eps * losses * (longest if name == "temperature" else 1.0)

    def call(self, backend=None, **inputs):
        return contrastive(**inputs, positives=self.positives, **self.options, backend=backend or self.case.backend)

    def result(self, **options):
        """The loss, and its gradients by name."""
        return self._differentiated(partial(self.call, **options), self.inputs(), self.anchors.device)

    def oracle(self, dtype, oracle=contrastive_of_pairs):
        """The same in `dtype`, on the CPU."""
        options = {name: value for name, value in self.options.items() if name != "exclude"}
        if "anchor_weight" in options:
            options["anchor_weight"] = options["anchor_weight"].cpu()

        def call(anchors, keys=None, **inputs):
            return oracle(anchors, keys, self.weights.to(dtype), self.excluded, **options, **inputs)

        return self._differentiated(call, self.inputs("cpu", dtype), "cpu")

    def _differentiated(self, call, inputs, device):
        loss = call(**inputs)
        cotangent = self.cotangent.to(device, loss.dtype)
        return loss.detach(), dict(
            zip(
                inputs, torch.autograd.grad(loss, list(inputs.values()), cotangent, materialize_grads=True), strict=True
            )
        )


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
    for op, arguments in seen.items():
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


A, K = torch.eye(4, 3), torch.eye(5, 3)
L = Labels(torch.arange(4), torch.arange(5))
OFFSETS, INDICES = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([4, 0, 1])
LARGE = torch.full((5,), 1e300, dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    [
        pytest.param(TypeError, "anchors", "list", {"anchors": [[1.0]]}, id="anchors-list"),
        pytest.param(TypeError, "anchors", "int64 of shape (4, 3)", {"anchors": A.long()}, id="anchors-int"),
        pytest.param(ValueError, "anchors", "float32 of shape (3,)", {"anchors": A[0]}, id="anchors-rank"),
        pytest.param(ValueError, "anchors", "float32 of shape (0, 3)", {"anchors": A[:0]}, id="anchors-empty"),
        pytest.param(
            ValueError, "anchors", "nan in row 2", {"anchors": A.index_fill(0, torch.tensor(2), math.nan)}, id="nan"
        ),
        pytest.param(ValueError, "anchors", "inf in row 0", {"anchors": A / 0}, id="inf"),
        pytest.param(TypeError, "keys", "str", {"keys": "own"}, id="keys-str"),
        pytest.param(ValueError, "keys", "float32 of shape (5, 2)", {"keys": K[:, :2]}, id="keys-dim"),
        pytest.param(TypeError, "keys", "float64", {"keys": K.double()}, id="keys-dtype"),
        pytest.param(ValueError, "keys", "meta", {"keys": K.to("meta")}, id="keys-device"),
        pytest.param(ValueError, "keys", "nan in row 0", {"keys": K * math.nan}, id="keys-nan"),
        pytest.param(
            ValueError, "anchors` and `keys", "a loss of", {"anchors": A * 1e25, "keys": K * 1e25}, id="large"
        ),
        pytest.param(TypeError, "positives", "NoneType", {"positives": None}, id="positives-none"),
        pytest.param(TypeError, "positives", "list", {"positives": [L]}, id="positives-list"),
        pytest.param(ValueError, "positives", "an empty tuple", {"positives": ()}, id="positives-empty"),
        pytest.param(TypeError, "positives", "a tensor of torch.float32", {"positives": A}, id="positives-float"),
        pytest.param(TypeError, "positives", "(4, 5)", {"positives": torch.ones(4, 5).long()}, id="positives-int-mask"),
        pytest.param(TypeError, "positives[1]", "NoneType", {"positives": (L, None)}, id="positives-part"),
        pytest.param(ValueError, "positives.anchor_ids", "(3,)", {"positives": Labels(torch.arange(3))}, id="ids"),
        pytest.param(
            TypeError, "positives.anchor_ids", "float32", {"positives": Labels(torch.ones(4))}, id="ids-float"
        ),
        pytest.param(ValueError, "positives.key_ids", "None", {"positives": Labels(torch.arange(4))}, id="no-key-ids"),
        pytest.param(
            ValueError,
            "positives.key_ids",
            "(5, 1)",
            {"positives": Labels(torch.ones(4, 2).long(), torch.ones(5, 1).long())},
            id="id-columns",
        ),
        pytest.param(
            ValueError, "positives", "bool of shape (4, 4)", {"positives": torch.ones(4, 4).bool()}, id="dense"
        ),
        pytest.param(
            ValueError,
            "positives",
            "PositiveMask",
            {"positives": PositiveMask.from_labels(torch.arange(4))},
            id="square",
        ),
        pytest.param(
            ValueError, "positives.offsets", "(4,)", {"positives": PairLists(OFFSETS[1:], INDICES)}, id="offsets"
        ),
        pytest.param(
            ValueError,
            "positives.offsets",
            "that descend",
            {"positives": PairLists(torch.tensor([0, 2, 1, 2, 3]), INDICES)},
            id="descending",
        ),
        pytest.param(
            ValueError, "positives.offsets", "to 3", {"positives": PairLists(OFFSETS, INDICES[:2])}, id="short"
        ),
        pytest.param(
            ValueError, "positives.indices", "5", {"positives": PairLists(OFFSETS, INDICES + 1)}, id="indices"
        ),
        pytest.param(
            ValueError, "positives.indices", "-1", {"positives": PairLists(OFFSETS, INDICES - 1)}, id="negative"
        ),
        pytest.param(
            TypeError, "positives.indices", "int32", {"positives": PairLists(OFFSETS, INDICES.int())}, id="int32"
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "-1",
            {"positives": PairLists(OFFSETS, INDICES, -torch.ones(3))},
            id="weights",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "nan",
            {"positives": PairLists(OFFSETS, INDICES, torch.ones(3) * math.nan)},
            id="weights-nan",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "requires_grad=True",
            {"positives": PairLists(OFFSETS, INDICES, torch.ones(3, requires_grad=True))},
            id="weights-grad",
        ),
        pytest.param(
            TypeError, "positives.weights", "list", {"positives": PairLists(OFFSETS, INDICES, [1.0])}, id="list"
        ),
        pytest.param(
            TypeError,
            "positives.weights",
            "int64 of shape (0,)",
            {"positives": PairLists(torch.zeros(5).long(), INDICES[:0], INDICES[:0])},
            id="weights-empty-int",
        ),
        pytest.param(
            ValueError,
            "exclude.weights",
            "a tensor",
            {"exclude": PairLists(OFFSETS, INDICES, torch.ones(3))},
            id="excluded",
        ),
        pytest.param(
            ValueError, "exclude.anchor_ids", "meta", {"exclude": Labels(torch.ones(4).long().to("meta"))}, id="meta"
        ),
        pytest.param(TypeError, "exclude_positives", "int", {"exclude_positives": 1}, id="exclude-positives"),
        pytest.param(ValueError, "temperature", "0", {"temperature": 0}, id="temperature-0"),
        pytest.param(ValueError, "temperature", "-1", {"temperature": -1.0}, id="temperature-negative"),
        pytest.param(TypeError, "temperature", "NoneType", {"temperature": None}, id="temperature-none"),
        pytest.param(ValueError, "temperature", "0.0", {"temperature": torch.tensor(0.0)}, id="temperature-tensor"),
        pytest.param(ValueError, "temperature", "nan", {"temperature": torch.tensor(math.nan)}, id="temperature-nan"),
        pytest.param(ValueError, "temperature", "(1,)", {"temperature": torch.ones(1)}, id="temperature-shape"),
        pytest.param(ValueError, "key_bias", "(4,)", {"key_bias": torch.ones(4)}, id="bias"),
        pytest.param(ValueError, "key_bias", "inf", {"key_bias": torch.ones(5) / 0}, id="bias-inf"),
        pytest.param(ValueError, "key_bias", "inf", {"key_bias": LARGE[:5]}, id="bias-large"),
        pytest.param(
            ValueError,
            "anchor_weight",
            "inf",
            {"anchor_weight": LARGE[:4]},
            id="weight-large",
        ),
        pytest.param(
            ValueError,
            "positives.weights",
            "inf",
            {"positives": PairLists(OFFSETS, INDICES, LARGE[:3])},
            id="weights-large",
        ),
        pytest.param(ValueError, "anchor_weight", "(5,)", {"anchor_weight": torch.ones(5)}, id="weight"),
        pytest.param(ValueError, "anchor_weight", "-1", {"anchor_weight": -torch.ones(4)}, id="weight-negative"),
        pytest.param(
            ValueError,
            "anchor_weight",
            "requires_grad=True",
            {"anchor_weight": torch.ones(4, requires_grad=True)},
            id="weight-grad",
        ),
        pytest.param(ValueError, "positive_aggregation", "'in'", {"positive_aggregation": "in"}, id="aggregation"),
        pytest.param(ValueError, "denominator", "None", {"denominator": None}, id="denominator"),
        pytest.param(ValueError, "reduction", "'avg'", {"reduction": "avg"}, id="reduction"),
        pytest.param(ValueError, "reduction", "'none'", {"reduction": "none", "both_directions": True}, id="both-none"),
        pytest.param(TypeError, "both_directions", "int", {"both_directions": 1}, id="both"),
        pytest.param(TypeError, "return_statistics", "str", {"return_statistics": "yes"}, id="statistics"),
    ],
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


def test_unavailable_backend():
    with pytest.raises(hpkernels.BackendUnavailableError, match=rf"^{OP}: backend 'cuda' is not available: \w+"):
        contrastive(A.double(), K.double(), positives=L, backend="cuda")


@each_exact_case
@pytest.mark.parametrize("name", ["plain", "own", "both"])
def test_second_differentiation(case, name):
    batch = Batch(case, **OPTIONS[name])
    inputs = batch.inputs()
    loss = batch.call(**inputs)
    (grad,) = torch.autograd.grad(loss, inputs["anchors"], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{OP}: double backward is not supported"):
        grad.sum().backward()
    for retain_graph in (True, False):
        inputs["anchors"].grad = None
        loss.backward(retain_graph=retain_graph)
        torch.testing.assert_close(inputs["anchors"].grad, grad, rtol=0, atol=0)


@each_exact_case
@each_option
def test_statistics(case, options):
    batch = Batch(case, **options)
    inputs = batch.inputs()
    loss, statistics = contrastive(
        **inputs, positives=batch.positives, **batch.options, return_statistics=True, backend=case.backend
    )
    torch.testing.assert_close(loss, batch.call(**inputs), rtol=0, atol=0)
    assert isinstance(statistics, ContrastiveStatistics)
    assert not any(value.requires_grad for value in statistics if value is not None)
    out = batch.excluded if batch.options.get("exclude_positives", True) else batch.excluded & (batch.weights == 0)
    taking_part = ~out if batch.keys is not None else (~out).fill_diagonal_(False)
    positives = taking_part & (batch.weights > 0)
    denominator = taking_part & ~positives if options.get("denominator") == "negatives" else taking_part
    keys = batch.anchors if batch.keys is None else batch.keys
    logits = (batch.anchors @ keys.T / batch.temperature).cpu()
    logits += 0 if batch.key_bias is None else batch.key_bias.cpu()
    logits = logits.masked_fill(~denominator, -torch.inf)
    expected = [logits.logsumexp(dim=1), positives.sum(dim=1)]
    if options.get("both_directions"):
        expected += [logits.logsumexp(dim=0), positives.sum(dim=0)]
    found = [value.cpu() for value in statistics if value is not None]
    torch.testing.assert_close(found, expected)


@each_exact_case
@pytest.mark.parametrize("asked", [("anchors",), ("keys",), ("temperature",), ("key_bias",), ("keys", "key_bias"), ()])
@pytest.mark.parametrize("name", ["weights", "both", "each"])
def test_only_what_is_asked_for(case, asked, name):
    """Gradients are the same whichever others are asked for, and without any forward makes none."""
    batch = Batch(case, **OPTIONS[name])
    expected = batch.result()
    inputs = {key: value.detach().requires_grad_(key in asked) for key, value in batch.inputs().items()}
    loss = batch.call(**inputs)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=0, atol=0)
    assert loss.requires_grad == bool(asked)
    if asked:
        grads = torch.autograd.grad(loss, [inputs[key] for key in asked], batch.cotangent.to(loss))
        torch.testing.assert_close(list(grads), [expected[1][key] for key in asked], rtol=1e-12, atol=1e-12)


@each_exact_case
def test_keys_without_a_gradient_may_be_written_before_backward(case):
    """As queues and banks of keys are, in one pass."""
    batch = Batch(case)
    expected = batch.result()[1]["anchors"]
    inputs = {**batch.inputs(), "keys": batch.keys.clone()}
    loss = batch.call(**inputs)
    inputs["keys"].zero_()
    (gradient,) = torch.autograd.grad(loss, inputs["anchors"], batch.cotangent.to(loss))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@each_exact_case
@pytest.mark.parametrize("name", ["plain", "own", "both", "each"])
def test_checkpoint_and_inference_tensors(case, name):
    """Saved tensors are unpacked once, and relations may come from ``torch.inference_mode``."""
    with torch.inference_mode():
        batch = Batch(case, **OPTIONS[name])
    same = Batch(case, **OPTIONS[name])
    expected, inputs = same.result(), same.inputs()

    def call(*values):
        return batch.call(**dict(zip(inputs, values, strict=True)))

    loss = torch.utils.checkpoint.checkpoint(call, *inputs.values(), use_reentrant=False)
    gradients = torch.autograd.grad(loss, list(inputs.values()), same.cotangent.to(loss))
    torch.testing.assert_close(
        (loss.detach(), dict(zip(inputs, gradients, strict=True))), expected, rtol=1e-12, atol=1e-12
    )


def test_pairs_are_saved(tmp_path):
    """And loaded without unpickling code."""
    for pairs in (L, PairLists(OFFSETS, INDICES), PairLists(OFFSETS, INDICES, torch.ones(3))):
        torch.save(pairs, tmp_path / "pairs.pt")
        loaded = torch.load(tmp_path / "pairs.pt", weights_only=True)
        assert type(loaded) is type(pairs)
        torch.testing.assert_close(contrastive(A, K, positives=loaded), contrastive(A, K, positives=pairs))


@each_exact_case
def test_forms_of_pairs(case):
    """The same pairs by label, mask, lists and tensors, one by one and together."""
    labels, key_labels = torch.arange(6) % 3, torch.arange(8) % 3
    dense = labels[:, None] == key_labels
    generator = torch.Generator().manual_seed(0)
    anchors, keys = (torch.randn(n, 4, generator=generator, dtype=case.dtype).to(case.device) for n in (6, 8))
    lists = lists_of(dense.double(), weighted=False)
    uneven = PairLists(lists.offsets, lists.indices, torch.ones(len(lists.indices), dtype=case.dtype))
    half = PairLists(lists.offsets, lists.indices, torch.full_like(uneven.weights, 0.5))
    run = partial(contrastive, anchors, keys, backend=case.backend)
    by_label = Labels(labels, key_labels)
    expected = run(positives=moved(by_label, case.device))
    columns = Labels(torch.stack((labels, torch.full((6,), -1)), 1), torch.stack((key_labels, torch.full((8,), -1)), 1))
    mask = PositiveMask.from_dense(dense, keys=True)
    for pairs in (
        mask,
        lists,
        uneven,
        columns,
        (by_label, mask),
        (lists, lists),
        (lists, half),
        (by_label, half, mask),
    ):
        torch.testing.assert_close(run(positives=moved(pairs, case.device)), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(run(positives=dense.to(case.device)), expected, rtol=1e-12, atol=0)
    own = contrastive(anchors, positives=labels.to(case.device), backend=case.backend)
    square = PositiveMask.from_labels(labels.to(case.device))
    torch.testing.assert_close(contrastive(anchors, positives=square, backend=case.backend), own, rtol=1e-12, atol=0)
    # Anchors that a mask ignores take no part, whatever else names their pairs.
    ignoring = PositiveMask.from_labels(labels.to(case.device), ignore_index=1)
    without = contrastive(anchors[labels != 1], positives=labels[labels != 1].to(case.device), backend=case.backend)
    listed = moved(lists_of((labels[:, None] == labels).double().fill_diagonal_(0), weighted=False), case.device)
    names = ignoring, (ignoring, labels.to(case.device)), (ignoring, listed), (ignoring, square)
    for pairs in names:
        torch.testing.assert_close(contrastive(anchors, positives=pairs, backend=case.backend), without)
    for pairs in (*names, labels.to(case.device)):
        nothing = PositiveMask.from_labels(torch.where(labels == 1, 9, torch.arange(6) + 10).to(case.device), 9)
        run_own = partial(contrastive, anchors, positives=pairs, exclude=nothing, backend=case.backend)
        for both in (True, False):
            torch.testing.assert_close(run_own(exclude_positives=both), without)


def test_lists_out_of_range_are_no_pairs_where_nothing_is_read():
    """Compiled, values are not checked: a key out of range is no pair, and no memory but the tensors' is touched."""
    wrong = PairLists(OFFSETS, torch.tensor([4, -3, 99]))
    right = PairLists(torch.tensor([0, 1, 1, 1, 1]), torch.tensor([4]))
    beyond = PairLists(torch.tensor([-9, 1, 1, 1, 2**40]), torch.tensor([4]))
    for backend in {case.backend for case in CASES if case.device == "cpu"}:
        run = torch.compile(partial(contrastive, A, K, backend=backend), fullgraph=True, backend="aot_eager")
        for lists in (wrong, beyond):
            torch.testing.assert_close(run(positives=lists), contrastive(A, K, positives=right, backend=backend))


@each_exact_case
def test_values_that_are_not_finite_show_where_nothing_is_read(case):
    for name in ("plain", "own", "both"):
        batch = Batch(case, **OPTIONS[name])
        for field in ("anchors", "keys", "key_bias"):
            inputs = {key: value.detach() for key, value in batch.inputs().items()}
            if field in inputs:
                inputs[field] = inputs[field].clone()
                inputs[field][0] = math.nan
                run = torch.compile(batch.call, fullgraph=True, backend="aot_eager")
                assert run(**inputs).isnan().all()


ROWS = torch.arange(40) % 7
FITTING = {"positives": Labels(ROWS), "temperature": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "positives", [Labels(ROWS), PositiveMask.from_labels(ROWS), Labels(ROWS[:, None])], ids=["label", "mask", "column"]
)
def test_fused(dtype, positives):
    """What the kernels of `multi_positive_contrastive` can take is the same by them."""
    if not backends.availability("multi_positive_contrastive", "cuda", "cpu", dtype).ok:
        pytest.skip("needs the CUDA kernels, on a GPU or emulated")
    anchors = normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    results = []
    for backend, kind in (("cuda", dtype), ("reference", torch.float32), ("reference", torch.float64)):
        leaf = anchors.to(dtype).to(kind, copy=True).requires_grad_()
        loss = contrastive(leaf, **{**FITTING, "positives": positives}, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for actual, plain, exact in zip(*results, strict=True):
        assert_rows_close(actual, exact, plain.to(actual.dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"positives": PositiveMask.from_dense(torch.rand(40, 40) < 0.5)},  # not known to be symmetric
        {"positives": Labels(ROWS, ROWS)},
        {"positives": Labels(torch.stack((ROWS, ROWS), 1))},
        {"positives": (Labels(ROWS), PositiveMask.from_labels(ROWS))},
        {"positives": PairLists(torch.arange(41), ROWS)},
        {"exclude": Labels(ROWS)},
        {"temperature": torch.tensor(0.2)},
        {"key_bias": torch.zeros(40)},
        {"anchor_weight": torch.ones(40)},
        {"positive_aggregation": "inside"},
        {"denominator": "negatives"},
        {"reduction": "sum"},
        {"both_directions": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_not_fused(options):
    with pytest.raises(
        hpkernels.BackendUnavailableError, match=r"^contrastive: backend 'cuda' is not available: it takes"
    ):
        contrastive(torch.eye(40), **{**FITTING, **options}, backend="cuda")


def test_fused_by_choice(monkeypatch):
    """On a GPU "auto" leaves to the fused kernels what fits them, if rows are short and the kernels right."""

    def chosen(rows, backend="auto", taken="cuda"):
        monkeypatch.setattr(backends, "select", lambda op, backend, tensor, caller=None: taken)
        arguments = arguments_of(
            OP, torch.empty(rows, device="meta"), None, positives=Labels(torch.empty(rows[0], device="meta").long()),
            exclude=None, exclude_positives=True, temperature=0.1, key_bias=None, positive_aggregation="outside",
            denominator="all", both_directions=False, anchor_weight=None, reduction="mean", backend=None,
        )  # fmt: skip
        return fused.chosen_backend(OP, arguments, 0.1, backend)

    assert chosen((4096, 512)) == "cuda" and chosen((4096, 512), taken="triton") == "triton"
    assert chosen((4096, 512), taken="reference") is None
    assert chosen((4096, 768)) is None and chosen((100_000, 512)) is None
    assert chosen((4096, 768), backend="cuda") == "cuda" and chosen((4096, 512), backend="reference") is None
    assert hpkernels.explain(OP, N=4096, D=512, device="H100").steps[0].route == "fused"
    assert hpkernels.explain(OP, N=4096, D=768, device="H100").steps[0].route == "chunked"


def test_blocks():
    """A block is what the workspace holds; where that is few, more."""
    rows = ROWS_OF_BLOCK
    problem = SimpleNamespace(anchors=torch.empty(1), all_keys=range(65536))
    assert rows(problem, 4) == 256 and chunked.CPU_WORKSPACE // (4 * 65536) == 128
    assert rows(SimpleNamespace(anchors=torch.empty(1), all_keys=range(8192)), 4) == 1024
    assert rows(SimpleNamespace(anchors=torch.empty(1), all_keys=range(10**6)), 4) == 32
    assert rows(SimpleNamespace(anchors=torch.empty(1, device="meta"), all_keys=range(65536)), 6) == 2720


class Largest(TorchDispatchMode):
    """The most elements that an operator has returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.elements = max([self.elements, *(value.numel() for value in tensors)])
        return result


@each_exact_case
@pytest.mark.parametrize("name", ["own", "both", "each", "weights"])
def test_nothing_of_all_pairs(case, name):
    """With blocks of 32 anchors no tensor has more than 32 K elements, or than pairs are listed."""
    batch = Batch(case, **OPTIONS[name], anchors=200, keys=300)
    inputs = batch.inputs()
    with Largest() as largest:
        loss = batch.call(**inputs)
        loss.backward(batch.cotangent.to(loss))
    listed = len(batch.positives[1].indices) if isinstance(batch.positives, tuple) else 0
    assert largest.elements <= max(32 * 300 + 1, listed) < 200 * 300 / 4
