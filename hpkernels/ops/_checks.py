"""Argument checks shared by the ops: every message reads "op: `argument` must ..., got ..."."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.nn import Parameter

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64,)
ANY_INTEGER = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LABELS = tuple(dtype for dtype in ANY_INTEGER if dtype != torch.uint64)
BOOLEAN = (torch.bool,)
NUMERIC = (*BOOLEAN, *ANY_INTEGER, *FLOATING)

_GREATEST = torch.finfo(torch.float64).max

Size = int | str
"""One size of a shape: a number that must be met, or a letter that says what the size stands for."""


def accumulation(dtype: torch.dtype) -> tuple[torch.dtype]:
    """The dtype that sums of products of `dtype` are kept in, as a choice of one."""
    return (torch.float64 if dtype == torch.float64 else torch.float32,)


def tensor(op: str, name: str, value: Any, shape: Sequence[Size], dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Check that `value` is a tensor of one of `dtypes` and of `shape`, with no empty dimension."""
    # The messages are built only when they are needed: Dynamo cannot print the symbolic sizes of dynamic shapes.
    if not isinstance(value, Tensor):
        wanted = f"{_dtype_names(dtypes)} tensor of shape {_shape_text(shape)}"
        raise TypeError(f"{op}: `{name}` must be {_with_article(wanted)}, got {_describe(value)}")
    if value.dtype not in dtypes:
        wanted = f"{_dtype_names(dtypes)} tensor"
        raise TypeError(f"{op}: `{name}` must be {_with_article(wanted)}, got {_describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else _name(value.layout)
        raise TypeError(f"{op}: `{name}` must be a dense tensor (torch.strided), got a {kind} one")
    _no_transform(op, name, value)
    sizes_fit = value.dim() == len(shape) and all(
        size == actual for size, actual in zip(shape, value.shape, strict=True) if not isinstance(size, str)
    )
    if not sizes_fit:
        raise ValueError(f"{op}: `{name}` must be of shape {_shape_text(shape)}, got {_describe(value)}")
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


def with_autocast(value: Any, other: Any) -> Any:
    """`value` in the dtype of `other` where autocast is on, as PyTorch's own functions would have it; else itself."""
    if not (isinstance(value, Tensor) and isinstance(other, Tensor) and value.dtype != other.dtype):
        return value
    both_float = value.is_floating_point() and other.is_floating_point()
    return value.to(other.dtype) if both_float and torch.is_autocast_enabled(other.device.type) else value


def constant(op: str, name: str, value: Tensor) -> None:
    """Check that no gradient is asked for through `value`, which the op treats as a constant."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: `{name}` must not require a gradient (pass `{name}.detach()`), got requires_grad=True")


def saveable(value: Tensor) -> Tensor:
    """`value` as backward can keep it: a copy of one that was made under ``torch.inference_mode``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not value.is_inference():
        return value
    return value.clone()


def _no_transform(op: str, name: str, value: Tensor) -> None:
    """Refuse forward-mode derivatives and the transforms of torch.func, which pass custom ops by or end inside them.

    PyTorch drops the tangent of an op without a forward derivative where no gradient is asked for: it would be 0.
    """
    if torch.compiler.is_compiling():
        return
    if functorch.is_batchedtensor(value):
        raise NotImplementedError(f"{op}: torch.vmap is not supported, call the op once for each `{name}`")
    if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(
            f"{op}: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not supported, use"
            f" torch.autograd.grad; `{name}` has a tangent"
        )
    if value.is_floating_point() and functorch.is_gradtrackingtensor(value):
        raise NotImplementedError(
            f"{op}: torch.func.grad and its like are not supported, use torch.autograd.grad; `{name}` is tracked by one"
        )


def readable(value: Tensor) -> bool:
    """Whether values can be read, and reading them makes nobody wait: eagerly, on the CPU, where nothing traces."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def finite(op: str, name: str, value: Tensor, infinity: bool = False, products: bool = False) -> None:
    """Check that `value` holds no NaN, and no infinity unless allowed; nor, with `products`, do inner products of rows.

    Only where the value is `readable`. Elsewhere the ops turn the loss into NaN instead, so that bad values are never
    silent.
    """
    if not readable(value):
        return
    (accumulate,) = accumulation(value.dtype)
    # One read, where the rest takes several.
    if not (infinity or products) and value.numel() and all(bound.isfinite() for bound in value.detach().aminmax()):
        return
    # No product of two rows is greater than the square of the norm of all.
    longest = math.sqrt(torch.finfo(accumulate).max)
    if torch.linalg.vector_norm(value.detach(), dtype=accumulate) <= longest:
        return
    bad = value.isnan() if infinity else ~value.isfinite()
    if bad.any():
        wanted = "be free of NaN" if infinity else "be finite"
        where = f" in row {int(bad.nonzero()[0, 0])}" if value.dim() else ""
        raise ValueError(f"{op}: `{name}` must {wanted}, got {value[bad][0].item()}{where}")
    if products:
        greatest = value.detach().abs().amax().double()
        length = greatest * torch.linalg.vector_norm(value.detach() / greatest, dim=-1, dtype=torch.float64).amax()
        if length > longest:
            raise ValueError(
                f"{op}: `{name}` must have rows whose inner products are finite in {_name(accumulate)}, of a length of"
                f" at most {longest:.3g}, got one of {length:.3g}"
            )


def real(
    op: str, name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf, open_minimum: bool = False
) -> float:
    """Check that `value` is a finite real number within [`minimum`, `maximum`] and return it as float."""
    wanted = _range_text(minimum, maximum, open_minimum)
    if not _is_number(value, Real):
        raise TypeError(f"{op}: `{name}` must be a finite number{wanted}, got {_kind(value)}")
    above = value > minimum if open_minimum else value >= minimum
    # Not math.isfinite: Dynamo makes a float that changes between calls symbolic, and follows comparisons alone.
    if not (-_GREATEST <= value <= _GREATEST and above and value <= maximum):
        raise ValueError(f"{op}: `{name}` must be a finite number{wanted}, got {value!r}")
    return float(value)


def reciprocal(op: str, name: str, value: Any, dtype: torch.dtype) -> float:
    """Check that `value` is a positive number with a finite reciprocal in `dtype` and return it as float."""
    number, least = real(op, name, value, 0, open_minimum=True), torch.finfo(dtype).tiny
    if number < least or number > 1 / least:
        raise ValueError(f"{op}: `{name}` must be from {least:.3g} to {1 / least:.3g}, got {number!r}")
    return number


def integer(op: str, name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Check that `value` is an integer within [`minimum`, `maximum`] and return it."""
    if not _is_number(value, (Integral, torch.SymInt)):
        raise TypeError(f"{op}: `{name}` must be an integer{_span_text(minimum, maximum)}, got {_kind(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{op}: `{name}` must be an integer{_span_text(minimum, maximum)}, got {value}")
    number: int = value
    return number


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(op: str, name: str, value: Any) -> None:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` must be True or False, got {_kind(value)}")


def _with_article(text: str) -> str:
    return f"{'an' if text.startswith('int') else 'a'} {text}"


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


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    kinds = {FLOATING: "floating-point", ANY_INTEGER: "integer", LABELS: "integer (not uint64)", NUMERIC: "numeric"}
    return kinds.get(tuple(dtypes)) or " or ".join(map(_name, dtypes))


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_name(value.dtype)} of shape {_shape_text(value.shape)}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, bool | str | Real | None) else type(value).__name__
