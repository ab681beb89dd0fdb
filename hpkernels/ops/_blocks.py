"""Blocks of rows: what plain PyTorch makes of all pairs is made of so many rows at a time that it stays small."""

from __future__ import annotations

WORKSPACE = 2**28
"""Bytes, 256 MiB: what the temporaries of a call in plain PyTorch take, besides what has no more than a few numbers an
anchor or one bit a pair. Rows come by the 32 where their pairs are packed into words: that many are always allowed."""


def blocks(whole: slice, size: int) -> list[slice]:
    """Slices of up to `size` that make up `whole`."""
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def row_blocks(rows: int, bytes_per_row: int, multiple: int = 1) -> list[slice]:
    """Slices of `rows` whose temporaries, `bytes_per_row` each, fit `WORKSPACE`, at multiples of `multiple` rows."""
    return blocks(slice(0, rows), max(1, WORKSPACE // bytes_per_row // multiple) * multiple)
