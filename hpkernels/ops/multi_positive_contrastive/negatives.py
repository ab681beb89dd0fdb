"""The negatives R (G, N) bit-packed: what is given, or what the seed draws."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels.ops._blocks import row_blocks
from hpkernels.ops._philox import bernoulli
from hpkernels.ops.hidden_positives.bits import as_bits, pack_bits, words_per_row


def negative_bits(negatives: Tensor | None, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """R, (G, ceil(N / 32)) int32: `negatives` as they are or packed, or `rows` x `columns` drawn with `rate`."""
    drawn: Tensor = drawn_negatives(seed, rows, columns, rate) if negatives is None else as_bits(negatives)
    return drawn


# A custom op for the reason that those of hidden_positives/bits.py have.
@torch.library.custom_op(
    "hpkernels::drawn_negatives",
    mutates_args=(),
    schema="(Tensor seed, SymInt rows, SymInt columns, float rate) -> Tensor",
)
def drawn_negatives(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """The bits of ``bernoulli(seed, rows, columns, rate)``."""
    if rate in (0, 1):
        alike = torch.full((1, columns), rate == 1, dtype=torch.bool, device=seed.device)
        return pack_bits(alike).expand(rows, -1).contiguous()
    bits = seed.new_empty((rows, words_per_row(columns)), dtype=torch.int32)
    for block in row_blocks(bits, 32 * columns):
        bits[block] = pack_bits(bernoulli(seed, block.stop - block.start, columns, rate, block.start))
    return bits


@drawn_negatives.register_fake
def _(seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    return seed.new_empty((rows, words_per_row(columns)), dtype=torch.int32)
