from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import similar_keys, similar_pairs

import hpkernels
from hpkernels import PositiveMask, hidden_positives
from hpkernels.ops import _blocks
from hpkernels.ops._bits import pack_bits, unpack_bits
from hpkernels.ops.hidden_positives import cpu, rows_of
from hpkernels.testing import available_cases, helpful_error, memory_layouts, random_problem, unchanged

OP = "hidden_positives"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
GOLDENS = ("joint_allneg", "joint_medium", "joint_noreweight", "joint_small", "joint_warmup", "separate")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
either_way = pytest.mark.parametrize("symmetric", [True, False])


def inputs(case, anchors=40, dim=24, seed=0):
    """Features of `anchors` patches and their thresholds, of which some let everything and some nothing through."""
    problem = random_problem(
        seed, images=1, height=1, width=anchors, feature_dim=dim, dtype=case.dtype, device=case.device
    )
    threshold = hpkernels.masked_topk(problem.features, problem.pool, backend="reference").values[:, 0]
    threshold[3::17] = float("inf")
    threshold[5::23] = -float("inf")
    return problem.features, threshold


def keyed(case, keys=50, dim=24, seed=1):
    """Keys of `inputs` and their thresholds, under their names."""
    rows, threshold = inputs(case, keys, dim, seed)
    return {"keys": rows, "key_threshold": threshold}


@either_way
@each_case
@given(anchors=st.integers(1, 70), dim=st.integers(1, 33), seed=st.integers(0, 9))
@example(anchors=1, dim=1, seed=0)
@example(anchors=33, dim=1, seed=0)
@example(anchors=64, dim=7, seed=0)
@example(anchors=65, dim=31, seed=0)
def test_matches_reference(case, symmetric, anchors, dim, seed):
    features, threshold = inputs(case, anchors, dim, seed)
    mask = hidden_positives(features, threshold, symmetric=symmetric, backend=case.backend)
    found = mask.to_dense().cpu()
    expected, margin = similar_pairs(features.cpu().double(), threshold.cpu().double(), symmetric)
    assert mask.symmetric == symmetric and torch.equal(mask.T.to_dense().cpu(), found.T)
    # With dim = 1 products are exact and ties the rule; otherwise rounding decides pairs this close to the limit.
    undecided = (margin.abs() < 1e-6) if dim > 1 and case.dtype != torch.float64 else torch.zeros_like(expected)
    undecided.fill_diagonal_(False)
    assert undecided.double().mean() < 1e-2
    assert torch.equal(found[~undecided], expected[~undecided])

    # The same with keys, of which there are others in number.
    key_count = 1 + 7 * anchors % 80
    others = keyed(case, key_count, dim, seed + 1)
    keys, of_keys = others.values()
    for limits in ({"threshold": threshold}, {"key_threshold": of_keys}, {"threshold": threshold, **others}):
        mask = hidden_positives(features, **{"keys": keys, **limits}, symmetric=symmetric, backend=case.backend)
        limits = {name: limits[name].cpu().double() for name in ("threshold", "key_threshold") if name in limits}
        expected, margin = similar_keys(features.cpu().double(), keys.cpu().double(), **limits)
        decided = (margin.abs() >= 1e-6) if dim > 1 and case.dtype != torch.float64 else torch.ones_like(expected)
        assert decided.double().mean() > 0.97 and mask.shape == (anchors, key_count) and not mask.symmetric
        assert torch.equal(mask.to_dense().cpu()[decided], expected[decided])


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("case", available_cases(OP, (torch.float64, torch.float32)), ids=str)
def test_golden(case, name, golden):
    data = golden(f"ghp_{name}")
    for features, threshold, count in (
        (data.features, data.threshold, data.positives_per_anchor),
        (data.specific, data.threshold_specific, data.positives_specific_per_anchor),
    ):
        features, threshold = (value.to(case.device, case.dtype) for value in (features, threshold))
        mask = hidden_positives(features, threshold, backend=case.backend)
        assert torch.equal(mask.count().cpu(), count)


