"""Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), in PyTorch integer arithmetic.

The same bits on every backend: CUDA, Triton and C++ compute it on 32-bit words, here int64 tensors hold them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words, as int64 tensors in [0, 2^32), for each counter; all inputs are 32-bit words too."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The int64 product wraps around, but all its 64 bits are those of the unsigned product.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def seed_key(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The key of an int64 seed: its low and its high word."""
    return seed & _WORD, (seed >> 32) & _WORD


def bernoulli(seed: Tensor, rows: int, columns: int, rate: float, first_row: int = 0) -> Tensor:
    """A (rows, columns) bool mask, each entry True with probability `rate`, a function of (seed, row, column) alone.

    Column j of row i is word ``j % 4`` of the generator at counter ``(j // 4, i, 0, 0)``; it is True if the word is
    below ``floor(rate * 2^32)``. So a mask can be made tile by tile, anywhere, without any state.

    Args:
        seed: 0-d int64 tensor.
        first_row: number of the first row, where the mask is a part of a larger one.
    """
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    block = torch.arange((columns + 3) // 4, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack(philox((block, row, zero, zero), seed_key(seed)), dim=-1)
    return words.flatten(1)[:, :columns] < int(rate * 2**32)
