"""Comparison row by row: one wrong row must not hide among thousands of right ones."""

from __future__ import annotations

import torch
from torch import Tensor


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Compute the Euclidean norm of the difference of each row.

    Args:
        actual: (R, ...) tensor of any dtype and device; a 0-d tensor is one row.
        expected: the same shape.

    Returns:
        (R,) float64 on the CPU. Equal infinities differ by 0; a row with a NaN on either side has error NaN.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> from hpkernels.testing import row_errors
        >>> row_errors(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])).tolist()
        [5.0, 0.0]
    """
    if actual.shape != expected.shape:
        raise ValueError(f"row_errors: `actual` must have the shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = _rows(actual), _rows(expected)
    errors: Tensor = (actual - expected).where(actual != expected, 0.0).norm(dim=1)
    return errors


def assert_rows_close(
    actual: Tensor, expected64: Tensor, plain: Tensor, *, factor: float = 3.0, eps: float | None = None
) -> None:
    """Assert that every row of `actual` is about as close to the exact result as plain PyTorch's.

    Row r passes if ``error(actual_r) <= factor * error(plain_r) + eps``, errors being those of `row_errors` against
    `expected64`. So the tolerance follows the conditioning of the problem instead of being guessed.

    Args:
        actual: (R, ...) the result to judge; a 0-d tensor is one row.
        expected64: the same shape, the result of the same inputs computed in float64.
        plain: the same shape, the result of the same formula in plain PyTorch with the precision of `actual`.
        factor: how much larger than the error of `plain` the error may be.
        eps: absolute slack, for rows that `plain` happens to get exactly right. None: two units in the last place of
            the row in the dtype of `actual`, and eight of the largest row in float32 (float64 if `actual` is float64),
            because results are accumulated in that precision.

    Raises:
        AssertionError: a row fails; the message names the worst row and its figures. A NaN fails.
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> from hpkernels.testing import assert_rows_close
        >>> exact = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        >>> assert_rows_close(exact.float(), exact, exact.float())
        >>> assert_rows_close(exact.float() + torch.tensor([[0.0], [1e-3]]), exact, exact.float())
        Traceback (most recent call last):
        ...
        AssertionError: 1 of 2 rows are wrong; the worst is row 1: error 1.41e-03, allowed 5.96e-06 (plain 0.00e+00)
    """
    errors, plain_errors = row_errors(actual, expected64), row_errors(plain, expected64)
    # Where plain PyTorch overflows or gives NaN it must not loosen the tolerance.
    allowed = factor * plain_errors.nan_to_num(0.0, 0.0) + (_rounding(actual, expected64) if eps is None else eps)
    wrong = ~(errors <= allowed)
    if not wrong.any():
        return
    excess = torch.where(wrong, (errors / allowed).nan_to_num(torch.inf, torch.inf), -1.0)
    worst = int(excess.argmax())
    raise AssertionError(
        f"{int(wrong.sum())} of {len(errors)} rows are wrong; the worst is row {worst}: error {errors[worst]:.2e}, "
        f"allowed {allowed[worst]:.2e} (plain {plain_errors[worst]:.2e})"
    )


def _rounding(actual: Tensor, expected64: Tensor) -> Tensor:
    norms = _rows(expected64).nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    largest = norms.max() if len(norms) else 0.0
    rounding: Tensor = 2 * torch.finfo(actual.dtype).eps * norms + 8 * torch.finfo(accumulation).eps * largest
    return rounding


def _rows(values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    return values.reshape(1, 1) if values.dim() == 0 else values.flatten(1) if values.dim() > 1 else values[:, None]
