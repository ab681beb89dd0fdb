"""The CUDA kernels of `local_propagation`: strips, tiles, passes and rows of any length; all ways of the stencil."""

from __future__ import annotations

import math

import pytest
import torch

from hpkernels import _native
from hpkernels.ops.local_propagation import cuda, reference
from hpkernels.testing import assert_rows_close

DEVICE = "cpu" if _native.EMULATED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(
    not _native.LIBRARIES["_C_cuda"].ok, reason=f"needs the CUDA kernels: {_native.LIBRARIES['_C_cuda'].reason}"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tokens(generator, images, heads, prefix, patches, dim, dtype):
    """query and key (B, heads, prefix + G, d), parts of one matrix as in a ViT."""
    fused = torch.randn(images, prefix + patches, 3, heads, dim, generator=generator)
    return fused.to(DEVICE, dtype).permute(2, 0, 3, 1, 4)[:2]


def as_rows(weights):
    """(B, window², H, W) with one row for each patch."""
    return weights.movedim(1, -1).flatten(0, 2)


def assert_weights_close(actual, query, key, *options):
    """By rows, except those of which rounding decides whether an entry is below the mean."""
    exact, plain = (
        reference.weights_forward(query.to(dtype), key.to(dtype), *options) for dtype in (torch.float64, torch.float32)
    )
    decided = ((actual > 0) == (exact > 0)).all(dim=1).flatten()
    assert decided.count_nonzero() >= 0.99 * decided.numel()
    assert_rows_close(as_rows(actual)[decided], as_rows(exact)[decided], as_rows(plain)[decided])


# A strip that is whole, or several of which one is not; tiles likewise.
@each_dtype
@pytest.mark.parametrize("grid", [(8, 16), (9, 15)], ids=str)
@pytest.mark.parametrize("workspace", [1, 160_000, 32 << 20], ids=lambda size: f"{size} bytes")
def test_passes(dtype, grid, workspace, engine, generator, monkeypatch):
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
    query, key = tokens(generator, 3, 2, 1, math.prod(grid), 24, dtype)
    options = (*grid, 28.0, 0.1, 0.9, 3, 1)
    assert_weights_close(cuda.weights_forward(query, key, *options), query, key, *options)


# A row takes a warp with 25 and 32 numbers a lane.
@pytest.mark.parametrize("grid", [(17, 17), (28, 28), (29, 28)], ids=str)
@pytest.mark.parametrize(("low", "high", "window"), [(0.1, 0.9, 5), (0.0, 1.0, 3)])
def test_rows_of_a_warp(grid, low, high, window, generator):
    query, key = tokens(generator, 1, 1, 0, math.prod(grid), 8, torch.float16)
    options = (*grid, 28.0, low, high, window, 0)
    assert_weights_close(cuda.weights_forward(query, key, *options), query, key, *options)


@pytest.mark.parametrize("infinite", [0.05, 0.2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_infinite_logits(infinite, sign, generator):
    """A few are clamped like any others; as many as make a quantile infinite, and no row can be clamped to that."""
    query, key = (value.abs() + 0.1 for value in tokens(generator, 1, 1, 0, 150, 1, torch.float16))
    key[:, :, : int(infinite * 150)] = sign * torch.inf
    options = (10, 15, 28.0, 0.1, 0.9, 3, 0)
    actual, expected = (module.weights_forward(query, key, *options) for module in (cuda, reference))
    assert expected.isnan().any() == (infinite > 0.1)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def weights_of_last_patches(query, key, first, height, width):
    """(R, 9): T_ij / c_i by its formula for the patches from `first` on, from the (G, d) tokens of one head."""
    logits = query[first:] @ key.T / math.sqrt(query.shape[1])
    ordered = logits.sort(dim=1).values
    clamped = logits.clamp(reference._quantile(ordered, 0.1), reference._quantile(ordered, 0.9))
    attention = clamped.softmax(dim=1) * (height * width)
    attention = attention.masked_fill(attention < 1 - 8 * torch.finfo(query.dtype).eps, 0) * (28 / (height * width))
    weights = query.new_zeros(len(attention), 9)
    for own, row, patch in zip(weights, attention, range(first, height * width), strict=True):
        y, x = divmod(patch, width)
        rows, columns = range(max(y - 1, 0), min(y + 2, height)), range(max(x - 1, 0), min(x + 2, width))
        for v in rows:
            for u in columns:
                own[3 * (v - y + 1) + u - x + 1] = row[v * width + u] / (len(rows) * len(columns))
    return weights


# A row is read again and again by a block; the number of patches is odd.
@pytest.mark.parametrize("grid", [(33, 33), (59, 71)], ids=str)
def test_rows_of_a_block(grid, generator):
    """A single strip, that of the last patches of the first image: the others stay as they were."""
    height, width = grid
    patches = height * width
    strip = (patches - 1) // cuda.STRIP_ROWS
    first = strip * cuda.STRIP_ROWS
    query, key = tokens(generator, 2, 1, 2, patches, 8, torch.float16)
    logits = torch.empty(cuda.STRIP_ROWS, patches + 1, device=DEVICE)
    weights = torch.full((2, 9, height, width), torch.nan, device=DEVICE)
    joined = (cuda._heads_joined(query), cuda._heads_joined(key))
    torch.ops.hpkernels_cuda.local_propagation_weights(
        *joined, 2, strip, strip + 1, 1 / math.sqrt(8), 28.0, 0.1, 0.9, logits, weights
    )
    assert weights[0].flatten(1)[:, :first].isnan().all() and weights[1].isnan().all()
    actual = weights[0].flatten(1)[:, first:].T
    own = query[0, 0, 2:], key[0, 0, 2:]
    exact, plain = (
        weights_of_last_patches(*(value.to(dtype) for value in own), first, height, width)
        for dtype in (torch.float64, torch.float32)
    )
    decided = ((actual > 0) == (exact > 0)).all(dim=1)
    assert decided.count_nonzero() >= 0.95 * decided.numel()
    assert_rows_close(actual[decided], exact[decided], plain[decided])


@each_dtype
def test_tokens_of_any_layout(dtype, generator):
    """The same numbers whether heads are joined in place or copied, start at 16 bytes or not, are padded or not."""
    options = (6, 7, 28.0, 0.1, 0.9, 3, 1)
    for dim in (16, 5):
        fused = tokens(generator, 3, 2, 1, 42, dim, dtype)
        expected = cuda.weights_forward(*fused, *options)
        shifted = [torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape) for value in fused]
        strided = [value.repeat_interleave(2, dim=3)[..., ::2] for value in fused]
        for query, key in ([value.contiguous() for value in fused], shifted, strided):
            assert torch.equal(cuda.weights_forward(query, key, *options), expected)
        one = [value[:1, :1].expand(3, 4, -1, -1) for value in fused]  # an image and a head seen many times
        torch.testing.assert_close(
            cuda.weights_forward(*one, *options),
            cuda.weights_forward(*(value[:1, :1] for value in fused), *options).expand(3, -1, -1, -1),
        )
    query, key = tokens(generator, 3, 2, 1, 42, 16, dtype)
    assert cuda._heads_joined(query).data_ptr() == query.data_ptr()  # what a ViT gives is not copied


# What decides how the stencil goes: the width and the size of an image, the window, and where images start. Parts of
# several stages, of which the last is partial; images of the most runs that a block takes, and of one more.
STENCILS = {
    "whole runs": ((2, 70, 6, 8), 3, 0),
    "rows that are no whole runs": ((3, 40, 4, 6), 3, 0),
    "single column": ((1, 9, 9, 1), 3, 0),
    "most runs": ((1, 3, 16, 112), 3, 0),
    "more runs": ((1, 3, 16, 116), 3, 0),
    "other windows": ((2, 11, 4, 8), 5, 0),
    "images not at 16 bytes": ((3, 5, 3, 3), 3, 0),
    "tensor not at 16 bytes": ((1, 8, 4, 4), 3, 1),
}


def outside_of(height, width, window):
    """(window², H, W): the cells that are outside the image."""
    ones = torch.ones(1, 1, height, width)
    return torch.nn.functional.unfold(ones, window, padding=window // 2).view(window * window, height, width) == 0


@each_dtype
@pytest.mark.parametrize("direction", ["apply_forward", "apply_backward"])
@pytest.mark.parametrize("name", STENCILS)
def test_stencil(name, direction, dtype, generator):
    shape, window, offset = STENCILS[name]
    numbers = torch.randn(offset + math.prod(shape), generator=generator)
    maps = numbers.to(DEVICE, dtype)[offset:].view(shape)
    weights = torch.rand(shape[0], window * window, *shape[2:], generator=generator)
    outside = outside_of(*shape[2:], window)
    exact, plain = (
        getattr(reference, direction)(maps.to(exactness), weights.masked_fill(outside, 0).to(DEVICE, exactness))
        for exactness in (torch.float64, torch.float32)
    )
    actual = getattr(cuda, direction)(maps, weights.masked_fill(outside, torch.nan).to(DEVICE))
    assert_rows_close(as_rows(actual), as_rows(exact), as_rows(plain.to(dtype)))


@pytest.mark.parametrize("direction", ["apply_forward", "apply_backward"])
@pytest.mark.parametrize("name", STENCILS)
def test_numbers_that_are_not_finite(name, direction, generator):
    """They show where the window has them, and nowhere else: not across the ends of rows, nor in the next plane."""
    shape, window, offset = STENCILS[name]
    maps = torch.randn(offset + math.prod(shape), generator=generator)[offset:].view(shape).to(DEVICE)
    maps[0, 1, 2, 0], maps[0, 2, 0, -1], maps[-1, -1, -1, -1] = math.nan, math.inf, -math.inf
    weights = 0.1 + torch.rand(shape[0], window * window, *shape[2:], generator=generator)
    weights = weights.masked_fill(outside_of(*shape[2:], window), 0).to(DEVICE)
    actual, expected = (getattr(module, direction)(maps, weights) for module in (cuda, reference))
    assert not expected.isfinite().all() and expected.isfinite().any()
    torch.testing.assert_close(actual, expected, equal_nan=True)
