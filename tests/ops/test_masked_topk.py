from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import hpkernels
from hpkernels import masked_topk
from hpkernels.ops import _triton
from hpkernels.testing import (
    assert_rows_close,
    available_cases,
    helpful_error,
    memory_layouts,
    random_problem,
    unchanged,
)

OP = "masked_topk"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
GOLDENS = ("allneg", "medium", "noreweight", "small", "warmup")
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def oracle(query, pool, k, mask=None, query_group=None, pool_group=None):
    """values and indices by sorting, query by query, in the dtype of the inputs."""
    values = torch.full((len(query), k), -math.inf, dtype=query.dtype)
    indices = torch.full((len(query), k), -1)
    for i in range(len(query)):
        products = [(float(query[i] @ pool[m]), m) for m in range(len(pool))]
        if mask is not None:
            products = [(value, m) for value, m in products if mask[i, m]]
        if query_group is not None:
            own = int(query_group[i])
            products = [(value, m) for value, m in products if own < 0 or own != int(pool_group[m])]
        for t, (value, m) in enumerate(sorted(products, key=lambda pair: (-pair[0], pair[1]))[:k]):
            values[i, t], indices[i, t] = value, m
    return values, indices


def inputs(queries=7, references=9, dim=5, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dim, generator=generator, dtype=torch.float64)
    pool = torch.randn(references, dim, generator=generator, dtype=torch.float64)
    return query.to(device, dtype), pool.to(device, dtype)


def restrictions(queries, references, seed=0, device="cpu"):
    """A mask that leaves query 0 nothing and query 1 one reference, and groups some of which are negative."""
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(queries, references, generator=generator) < 0.7
    mask[0] = False
    mask[1:2] = torch.arange(references) == references - 1
    query_group = torch.randint(-1, 3, (queries,), generator=generator)
    query_group[1:2] = -1
    pool_group = torch.randint(-1, 3, (references,), generator=generator)
    return {
        "mask": mask.to(device),
        "query_group": query_group.to(device),
        "pool_group": pool_group.to(device),
    }


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_with_gradients(query, pool, k, cotangent, **options):
    query, pool = query.detach().requires_grad_(), pool.detach().requires_grad_()
    values, indices = masked_topk(query, pool, k, **options)
    return values.detach(), indices, *torch.autograd.grad(values, (query, pool), cotangent)


