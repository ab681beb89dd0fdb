"""What every op promises about its inputs and errors, as checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def memory_layouts(value: Tensor) -> dict[str, Tensor]:
    """Copy a tensor into memory in the ways that views of larger tensors have.

    Args:
        value: any tensor.

    Returns:
        Tensors equal to `value` by the name of their layout: "reversed" (first dimension fastest), "strided" (every
        second row and third column), "offset" (not at the start of its storage).

    Examples:
        >>> import torch
        >>> from hpkernels.testing import memory_layouts
        >>> {name: copy.stride() for name, copy in memory_layouts(torch.zeros(2, 5)).items()}
        {'reversed': (1, 2), 'strided': (30, 3), 'offset': (5, 1)}
    """
    dims = tuple(reversed(range(value.dim())))
    backwards = value.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims)
    strided = value.new_zeros([2 * size if dim == 0 else 3 * size for dim, size in enumerate(value.shape)])
    strided = strided[tuple(slice(None, None, 2 if dim == 0 else 3) for dim in range(value.dim()))]
    strided.copy_(value)
    offset = value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
    return {"reversed": backwards, "strided": strided, "offset": offset}


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Assert that the ``with`` block does not write to any of `tensors`, not even the values that they have.

    Raises:
        AssertionError: a tensor was modified in place; the message gives its position.

    Examples:
        >>> import torch
        >>> from hpkernels.testing import unchanged
        >>> value = torch.zeros(3)
        >>> with unchanged(value):
        ...     _ = value.add_(0)
        Traceback (most recent call last):
        ...
        AssertionError: tensor 0 was modified in place
    """
    before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
    yield
    for position, (tensor, (version, values)) in enumerate(zip(tensors, before, strict=True)):
        differs = (tensor != values) & ~(tensor.isnan() & values.isnan())
        # A kernel that writes through a pointer does not raise the version, and one that writes back does not differ.
        assert tensor._version == version and not differs.any(), f"tensor {position} was modified in place"


@contextmanager
def helpful_error(error: type[Exception], op: str, argument: str, got: str) -> Iterator[None]:
    """Assert that the ``with`` block raises `error` with a message that reads "op: `argument` ... got ...".

    Args:
        error: the exact type.
        op: the name of the function that the user called.
        argument: the name of the argument that is wrong.
        got: a part of what the message says after "got".

    Raises:
        AssertionError: nothing is raised, or something else.

    Examples:
        >>> import hpkernels, torch
        >>> from hpkernels.testing import helpful_error
        >>> with helpful_error(ValueError, "masked_topk", "k", got="5"):
        ...     hpkernels.masked_topk(torch.eye(3), torch.eye(3), k=5)
    """
    try:
        yield
    except Exception as raised:
        assert type(raised) is error, f"expected {error.__name__}, got {raised!r}"
        message = str(raised)
        assert message.startswith(f"{op}: `{argument}` must "), message
        _, separator, came = message.rpartition(", got ")
        assert separator and got in came, message
    else:
        raise AssertionError(f"expected {error.__name__} about `{argument}` of {op}, nothing was raised")