@each_case
def test_gradients(case):
    features, threshold = inputs(case)
    z = features.clone().requires_grad_()
    positives = hidden_positives(z.detach(), threshold, backend=case.backend)
    assert not positives.bits.requires_grad
    constant = PositiveMask.from_dense(positives.to_dense())
    grads = []
    for mask in (positives, constant):
        loss = hpkernels.multi_positive_contrastive(z, mask, backend="reference")
        grads.append(torch.autograd.grad(loss, z)[0])
    assert grads[0].any()
    assert torch.equal(*grads)
    with torch.no_grad():  # where nothing is recorded there is no gradient to lose
        assert torch.equal(hidden_positives(z, threshold, backend=case.backend).bits, positives.bits)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float64,)), ids=str)
def test_gradcheck(case):
    features, threshold = inputs(case, anchors=9)

    def loss(z):
        positives = hidden_positives(features, threshold, backend=case.backend)
        return hpkernels.multi_positive_contrastive(z, positives, temperature=0.5, backend="reference")

    assert torch.autograd.gradcheck(loss, features[:, :4].clone().requires_grad_())


@either_way
@each_case
def test_opcheck(case, symmetric):
    torch.library.opcheck(torch.ops.hpkernels.hidden_positives.default, (*inputs(case), symmetric, case.backend))
    (features, threshold), (keys, key_threshold) = inputs(case), keyed(case).values()
    for given_rows in (
        (features, keys, threshold, key_threshold, symmetric, None),
        (features[7:20], features, threshold[7:20], threshold, symmetric, 7),
    ):
        torch.library.opcheck(torch.ops.hpkernels.hidden_positives_between.default, (*given_rows, case.backend))


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@each_case
def test_layouts(case, layout):
    features, threshold = inputs(case)
    expected = hidden_positives(features, threshold, backend=case.backend).bits
    moved = (memory_layouts(value)[layout] for value in (features, threshold))
    assert torch.equal(hidden_positives(*moved, backend=case.backend).bits, expected)
    others = keyed(case)
    expected = hidden_positives(features, threshold, **others, backend=case.backend).bits
    moved = {name: memory_layouts(value)[layout] for name, value in others.items()}
    assert torch.equal(hidden_positives(features, threshold, **moved, backend=case.backend).bits, expected)

    alike = hidden_positives(features[:1].expand(5, -1), threshold[:1].mul(0).expand(5), backend=case.backend)
    assert alike.count().tolist() == [4] * 5
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(PositiveMask.from_dense(memory_layouts(mask)[layout]).bits, PositiveMask.from_dense(mask).bits)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_compile(case):
    def run(features, threshold):
        masks = [hidden_positives(features, threshold, symmetric=way, backend=case.backend) for way in (True, False)]
        others = {"keys": features[9:], "key_threshold": threshold[9:]}
        masks.append(hidden_positives(features, threshold, **others, backend=case.backend))
        masks.append(hidden_positives(features, **others, backend=case.backend).T)
        rows = rows_of(features[9:], threshold[9:], features, threshold, 9, backend=case.backend)
        return [rows, *(value for mask in masks for value in (mask.bits, mask.to_dense(), mask.count()))]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for anchors in (40, 70):  # the second compiles again, now for any sizes
        torch.testing.assert_close(compiled(*inputs(case, anchors)), run(*inputs(case, anchors)), rtol=0, atol=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*inputs(case, 101)), run(*inputs(case, 101)), rtol=0, atol=0)


def test_cuda_graph(cuda_graph):
    for case in available_cases(OP, (torch.float32, torch.float16)):
        if case.device == "cuda":
            features, threshold = inputs(case)
            # Reversed features keep their thresholds, so the relation is another one.
            for others in ({}, keyed(case)):
                cuda_graph(
                    lambda case=case, given=(features, threshold), others=others: (
                        hidden_positives(*given, **others, backend=case.backend).bits
                    ),
                    features,
                )


