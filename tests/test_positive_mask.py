"""PositiveMask: what it refuses, its operators, labels of any kind, and files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpkernels import PositiveMask, multi_positive_contrastive
from hpkernels.ops._bits import pack_bits

N = 70


@pytest.fixture
def dense():
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.2
    return mask & ~torch.eye(N, dtype=torch.bool)


@pytest.fixture
def labels():
    return torch.randint(4, (N,), generator=torch.Generator().manual_seed(0))


def bits(rows=N, words=3, dtype=torch.int32):
    return torch.zeros((rows, words), dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((bits(2, 1), N), ValueError, r"`bits` must be of shape \(70, 3\), got int32 of shape \(2, 1\)$"),
        ((bits(words=1), N), ValueError, r"`bits` must be of shape \(70, 3\)"),
        ((bits(dtype=torch.int64), N), TypeError, "`bits` must be an int32 tensor, got int64"),
        ((bits(dtype=torch.float32), N), TypeError, "`bits` must be an int32 tensor, got float32"),
        ((None, N), TypeError, r"`bits` must be an int32 tensor of shape \(70, 3\), got NoneType$"),
        ((bits(), 70.0), TypeError, "`anchors` must be an integer"),
        ((bits(), 0), ValueError, "`anchors` must be an integer of at least 1"),
        ((torch.full((N, 3), -1, dtype=torch.int32), N), ValueError, "`bits` must be 0 beyond column 69"),
        ((pack_bits(torch.eye(N, dtype=torch.bool)), N), ValueError, "`bits` must be 0 on the diagonal"),
    ],
)
def test_bits_that_kernels_would_trust_are_checked(arguments, kind, message):
    with pytest.raises(kind, match=f"^PositiveMask: {message}"):
        PositiveMask(*arguments)


def test_bits_that_were_changed_later_are_checked_too(dense):
    mask = PositiveMask.from_dense(dense)
    mask.bits = mask.bits[:2]
    with pytest.raises(ValueError, match=r"`positives.bits` must be of shape \(70, 3\)"):
        multi_positive_contrastive(torch.eye(N), mask)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("column", [N - 1 + 20, 0], ids=["padding", "diagonal"])
def test_bits_are_checked_where_the_constructor_could_not(backend, column, labels):
    mask = PositiveMask.from_labels(labels)
    mask.bits[0, column // 32] |= 1 << column % 32
    z = torch.eye(N, requires_grad=True)
    with pytest.raises(ValueError, match="^PositiveMask: `bits` must be 0"):
        multi_positive_contrastive(z, mask, backend=backend)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="^PositiveMask: `bits` must be 0"):
        multi_positive_contrastive(z, PositiveMask(mask.bits, N), backend=backend)


def test_masks_made_in_inference_mode_train(labels):
    with torch.inference_mode():
        mask = PositiveMask.from_labels(labels)
    z = torch.eye(N, requires_grad=True)
    multi_positive_contrastive(z, mask).backward()
    assert z.grad.any()


def test_operators(dense):
    other = dense.roll(1, 0) & ~torch.eye(N, dtype=torch.bool)
    a, b = PositiveMask.from_dense(dense), PositiveMask.from_dense(other)
    assert torch.equal((a | b).to_dense(), dense | other)
    assert torch.equal((a & b).to_dense(), dense & other)
    assert torch.equal(a.T.to_dense(), dense.T)
    assert a == PositiveMask.from_dense(dense) and a != b and a != dense
    assert (len(a), a.shape) == (N, (N, N))
    with pytest.raises(ValueError, match="both masks must have 70 anchors, got one of 3"):
        a | PositiveMask.from_dense(torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(TypeError):
        a | dense


def test_a_transpose_goes_through_parts(monkeypatch, dense):
    monkeypatch.setattr("hpkernels.ops._blocks.WORKSPACE", 1)  # 32 rows at a time
    assert torch.equal(PositiveMask.from_dense(dense).T.to_dense(), dense.T)


def test_files_load_as_weights_only(labels):
    mask = PositiveMask.from_labels(labels, ignore_index=0)
    mask = PositiveMask(mask.bits, np.int64(N), symmetric=True, ignored=mask.ignored)
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["mask"]
    assert loaded == mask and loaded.symmetric and torch.equal(loaded.ignored, labels == 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_labels_of_any_integer_dtype(dtype, labels):
    assert PositiveMask.from_labels(labels.to(dtype)) == PositiveMask.from_labels(labels)


def test_unsigned_labels_are_never_negative(labels):
    hashes = (labels - 2).to(torch.uint64)  # half of them above 2^63
    assert PositiveMask.from_labels(hashes) == PositiveMask.from_labels(labels)


def test_a_mask_moves_to_devices_alone(labels):
    mask = PositiveMask.from_labels(labels)
    assert mask.to("cpu").to(torch.device("cpu")) == mask and mask.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match="^PositiveMask.to: `device` must be a torch.device or its name, got torch.fl"):
        mask.to(torch.float16)


@pytest.mark.parametrize("ignore_index", [1, (1, 3), [255, 1], torch.tensor(1), torch.tensor([1, 3]), np.array(1)])
def test_ignored_labels_have_no_positives(ignore_index, labels):
    mask = PositiveMask.from_labels(labels, ignore_index=ignore_index)
    ignored = torch.isin(labels, torch.as_tensor(ignore_index))
    assert torch.equal(mask.ignored, ignored)
    expected = (labels[:, None] == labels) & ~torch.eye(N, dtype=torch.bool) & ~ignored[:, None]
    assert torch.equal(mask.to_dense(), expected)


@pytest.mark.parametrize("ignore_index", [1.5, "255", [None], True])
def test_ignore_index_is_checked(ignore_index, labels):
    with pytest.raises(TypeError, match="PositiveMask.from_labels: `ignore_index` must be an integer"):
        PositiveMask.from_labels(labels, ignore_index=ignore_index)


def test_combined_masks_ignore_what_either_ignores(dense, labels):
    a, b = PositiveMask.from_labels(labels, ignore_index=1), PositiveMask.from_dense(dense)
    for combined in (a | b, b | a, a & b):
        assert torch.equal(combined.ignored, labels == 1)
        assert not combined.to_dense()[labels == 1].any() and not combined.to_dense()[:, labels == 1].any()


K = 45
each_other = pytest.mark.parametrize("keys", [K, N, 2 * N])  # a mask of as many keys as anchors is no square one


def between(keys=K, seed=0):
    return torch.rand(N, keys, generator=torch.Generator().manual_seed(seed)) < 0.2


@each_other
def test_masks_of_anchors_and_keys(keys):
    dense, other = between(keys), between(keys, 1)
    a, b = (PositiveMask.from_dense(mask, keys=True) for mask in (dense, other))
    assert (a.anchors, a.keys, a.shape, len(a), a.symmetric) == (N, keys, (N, keys), N, False)
    assert a.bits.shape == (N, -(-keys // 32)) and a.nbytes == 4 * a.bits.numel()
    assert torch.equal(a.to_dense(), dense) and dense.diagonal().any()
    assert torch.equal(a.count(), dense.sum(dim=1))
    assert torch.equal((a | b).to_dense(), dense | other) and torch.equal((a & b).to_dense(), dense & other)
    assert (a | b).shape == (N, keys) and a == PositiveMask.from_dense(dense, keys=True) and a != b
    assert a.T.shape == (keys, N) and torch.equal(a.T.to_dense(), dense.T) and a == a.T.T
    assert a == a.to("cpu") and a.to("meta").shape == (N, keys)
    assert repr(a) == f"PositiveMask({N} anchors x {keys} keys, {a.nbytes} bytes, device='cpu')"


def test_masks_of_two_kinds_do_not_meet(dense):
    square, rectangle = PositiveMask.from_dense(dense), PositiveMask.from_dense(dense, keys=True)
    assert square != rectangle and torch.equal(square.bits, rectangle.bits)
    with pytest.raises(ValueError, match="both masks must have 70 anchors, got one of 70 anchors x 70 keys"):
        square | rectangle
    with pytest.raises(ValueError, match="both masks must have 70 anchors x 70 keys, got one of 70 anchors x 45 keys"):
        rectangle & PositiveMask.from_dense(between(), keys=True)
    with pytest.raises(ValueError, match=r"ignoring: the mask must be a square one, got one of 70 anchors x 70 keys"):
        rectangle.ignoring(torch.zeros(N, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"keys": K + 32}, ValueError, r"`bits` must be of shape \(70, 3\), got int32 of shape \(70, 2\)"),
        ({"keys": K - 1}, ValueError, "`bits` must be 0 beyond column 43"),
        ({"keys": 0}, ValueError, "`keys` must be an integer of at least 1"),
        ({"keys": 45.0}, TypeError, "`keys` must be an integer"),
        ({"keys": K, "symmetric": True}, ValueError, "`symmetric` must be False where there are keys"),
        (
            {"keys": K, "ignored": torch.zeros(N, dtype=torch.bool)},
            ValueError,
            "`ignored` must be None where there are keys: it is for square masks only",
        ),
    ],
)
def test_arguments_of_masks_with_keys_are_checked(options, kind, message):
    filled = PositiveMask.from_dense(torch.ones(N, K, dtype=torch.bool), keys=True).bits
    with pytest.raises(kind, match=f"^PositiveMask: {message}"):
        PositiveMask(filled, N, **options)


@pytest.mark.parametrize("mask", [between(), between(N)], ids=["not square", "square"])
def test_what_a_dense_mask_is_must_be_said(mask):
    """A square one is of anchors alone unless `keys` says otherwise, others are never."""
    assert PositiveMask.from_dense(mask, keys=True).keys == mask.shape[1]
    if mask.shape[1] == N:
        assert PositiveMask.from_dense(mask).keys is None
    else:
        with pytest.raises(
            ValueError, match=r"or come with keys=True for anchors x keys, got bool of shape \(70, 45\)"
        ):
            PositiveMask.from_dense(mask)
    with pytest.raises(TypeError, match="PositiveMask.from_dense: `keys` must be True or False, got int 45"):
        PositiveMask.from_dense(mask, keys=45)


@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.int64), (torch.uint8, torch.int32), (torch.int16, torch.uint64)]
)
def test_labels_of_keys(dtypes, labels):
    signed = [dtype.is_signed for dtype in dtypes]
    labels = (labels - 1 if signed[0] else labels).to(dtypes[0])
    of_keys = torch.randint(5, (K,), generator=torch.Generator().manual_seed(1))
    of_keys = (of_keys - 1 if signed[1] else of_keys).to(dtypes[1])
    mask = PositiveMask.from_labels(labels, key_labels=of_keys)
    expected = (labels.long()[:, None] == of_keys.long()) & (labels.long()[:, None] >= 0)
    assert mask.keys == K and mask.ignored is None and torch.equal(mask.to_dense(), expected) and expected.any()


def test_labels_that_no_key_has():
    """The greatest unsigned labels have the bits of negative ones, which are nobody's."""
    greatest = torch.full((2,), -1).to(torch.uint64)
    assert not PositiveMask.from_labels(greatest, key_labels=torch.tensor([-1, 3])).to_dense().any()
    assert not PositiveMask.from_labels(torch.tensor([-1, 3]), key_labels=greatest).to_dense().any()
    assert PositiveMask.from_labels(greatest, key_labels=greatest).to_dense().all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"key_labels": torch.ones(3)}, TypeError, "`key_labels` must be an integer tensor, got float32"),
        ({"key_labels": torch.ones(3, 1).long()}, ValueError, r"`key_labels` must be of shape \(K,\), got int64"),
        ({"key_labels": torch.ones(0).long()}, ValueError, "`key_labels` must not be empty"),
        ({"key_labels": torch.ones(3, device="meta").long()}, ValueError, "`key_labels` must be on the device of"),
        (
            {"key_labels": torch.ones(3).long(), "ignore_index": 255},
            ValueError,
            "`ignore_index` must be None where there are `key_labels`: .* square masks only, got 255",
        ),
    ],
)
def test_labels_of_keys_are_checked(options, kind, message, labels):
    with pytest.raises(kind, match=f"^PositiveMask.from_labels: {message}"):
        PositiveMask.from_labels(labels, **options)


def test_files_of_masks_with_keys():
    mask = PositiveMask.from_dense(between(), keys=True)
    mask = PositiveMask(mask.bits, N, keys=np.int64(K))
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded == mask and loaded.keys == K


def test_states_from_before_there_were_keys(labels):
    mask = PositiveMask.from_labels(labels, ignore_index=0)
    state = mask.__getstate__()
    del state["keys"]
    loaded = PositiveMask.__new__(PositiveMask)
    loaded.__setstate__(state)
    assert loaded == mask and loaded.keys is None and loaded.symmetric


@pytest.mark.parametrize("name", ["positives", "specific"])
@each_other
def test_the_loss_refuses_keys(name, keys, labels):
    mask = PositiveMask.from_dense(between(keys), keys=True)
    given = {"positives": labels, "specific": None, "specific_weight": 0.5 * (name == "specific"), name: mask}
    with pytest.raises(ValueError, match=rf"`{name}` must be a square mask, .* got one of 70 anchors x {keys} keys"):
        multi_positive_contrastive(torch.eye(N), **given)
