"""The functions that the Triton kernels of several ops call: loads, products, exponentials, bits."""

from __future__ import annotations

import triton
import triton.language as tl

from hpkernels.ops._triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr):
    """`sums` and the matrix product of `a` and `b`, in float32."""
    if _INTERPRETED:  # whose product of bfloat16 numbers is one of their bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def load_rows(base, rows, row_stride, columns, column_stride, count, dim):
    """A tile (rows, columns) of a (count, dim) matrix; 0 outside of it."""
    inside = (rows >= 0) & (rows < count)
    at = base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(at, mask=inside[:, None] & (columns < dim)[None, :], other=0.0)


@triton.jit
def row_products(
    left, left_rows, left_stride, left_step, left_count,
    right, right_rows, right_stride, right_step, right_count,
    dim, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inner products, float32, of rows of two matrices (., dim) with any strides."""
    sums = tl.zeros((left_rows.shape[0], right_rows.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        a = load_rows(left, left_rows, left_stride, columns, left_step, left_count, dim)
        b = load_rows(right, right_rows, right_stride, columns, right_step, right_count, dim)
        sums = multiply(a, tl.trans(b), sums, PRECISION)
    return sums


@triton.jit
def comparable_products(
    left, left_rows, left_stride, left_step, left_count,
    right, right_rows, right_stride, right_step, right_count,
    dim, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`row_products` whose bits are those of the same two rows in any other tile, whichever of them is left.

    Rows beyond the last have the products of the last: a mask of rows would make the loop longer by a third.
    Three products of TF32 are summed apart: Triton's own "tf32x3" adds the two small ones to one another in an
    order that depends on which matrix is left.
    """
    left = row_addresses(left, left_rows, left_stride, left_count)
    right = row_addresses(right, right_rows, right_stride, right_count)
    sums = tl.zeros((left_rows.shape[0], right_rows.shape[0]), tl.float32)
    if PRECISION == "tf32x3":
        of_left_rests = tl.zeros((left_rows.shape[0], right_rows.shape[0]), tl.float32)
        of_right_rests = tl.zeros((left_rows.shape[0], right_rows.shape[0]), tl.float32)
        for start in range(0, dim, BLOCK_D):
            a = load_features(left, start, left_step, dim, BLOCK_D)
            b = load_features(right, start, right_step, dim, BLOCK_D)
            large_a, large_b = to_tf32(a), to_tf32(b)
            of_left_rests = multiply(to_tf32(a - large_a), tl.trans(large_b), of_left_rests, "tf32")
            of_right_rests = multiply(large_a, tl.trans(to_tf32(b - large_b)), of_right_rests, "tf32")
            sums = multiply(large_a, tl.trans(large_b), sums, "tf32")
        rests = of_left_rests + of_right_rests  # NaN where a factor is infinite
        sums = tl.where(tl.abs(sums) == float("inf"), sums, sums + rests)
    else:
        for start in range(0, dim, BLOCK_D):
            a = load_features(left, start, left_step, dim, BLOCK_D)
            b = load_features(right, start, right_step, dim, BLOCK_D)
            sums = multiply(a, tl.trans(b), sums, PRECISION)
    return sums


@triton.jit
def row_addresses(base, rows, stride, count):
    """Where rows of a matrix start, (rows, 1); those beyond the last are the last."""
    return base + tl.minimum(rows, count - 1).to(tl.int64)[:, None] * stride


@triton.jit
def load_features(rows, start, step, dim, BLOCK_D: tl.constexpr):
    """BLOCK_D features of rows that are given by their addresses; 0 beyond the last feature."""
    columns = start + tl.arange(0, BLOCK_D)
    return tl.load(rows + columns.to(tl.int64)[None, :] * step, mask=(columns < dim)[None, :], other=0.0)


@triton.jit
def to_tf32(x):
    """The nearest number of TF32, which has 11 significant bits."""
    if _INTERPRETED:  # which knows no assembly
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def products_and_tile(
    base,
    rows,
    own,
    columns,
    features,
    count,
    dim,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inner products of `rows` and `columns` of a contiguous (count, dim) matrix, and `features` of the columns.

    If `features` are all there are, WHOLE, `own` is that tile of the rows, and each column is loaded once for both.
    """
    tile = load_rows(base, columns, dim, features, 1, count, dim)
    if WHOLE:
        products = multiply(own, tl.trans(tile), tl.zeros((rows.shape[0], columns.shape[0]), tl.float32), PRECISION)
    else:
        products = row_products(base, rows, dim, 1, count, base, columns, dim, 1, count, dim, PRECISION, BLOCK_D)
    return products, tile


@triton.jit
def scaled(products, scale):
    """`products` times `scale`, rounded, whatever is subtracted from it.

    Compilers contract a product and a difference to one instruction, which does not round the product: in one kernel
    and not in the next, and then exp(l - log sum) of long rows is not what it is of the other.
    """
    return tl.fma(products, scale, 0.0)


@triton.jit
def short_exp(x):
    """exp(x) in fewer instructions than ``tl.exp``, which keeps subnormal numbers."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def bits_at(bits, rows, words, columns, inside):
    """Whether the bits of (rows, columns), of broadcastable shapes, are set; False unless `inside`."""
    word = tl.load(bits + rows.to(tl.int64) * words + (columns >> 5), mask=inside, other=0)
    return ((word >> (columns & 31)) & 1) != 0


@triton.jit
def words_from(bits, rows, words, first, COUNT: tl.constexpr):
    """COUNT words (rows, COUNT) of bits from column `first` on, a multiple of 32; 0 for rows of -1."""
    word = first // 32 + tl.arange(0, COUNT)
    inside = (rows >= 0)[:, None] & (word < words)[None, :]
    return tl.load(bits + rows.to(tl.int64)[:, None] * words + word[None, :], mask=inside, other=0)


@triton.jit
def bits_of(words):
    """The bits of words (R, W) as (R, 32 W) bool."""
    values = tl.full((), 1, tl.int32) << tl.arange(0, 32)
    if words.shape[1] == 1:
        is_set = (words & values[None, :]) != 0
    else:
        is_set = tl.reshape((words[:, :, None] & values[None, None, :]) != 0, (words.shape[0], 32 * words.shape[1]))
    return is_set


@triton.jit
def population_count(words):
    """The number of set bits of each int32 word (Warren, Hacker's Delight, 5-1)."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def low_bits(count):
    """Words whose lowest `count` bits are set, none for less than 0 and all for more than 32."""
    kept = tl.minimum(tl.maximum(count, 0), 32).to(tl.int64)
    return ((tl.full((), 1, tl.int64) << kept) - 1).to(tl.int32)