@each_case
def test_deterministic(case):
    for others in ({}, keyed(case, 150)):
        first, second = (hidden_positives(*inputs(case, 130), **others, backend=case.backend).bits for _ in range(2))
        assert torch.equal(first, second)


@each_case
def test_edge_cases(case):
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32

    def find(features, threshold, symmetric=True):
        features = torch.tensor(features, dtype=case.dtype, device=case.device)
        threshold = torch.tensor(threshold, dtype=accumulate, device=case.device)
        mask = hidden_positives(features, threshold, symmetric=symmetric, backend=case.backend)
        return mask.to_dense().int().tolist()

    # one anchor: never its own positive, even where everything is allowed
    assert find([[1.0]], [-1.0]) == [[0]]
    # all and none
    assert find([[1.0], [1.0], [-1.0]], [-2.0] * 3) == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert find([[1.0], [1.0], [-1.0]], [2.0] * 3) == [[0] * 3] * 3
    # the smaller of the two thresholds counts, and equality is not enough
    half = [[1.0, 0.0], [0.5, 0.0], [0.25, 0.0]]
    assert find(half, [0.5, 0.5, 9.0]) == [[0] * 3] * 3
    assert find(half, [0.25, 9.0, 9.0]) == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert find(half, [9.0, 9.0, 0.125]) == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    # infinite thresholds: nothing by themselves, everything
    inf = float("inf")
    assert find(half, [inf] * 3) == [[0] * 3] * 3
    assert find(half, [inf, inf, -inf]) == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    # not symmetric: the anchor's own threshold counts, and equality is not enough either
    assert find([[1.0]], [-1.0], False) == [[0]]
    assert find(half, [0.5, 0.5, 9.0], False) == [[0] * 3] * 3
    assert find(half, [0.25, 9.0, 9.0], False) == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert find(half, [9.0, 9.0, 0.125], False) == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert find(half, [inf, inf, -inf], False) == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]

    def between(features, keys, threshold, key_threshold):
        features, keys = (torch.tensor(rows, dtype=case.dtype, device=case.device) for rows in (features, keys))
        limits = (
            None if limit is None else torch.tensor(limit, dtype=accumulate, device=case.device)
            for limit in (threshold, key_threshold)
        )
        limits = dict(zip(("threshold", "key_threshold"), limits, strict=True))
        return hidden_positives(features, keys=keys, **limits, backend=case.backend).to_dense().int().tolist()

    # anchors and keys: the diagonal is ordinary, also where they are the same
    assert between([[1.0]], [[1.0]], [-1.0], None) == [[1]]
    assert between(half, half, [-inf] * 3, None) == [[1] * 3] * 3
    assert between([[1.0, 0.0]], half + half, [1.0], [-1.0] * 6) == [[0] * 6]
    # each threshold that is given, and equality is not enough
    assert between(half, half[:2], [0.5, 0.5, 0.0], None) == [[1, 0], [0, 0], [1, 1]]
    assert between(half, half[:2], None, [0.25, 0.125]) == [[1, 1], [1, 1], [0, 0]]
    assert between(half, half[:2], [0.5, 0.25, 0.0], [0.25, 0.125]) == [[1, 0], [1, 0], [0, 0]]
    assert between(half, half[:2], [-inf] * 3, [inf, -inf]) == [[0, 1]] * 3


