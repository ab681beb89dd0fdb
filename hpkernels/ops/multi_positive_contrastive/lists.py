"""What the GPU backends of `multi_positive_contrastive` share: how g is scaled, and when and how pairs are listed."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels.cost import MOST_LISTED_DENSITY, lists_may_pay

_MOST_LISTED = 2**31 - 1  # positives across images; up to N = 378 000 their density is what bounds them
_STAGED_BYTES = 2**28  # of gradients of sampled columns at a time
_GREATEST_G = 2.0**14  # of the 65504 of float16


class Lists(NamedTuple):
    """Pairs across images by their first anchor, or patch position: where each list starts, and its columns."""

    offsets: Tensor
    columns: Tensor
    sampled_offsets: Tensor
    sampled_columns: Tensor


class Stage(NamedTuple):
    """Patch positions whose columns' gradients are held at a time: `count` from 32 `first_word` on.

    Those of column j are in the rows slots[j] to slots[j + 1] - 1 of `capacity`; `positions` is R transposed, whole.
    """

    positions: Tensor
    first_word: int
    count: int  # type: ignore[assignment]  # of tuple, and not called
    slots: Tensor
    capacity: int


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row statistics (4, N) with their coefficients divided by a factor, and the factor.

    The kernels round ``g_ij + g_ji`` to the dtype of z and multiply it with z. In float16 the coefficients of a large
    batch, or of an image with many anchors beside one with few, would be too small for that. Divided they are at most
    `_GREATEST_G` / 4, and so ``g_ij + g_ji`` at most `_GREATEST_G`: each of the two is a push times a probability less
    at most two pulls.
    """
    factor = rows[1:].amax().clamp(min=torch.finfo(rows.dtype).tiny * _GREATEST_G) / (_GREATEST_G / 4)
    return torch.cat((rows[:1], rows[1:] / factor)), factor


def allowed(anchors: int, group: int, negatives: Tensor | None, rate: float) -> bool:
    """Whether lists may take less time than blocks; given negatives may be any number, so they take blocks."""
    return negatives is None and lists_may_pay(anchors, group, rate)


def capacity(anchors: int) -> int:
    """How many positives across images are listed: half of the bytes of a packed mask."""
    return min(math.ceil(MOST_LISTED_DENSITY * anchors**2), _MOST_LISTED)


def sampled_capacity(positions: int, anchors: int, rate: float) -> int:
    """Room for the negatives drawn at some positions, ten standard deviations above their expected number."""
    expected = rate * positions * anchors
    return math.ceil(min(expected + 10 * math.sqrt(expected) + 64, positions * anchors))


def stages(bits: ModuleType, negatives: Tensor, anchors: int, dim: int, rate: float) -> list[Stage]:
    """The patch positions, so many at a time that the gradients of their columns fit `_STAGED_BYTES`.

    `bits` is the backend's module of kernels on packed bits, `negatives` R, (G, words).
    """
    positions = bits.transpose(negatives, anchors)
    expected_bytes = 4 * dim * max(rate, 1e-6) * anchors  # of a position
    words_at_a_time = max(1, int(_STAGED_BYTES / expected_bytes / 32))
    found = []
    for first_word in range(0, positions.shape[1], words_at_a_time):
        words = positions[:, first_word : first_word + words_at_a_time]
        count = min(32 * words.shape[1], len(negatives) - 32 * first_word)
        slots = bits.offsets_of(bits.count(words))
        found.append(Stage(positions, first_word, count, slots, sampled_capacity(count, anchors, rate)))
    return found
