from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import hpkernels
from hpkernels import apply_local_propagation, backends, local_propagation, local_propagation_weights
from hpkernels.testing import assert_rows_close, available_cases, helpful_error, memory_layouts, unchanged

OP = "local_propagation"
CASES = available_cases(OP, (torch.float64, torch.float32, torch.float16, torch.bfloat16))
EXACT_CASES = available_cases(OP, (torch.float64,))
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def values_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(case, batch=2, dim=3, height=4, width=5, heads=2, head_dim=6, prefix=1, sharpness=2.0, seed=0):
    """code (B, D, H, W), query and key (B, heads, prefix + H*W, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, dim, height, width), *((batch, heads, prefix + height * width, head_dim),) * 2)
    code, query, key = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(value.to(case.device, case.dtype) for value in (code, sharpness * query, key))


def attention(query, key, dtype, sigma=28.0, quantiles=(0.1, 0.9), prefix=1):
    """T of each image before and after its small entries are dropped: two (B, G, G) arrays of precision `dtype`."""
    query, key = (value.detach().cpu().double().numpy().astype(dtype)[:, :, prefix:] for value in (query, key))
    images, heads, patches, head_dim = query.shape
    before = np.zeros((images, patches, patches), dtype)
    for b in range(images):
        for i in range(patches):
            per_head = [key[b, h] @ query[b, h, i] / dtype(math.sqrt(head_dim)) for h in range(heads)]
            row = np.mean(per_head, axis=0, dtype=dtype)
            row = np.clip(row, *(np.quantile(row, quantile) for quantile in quantiles))
            row = np.exp(row - row.max())
            before[b, i] = sigma * row / row.sum()
    after = np.where(before < before.mean(axis=2, keepdims=True), dtype(0), before)
    return before, after


def window_weights(after, height, width, window=3):
    """T_ij / c_i by walking the window of each patch: (B, window², H, W)."""
    offsets = [divmod(cell, window) for cell in range(window * window)]
    offsets = [(row - window // 2, column - window // 2) for row, column in offsets]
    weights = np.zeros((len(after), window * window, height, width), after.dtype)
    for y in range(height):
        for x in range(width):
            cells = [
                (cell, (y + dy) * width + x + dx)
                for cell, (dy, dx) in enumerate(offsets)
                if 0 <= y + dy < height and 0 <= x + dx < width
            ]
            for cell, j in cells:
                weights[:, cell, y, x] = after[:, y * width + x, j] / after.dtype.type(len(cells))
    return torch.from_numpy(weights)


def neighbour_sum(code, weights):
    """mixed_i = sum over the window of weights_ij code_j, patch by patch; and its transpose for the gradient."""
    window = math.isqrt(weights.shape[1])
    height, width = code.shape[2:]
    mixed, transposed = torch.zeros_like(code), torch.zeros_like(code)
    for y in range(height):
        for x in range(width):
            for cell in range(window * window):
                v, u = y + cell // window - window // 2, x + cell % window - window // 2
                if 0 <= v < height and 0 <= u < width:
                    weight = weights[:, cell, y, x][:, None]
                    mixed[:, :, y, x] += weight * code[:, :, v, u]
                    transposed[:, :, v, u] += weight * code[:, :, y, x]
    return mixed, transposed


def as_rows(values):
    """(B, C, H, W) with one row for each patch."""
    return values.movedim(1, -1).flatten(0, 2)


def run_with_gradient(code, query, key, cotangent, **options):
    code = code.detach().requires_grad_()
    mixed = local_propagation(code, query, key, **options)
    return mixed.detach(), torch.autograd.grad(mixed, code, cotangent)[0]


@each_case
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    prefix=st.integers(0, 5),
    window=st.sampled_from([1, 3, 5]),
    quantiles=st.sampled_from([(0.1, 0.9), (0.0, 1.0), (0.25, 0.3)]),
    seed=st.integers(0, 9),
)
@example(4, 5, 2, 6, 1, 3, (0.1, 0.9), 0)
@example(1, 1, 1, 1, 0, 3, (0.1, 0.9), 0)
@example(1, 9, 1, 4, 1, 5, (0.1, 0.9), 0)
@example(3, 11, 2, 5, 4, 3, (0.0, 0.9), 0)
def test_matches_reference(case, height, width, heads, head_dim, prefix, window, quantiles, seed):
    code, query, key = inputs(case, 2, 3, height, width, heads, head_dim, prefix, seed=seed)
    options = {"quantiles": quantiles, "prefix_tokens": prefix, "sigma": 20.0}
    weights = local_propagation_weights(query, key, (height, width), **options, window=window, backend=case.backend)
    mixed = local_propagation(code, query, key, **options, window=window, backend=case.backend)
    assert weights.dtype == values_dtype(case.dtype) and weights.shape == (2, window * window, height, width)
    assert mixed.dtype == case.dtype and mixed.device == code.device

    np_dtype = np.float64 if case.dtype == torch.float64 else np.float32
    before, after = attention(query, key, np.float64, 20.0, quantiles, prefix)
    _, plain_after = attention(query, key, np_dtype, 20.0, quantiles, prefix)
    expected, plain = (window_weights(values, height, width, window) for values in (after, plain_after))
    # Rounding decides about entries at the row's mean: leave out the patches whose window has one.
    mean = before.mean(axis=2, keepdims=True)
    near = window_weights((np.abs(before - mean) < 1e-5 * mean).astype(np.float64), height, width, window)
    decided = as_rows(near).sum(dim=1) == 0 if height * width > 1 else slice(None)
    assert near.count_nonzero() <= 0.01 * near.numel() or height * width == 1
    assert_rows_close(as_rows(weights.cpu())[decided], as_rows(expected)[decided], as_rows(plain)[decided])

    exact, _ = neighbour_sum(code.cpu().double(), weights.cpu().double())
    plain, _ = neighbour_sum(code.cpu().to(values_dtype(case.dtype)), weights.cpu())
    assert_rows_close(as_rows(mixed), as_rows(exact), as_rows(plain.to(case.dtype)))


@pytest.mark.parametrize("name", ["lhp_small", "lhp_sharp", "lhp_14"])
@pytest.mark.parametrize("case", available_cases(OP, (torch.float64, torch.float32)), ids=str)
def test_golden(case, name, golden):
    data = golden(name)
    code, query, key, cotangent = (
        value.to(case.device, case.dtype) for value in (data.code, data.query, data.key, data.cotangent)
    )
    options = {"sigma": data.meta["sigma"], "quantiles": tuple(data.meta["quantiles"])}
    mixed, grad = run_with_gradient(code, query, key, cotangent, **options, backend=case.backend)
    for actual, expected in ((mixed, data.mixed), (grad, data.grad_code)):
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=1e-5)


@each_case
@pytest.mark.parametrize("window", [1, 3, 5])
def test_gradients(case, window):
    code, query, key = inputs(case)
    cotangent = torch.randn(code.shape, generator=torch.Generator().manual_seed(3)).to(code)
    options = {"window": window, "backend": case.backend}
    _, grad = run_with_gradient(code, query, key, cotangent, **options)
    weights = local_propagation_weights(query, key, (4, 5), **options).cpu()
    assert not weights.requires_grad
    _, exact = neighbour_sum(cotangent.cpu().double(), weights.double())
    _, plain = neighbour_sum(cotangent.cpu().to(values_dtype(case.dtype)), weights)
    assert grad.dtype == case.dtype
    assert_rows_close(as_rows(grad), as_rows(exact), as_rows(plain.to(case.dtype)))


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_gradcheck(case):
    code, query, key = inputs(case, batch=1, dim=2, height=3, width=4)
    code.requires_grad_()
    for window in (1, 3):
        run = partial(local_propagation, query=query, key=key, window=window, backend=case.backend)
        assert torch.autograd.gradcheck(run, code)


@each_case
def test_opcheck(case):
    code, query, key = inputs(case)
    ops = torch.ops.hpkernels
    torch.library.opcheck(ops.local_propagation_weights.default, (query, key, 4, 5, 28.0, 0.1, 0.9, 3, 1, case.backend))
    weights = local_propagation_weights(query, key, (4, 5), backend=case.backend)
    for leaf in (code, code.clone().requires_grad_()):
        torch.library.opcheck(ops.apply_local_propagation.default, (leaf, weights, case.backend))
    torch.library.opcheck(ops.apply_local_propagation_backward.default, (code, weights, case.backend))


@pytest.mark.parametrize("layout", ["reversed", "strided", "offset"])
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_layouts(case, layout):
    code, query, key = inputs(case)
    cotangent = torch.randn(code.shape, generator=torch.Generator().manual_seed(3)).to(code)
    expected = run_with_gradient(code, query, key, cotangent, backend=case.backend)
    weights = local_propagation_weights(query, key, (4, 5), backend=case.backend)
    moved = [memory_layouts(value)[layout] for value in (code, query, key, cotangent)]
    torch.testing.assert_close(run_with_gradient(*moved, backend=case.backend), expected, rtol=1e-12, atol=1e-12)
    mixed = apply_local_propagation(moved[0], memory_layouts(weights)[layout], backend=case.backend)
    torch.testing.assert_close(mixed, expected[0], rtol=1e-12, atol=1e-12)

    # Convolutions give channels-last codes and gradients.
    last_code, last_cotangent = (value.to(memory_format=torch.channels_last) for value in (code, cotangent))
    actual = run_with_gradient(last_code, query, key, last_cotangent, backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    # One image and one head seen many times.
    repeated = local_propagation(
        code[:1].expand(3, -1, -1, -1),
        query[:1, :1].expand(3, 4, -1, -1),
        key[:1, :1].expand(3, 4, -1, -1),
        backend=case.backend,
    )
    once = local_propagation(code[:1], query[:1, :1], key[:1, :1], backend=case.backend)
    torch.testing.assert_close(repeated, once.expand(3, -1, -1, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", available_cases(OP, (torch.float32,)), ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(case, compiler):
    run = partial(local_propagation, backend=case.backend)
    compiled = torch.compile(run, fullgraph=True, backend=compiler)

    def check(**sizes):
        code, query, key = inputs(case, **sizes)
        results = []
        for function in (compiled, run):
            leaf = code.clone().requires_grad_()
            mixed = function(leaf, query, key)
            mixed.square().sum().backward()
            results.append((mixed.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    check(batch=2, height=4, width=5)
    check(batch=3, height=6, width=7)  # compiled again, now for any sizes
    with torch.compiler.set_stance("fail_on_recompile"):
        check(batch=4, height=3, width=8)


def test_cuda_graph(cuda_graph):
    for case in available_cases(OP, (torch.float32, torch.float16)):
        if case.device == "cuda":
            code, query, key = inputs(case)
            call = partial(run_with_gradient, code, query, key, torch.ones_like(code), backend=case.backend)
            cuda_graph(call, code, query)


@each_case
def test_deterministic(case):
    code, query, key = inputs(case, batch=3, dim=8, height=9, width=7)
    first, second = (run_with_gradient(code, query, key, code, backend=case.backend) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@each_case
def test_edge_cases(case):
    # A single patch attends to itself alone: T = sigma.
    code, query, key = inputs(case, height=1, width=1)
    mixed, grad = run_with_gradient(code, query, key, torch.ones_like(code), sigma=2.0, backend=case.backend)
    torch.testing.assert_close(mixed, 2 * code)
    torch.testing.assert_close(grad, torch.full_like(code, 2.0))
    # A window of one cell scales each code by its own weight.
    code, query, key = inputs(case)
    weights = local_propagation_weights(query, key, (4, 5), window=1, backend=case.backend)
    own = local_propagation(code, query, key, window=1, backend=case.backend)
    torch.testing.assert_close(own, (code * weights).to(code.dtype))
    # The window may be larger than the image: cells outside have weight 0 and do not count.
    wide = local_propagation_weights(query, key, (4, 5), window=11, backend=case.backend)
    outside = torch.ones(11, 11, 4, 5, dtype=torch.bool, device=case.device)
    for y in range(4):
        for x in range(5):
            outside[5 - y : 9 - y, 5 - x : 10 - x, y, x] = False
    assert not wide[:, outside.flatten(0, 1)].any()
    assert wide.count_nonzero() > 0
    # Sigma scales everything; prefix tokens have no influence.
    scaled = local_propagation_weights(query, key, (4, 5), sigma=14.0, backend=case.backend)
    torch.testing.assert_close(2 * scaled, local_propagation_weights(query, key, (4, 5), backend=case.backend))
    patches = (query[:, :, 1:], key[:, :, 1:])
    alone = local_propagation_weights(*patches, (4, 5), prefix_tokens=0, sigma=14.0, backend=case.backend)
    assert torch.equal(alone, scaled)
    # Logits far outside the range of exp.
    mixed, grad = run_with_gradient(code, 100 * query, 10 * key, code, backend=case.backend)
    assert mixed.isfinite().all() and grad.isfinite().all() and mixed.any()
    # Nothing flows where the weights are 0.
    nothing = apply_local_propagation(code, torch.zeros_like(weights).expand(-1, 9, -1, -1), backend=case.backend)
    assert not nothing.any()


CODE, TOKENS, WEIGHTS = torch.ones(2, 3, 4, 5), torch.ones(2, 2, 21, 6), torch.ones(2, 9, 4, 5)


def attention_errors():
    """Bad values of the arguments that `local_propagation` and `local_propagation_weights` share."""
    nan = torch.full_like(TOKENS, math.nan)
    table = {
        "query": [
            (TypeError, None, "NoneType"),
            (TypeError, TOKENS.long(), "int64"),
            (ValueError, TOKENS[0], "shape (2, 21, 6)"),
            (ValueError, TOKENS[None], "shape (1, 2, 2, 21, 6)"),
            (ValueError, TOKENS[:, :, 1:], "shape (2, 2, 20, 6)"),
            (ValueError, TOKENS[:, :0], "shape (2, 0, 21, 6)"),
            (ValueError, TOKENS[..., :0], "shape (2, 2, 21, 0)"),
            (ValueError, TOKENS[:0], "shape (0, 2, 21, 6)"),
            (ValueError, nan, "nan in row 0"),
            (ValueError, TOKENS.clone().requires_grad_(), "requires_grad=True"),
        ],
        "key": [
            (TypeError, [1], "list"),
            (TypeError, TOKENS.bool(), "bool"),
            (TypeError, TOKENS.half(), "float16"),
            (ValueError, TOKENS[:1], "shape (1, 2, 21, 6)"),
            (ValueError, TOKENS[:, :1], "shape (2, 1, 21, 6)"),
            (ValueError, TOKENS[..., :5], "shape (2, 2, 21, 5)"),
            (ValueError, TOKENS[0], "shape (2, 21, 6)"),
            (ValueError, TOKENS.to("meta"), "meta"),
            (ValueError, nan, "nan in row 0"),
            (ValueError, TOKENS / 0, "inf in row 0"),
            (ValueError, TOKENS.clone().requires_grad_(), "requires_grad=True"),
        ],
        "sigma": [
            (ValueError, 0, "0"),
            (ValueError, -28.0, "-28.0"),
            (ValueError, math.nan, "nan"),
            (ValueError, math.inf, "inf"),
            (ValueError, 1e39, "1e+39"),  # infinite in float32
            (TypeError, True, "bool True"),
            (TypeError, None, "NoneType None"),
        ],
        "quantiles": [
            (TypeError, 0.1, "0.1"),
            (TypeError, (0.1,), "(0.1,)"),
            (TypeError, (0.1, 0.5, 0.9), "(0.1, 0.5, 0.9)"),
            (TypeError, ("a", "b"), "str 'a'"),
            (TypeError, (False, True), "bool False"),
            (ValueError, (-0.1, 0.9), "-0.1"),
            (ValueError, (0.1, 1.1), "1.1"),
            (ValueError, (0.1, math.nan), "nan"),
            (ValueError, (0.9, 0.1), "(0.9, 0.1)"),
        ],
        "window": [
            (ValueError, 2, "2"),
            (ValueError, 0, "0"),
            (ValueError, -3, "-3"),
            (TypeError, 3.0, "float 3.0"),
            (TypeError, True, "bool True"),
            (TypeError, None, "NoneType None"),
        ],
        "prefix_tokens": [
            (ValueError, -1, "-1"),
            (TypeError, 1.0, "float 1.0"),
            (TypeError, True, "bool True"),
            (TypeError, None, "NoneType None"),
        ],
        "backend": [(ValueError, "gpu", "'gpu'"), (ValueError, None, "None")],
    }
    return [
        pytest.param(function, error, name, got, {name: value}, id=f"{function.__name__}-{name}-{got}")
        for function in (local_propagation, local_propagation_weights)
        for name, rows in table.items()
        for error, value, got in rows
    ]


def own_errors():
    """Bad values of the arguments that only one or two of the functions have."""
    nan_code = CODE.clone()
    nan_code[1, 0, 0, 0] = math.nan
    table = {
        (local_propagation, apply_local_propagation): [
            ("code", TypeError, None, "NoneType"),
            ("code", TypeError, CODE.long(), "int64"),
            ("code", ValueError, CODE[0], "shape (3, 4, 5)"),
            ("code", ValueError, CODE[:, :0], "shape (2, 0, 4, 5)"),
            ("code", ValueError, CODE[:, :, :0], "shape (2, 3, 0, 5)"),
            ("code", ValueError, nan_code, "nan in row 1"),
        ],
        (local_propagation,): [
            ("query", ValueError, TOKENS[:1], "shape (1, 2, 21, 6)"),
            ("query", ValueError, TOKENS.to("meta"), "meta"),
        ],
        (local_propagation_weights,): [
            ("grid", TypeError, 4, "4"),
            ("grid", TypeError, (4, 5, 1), "(4, 5, 1)"),
            ("grid", TypeError, None, "None"),
            ("grid", ValueError, (0, 5), "0"),
            ("grid", TypeError, (4.0, 5), "float 4.0"),
        ],
        (apply_local_propagation,): [
            ("weights", TypeError, None, "NoneType"),
            ("weights", TypeError, WEIGHTS.bool(), "bool"),
            ("weights", ValueError, WEIGHTS[0], "shape (9, 4, 5)"),
            ("weights", ValueError, WEIGHTS[:1], "shape (1, 9, 4, 5)"),
            ("weights", ValueError, WEIGHTS[:, :, :3], "shape (2, 9, 3, 5)"),
            ("weights", ValueError, WEIGHTS[..., :4], "shape (2, 9, 4, 4)"),
            ("weights", ValueError, WEIGHTS[:, :8], "8"),
            ("weights", ValueError, WEIGHTS[:, :4], "4"),
            ("weights", ValueError, WEIGHTS[:, :0], "0"),
            ("weights", ValueError, WEIGHTS.to("meta"), "meta"),
            ("weights", ValueError, WEIGHTS * math.nan, "nan in row 0"),
            ("weights", ValueError, WEIGHTS.clone().requires_grad_(), "requires_grad=True"),
            ("backend", ValueError, "gpu", "'gpu'"),
        ],
    }
    return [
        pytest.param(function, error, name, got, {name: value}, id=f"{function.__name__}-{name}-{got}")
        for functions, rows in table.items()
        for function in functions
        for name, error, value, got in rows
    ]


VALID = {
    local_propagation: {"code": CODE, "query": TOKENS, "key": TOKENS},
    local_propagation_weights: {"query": TOKENS, "key": TOKENS, "grid": (4, 5)},
    apply_local_propagation: {"code": CODE, "weights": WEIGHTS},
}


@pytest.mark.parametrize(("function", "error", "argument", "got", "options"), attention_errors() + own_errors())
def test_errors(function, error, argument, got, options):
    with helpful_error(error, function.__name__, argument, got):
        function(**{**VALID[function], **options})


@each_case
def test_inputs_untouched(case):
    code, query, key = inputs(case)
    weights = local_propagation_weights(query, key, (4, 5), backend=case.backend)
    with unchanged(code, query, key, weights):
        run_with_gradient(code, query, key, code, backend=case.backend)
        apply_local_propagation(code, weights, backend=case.backend)


@each_case
def test_autocast(case):
    code, query, key = inputs(case, head_dim=32)
    expected = run_with_gradient(code, query, key, code, backend=case.backend)
    with torch.autocast(case.device, torch.bfloat16):
        actual = run_with_gradient(code, query, key, code, backend=case.backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_unavailable_backend(function):
    arguments = {
        name: value.double() if isinstance(value, torch.Tensor) else value for name, value in VALID[function].items()
    }
    with pytest.raises(
        hpkernels.BackendUnavailableError, match=rf"^{function.__name__}: backend 'cuda' is not available: \w+"
    ):
        function(**arguments, backend="cuda")


@pytest.mark.parametrize("function", [local_propagation, local_propagation_weights], ids=lambda f: f.__name__)
def test_grid_that_does_not_fit_the_tokens(function):
    """The message asks for as many tokens as the grid and the prefix make."""
    valid = dict(VALID[function])
    valid["code" if "code" in valid else "grid"] = torch.ones(2, 3, 5, 5) if "code" in valid else (5, 5)
    with helpful_error(ValueError, function.__name__, "query", "shape (2, 2, 21, 6)"):
        function(**valid)
    with pytest.raises(ValueError, match=r"\(B, heads, 26, d\)|\(2, heads, 26, d\)"):
        function(**valid)


@each_case
def test_second_differentiation(case):
    code, query, key = inputs(case)
    code.requires_grad_()
    total = local_propagation(code, query, key, backend=case.backend).square().sum()
    (grad,) = torch.autograd.grad(total, code, create_graph=True)
    with pytest.raises(RuntimeError, match=r"local_propagation: double backward is not supported"):
        grad.sum().backward()
    for retain_graph in (True, False):
        code.grad = None
        total.backward(retain_graph=retain_graph)
        torch.testing.assert_close(code.grad, grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@each_case
def test_weights_can_be_kept(case):
    code, query, key = inputs(case)
    weights = local_propagation_weights(query, key, (4, 5), backend=case.backend)
    expected = local_propagation(code, query, key, backend=case.backend)
    assert torch.equal(apply_local_propagation(code, weights, backend=case.backend), expected)
    # A cache of half precision is a valid input for codes of any precision.
    half = weights.to(torch.float16)
    mixed = apply_local_propagation(code, half, backend=case.backend)
    exact, _ = neighbour_sum(code.cpu().double(), half.cpu().double())
    plain, _ = neighbour_sum(code.cpu().to(values_dtype(case.dtype)), half.cpu().to(values_dtype(case.dtype)))
    assert mixed.dtype == case.dtype
    assert_rows_close(as_rows(mixed), as_rows(exact), as_rows(plain.to(case.dtype)))


@each_case
@pytest.mark.parametrize("patches", [(2, 3), (4, 5), (7, 7), (5, 11), (14, 14)], ids=str)
def test_uniform_attention_is_kept(case, patches):
    """A row of equal entries has none below its mean: T = sigma / G in the whole window, not 0."""
    height, width = patches
    tokens = torch.ones(1, 1, height * width, 1, dtype=case.dtype, device=case.device)
    weights = local_propagation_weights(tokens, tokens, patches, prefix_tokens=0, backend=case.backend)
    inside = window_weights(np.ones((1, height * width, height * width)), height, width).to(weights)
    torch.testing.assert_close(weights, inside * (28 / (height * width)))


TRITON_CASES = [case for case in CASES if case.backend == "triton"]
GPU_CASES = [case for case in CASES if case.backend in ("cuda", "triton")]


@pytest.mark.parametrize("workspace", [1, 5000, 1 << 20], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_passes(case, workspace, monkeypatch):
    """Weights are the same in however many passes."""
    code, query, key = inputs(case, batch=3, height=5, width=8)
    expected = local_propagation_weights(query, key, (5, 8), backend=case.backend)
    kernels = backends.implementation(OP, "triton")
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", workspace)
    actual = local_propagation_weights(query, key, (5, 8), backend=case.backend)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_nan_shows_in_the_weights(case):
    _, query, key = inputs(case, batch=3)
    query[0, 0, 3, 1] = math.nan
    query[1, 1, 4, 2] = math.inf
    key[2, 1, 5, 0] = math.nan
    options = (4, 5, 28.0, 0.1, 0.9, 3, 1)
    actual, expected = (
        backends.implementation(OP, backend).weights_forward(query, key, *options)
        for backend in (case.backend, "reference")
    )
    assert torch.equal(actual.isnan(), expected.isnan())
    assert [image.isnan().any().item() for image in actual] == [True, True, True]
