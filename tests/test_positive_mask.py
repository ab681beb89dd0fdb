"""PositiveMask: what it refuses, its operators, labels of any kind, and files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpkernels import PositiveMask, multi_positive_contrastive
from hpkernels.ops.hidden_positives.bits import pack_bits

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
        (
            (bits(2, 1), N),
            ValueError,
            r"`bits` must be an int32 tensor of shape \(70, 3\), got int32 of shape \(2, 1\)",
        ),
        ((bits(words=1), N), ValueError, r"`bits` must be an int32 tensor of shape \(70, 3\)"),
        ((bits(dtype=torch.int64), N), TypeError, "`bits` must be an int32 tensor .* got int64"),
        ((bits(dtype=torch.float32), N), TypeError, "`bits` must be an int32 tensor .* got float32"),
        ((None, N), TypeError, "`bits` must be an int32 tensor .* got NoneType"),
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
    with pytest.raises(ValueError, match=r"`positives.bits` must be an int32 tensor of shape \(70, 3\)"):
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
