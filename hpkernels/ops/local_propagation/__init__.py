"""Local hidden positives: mix each patch's code with those of the neighbours that it attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.local_propagation import registration

__all__ = ["apply_local_propagation", "local_propagation", "local_propagation_weights"]


def local_propagation(
    code: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    sigma: float = 28.0,
    quantiles: tuple[float, float] = (0.1, 0.9),
    window: int = 3,
    prefix_tokens: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Average each patch's code over its window, weighted by the backbone's attention (HP, CVPR 2023).

    ``mixed_i = (1 / c_i) * sum over j in the window of i of T_ij code_j`` with the weights of
    `local_propagation_weights` and c_i the number of window cells inside the image.

    Args:
        code: (B, D, H, W) floating-point codes; gradients flow through them to the neighbours.
        query: (B, heads, prefix_tokens + H*W, d) of the backbone's last block, no gradient.
        key: the same for keys.
        sigma, quantiles, window, prefix_tokens: see `local_propagation_weights`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, D, H, W) mixed codes, dtype of `code`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, non-finite inputs are a ValueError; elsewhere they show in the result.

    Notes:
        The weights depend on the frozen backbone only: compute them once with `local_propagation_weights` and reuse
        them with `apply_local_propagation` where features are cached.

    Examples:
        >>> import torch, hpkernels
        >>> code, tokens = torch.rand(1, 4, 5, 6), torch.rand(1, 2, 31, 8)
        >>> hpkernels.local_propagation(code, tokens, tokens).shape
        torch.Size([1, 4, 5, 6])
    """
    op = "local_propagation"
    check.tensor(op, "code", code, ("B", "D", "H", "W"))
    batch, _, height, width = code.shape
    query_shape = (batch, "heads", check.integer(op, "prefix_tokens", prefix_tokens, 0) + height * width, "d")
    check.tensor(op, "query", query, query_shape)
    check.same(op, "query", query, "code", code, dtype=False)
    weights = _weights(op, query, key, (height, width), sigma, quantiles, window, prefix_tokens, backend)
    return _apply(op, code, weights, backend)


def local_propagation_weights(
    query: Tensor,
    key: Tensor,
    grid: tuple[int, int],
    *,
    sigma: float = 28.0,
    quantiles: tuple[float, float] = (0.1, 0.9),
    window: int = 3,
    prefix_tokens: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the weights of `local_propagation`, T_ij / c_i for each cell j of the window of each patch i.

    T: attention logits ``<query_i, key_j> / sqrt(d)`` averaged over heads, prefix tokens removed; each row clamped to
    its own quantiles (linear interpolation), softmax over the row, times sigma; entries below the row's mean are 0.

    Args:
        query: (B, heads, prefix_tokens + H*W, d) floating-point, no gradient.
        key: the same shape and dtype.
        grid: (H, W), the patches of one image.
        sigma: factor of the attention, > 0 and finite in the dtype of the result.
        quantiles: the two quantiles that a row is clamped to, 0 <= low <= high <= 1.
        window: odd side of the square window.
        prefix_tokens: class and register tokens in front of the patches, >= 0.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, window², H, W) float32 (float64 for float64 inputs), row-major over the window's cells; 0 for cells outside
        the image.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, a `query` or `key` that is not finite, or whose inner products are not, is a ValueError;
            elsewhere the weights are NaN.

    Examples:
        >>> import torch, hpkernels
        >>> tokens = torch.rand(1, 2, 30, 8)
        >>> hpkernels.local_propagation_weights(tokens, tokens, (5, 6), prefix_tokens=0).shape
        torch.Size([1, 9, 5, 6])
    """
    op = "local_propagation_weights"
    return _weights(op, query, key, grid, sigma, quantiles, window, prefix_tokens, backend)


def apply_local_propagation(code: Tensor, weights: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Apply the weights of `local_propagation_weights` to codes: a stencil of window² points.

    Args:
        code: (B, D, H, W) floating-point.
        weights: (B, window², H, W) floating-point with an odd window; no gradient.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (B, D, H, W) mixed codes, dtype of `code`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Notes:
        Sums in float32 (float64). The gradient is the transposed stencil; double backward is refused. Deterministic.

    Examples:
        >>> import torch, hpkernels
        >>> code, weights = torch.rand(1, 4, 5, 6), torch.zeros(1, 9, 5, 6)
        >>> weights[:, 4] = 1  # the middle cell alone: nothing moves
        >>> torch.equal(hpkernels.apply_local_propagation(code, weights), code)
        True
    """
    return _apply("apply_local_propagation", code, weights, backend)