@each_case
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "restricted"])
@given(
    queries=st.integers(1, 40),
    references=st.integers(1, 70),
    dim=st.integers(1, 33),
    k=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@example(queries=1, references=1, dim=1, k=1, seed=0)
@example(queries=33, references=65, dim=31, k=1, seed=0)
@example(queries=5, references=64, dim=7, k=64, seed=0)
def test_matches_reference(case, restricted, queries, references, dim, k, seed):
    k = min(k, references) if k < 64 else references
    query, pool = inputs(queries, references, dim, seed, case.dtype, case.device)
    options = restrictions(queries, references, seed, case.device) if restricted else {}
    values, indices = masked_topk(query, pool, k, **options, backend=case.backend)

    host = {name: value.cpu() for name, value in options.items()}
    exact_values, exact_indices = oracle(query.cpu().double(), pool.cpu().double(), k, **host)
    accumulate = values_dtype(case.dtype)
    plain_values, _ = oracle(query.cpu().to(accumulate), pool.cpu().to(accumulate), k, **host)
    assert values.dtype == accumulate and indices.dtype == torch.int64
    assert values.device == indices.device == query.device
    assert_rows_close(values, exact_values, plain_values)
    # Rounding may order near ties differently, but then the references chosen are as good as the exact ones.
    indices = indices.cpu()
    assert torch.equal(indices == -1, exact_indices == -1)
    for row in indices:
        chosen = row[row >= 0].tolist()
        assert len(set(chosen)) == len(chosen)
    products = (query.double() @ pool.double().T).cpu().gather(1, indices.clamp(min=0)).where(indices >= 0, -math.inf)
    assert_rows_close(products, exact_values, plain_values, eps=1e-5 * dim)
    if case.dtype == torch.float64 and dim > 1:
        assert torch.equal(indices, exact_indices)


@pytest.mark.parametrize("name", [*(f"ghp_joint_{name}" for name in GOLDENS), "ghp_separate"])
@pytest.mark.parametrize("case", available_cases(OP, (torch.float64, torch.float32)), ids=str)
def test_golden(case, name, golden):
    data = golden(name)
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    for query, pool, threshold in (
        (data.features, data.pool, data.threshold),
        (data.specific, data.pool_specific, data.threshold_specific),
    ):
        query, pool = query.to(case.device, case.dtype), pool.to(case.device, case.dtype)
        values = masked_topk(query, pool, backend=case.backend).values[:, 0]
        torch.testing.assert_close(values.double().cpu(), threshold, rtol=tolerance, atol=0)


@each_case
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "restricted"])
def test_gradients(case, k, restricted):
    query, pool = inputs(37, 6, 9, dtype=case.dtype, device=case.device)  # few references: chosen many times each
    options = restrictions(37, 6, device=case.device) if restricted else {}
    cotangent = torch.randn(37, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    accumulate = values_dtype(case.dtype)
    cotangent = cotangent.to(accumulate)
    _, indices, grad_query, grad_pool = run_with_gradients(
        query, pool, k, cotangent.to(case.device), **options, backend=case.backend
    )

    def expected(dtype):
        rows, references, weights = (value.cpu().to(dtype) for value in (query, pool, cotangent))
        query_sum, pool_sum = torch.zeros_like(rows), torch.zeros_like(references)
        for i in range(len(rows)):
            for t, m in enumerate(indices[i].tolist()):
                if m >= 0:
                    query_sum[i] += weights[i, t] * references[m]
                    pool_sum[m] += weights[i, t] * rows[i]
        return query_sum, pool_sum

    for actual, exact, plain in zip(
        (grad_query, grad_pool), expected(torch.float64), expected(accumulate), strict=True
    ):
        assert actual.dtype == case.dtype
        assert_rows_close(actual, exact, plain.to(case.dtype))


@pytest.mark.parametrize("case", available_cases(OP, (torch.float64,)), ids=str)
def test_gradcheck(case):
    query, pool = (value.requires_grad_() for value in inputs(5, 7, 3, dtype=case.dtype, device=case.device))
    options = restrictions(5, 7, device=case.device)

    def values(query, pool):
        found = masked_topk(query, pool, 3, **options, backend=case.backend).values
        return found.masked_fill(found == -math.inf, 0)

    assert torch.autograd.gradcheck(values, (query, pool))


@each_case
def test_opcheck(case):
    query, pool = inputs(5, 7, 3, dtype=case.dtype, device=case.device)
    groups = restrictions(5, 7, device=case.device).values()
    forward, backward = torch.ops.hpkernels.masked_topk.default, torch.ops.hpkernels.masked_topk_backward.default
    for tensors in ((query, pool), (query.requires_grad_(), pool.requires_grad_())):
        torch.library.opcheck(forward, (*tensors, 2, None, None, None, case.backend))
        torch.library.opcheck(forward, (*tensors, 2, *groups, case.backend))
    query, pool = query.detach(), pool.detach()
    values, indices = masked_topk(query, pool, 2, backend=case.backend)
    torch.library.opcheck(backward, (torch.ones_like(values), indices, query, pool, case.backend))


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@pytest.mark.parametrize("case", available_cases(OP, (torch.float64,)), ids=str)
def test_layouts(case, layout):
    query, pool = inputs(11, 13, 6, dtype=case.dtype, device=case.device)
    options = restrictions(11, 13, device=case.device)
    cotangent = torch.linspace(1, 2, 33, dtype=case.dtype, device=case.device).view(11, 3)
    expected = run_with_gradients(query, pool, 3, cotangent, **options, backend=case.backend)
    moved = {name: memory_layouts(value)[layout] for name, value in options.items()}
    query, pool, cotangent = (memory_layouts(value)[layout] for value in (query, pool, cotangent))
    actual = run_with_gradients(query, pool, 3, cotangent, **moved, backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    row = query[:1].clone().requires_grad_()
    values, _ = masked_topk(row.expand(4, -1), pool[:1].expand(5, -1), 2, backend=case.backend)
    torch.testing.assert_close(values, (query[0] @ pool[0]).expand(4, 2), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(values.sum(), row)
    torch.testing.assert_close(grad, 8 * pool[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(case, compiler):
    def run(query, pool, mask, query_group, pool_group):
        return masked_topk(
            query, pool, 2, mask=mask, query_group=query_group, pool_group=pool_group, backend=case.backend
        )

    compiled = torch.compile(run, fullgraph=True, backend=compiler)

    def check(queries, references):
        query, pool = inputs(queries, references, device=case.device)
        options = restrictions(queries, references, device=case.device).values()
        results = []
        for function in (compiled, run):
            leaf = query.clone().requires_grad_()
            values, indices = function(leaf, pool, *options)
            values[2:].sum().backward()
            results.append((values.detach(), indices, leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    check(6, 8)
    check(9, 14)  # compiled again, now for any sizes
    with torch.compiler.set_stance("fail_on_recompile"):
        check(12, 11)


def test_cuda_graph(cuda_graph):
    for case in available_cases(OP, (torch.float32, torch.float16)):
        if case.device == "cuda":
            query, pool = inputs(40, 70, 16, dtype=case.dtype, device="cuda")
            options = restrictions(40, 70, device="cuda")
            cotangent = torch.ones(40, 3, device="cuda")
            call = partial(run_with_gradients, query, pool, 3, cotangent, **options, backend=case.backend)
            cuda_graph(call, query, pool)


@each_case
def test_deterministic(case):
    query, pool = inputs(64, 3, 16, dtype=case.dtype, device=case.device)
    cotangent = torch.randn(64, 2, device=case.device, generator=torch.Generator(case.device).manual_seed(0))
    cotangent = cotangent.to(values_dtype(case.dtype))
    first, second = (run_with_gradients(query, pool, 2, cotangent, backend=case.backend) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@each_case
def test_edge_cases(case):
    def find(query, pool, k=1, **options):
        query, pool = (torch.tensor(rows, dtype=case.dtype, device=case.device) for rows in (query, pool))
        options = {name: torch.tensor(value, device=case.device) for name, value in options.items()}
        values, indices = masked_topk(query, pool, k, **options, backend=case.backend)
        return values.tolist(), indices.tolist()

    # one query, one reference, one dimension
    assert find([[3.0]], [[-2.0]]) == ([[-6.0]], [[0]])
    # exact ties go to the lowest index, whatever k
    ties = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert find([[1.0, 0.0]], ties) == ([[1.0]], [[1]])
    assert find([[1.0, 0.0]], ties, 4) == ([[1.0, 1.0, 1.0, 0.0]], [[1, 2, 4, 0]])
    # all references tie
    assert find([[0.0, 0.0]], ties, 5) == ([[0.0] * 5], [[0, 1, 2, 3, 4]])
    # fewer than k allowed, and none
    mask = [[False, True, False, True, False], [False] * 5]
    assert find([[1.0, 0.0]] * 2, ties, 3, mask=mask) == (
        [[1.0, 0.0, -math.inf], [-math.inf] * 3],
        [[1, 3, -1], [-1] * 3],
    )
    # an equal group excludes the pair, a negative one nothing
    groups = {"query_group": [4, -1], "pool_group": [0, 4, 0, -1, 4]}
    assert find([[1.0, 0.0]] * 2, ties, 2, **groups) == ([[1.0, 0.0], [1.0, 1.0]], [[2, 0], [1, 2]])
    # mask and groups together
    assert find([[1.0, 0.0]] * 2, ties, 2, mask=mask, **groups) == (
        [[0.0, -math.inf], [-math.inf] * 2],
        [[3, -1], [-1] * 2],
    )


NAN = torch.tensor([[0.0, 1.0, math.nan]]).expand(4, 3)
ONES = torch.ones


@pytest.mark.parametrize(
    ("error", "argument", "got", "options"),
    [
        pytest.param(TypeError, "query", "list", {"query": [[1.0]]}, id="query-list"),
        pytest.param(ValueError, "query", "float32 of shape (3,)", {"query": ONES(3)}, id="query-rank-1"),
        pytest.param(ValueError, "query", "float32 of shape (1, 4, 3)", {"query": ONES(1, 4, 3)}, id="query-rank-3"),
        pytest.param(TypeError, "query", "int64 of shape (4, 3)", {"query": ONES(4, 3).long()}, id="query-int"),
        pytest.param(TypeError, "query", "complex64", {"query": ONES(4, 3) * 1j}, id="query-complex"),
        pytest.param(ValueError, "query", "shape (0, 3)", {"query": ONES(0, 3)}, id="query-empty-N"),
        pytest.param(ValueError, "query", "shape (4, 0)", {"query": ONES(4, 0)}, id="query-empty-D"),
        pytest.param(ValueError, "query", "nan in row 0", {"query": NAN}, id="query-nan"),
        pytest.param(ValueError, "query", "-inf", {"query": ONES(4, 3) * -math.inf}, id="query-inf"),
        pytest.param(
            ValueError,
            "query",
            "one of 1.73e+20",
            {"query": ONES(4, 3) * 1e20},
            id="query-large",
        ),
        pytest.param(TypeError, "query", "a sparse_coo one", {"query": ONES(4, 3).to_sparse()}, id="query-sparse"),
        pytest.param(TypeError, "pool", "NoneType", {"pool": None}, id="pool-none"),
        pytest.param(ValueError, "pool", "shape (3,)", {"pool": ONES(3)}, id="pool-rank-1"),
        pytest.param(ValueError, "pool", "shape (5, 2)", {"pool": ONES(5, 2)}, id="pool-D"),
        pytest.param(ValueError, "pool", "shape (0, 3)", {"pool": ONES(0, 3)}, id="pool-empty"),
        pytest.param(TypeError, "pool", "bool", {"pool": ONES(5, 3).bool()}, id="pool-bool"),
        pytest.param(TypeError, "pool", "float16", {"pool": ONES(5, 3).half()}, id="pool-dtype"),
        pytest.param(ValueError, "pool", "meta", {"pool": ONES(5, 3, device="meta")}, id="pool-device"),
        pytest.param(ValueError, "pool", "nan", {"pool": NAN}, id="pool-nan"),
        pytest.param(ValueError, "k", "0", {"k": 0}, id="k-0"),
        pytest.param(ValueError, "k", "-1", {"k": -1}, id="k-negative"),
        pytest.param(ValueError, "k", "6", {"k": 6}, id="k-above-M"),
        pytest.param(TypeError, "k", "bool True", {"k": True}, id="k-bool"),
        pytest.param(TypeError, "k", "float 2.0", {"k": 2.0}, id="k-float"),
        pytest.param(TypeError, "k", "NoneType None", {"k": None}, id="k-none"),
        pytest.param(TypeError, "k", "Tensor", {"k": torch.tensor(1)}, id="k-tensor"),
        pytest.param(TypeError, "mask", "list", {"mask": [[True]]}, id="mask-list"),
        pytest.param(TypeError, "mask", "uint8 of shape (4, 5)", {"mask": ONES(4, 5).byte()}, id="mask-dtype"),
        pytest.param(ValueError, "mask", "bool of shape (5, 4)", {"mask": ONES(5, 4).bool()}, id="mask-transposed"),
        pytest.param(ValueError, "mask", "bool of shape (5,)", {"mask": ONES(5).bool()}, id="mask-rank"),
        pytest.param(
            ValueError, "mask", "meta", {"mask": ONES(4, 5, dtype=torch.bool, device="meta")}, id="mask-device"
        ),
        pytest.param(ValueError, "pool_group", "None", {"query_group": ONES(4).long()}, id="query-group-alone"),
        pytest.param(ValueError, "query_group", "None", {"pool_group": ONES(5).long()}, id="pool-group-alone"),
        *(
            pytest.param(error, name, got, {**groups, name: wrong}, id=f"{name}-{what}")
            for groups in [{"query_group": ONES(4).long(), "pool_group": ONES(5).long()}]
            for name in groups
            for error, got, wrong, what in [
                (TypeError, "list", [0, 1], "list"),
                (TypeError, "int32", groups[name].int(), "int32"),
                (TypeError, "float32", groups[name].float(), "float"),
                (ValueError, "shape (3,)", ONES(3).long(), "length"),
                (ValueError, "shape (1, 4)", ONES(1, 4).long(), "rank"),
                (ValueError, "meta", groups[name].to("meta"), "device"),
            ]
        ),
        pytest.param(ValueError, "backend", "'gpu'", {"backend": "gpu"}, id="backend-unknown"),
        pytest.param(ValueError, "backend", "None", {"backend": None}, id="backend-none"),
    ],
)
def test_errors(error, argument, got, options):
    with helpful_error(error, OP, argument, got):
        masked_topk(**{"query": ONES(4, 3), "pool": ONES(5, 3), **options})


@each_case
def test_inputs_untouched(case):
    query, pool = inputs(12, 9, 4, dtype=case.dtype, device=case.device)
    options = restrictions(12, 9, device=case.device)
    values = masked_topk(query, pool, 2, backend=case.backend).values
    with unchanged(query, pool, *options.values(), values):
        run_with_gradients(query, pool, 2, values, **options, backend=case.backend)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32, torch.bfloat16)), ids=str)
def test_autocast(case):
    query, pool = inputs(12, 9, 24, dtype=case.dtype, device=case.device)
    cotangent = torch.linspace(1, 2, 24, device=case.device).view(12, 2)
    expected = run_with_gradients(query, pool, 2, cotangent, backend=case.backend)
    with torch.autocast(case.device, torch.bfloat16):
        actual = run_with_gradients(query, pool, 2, cotangent, backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_unavailable_backend():
    with pytest.raises(hpkernels.BackendUnavailableError, match=r"^masked_topk: backend 'cuda' is not available: \w+"):
        masked_topk(ONES(4, 3).double(), ONES(5, 3).double(), backend="cuda")


@each_case
def test_second_differentiation(case):
    query, pool = (value.requires_grad_() for value in inputs(dtype=case.dtype, device=case.device))
    total = masked_topk(query, pool, 2, backend=case.backend).values.sum()
    (grad,) = torch.autograd.grad(total, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^masked_topk: double backward is not supported"):
        grad.sum().backward()
    total.backward(retain_graph=True)
    torch.testing.assert_close(query.grad, grad, rtol=0, atol=0)
    query.grad = None
    total.backward()
    torch.testing.assert_close(query.grad, grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@each_case
def test_gradient_to_one_input_only(case):
    query, pool = inputs(dtype=case.dtype, device=case.device)
    cotangent = torch.ones(7, 1, device=case.device, dtype=values_dtype(case.dtype))
    both = run_with_gradients(query, pool, 1, cotangent, backend=case.backend)
    pool.requires_grad_()
    values, indices = masked_topk(query, pool, backend=case.backend)
    assert values.requires_grad and not indices.requires_grad
    values.sum().backward()
    torch.testing.assert_close(pool.grad, both[3], rtol=0, atol=0)


@each_case
def test_nothing_allowed_has_zero_gradient(case):
    query, pool = inputs(3, 4, dtype=case.dtype, device=case.device)
    mask = torch.zeros(3, 4, dtype=torch.bool, device=case.device)
    cotangent = torch.ones(3, 2, device=case.device, dtype=values_dtype(case.dtype))
    _, _, grad_query, grad_pool = run_with_gradients(query, pool, 2, cotangent, mask=mask, backend=case.backend)
    assert not grad_query.any() and not grad_pool.any()


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_no_patch_meets_its_own_image(case):
    problem = random_problem(images=4, height=3, width=3, device=case.device)
    image = torch.arange(36, device=case.device) // 9
    pool, pool_group = problem.features[::9], image[::9]
    options = {"query_group": image, "pool_group": pool_group}
    _, indices = masked_topk(problem.features, pool, 3, **options, backend=case.backend)
    assert (indices >= 0).all()
    assert (pool_group[indices] != image[:, None]).all()


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_nan_shows_where_values_cannot_be_read(case):
    find = torch.compile(partial(masked_topk, backend=case.backend), fullgraph=True, backend="eager")
    query, pool = inputs(device=case.device)
    query[2, 1] = math.nan
    values = find(query, pool).values
    assert values[2].isnan().all() and values[:2].isfinite().all() and values[3:].isfinite().all()


@pytest.mark.parametrize("k", [100, 128, 129])  # what the Triton kernel keeps at most, and more
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "restricted"])
@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_many_values(case, restricted, k, monkeypatch):
    monkeypatch.setattr("hpkernels.ops._blocks.WORKSPACE", 3 * 36 * 140)  # blocks of three rows
    query, pool = (value.mul(4).round().div(4) for value in inputs(7, 140, 5))  # exact products, and so ties
    options = restrictions(7, 140) if restricted else {}
    expected = oracle(query, pool, k, **options)
    query, pool = query.to(case.device), pool.to(case.device)
    options = {name: value.to(case.device) for name, value in options.items()}
    values, indices = masked_topk(query, pool, k, **options, backend=case.backend)
    assert torch.equal(values.cpu(), expected[0]) and torch.equal(indices.cpu(), expected[1])


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
def test_nan_comes_first(case):
    find = torch.compile(partial(masked_topk, backend=case.backend), fullgraph=True, backend="eager")
    query, pool = inputs(5, 40, device=case.device)
    query[2, 1] = math.nan
    values = find(query, pool, 3).values
    assert values[2].isnan().all() and values[[0, 1, 3, 4]].isfinite().all()


def test_products_are_summed_in_the_order_of_discovery():
    pytest.importorskip("triton")
    table = _triton.table()
    discovery = table["hidden_positives_fwd_kernel"]
    kernels = ("masked_topk_top1_fwd_kernel", "masked_topk_fwd_kernel", "hidden_positives_between_fwd_kernel")
    for kernel in kernels:
        for arch, by_size in table[kernel].items():
            for size, entry in by_size.items():
                assert entry["BLOCK_D"] == discovery[arch][size]["BLOCK_D"], (kernel, arch, size)
