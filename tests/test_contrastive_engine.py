"""What is special to `contrastive`: its engines and their memory, the forms of pairs, what autograd keeps."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hpkernels
from hpkernels import ContrastiveStatistics, Labels, PairLists, PositiveMask, backends, contrastive
from hpkernels.ops.contrastive import chunked, fused
from hpkernels.ops.contrastive.arguments import arguments_of
from hpkernels.testing import assert_rows_close
from tests.ops.contrastive_batch import (
    CASES,
    INDICES,
    OFFSETS,
    OP,
    OPTIONS,
    A,
    Batch,
    K,
    L,
    each_exact_case,
    each_option,
    lists_of,
    moved,
)

ROWS_OF_BLOCK = chunked.rows_of_block  # before it is replaced by what makes several of small problems


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Problems of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "rows_of_block", lambda problem, pair_bytes: 32)
        yield


def test_unavailable_backend():
    with pytest.raises(hpkernels.BackendUnavailableError, match=rf"^{OP}: backend 'cuda' is not available: \w+"):
        contrastive(A.double(), K.double(), positives=L, backend="cuda")


def test_messages_about_positives_name_what_a_beginner_passes():
    with pytest.raises(TypeError, match="must be an integer or bool tensor, Labels, .* got list$"):
        contrastive(A, K, positives=[0, 1])
    with pytest.raises(ValueError, match=r"`positives.anchor_ids` must be of shape \(4,\), got int64 of shape \(3,\)"):
        contrastive(A, positives=torch.arange(3))


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


@pytest.mark.parametrize(
    "settings", [{}, {"both_directions": True}, {"reduction": "none"}], ids=lambda s: [*s, "one"][0]
)
def test_bank_made_in_inference_mode(settings):
    """Keys and a bias without gradients, which backward keeps where it computes the logits again."""
    with torch.inference_mode():
        bank, bias = K.clone(), torch.ones(len(K), dtype=K.dtype)

    def gradient(keys, key_bias):
        anchors = A.clone().requires_grad_()
        contrastive(anchors, keys, positives=L, key_bias=key_bias, **settings).sum().backward()
        return anchors.grad

    torch.testing.assert_close(gradient(bank, bias), gradient(K, torch.ones_like(K[:, 0])))


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not backends.availability("multi_positive_contrastive", "cuda", device, dtype).ok:
        pytest.skip("needs the CUDA kernels, on a GPU or emulated")
    anchors = normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0))).to(device)
    positives = moved(positives, device)
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
    assert rows(problem, 4) == 256 and chunked.CHUNK_BYTES_ON_CPU // (4 * 65536) == 128
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