FEATURES, THRESHOLD, ROW = torch.eye(4, 3), torch.zeros(4), torch.tensor([1])
KEYS, OF_KEYS = torch.eye(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    [
        pytest.param(TypeError, "features", "NoneType", {"features": None}, id="features-none"),
        pytest.param(TypeError, "features", "int64", {"features": FEATURES.long()}, id="features-int"),
        pytest.param(TypeError, "features", "bool", {"features": FEATURES.bool()}, id="features-bool"),
        pytest.param(ValueError, "features", "shape (3,)", {"features": FEATURES[0]}, id="features-rank-1"),
        pytest.param(ValueError, "features", "shape (1, 4, 3)", {"features": FEATURES[None]}, id="features-rank-3"),
        pytest.param(ValueError, "features", "shape (0, 3)", {"features": FEATURES[:0]}, id="features-empty-N"),
        pytest.param(ValueError, "features", "shape (4, 0)", {"features": FEATURES[:, :0]}, id="features-empty-D"),
        pytest.param(
            ValueError,
            "features",
            "nan in row 1",
            {"features": FEATURES.index_fill(0, ROW, torch.nan)},
            id="features-nan",
        ),
        pytest.param(ValueError, "features", "inf in row 0", {"features": FEATURES / 0}, id="features-inf"),
        pytest.param(ValueError, "features", "one of 1e+30", {"features": FEATURES * 1e30}, id="features-large"),
        pytest.param(
            ValueError,
            "features",
            "requires_grad=True",
            {"features": FEATURES.clone().requires_grad_()},
            id="features-grad",
        ),
        pytest.param(TypeError, "threshold", "float", {"threshold": 0.5}, id="threshold-float"),
        pytest.param(TypeError, "threshold", "float64", {"threshold": THRESHOLD.double()}, id="threshold-float64"),
        pytest.param(TypeError, "threshold", "float16", {"threshold": THRESHOLD.half()}, id="threshold-float16"),
        pytest.param(TypeError, "threshold", "int64", {"threshold": THRESHOLD.long()}, id="threshold-int"),
        pytest.param(ValueError, "threshold", "shape (3,)", {"threshold": THRESHOLD[:3]}, id="threshold-length"),
        pytest.param(ValueError, "threshold", "shape (4, 1)", {"threshold": THRESHOLD[:, None]}, id="threshold-rank-2"),
        pytest.param(ValueError, "threshold", "shape ()", {"threshold": THRESHOLD[0]}, id="threshold-rank-0"),
        pytest.param(ValueError, "threshold", "meta", {"threshold": THRESHOLD.to("meta")}, id="threshold-device"),
        pytest.param(ValueError, "threshold", "nan in row 0", {"threshold": THRESHOLD / 0}, id="threshold-nan"),
        pytest.param(
            ValueError,
            "threshold",
            "requires_grad=True",
            {"threshold": THRESHOLD.clone().requires_grad_()},
            id="threshold-grad",
        ),
        pytest.param(TypeError, "threshold", "NoneType", {"threshold": None}, id="threshold-none"),
        pytest.param(ValueError, "threshold", "None", {"threshold": None, "keys": KEYS}, id="no-threshold"),
        pytest.param(TypeError, "keys", "list", {"keys": [[1.0]]}, id="keys-list"),
        pytest.param(TypeError, "keys", "float64", {"keys": KEYS.double()}, id="keys-float64"),
        pytest.param(TypeError, "keys", "int64", {"keys": KEYS.long()}, id="keys-int"),
        pytest.param(ValueError, "keys", "shape (2, 2)", {"keys": KEYS[:, :2]}, id="keys-D"),
        pytest.param(ValueError, "keys", "shape (3,)", {"keys": KEYS[0]}, id="keys-rank-1"),
        pytest.param(ValueError, "keys", "shape (0, 3)", {"keys": KEYS[:0]}, id="keys-empty-K"),
        pytest.param(ValueError, "keys", "meta", {"keys": KEYS.to("meta")}, id="keys-device"),
        pytest.param(ValueError, "keys", "inf in row 0", {"keys": KEYS / 0}, id="keys-inf"),
        pytest.param(ValueError, "keys", "one of 1e+30", {"keys": KEYS * 1e30}, id="keys-large"),
        pytest.param(ValueError, "keys", "requires_grad=True", {"keys": KEYS.clone().requires_grad_()}, id="keys-grad"),
        pytest.param(ValueError, "key_threshold", "Tensor", {"key_threshold": THRESHOLD}, id="key_threshold-no-keys"),
        pytest.param(
            TypeError, "key_threshold", "float", {"keys": KEYS, "key_threshold": 0.5}, id="key_threshold-float"
        ),
        pytest.param(
            TypeError,
            "key_threshold",
            "float64",
            {"keys": KEYS, "key_threshold": OF_KEYS.double()},
            id="key_threshold-float64",
        ),
        pytest.param(
            ValueError,
            "key_threshold",
            "shape (4,)",
            {"keys": KEYS, "key_threshold": THRESHOLD},
            id="key_threshold-length",
        ),
        pytest.param(
            ValueError,
            "key_threshold",
            "nan in row 0",
            {"keys": KEYS, "key_threshold": OF_KEYS / 0},
            id="key_threshold-nan",
        ),
        pytest.param(
            ValueError,
            "key_threshold",
            "requires_grad=True",
            {"keys": KEYS, "key_threshold": OF_KEYS.clone().requires_grad_()},
            id="key_threshold-grad",
        ),
        pytest.param(TypeError, "symmetric", "1", {"symmetric": 1}, id="symmetric-int"),
        pytest.param(TypeError, "symmetric", "None", {"symmetric": None}, id="symmetric-none"),
        pytest.param(ValueError, "backend", "'gpu'", {"backend": "gpu"}, id="backend-unknown"),
    ],
)
def test_errors(error, argument, got, options):
    with helpful_error(error, OP, argument, got):
        hidden_positives(**{"features": FEATURES, "threshold": THRESHOLD, **options})


