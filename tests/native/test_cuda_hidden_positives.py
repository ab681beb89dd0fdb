"""The CUDA kernels of `hidden_positives` across strips, tiles, parts and blocks of features."""

from __future__ import annotations

import pytest
import torch

from hpkernels import backends
from hpkernels.ops import _cuda
from hpkernels.ops._bits import unpack_bits, words_per_row
from hpkernels.ops.hidden_positives import reference
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


@pytest.fixture
def find_between():
    """``find_between(features, keys, threshold, key_threshold, either, first)``: the same between anchors and keys."""
    return backends.implementation(OP, "cuda").between


def check(find, features, threshold):
    for symmetric in (True, False):
        bits = find(features, threshold, symmetric)
        expected = reference.forward(features.cpu().double(), threshold.cpu().double(), symmetric)
        assert torch.equal(bits.cpu(), expected)
        assert torch.equal(find(features, threshold, symmetric), bits)


def check_between(find_between, features, threshold, keys, key_threshold):
    exact = (value.cpu().double() for value in (features, keys, threshold, key_threshold))
    above_rows, above_keys = (
        reference.positives_between(rows, others, limit, of_others) for rows, others, limit, of_others in masked(*exact)
    )
    known = ~(threshold.isnan()[:, None] | key_threshold.isnan()).cpu()
    expected = {False: above_rows & above_keys & known, True: (above_rows | above_keys) & known}
    for either, first in ((False, None), (True, None), (True, 5), (False, len(keys) - 1)):
        bits = find_between(features, keys, threshold, key_threshold, either, first)
        wanted = expected[either].clone()
        if first is not None:
            wanted.diagonal(first).fill_(False)
        padded = torch.nn.functional.pad(wanted, (0, 32 * bits.shape[1] - len(keys)))
        assert torch.equal(unpack_bits(bits.cpu(), padded.shape[1]), padded)


def masked(features, keys, threshold, key_threshold):
    """The arguments of two relations, of each of which one side has no threshold."""
    yield features, keys, threshold, torch.full_like(key_threshold, -torch.inf)
    yield features, keys, torch.full_like(threshold, -torch.inf), key_threshold


# Rows of several blocks of 128 bytes.
LONG = {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("anchors", [128, 129, 301])
def test_strips_and_tiles(find, engine, case, anchors):
    check(find, *whole_numbers(case, anchors, LONG[case.dtype]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("anchors", "keys"), [(1, 1), (130, 256), (63, 300), (257, 129)])
def test_strips_and_tiles_of_keys(find_between, engine, case, anchors, keys):
    dim = LONG[case.dtype]
    check_between(find_between, *whole_numbers(case, anchors, dim), *whole_numbers(case, keys, dim))


def test_parts(find, find_between, one_case):
    check(find, *whole_numbers(one_case, 8 * 128 + 37, 8))  # eight strips of two parts; the last tile is not full
    check_between(find_between, *whole_numbers(one_case, 40, 8), *whole_numbers(one_case, 8 * 128 + 37, 8))


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


@pytest.mark.parametrize(("anchors", "keys"), [(33, 250), (130, 512), (257, 70)])
def test_every_word_between_is_written(one_case, anchors, keys):
    (rows, _), (others, _) = whole_numbers(one_case, anchors, 8), whole_numbers(one_case, keys, 8)
    limits = [rows.new_full((512,), torch.nan, dtype=torch.float32) for _ in range(2)]
    limits[0][:anchors], limits[1][:keys] = -torch.inf, torch.inf
    bits = torch.full((anchors + 1, words_per_row(keys)), -1, dtype=torch.int32, device=rows.device)
    torch.ops.hpkernels_cuda.hidden_positives_between(rows, others, *limits, False, -anchors, bits[:anchors])
    assert not bits[:anchors].any() and (bits[anchors] == -1).all()


@pytest.mark.parametrize("missing", [1, 256])
def test_thresholds_that_are_not_padded(one_case, missing):
    features, _ = whole_numbers(one_case, 300, 8)
    bits = torch.empty(300, 10, dtype=torch.int32, device=features.device)
    threshold = torch.zeros(512 - missing, device=features.device)
    with pytest.raises(RuntimeError, match="must be padded"):
        torch.ops.hpkernels_cuda.hidden_positives(features, threshold, True, bits)
    padded = torch.zeros(512, device=features.device)
    for limits in ((threshold, padded), (padded, threshold)):
        with pytest.raises(RuntimeError, match="must be padded"):
            torch.ops.hpkernels_cuda.hidden_positives_between(features, features, *limits, True, 0, bits)


def test_rows_too_long_for_a_strip_in_shared_memory(find, find_between, one_case):
    check(find, *whole_numbers(one_case, 150, 520))
    check_between(find_between, *whole_numbers(one_case, 50, 520), *whole_numbers(one_case, 150, 520))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_the_square(find, find_between, engine, case):
    """To the bit, where rounding decides: thresholds are products."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 96, generator=generator).to(case.device, case.dtype)
    threshold = backends.implementation("masked_topk", "cuda").forward(features, features, 9)[0][:, 8].contiguous()
    nothing = torch.full_like(threshold, -torch.inf)
    for symmetric in (True, False):
        whole = find(features, threshold, symmetric)
        for rows in (slice(0, 130), slice(130, 161), slice(161, 400)):
            limits = threshold[rows], threshold if symmetric else nothing
            found = find_between(features[rows], features, *limits, symmetric, rows.start)
            assert torch.equal(found, whole[rows])


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
