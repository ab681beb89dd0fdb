"""Argument checks shared by the ops: every message reads "op: `argument` must ..., got ..."."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64,)
BOOLEAN = (torch.bool,)

Size = int | str
"""One size of a shape: a number that must be met, or a letter that says what the size stands for."""


def accumulation(dtype: torch.dtype) -> tuple[torch.dtype]:
    """The dtype that sums of products of `dtype` are kept in, as a choice of one."""
    return (torch.float64 if dtype == torch.float64 else torch.float32,)


def tensor(op: str, name: str, value: Any, shape: Sequence[Size], dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Check that `value` is a tensor of one of `dtypes` and of `shape`, with no empty dimension."""
    # The messages are built only when they are needed: Dynamo cannot print the symbolic sizes of dynamic shapes.
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(_tensor_text(op, name, value, shape, dtypes))
    sizes_fit = value.dim() == len(shape) and all(
        size == actual for size, actual in zip(shape, value.shape, strict=True) if not isinstance(size, str)
    )
    if not sizes_fit:
        raise ValueError(_tensor_text(op, name, value, shape, dtypes))
    if any(size == 0 for size in value.shape):
        raise ValueError(f"{op}: `{name}` must not be empty, got {_describe(value)}")


def same(op: str, name: str, value: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Check that `value` has the device, and if `dtype` is set the dtype, of `other`."""
    if value.device != other.device:
        raise ValueError(f"{op}: `{name}` must be on the device of `{other_name}` ({other.device}), got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{op}: `{name}` must have the dtype of `{other_name}` ({_name(other.dtype)}), got {_name(value.dtype)}"
        )


def constant(op: str, name: str, value: Tensor) -> None:
    """Check that no gradient is asked for through `value`, which the op treats as a constant."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: `{name}` must not require a gradient (pass `{name}.detach()`), got requires_grad=True")


def finite(op: str, name: str, value: Tensor, infinity: bool = False) -> None:
    """Check that `value` holds no NaN, and no infinity unless allowed.

    Only where reading values is free of cost to the caller: eagerly, on the CPU. Elsewhere the ops turn the loss into
    NaN instead, so that bad values are never silent.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return
    if value.detach().sum(dtype=accumulation(value.dtype)[0]).isfinite():  # one pass, where `bad` takes several
        return
    bad = value.isnan() if infinity else ~value.isfinite()
    if bad.any():
        wanted = "be free of NaN" if infinity else "be finite"
        where = f" in row {int(bad.nonzero()[0, 0])}" if value.dim() else ""
        raise ValueError(f"{op}: `{name}` must {wanted}, got {value[bad][0].item()}{where}")


def real(
    op: str, name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf, open_minimum: bool = False
) -> float:
    """Check that `value` is a finite real number within [`minimum`, `maximum`] and return it as float."""
    wanted = _range_text(minimum, maximum, open_minimum)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: `{name}` must be a finite number{wanted}, got {_kind(value)}")
    above = value > minimum if open_minimum else value >= minimum
    if not (math.isfinite(value) and above and value <= maximum):
        raise ValueError(f"{op}: `{name}` must be a finite number{wanted}, got {value!r}")
    return float(value)


def integer(op: str, name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Check that `value` is an integer within [`minimum`, `maximum`] and return it."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{op}: `{name}` must be an integer{_span_text(minimum, maximum)}, got {_kind(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{op}: `{name}` must be an integer{_span_text(minimum, maximum)}, got {value}")
    return value


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(op: str, name: str, value: Any) -> None:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` must be True or False, got {_kind(value)}")


def _tensor_text(op: str, name: str, value: Any, shape: Sequence[Size], dtypes: Sequence[torch.dtype]) -> str:
    wanted = f"{_dtype_names(dtypes)} tensor of shape {_shape_text(shape)}"
    article = "an" if wanted.startswith("int") else "a"
    return f"{op}: `{name}` must be {article} {wanted}, got {_describe(value)}"


def _span_text(minimum: int, maximum: int | None) -> str:
    return f" of at least {minimum}" if maximum is None else f" from {minimum} to {maximum}"


def _range_text(minimum: float, maximum: float, open_minimum: bool) -> str:
    if minimum == -math.inf and maximum == math.inf:
        return ""
    if maximum == math.inf:
        return f" {'above' if open_minimum else 'of at least'} {minimum:g}"
    return f" in {'(' if open_minimum else '['}{minimum:g}, {maximum:g}]"


def _shape_text(shape: Sequence[Size]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return "floating-point" if tuple(dtypes) == FLOATING else " or ".join(map(_name, dtypes))


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_name(value.dtype)} of shape {_shape_text(value.shape)}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, bool | str | Real | None) else type(value).__name__