@each_case
def test_inputs_untouched(case):
    features, threshold = inputs(case)
    with unchanged(features, threshold):
        mask = hidden_positives(features, threshold, backend=case.backend)
    with unchanged(mask.bits):
        mask.to_dense(), mask.count()
    others = keyed(case)
    with unchanged(features, threshold, *others.values()):
        hidden_positives(features, threshold, **others, backend=case.backend)


@each_case
def test_autocast(case):
    features, threshold = inputs(case, 70)
    expected = hidden_positives(features, threshold, backend=case.backend).bits
    with torch.autocast(case.device, torch.bfloat16):
        assert torch.equal(hidden_positives(features, threshold, backend=case.backend).bits, expected)
    others = keyed(case)
    others["keys"] = others["keys"].bfloat16().to(case.dtype)
    expected = hidden_positives(features, threshold, **others, backend=case.backend)
    with torch.autocast(case.device, torch.bfloat16):
        assert hidden_positives(features, threshold, **others, backend=case.backend) == expected
        others["keys"] = others["keys"].bfloat16()  # cast to the dtype of the anchors
        assert hidden_positives(features, threshold, **others, backend=case.backend) == expected


def test_unavailable_backend():
    with pytest.raises(
        hpkernels.BackendUnavailableError, match=r"^hidden_positives: backend 'cuda' is not available: \w+"
    ):
        hidden_positives(FEATURES.double(), THRESHOLD.double(), backend="cuda")


