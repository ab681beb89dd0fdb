"""The CUDA kernel of `hidden_positives` across strips, tiles, parts and blocks of features."""

from __future__ import annotations

import pytest
import torch

from hpkernels import backends
from hpkernels.ops import _cuda
from hpkernels.ops.hidden_positives import reference
from hpkernels.ops.hidden_positives.bits import unpack_bits, words_per_row
from hpkernels.testing import available_cases

OP = "hidden_positives"
CASES = [case for case in available_cases(OP, _cuda.DTYPES) if case.backend == "cuda"]
pytestmark = pytest.mark.skipif(
    not CASES, reason=backends.availability(OP, "cuda", "cuda" if torch.cuda.is_available() else "cpu").reason
)
GIBIBYTE = 2**30


@pytest.fixture
def find():
    """``find(features, threshold)``: the words of the CUDA kernel. Unlike the op it takes any threshold."""
    return backends.implementation(OP, "cuda").forward


def whole_numbers(case, anchors, dim):
    """Features whose products are exact, and thresholds, many equal to a product, some that are no number."""
    generator = torch.Generator().manual_seed(anchors)
    features = torch.randint(-2, 3, (anchors, dim), generator=generator)
    threshold = torch.randint(0, 4 * dim, (anchors,), generator=generator).float()
    threshold[4::9], threshold[3::31], threshold[5::23] = torch.inf, -torch.inf, torch.nan
    return features.to(case.device, case.dtype), threshold.to(case.device)


def check(find, features, threshold):
    for symmetric in (True, False):
        bits = find(features, threshold, symmetric)
        expected = reference.forward(features.cpu().double(), threshold.cpu().double(), symmetric)
        assert torch.equal(bits.cpu(), expected)
        assert torch.equal(find(features, threshold, symmetric), bits)


# Rows of several blocks of 128 bytes.
LONG = {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("anchors", [128, 129, 301])
def test_strips_and_tiles(find, engine, case, anchors):
    check(find, *whole_numbers(case, anchors, LONG[case.dtype]))


def test_parts(find, one_case):
    check(find, *whole_numbers(one_case, 8 * 128 + 37, 8))  # eight strips of two parts; the last tile is not full


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("anchors", [33, 250, 512, 700])
def test_every_word_is_written(find, one_case, anchors, symmetric):
    """Words that are written one by one, in twos and in fours, from a tile on the diagonal and from others."""
    features, _ = whole_numbers(one_case, anchors, 8)
    threshold = features.new_full((-(-anchors // 256) * 256,), torch.nan, dtype=torch.float32)
    threshold[:anchors] = torch.inf
    bits = torch.full((anchors + 1, words_per_row(anchors)), -1, dtype=torch.int32, device=features.device)
    torch.ops.hpkernels_cuda.hidden_positives(features, threshold, symmetric, bits[:anchors])
    assert not bits[:anchors].any() and (bits[anchors] == -1).all()


@pytest.mark.parametrize("missing", [1, 256])
def test_thresholds_that_are_not_padded(one_case, missing):
    features, _ = whole_numbers(one_case, 300, 8)
    bits = torch.empty(300, 10, dtype=torch.int32, device=features.device)
    threshold = torch.zeros(512 - missing, device=features.device)
    with pytest.raises(RuntimeError, match="must be padded"):
        torch.ops.hpkernels_cuda.hidden_positives(features, threshold, True, bits)


def test_rows_too_long_for_a_strip_in_shared_memory(find, one_case):
    check(find, *whole_numbers(one_case, 150, 520))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_products_are_those_of_masked_topk(find, engine, case, k):
    """To the bit: no anchor is nearer to one of the pool than its nearest is, and each is if that were a bit less."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 96, generator=generator).to(case.device, case.dtype)
    in_pool, others = features[:170], features[170:]
    nearest = backends.implementation("masked_topk", "cuda").forward(others, in_pool, k)[0][:, 0]
    threshold = torch.cat([nearest.new_full((170,), torch.inf), nearest])
    found = unpack_bits(find(features, threshold).cpu(), 300)
    assert not found[170:, :170].any()
    lower = torch.cat([threshold[:170], torch.nextafter(nearest, nearest.new_tensor(-torch.inf))])
    assert unpack_bits(find(features, lower).cpu(), 300)[170:, :170].any(dim=1).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limit", [torch.inf, -torch.inf, torch.nan])
def test_the_same_threshold_everywhere(find, one_case, limit, symmetric):
    features, _ = whole_numbers(one_case, 200, 8)
    bits = find(features, torch.full((200,), limit, device=features.device), symmetric)
    found = unpack_bits(bits.cpu(), 224)  # with the bits after the last column
    expected = torch.zeros(200, 224, dtype=torch.bool)
    expected[:, :200] = ~torch.eye(200, dtype=torch.bool) & (limit == -torch.inf)
    assert torch.equal(found, expected)


def test_more_words_than_32_bits_count(find):
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 16 * GIBIBYTE:
        pytest.skip("needs a CUDA device with 16 GiB of free memory")
    anchors = 2**18 + 64
    features = torch.ones(anchors, 8, dtype=torch.float16, device="cuda")
    threshold = torch.full((anchors,), torch.inf, device="cuda")
    similar = [0, 5, anchors - 2]  # to all, and no others are to one another
    threshold[similar] = 7
    bits = find(features, threshold)
    assert bits.numel() > 2**31
    rows = [0, 1, 5, anchors // 2, anchors - 3, anchors - 2, anchors - 1]
    expected = torch.zeros(len(rows), anchors, dtype=torch.bool, device="cuda")
    expected[:, similar] = True
    for place, row in enumerate(rows):
        expected[place] |= row in similar
        expected[place, row] = False
    assert torch.equal(unpack_bits(bits[rows], anchors), expected)
