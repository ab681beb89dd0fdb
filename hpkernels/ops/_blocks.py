"""Blocks of rows: what plain PyTorch makes of all pairs is made of so many rows at a time that it stays small."""

from __future__ import annotations

from torch import Tensor

WORKSPACE = 2**28
"""Bytes, 256 MiB: what the temporaries of a call in plain PyTorch take, besides what has no more than a few numbers an
anchor or one bit a pair. Rows come by the 32 where their pairs are packed into words: that many are always allowed."""

CPU_WORKSPACE = 2**25
"""The same on the CPU, where blocks that stay in its caches take less time. A GPU needs larger ones to be busy."""


def blocks(whole: slice, size: int) -> list[slice]:
    """Slices of up to `size` that make up `whole`."""
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def row_blocks(tensor: Tensor, bytes_per_row: int, multiple: int = 1) -> list[slice]:
    """Slices of the rows of `tensor` whose temporaries, `bytes_per_row` each, fit; at multiples of `multiple` rows."""
    rows = max(1, workspace_of(tensor) // bytes_per_row // multiple) * multiple
    return blocks(slice(0, len(tensor)), rows)


def workspace_of(tensor: Tensor) -> int:
    """Bytes that temporaries may take on the device of `tensor`."""
    return min(WORKSPACE, CPU_WORKSPACE) if tensor.device.type == "cpu" else WORKSPACE