@pytest.mark.parametrize("anchors", [1, 31, 32, 33, 64, 70])
def test_packing(anchors):
    dense = torch.rand(anchors, anchors, generator=torch.Generator().manual_seed(anchors)) < 0.5
    dense.fill_diagonal_(False)
    mask = PositiveMask.from_dense(dense)
    words = (anchors + 31) // 32
    assert mask.bits.shape == (anchors, words) and mask.bits.dtype == torch.int32
    for i in range(anchors):
        for j in range(32 * words):  # beyond the last column the bits are 0
            assert bool(int(mask.bits[i, j // 32]) >> (j % 32) & 1) == (j < anchors and bool(dense[i, j]))
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.count(), dense.sum(dim=1))
    assert mask.count().dtype == torch.int64
    assert mask.nbytes == 4 * anchors * words
    assert mask.device == dense.device
    assert torch.equal(mask.to("cpu").bits, mask.bits)
    assert str(anchors) in repr(mask) and str(mask.nbytes) in repr(mask)


def test_packing_of_rectangles():
    mask = torch.rand(3, 45, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 45), mask)
    assert pack_bits(mask).shape == (3, 2)


def test_from_dense_ignores_the_diagonal_and_keeps_asymmetry():
    dense = torch.tensor([[True, True, False], [False, True, False], [True, True, True]])
    assert PositiveMask.from_dense(dense).to_dense().int().tolist() == [[0, 1, 0], [0, 0, 0], [1, 1, 0]]
    assert dense.diagonal().all()


@pytest.mark.parametrize("anchors", [1, 45, 1025])  # more rows than from_labels compares at a time
def test_from_labels(anchors):
    labels = torch.randint(-2, 4, (anchors,), generator=torch.Generator().manual_seed(0))
    dense = (labels[:, None] == labels) & (labels >= 0)
    assert torch.equal(PositiveMask.from_labels(labels).bits, PositiveMask.from_dense(dense).bits)
    assert not PositiveMask.from_labels(labels).to_dense().diagonal().any()


@pytest.mark.parametrize(
    ("make", "error", "argument", "value", "got"),
    [
        ("from_dense", TypeError, "mask", [[True]], "list"),
        ("from_dense", TypeError, "mask", torch.ones(3, 3), "float32 of shape (3, 3)"),
        ("from_dense", ValueError, "mask", torch.ones(3, 2).bool(), "bool of shape (3, 2)"),
        ("from_dense", ValueError, "mask", torch.ones(3).bool(), "bool of shape (3,)"),
        ("from_dense", ValueError, "mask", torch.ones(0, 0).bool(), "bool of shape (0, 0)"),
        ("from_labels", TypeError, "labels", torch.ones(3), "float32 of shape (3,)"),
        ("from_labels", TypeError, "labels", torch.ones(3).bool(), "bool of shape (3,)"),
        ("from_labels", ValueError, "labels", torch.ones(3, 1).long(), "int64 of shape (3, 1)"),
        ("from_labels", ValueError, "labels", torch.ones(0).long(), "int64 of shape (0,)"),
        ("from_labels", TypeError, "labels", None, "NoneType"),
    ],
)
def test_positive_mask_errors(make, error, argument, value, got):
    with helpful_error(error, f"PositiveMask.{make}", argument, got):
        getattr(PositiveMask, make)(value)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_a_pair_with_nan_is_no_positive_where_values_cannot_be_read(case):
    find = torch.compile(partial(hidden_positives, backend=case.backend), fullgraph=True, backend="eager")
    features = torch.ones(4, 2, device=case.device)
    threshold = torch.zeros(4, device=case.device)
    features[1, 0] = torch.nan
    assert find(features, threshold).count().tolist() == [2, 0, 2, 2]
    threshold[3] = torch.nan
    assert find(features, threshold).count().tolist() == [1, 0, 1, 0]

    # Not symmetric, the threshold of the other anchor of a pair does not matter.
    find = torch.compile(
        partial(hidden_positives, symmetric=False, backend=case.backend), fullgraph=True, backend="eager"
    )
    assert find(features, threshold).to_dense().int().tolist() == [[0, 0, 1, 1], [0] * 4, [1, 0, 0, 1], [0] * 4]

    # Of anchors and keys all that is given must be a number.
    find = torch.compile(partial(hidden_positives, backend=case.backend), fullgraph=True, backend="eager")
    keys, key_threshold = torch.ones(3, 2, device=case.device), torch.zeros(3, device=case.device)
    assert find(features, threshold, keys=keys).count().tolist() == [3, 0, 3, 0]
    key_threshold[2] = keys[0, 1] = torch.nan
    assert find(features, keys=keys, key_threshold=key_threshold).count().tolist() == [1, 0, 1, 1]
    assert find(features, threshold, keys=keys, key_threshold=key_threshold).count().tolist() == [1, 0, 1, 0]


@each_case
@pytest.mark.parametrize("anchors", [65, 130])
def test_both_directions_are_decided_by_one_product(case, anchors):
    """The union with the transpose is the symmetric relation to the bit, also where rounding decides."""
    generator = torch.Generator().manual_seed(anchors)
    features = torch.nn.functional.normalize(torch.randn(anchors, 33, generator=generator)).to(case.device, case.dtype)
    wide = features.to(hpkernels.masked_topk(features, features, backend="reference").values.dtype)
    threshold = (wide @ wide.T).fill_diagonal_(-1).topk(4).values[:, 3].contiguous()  # ties but for rounding
    found, both = (hidden_positives(features, threshold, symmetric=way, backend=case.backend) for way in (False, True))
    assert not found.symmetric and both.symmetric
    assert torch.equal((found | found.T).bits, both.bits)
    assert not torch.equal(found.bits, both.bits) and (found.count() <= 4).all()


@either_way
@each_case
@pytest.mark.parametrize("anchors", [65, 130])
def test_rows_are_those_of_the_square(case, anchors, symmetric, monkeypatch):
    """To the bit, wherever the range of rows starts and ends, also where rounding decides."""
    monkeypatch.setattr(_blocks, "WORKSPACE", 1)  # tiles of 32 anchors, in which ranges do not end
    monkeypatch.setattr(cpu, "_ROWS", 32)
    monkeypatch.setattr(cpu, "_COLUMNS", 64)
    generator = torch.Generator().manual_seed(anchors)
    features = torch.nn.functional.normalize(torch.randn(anchors, 33, generator=generator)).to(case.device, case.dtype)
    wide = features.to(torch.float64 if case.dtype == torch.float64 else torch.float32)
    threshold = (wide @ wide.T).fill_diagonal_(-1).topk(4).values[:, 3].contiguous()  # ties but for rounding
    threshold[0], threshold[40], threshold[-1] = -torch.inf, torch.inf, -torch.inf
    expected = hidden_positives(features, threshold, symmetric=symmetric, backend=case.backend).bits
    edges = [0, 1, 20, 33, 64, anchors]
    parts = [
        rows_of(features[first:last], threshold[first:last], features, threshold, first, symmetric=symmetric,
                backend=case.backend)
        for first, last in pairwise(edges)
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), expected)


@each_case
def test_keys_that_are_the_anchors(case):
    """Both kinds of relation agree but for the diagonal, and a mask is the transpose of the exchanged one."""
    features, threshold = inputs(case, 70)
    square = hidden_positives(features, threshold, symmetric=False, backend=case.backend).to_dense()
    found = hidden_positives(features, threshold, keys=features, backend=case.backend)
    off_diagonal = ~torch.eye(70, dtype=torch.bool, device=case.device)
    assert torch.equal(found.to_dense() & off_diagonal, square) and found.to_dense().diagonal().any()
    exchanged = hidden_positives(features, keys=features, key_threshold=threshold, backend=case.backend)
    assert found == exchanged.T


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_false_negatives_are_found_in_one_call(case):
    """Keys that are nearer to an anchor than its own positive, by a margin."""
    problem = random_problem(images=1, height=1, width=40, device=case.device)
    anchors, keys = problem.z, problem.z_mixed
    own = (anchors * keys).sum(dim=1)
    mask = hidden_positives(anchors, own + 0.05, keys=keys, backend=case.backend).to_dense()
    assert torch.equal(mask, anchors @ keys.T > own[:, None] + 0.05)
    assert mask.any() and not mask.diagonal().any()