def _weights(
    op: str,
    query: Tensor,
    key: Tensor,
    grid: tuple[int, int],
    sigma: float,
    quantiles: tuple[float, float],
    window: int,
    prefix_tokens: int,
    backend: Backend,
) -> Tensor:
    height, width = _check_grid(op, grid)
    prefix_tokens = check.integer(op, "prefix_tokens", prefix_tokens, 0)
    tokens = prefix_tokens + height * width
    check.tensor(op, "query", query, ("B", "heads", tokens, "d"))
    check.tensor(op, "key", key, tuple(query.shape))
    check.same(op, "key", key, "query", query)
    check.constant(op, "query", query)
    check.constant(op, "key", key)
    low, high = check_settings(op, sigma, quantiles, window, prefix_tokens)
    greatest = torch.finfo(check.accumulation(query.dtype)[0]).max
    sigma = check.real(op, "sigma", sigma, 0, greatest, open_minimum=True)
    check.finite(op, "query", query, products=True)
    check.finite(op, "key", key, products=True)
    backend = backends.select("local_propagation", backend, query, caller=op)
    weights: Tensor = registration.local_propagation_weights(
        query, key, height, width, sigma, low, high, window, prefix_tokens, backend
    )
    return weights


def _apply(op: str, code: Tensor, weights: Tensor, backend: Backend) -> Tensor:
    check.tensor(op, "code", code, ("B", "D", "H", "W"))
    batch, _, height, width = code.shape
    check.tensor(op, "weights", weights, (batch, "window²", height, width))
    window = round(weights.shape[1] ** 0.5)
    if window * window != weights.shape[1] or window % 2 == 0:
        raise ValueError(f"{op}: `weights` must have window² channels of an odd window, got {weights.shape[1]}")
    check.same(op, "weights", weights, "code", code, dtype=False)
    check.constant(op, "weights", weights)
    check.finite(op, "code", code)
    check.finite(op, "weights", weights)
    backend = backends.select("local_propagation", backend, code, caller=op)
    mixed: Tensor = registration.apply_local_propagation(code, weights, backend)
    return mixed


def _check_grid(op: str, grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise TypeError(f"{op}: `grid` must be a pair (H, W), got {grid!r}")
    height, width = (check.integer(op, "grid", size, 1) for size in grid)
    return height, width


def check_settings(
    op: str, sigma: float, quantiles: tuple[float, float], window: int, prefix_tokens: int
) -> tuple[float, float]:
    """Check what does not depend on any tensor; the result are the quantiles."""
    check.integer(op, "prefix_tokens", prefix_tokens, 0)
    check.real(op, "sigma", sigma, 0, open_minimum=True)
    low, high = _check_quantiles(op, quantiles)
    _check_window(op, window)
    return low, high


def _check_quantiles(op: str, quantiles: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(quantiles, tuple | list) or len(quantiles) != 2:
        raise TypeError(f"{op}: `quantiles` must be a pair (low, high), got {quantiles!r}")
    low, high = (check.real(op, "quantiles", quantile, 0, 1) for quantile in quantiles)
    if low > high:
        raise ValueError(f"{op}: `quantiles` must be in ascending order, got {quantiles!r}")
    return low, high


def _check_window(op: str, window: int) -> None:
    if check.integer(op, "window", window, 1) % 2 == 0:
        raise ValueError(f"{op}: `window` must be odd, got {window}")
