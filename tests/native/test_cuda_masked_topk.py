"""The CUDA kernels of `masked_topk` across strips, tiles, parts of the pool, passes over it and blocks of features."""

from __future__ import annotations

import pytest
import torch

from hpkernels import backends
from hpkernels.ops import _cuda
from hpkernels.ops.masked_topk import reference
from hpkernels.testing import available_cases

OP = "masked_topk"
CASES = [case for case in available_cases(OP, _cuda.DTYPES) if case.backend == "cuda"]
pytestmark = pytest.mark.skipif(
    not CASES, reason=backends.availability(OP, "cuda", "cuda" if torch.cuda.is_available() else "cpu").reason
)
# One value; some of those that a pass finds; several passes, the last of which finds some, and all.
each_k = pytest.mark.parametrize("k", [1, 5, 40, 128])
# Rows of several blocks of 128 bytes.
LONG = {torch.float16: 300, torch.bfloat16: 72, torch.float32: 140}


@pytest.fixture
def kernels():
    return backends.implementation(OP, "cuda")


def whole_numbers(case, queries, references, dim):
    """Rows whose products are exact, and often equal."""
    generator = torch.Generator().manual_seed(references)
    rows = torch.randint(-2, 3, (queries + references, dim), generator=generator).to(case.device, case.dtype)
    return rows[:queries], rows[queries:]


def restrictions(queries, references, device):
    """A mask and groups that are not contiguous; nothing is left to query 0, and one reference to query 1."""
    generator = torch.Generator().manual_seed(queries)
    mask = torch.rand(2 * references, 3 * queries, generator=generator)[::2, ::3].T < 0.8
    mask[0] = False
    mask[1] = torch.arange(references) == references - 1
    query_group, pool_group = (torch.randint(-1, 6, (2 * count,), generator=generator) for count in mask.shape)
    query_group[2] = -1  # of query 1
    return mask.to(device), query_group.to(device)[::2], pool_group.to(device)[::2]


def check(kernels, query, pool, k, *restricted):
    """Compare with the reference, and a second time with the first, bit by bit; NaN has no index."""
    values, indices = kernels.forward(query, pool, k, *restricted)
    host = [given.cpu() for given in restricted]
    expected, places = reference.forward(query.cpu().double(), pool.cpu().double(), k, *host)
    torch.testing.assert_close(values.cpu().double(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices.cpu(), places.where(expected > -torch.inf, -1))
    again = kernels.forward(query, pool, k, *restricted)
    torch.testing.assert_close(again, (values, indices), rtol=0, atol=0, equal_nan=True)
    return values, indices


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_do_not_depend_on_which_row_is_the_query(kernels, case):
    """So a feature that is in the pool ties with itself in `hidden_positives`, on whichever side it is there."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 128, 96, generator=generator).to(case.device, case.dtype)

    def products(query, pool):
        values, indices = kernels.forward(query, pool, 128)
        return torch.empty_like(values).scatter_(1, indices, values)

    assert torch.equal(products(*rows), products(*rows.flip(0)).T)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strips_and_tiles(kernels, engine, case, k):
    query, pool = whole_numbers(case, 133, 301, LONG[case.dtype])
    check(kernels, query, pool, k, *restrictions(133, 301, case.device))


@pytest.mark.parametrize("k", [1, 5, 16, 17])
@pytest.mark.parametrize("parts", [1, 3, 5])
def test_parts(kernels, one_case, parts, k, monkeypatch):
    monkeypatch.setattr(kernels, "_parts", lambda queries, references: parts)
    query, pool = whole_numbers(one_case, 70, 512 + 9, 8)  # in parts of one to five tiles
    check(kernels, query, pool, k, *restrictions(70, 512 + 9, one_case.device))


@each_k
def test_few_queries_and_many_references(kernels, one_case, k):
    query, pool = whole_numbers(one_case, 5, 1101, 8)
    assert kernels._parts(5, 1101) > 1
    check(kernels, query, pool, k)


@pytest.mark.parametrize("k", [1, 5])
def test_rows_too_long_for_a_strip_in_shared_memory(kernels, one_case, k):
    check(kernels, *whole_numbers(one_case, 3, 150, 520), k)


@each_k
def test_ascending_values(kernels, one_case, k):
    """Each product is greater than all before: those of even queries, that is."""
    references = torch.arange(601, device=one_case.device)
    pool = torch.stack([references % 32, references // 32], dim=1).to(one_case.dtype)
    query = torch.tensor([[1, 32], [-1, -32]] * 35, dtype=pool.dtype, device=pool.device)
    _, indices = check(kernels, query, pool, k)
    assert torch.equal(indices[:2], torch.stack([references.flip(0)[:k], references[:k]]))


@each_k
def test_ties_go_to_the_lowest_index(kernels, one_case, k):
    """All products are negative: less than 0, which is that of what lies beyond the last reference."""
    pool = torch.ones(601, 8, dtype=one_case.dtype, device=one_case.device)
    _, indices = check(kernels, -pool[:3], pool, k)
    assert torch.equal(indices, torch.arange(k, device=pool.device).expand(3, k))


@pytest.mark.parametrize("layout", ["row for all", "column for all", "every second"])
@pytest.mark.parametrize("k", [1, 3])
def test_layouts_of_the_mask(kernels, one_case, layout, k):
    query, pool = whole_numbers(one_case, 20, 150, 8)
    mask = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = {
        "row for all": mask[:1, :150].expand(20, 150),
        "column for all": mask[:20, :1].expand(20, 150),
        "every second": mask[::2, ::2],
    }[layout]
    check(kernels, query, pool, k, mask.to(pool.device))


@each_k
def test_infinity(kernels, one_case, k):
    """A product of -inf is no choice; one of inf is the greatest after NaN."""
    query, pool = whole_numbers(one_case, 3, 300, 8)
    query[:, 0], pool[:, 0] = 1, 0
    pool[::2, 0] = -torch.inf
    pool[[133, 150], 0] = torch.inf
    pool[131, 0] = torch.nan
    mask = torch.ones(3, 300, dtype=torch.bool, device=pool.device)
    mask[2, 131] = False
    values, indices = check(kernels, query, pool, k, mask)
    assert values[0, 0].isnan() and (values[2, 0], indices[2, 0]) == (torch.inf, 133)


@each_k
def test_nan(kernels, one_case, k):
    query, pool = whole_numbers(one_case, 5, 601, 8)
    query[3, 2] = torch.nan
    values, _ = check(kernels, query, pool, k)
    assert values[3].isnan().all() and not values[:3].isnan().any()
    pool[[7, 400], 5] = torch.nan
    values, _ = check(kernels, query, pool, k)
    assert torch.equal(values[0].isnan().cpu(), torch.arange(k) < 2)


# References that are named so often that two blocks share each, and some that no query names; features that take one
# round of a warp and several, whole chunks of 16 bytes or not.
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("references", "dim"), [(2, 140), (40, 24), (3, 301)])
def test_backward(kernels, case, references, dim):
    query, pool = whole_numbers(case, 600, references, dim)
    _, indices = kernels.forward(query, pool, 2)
    indices[::7, 1] = -1
    generator = torch.Generator().manual_seed(0)
    grad_values = torch.randint(-3, 4, indices.shape, generator=generator).float().to(case.device)
    host = (given.cpu() for given in (grad_values, indices, query.float(), pool.float()))
    for grad, expected in zip(
        kernels.backward(grad_values, indices, query, pool), reference.backward(*host), strict=True
    ):
        assert torch.equal(grad.cpu(), expected.to(case.dtype))
