"""Triton kernels of `local_propagation`: logits by tensor cores, quantiles of a row in registers, a gathering stencil.

The mean over heads of <q, k> is one product of full width, heads * d, read in place. The logits go to a workspace that
stays in the second-level cache, pass by pass; a warp then has a row of them in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.ops import _triton
from hpkernels.ops._triton import supports
from hpkernels.ops._triton_functions import load_features, load_rows, multiply, row_addresses

__all__ = ["apply_backward", "apply_forward", "supports", "weights_forward"]

WORKSPACE_BYTES = 24 << 20
"""What the logits of a pass may take, unless those of a single tile of rows take more."""

_COLUMNS_OF_A_WARP = 1024
_MOST_WARPS = 16
_ROUNDING = tl.constexpr(8 * torch.finfo(torch.float32).eps)


@triton.jit
def _tile(index, SIZE: tl.constexpr):
    return index * SIZE + tl.arange(0, SIZE)


@triton.jit
def _logits(
    query, key, query_image, query_head, query_token, query_step, key_image, key_head, key_token, key_step,
    patches, heads, dim, scale, image, rows, columns, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tile (rows, columns) of one image's logits: one product over all heads, so that loads overlap throughout."""
    query = row_addresses(query + image.to(tl.int64) * query_image, rows, query_token, patches)
    key = row_addresses(key + image.to(tl.int64) * key_image, columns, key_token, patches)
    steps = tl.cdiv(dim, BLOCK_D)
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for step in range(heads * steps):
        head, start = tl.cast(step // steps, tl.int64), step % steps * BLOCK_D
        a = load_features(query + head * query_head, start, query_step, dim, BLOCK_D)
        b = load_features(key + head * key_head, start, key_step, dim, BLOCK_D)
        sums = multiply(a, tl.trans(b), sums, "ieee")
    return sums * scale


@triton.jit
def _store_window(
    logits, image, patch, columns, stored,
    weights, height, width, sigma, low, low_next, low_part, high, high_next, high_part, WINDOW: tl.constexpr,
):  # fmt: skip
    """Clamp and normalise whole rows of logits, and store the entries of each row that lie in its window.

    A row is a `patch` of an `image`; `sigma` is that of one patch, sigma / G; the two quantiles are given by `_ranks`.
    """
    patches = height * width
    keys = tl.where((columns < patches)[None, :], _reordered(logits.to(tl.int32, bitcast=True)), 0x7FFFFFFF)
    low_key, high_key = _order_statistics(keys, patches, low, high)
    least = _interpolated(keys, low_key, low_next, low_part)[:, None]
    most = _interpolated(keys, high_key, high_next, high_part)[:, None]

    # Comparisons with NaN are false, so that NaN stays.
    clamped = tl.where(logits < least, least, tl.where(logits > most, most, logits))
    attention = tl.where((columns < patches)[None, :], tl.exp(clamped - most), 0.0)
    attention *= (patches / tl.sum(attention, axis=1))[:, None]  # in units of the row's mean
    attention = tl.where(attention < 1 - _ROUNDING, 0.0, attention)

    RADIUS: tl.constexpr = WINDOW // 2
    y, x = patch // width, patch % width
    tall = tl.minimum(y + RADIUS, height - 1) - tl.maximum(y - RADIUS, 0) + 1
    wide = tl.minimum(x + RADIUS, width - 1) - tl.maximum(x - RADIUS, 0) + 1
    values = attention * (sigma / tl.where(stored, tall * wide, 1))[:, None]

    # Each entry knows its own cell, so nothing is gathered and the work does not depend on the window.
    down = (columns // width)[None, :] - y[:, None] + RADIUS
    right = (columns % width)[None, :] - x[:, None] + RADIUS
    inside = (down >= 0) & (down < WINDOW) & (right >= 0) & (right < WINDOW) & (columns < patches)[None, :]
    start = image.to(tl.int64) * (WINDOW * WINDOW * patches) + patch
    at = start[:, None] + (down * WINDOW + right) * patches
    tl.store(weights + at, values, mask=inside & stored[:, None])


@triton.jit
def _reordered(bits):
    """The bits of floats as integers in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _order_statistics(keys, count, first_rank, second_rank):
    """Of each row of `count` keys, and then greatest numbers, the keys of two ranks (from 0).

    Each is bracketed, and the bracket halved until it holds no other key, or one number, which may be several keys.
    """
    low = tl.min(keys, axis=1)
    high = tl.max(tl.where(tl.arange(0, keys.shape[1])[None, :] < count, keys, -0x80000000), axis=1)
    below, held = tl.zeros_like(low), tl.zeros_like(low) + count
    other_low, other_high, other_below, other_held = low, high, below, held
    while tl.max(tl.maximum(_unknown(low, high, held), _unknown(other_low, other_high, other_held)), axis=0) > 0:
        low, high, below, held = _halved(keys, low, high, below, held, first_rank)
        other_low, other_high, other_below, other_held = _halved(
            keys, other_low, other_high, other_below, other_held, second_rank
        )
    return _least_from(keys, low), _least_from(keys, other_low)


@triton.jit
def _unknown(low, high, held):
    return ((held > 1) & (low < high)).to(tl.int32)


@triton.jit
def _halved(keys, low, high, below, held, rank):
    """The half with the key of `rank` of a bracket [low, high], which holds so many keys, and so many are below."""
    middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
    below_middle = tl.sum((keys < middle[:, None]).to(tl.int32), axis=1)
    lower = below_middle > rank
    held = tl.where(lower, below_middle - below, held + below - below_middle)
    return (
        tl.where(lower, low, middle),
        tl.where(lower, middle - 1, high),
        tl.where(lower, below, below_middle),
        held,
    )


@triton.jit
def _least_from(keys, bound):
    return tl.min(tl.where(keys >= bound[:, None], keys, 0x7FFFFFFF), axis=1)


@triton.jit
def _interpolated(keys, below, next_rank, part):
    """The value of each row that is `part` of the way from key `below` to the key of `next_rank`."""
    larger = keys > below[:, None]
    following = tl.min(tl.where(larger, keys, 0x7FFFFFFF), axis=1)
    not_larger = keys.shape[1] - tl.sum(larger.to(tl.int32), axis=1)
    following = tl.where(not_larger > next_rank, below, following)
    below = _reordered(below).to(tl.float32, bitcast=True)
    following = _reordered(following).to(tl.float32, bitcast=True)
    return below + part * (following - below)


@triton.jit
def _sum_window(
    maps, weights, result, dim, height, width, maps_image, maps_step, maps_y, maps_x,
    weights_image, weights_cell, weights_y, weights_x, TRANSPOSED: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile (features, patches) of the stencil or its transpose; `maps` of any strides, `result` contiguous.

    Threads run along the features where these are next to each other in memory, else along the patches.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    patches = height * width
    patch_tiles, feature_tiles = tl.cdiv(patches, BLOCK_PATCHES), tl.cdiv(dim, BLOCK_D)
    patch = _tile(tl.program_id(0) % patch_tiles, BLOCK_PATCHES)
    feature = _tile(tl.program_id(0) // patch_tiles % feature_tiles, BLOCK_D)
    image = (tl.program_id(0) // patch_tiles // feature_tiles).to(tl.int64)
    y, x = patch // width, patch % width
    maps += image * maps_image + feature.to(tl.int64)[:, None] * maps_step
    weights += image * weights_image

    sums = tl.zeros((BLOCK_D, BLOCK_PATCHES), tl.float32)
    for cell in range(WINDOW * WINDOW):
        down, right = cell // WINDOW - RADIUS, cell % WINDOW - RADIUS
        v, u = (y - down, x - right) if TRANSPOSED else (y + down, x + right)
        inside = (v >= 0) & (v < height) & (u >= 0) & (u < width) & (patch < patches)
        weight_y, weight_x = (v, u) if TRANSPOSED else (y, x)
        v, u = v.to(tl.int64), u.to(tl.int64)
        at = tl.cast(cell, tl.int64) * weights_cell + weight_y.to(tl.int64) * weights_y
        weight = tl.load(weights + at + weight_x.to(tl.int64) * weights_x, mask=inside, other=0.0).to(tl.float32)
        at = (v * maps_y + u * maps_x)[None, :]
        values = tl.load(maps + at, mask=(feature < dim)[:, None] & inside[None, :], other=0.0)
        sums += weight[None, :] * values.to(tl.float32)

    at = (image * dim + feature)[:, None] * patches + patch[None, :]
    tl.store(result + at, sums.to(result.dtype.element_ty), mask=(feature < dim)[:, None] & (patch < patches)[None, :])


@triton.jit(do_not_specialize=["first_tile", "first_row"])
def logits_fwd_kernel(
    query, key, query_image, query_head, query_token, query_step, key_image, key_head, key_token, key_step,
    patches, heads, dim, scale, logits, first_tile, first_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logits[b * G + i - first_row, j] = (1 / (heads * sqrt(d))) * sum over heads of <q_i, k_j> in image b.

    Bytes: the tokens of both tiles; logits, 4 a pair.
    """
    column_tiles, row_tiles = tl.cdiv(patches, BLOCK_COLUMNS), tl.cdiv(patches, BLOCK_ROWS)
    tile = first_tile + tl.program_id(0) // column_tiles
    image, rows = tile // row_tiles, _tile(tile % row_tiles, BLOCK_ROWS)
    columns = _tile(tl.program_id(0) % column_tiles, BLOCK_COLUMNS)
    values = _logits(
        query, key, query_image, query_head, query_token, query_step, key_image, key_head, key_token, key_step,
        patches, heads, dim, scale, image, rows, columns, BLOCK_D,
    )  # fmt: skip
    at = (image * patches + rows - first_row).to(tl.int64)[:, None] * patches + columns[None, :]
    tl.store(logits + at, values, mask=(rows < patches)[:, None] & (columns < patches)[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row"])
def rows_fwd_kernel(
    logits, weights, first_row, last_row, height, width, sigma, low, low_next, low_part, high, high_next, high_part,
    WINDOW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """weights[b, cell, i] = T_ij / c_i for the j at `cell` of the window of i; cells outside the image stay 0.

    Rows of logits are clamped and normalised in registers. Bytes: logits once, G * 4 a patch; weights, window² * 4.
    """
    patches = height * width
    local = _tile(tl.program_id(0), BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    values = load_rows(logits, local, patches, columns, 1, last_row - first_row, patches)
    row = first_row + local
    _store_window(
        values, row // patches, row % patches, columns, row < last_row,
        weights, height, width, sigma, low, low_next, low_part, high, high_next, high_part, WINDOW,
    )  # fmt: skip


@triton.jit
def apply_fwd_kernel(
    code, weights, mixed, dim, height, width, code_image, code_step, code_y, code_x,
    weights_image, weights_cell, weights_y, weights_x,
    WINDOW: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mixed[b, d, p] = sum over cells of weights[b, cell, p] * code[b, d, p + offset(cell)], inside the image only.

    Bytes: code and mixed once each, B * D * G elements; weights, B * window² * G elements, once for every BLOCK_D
    features. The neighbours of a patch come from cache.
    """
    _sum_window(
        code, weights, mixed, dim, height, width, code_image, code_step, code_y, code_x,
        weights_image, weights_cell, weights_y, weights_x, False, WINDOW, BLOCK_PATCHES, BLOCK_D,
    )  # fmt: skip


@triton.jit
def apply_bwd_kernel(
    grad_mixed, weights, grad_code, dim, height, width, grad_image, grad_step, grad_y, grad_x,
    weights_image, weights_cell, weights_y, weights_x,
    WINDOW: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_code[b, d, p] = sum over cells of (weights[b, cell, .] * grad_mixed[b, d, .])[p - offset(cell)].

    A sum over the patches whose window holds p, so a gather too. Bytes: as `apply_fwd_kernel`.
    """
    _sum_window(
        grad_mixed, weights, grad_code, dim, height, width, grad_image, grad_step, grad_y, grad_x,
        weights_image, weights_cell, weights_y, weights_x, True, WINDOW, BLOCK_PATCHES, BLOCK_D,
    )  # fmt: skip


def weights_forward(
    query: Tensor,
    key: Tensor,
    height: int,
    width: int,
    sigma: float,
    low: float,
    high: float,
    window: int,
    prefix_tokens: int,
) -> Tensor:
    """T_ij / c_i for the window of each patch, (B, window², H, W)."""
    images, heads, _, dim = query.shape
    patches = height * width
    query, key = query[:, :, prefix_tokens:], key[:, :, prefix_tokens:]
    product = (query, key, *query.stride(), *key.stride(), patches, heads, dim, 1 / (heads * math.sqrt(dim)))
    row = (height, width, sigma / patches, *_ranks(low, patches), *_ranks(high, patches))
    weights = query.new_zeros((images, window * window, height, width), dtype=torch.float32)
    config = _triton.configuration(logits_fwd_kernel, query)
    rows, row_tiles = config["BLOCK_ROWS"], triton.cdiv(patches, config["BLOCK_ROWS"])
    tiles, column_tiles = images * row_tiles, triton.cdiv(patches, config["BLOCK_COLUMNS"])
    passes = triton.cdiv(tiles, max(1, WORKSPACE_BYTES // (4 * rows * patches)))
    logits = query.new_empty((triton.cdiv(tiles, passes) * rows, patches), dtype=torch.float32)
    columns = triton.next_power_of_2(patches)
    row_config = _triton.configuration(rows_fwd_kernel, logits) | {"WINDOW": window, "BLOCK_COLUMNS": columns}
    row_config["num_warps"] = min(_MOST_WARPS, row_config["num_warps"] * triton.cdiv(columns, _COLUMNS_OF_A_WARP))
    for i in range(passes):
        first, last = (tiles * end // passes for end in (i, i + 1))
        start, stop = (tile // row_tiles * patches + tile % row_tiles * rows for tile in (first, last))
        grid = ((last - first) * column_tiles,)
        _triton.launch(logits_fwd_kernel, grid, *product, logits, first, start, **config)
        grid = (triton.cdiv(stop - start, row_config["BLOCK_ROWS"]),)
        _triton.launch(rows_fwd_kernel, grid, logits, weights, start, stop, *row, **row_config)
    return weights


def _ranks(quantile: float, count: int) -> tuple[int, int, float]:
    """The two order statistics between which `quantile` of `count` values lies, and how far it is from the first."""
    position = quantile * (count - 1)
    below = math.floor(position)
    return below, min(below + 1, count - 1), position - below


def apply_forward(code: Tensor, weights: Tensor) -> Tensor:
    """The stencil: each patch gathers its window, (B, D, H, W)."""
    return _stencil(apply_fwd_kernel, code, weights)


def apply_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The transposed stencil: each patch gathers the gradients of the patches whose windows hold it."""
    return _stencil(apply_bwd_kernel, grad, weights)


def _stencil(kernel, maps: Tensor, weights: Tensor) -> Tensor:
    result = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    config = _triton.configuration(kernel, maps)
    images, dim, height, width = maps.shape
    patch_tiles = triton.cdiv(height * width, config["BLOCK_PATCHES"])
    grid = (images * triton.cdiv(dim, config["BLOCK_D"]) * patch_tiles,)
    sizes = (*maps.shape[1:], *maps.stride(), *weights.stride())
    _triton.launch(kernel, grid, maps, weights, result, *sizes, WINDOW=math.isqrt(weights.shape[1]), **config)
    return result
