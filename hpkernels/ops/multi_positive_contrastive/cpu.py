"""CPU kernels of `multi_positive_contrastive`, without any N x N tensor: see ``reference.py`` for the formulas.

Two routes give the same result; the one with less work is taken. The sparse one computes the logits of positives and
sampled negatives alone. The dense one computes all logits, a block of anchors at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels._native import supports_cpu as supports
from hpkernels.ops import _checks as check
from hpkernels.ops.hidden_positives.bits import pack_bits, words_per_row
from hpkernels.ops.multi_positive_contrastive.reference import anchor_coefficients

__all__ = ["backward", "forward", "supports"]

_TILE = 2**20  # logits of the dense route held at a time
_SPARSE_COST = 4.0  # of a logit of the sparse route, in logits of the dense one, measured


def forward(
    z: Tensor,
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    anchors_per_image: int,
    temperature: float,
    scale: float,
    negative_rate: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and the (4, N) row statistics, for bit-packed positives (N, ceil(N / 32))."""
    (accumulate,) = check.accumulation(z.dtype)
    anchors = len(z)
    rows, positives, specific = z.detach().to(accumulate).contiguous(), *_contiguous(positives, specific)
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    sums = rows.new_empty((3, anchors))
    counts = rows.new_empty((2, anchors), dtype=torch.int64)
    kernels = torch.ops.hpkernels_cpu
    if _sparse_is_less_work(positives, specific, drawn):
        kernels.contrastive_sparse_forward(rows, 1 / temperature, positives, specific, drawn, sums, counts)
    else:
        for start, tile in _products(rows):
            kernels.contrastive_dense_forward(tile, start, 1 / temperature, positives, specific, drawn, sums, counts)
    log_denominator, agnostic_logits, specific_logits = sums
    usable = log_denominator > -torch.inf
    push, pull, pull_specific = anchor_coefficients(
        *counts.to(accumulate),
        usable,
        specific_weight,
        anchors_per_image=anchors_per_image,
        scale=scale,
        variant=variant,
        reweight=reweight,
        keep_specific_only=keep_specific_only,
    )
    log_denominator = log_denominator.where(usable, 0)
    loss = (push * log_denominator - pull * agnostic_logits - pull_specific * specific_logits).sum()
    loss = loss + (rows * 0).sum()  # 0, or NaN if z is not finite
    return loss, torch.stack((log_denominator, push, pull, pull_specific))


def backward(
    grad_loss: Tensor,
    z: Tensor,
    positives: Tensor,
    specific: Tensor | None,
    negatives: Tensor | None,
    seed: Tensor,
    rows: Tensor,
    anchors_per_image: int,
    temperature: float,
    negative_rate: float,
) -> Tensor:
    """The gradient of z from the row statistics; logits, probabilities and negatives are computed again."""
    anchors = len(z)
    vectors, positives, specific = z.detach().to(rows.dtype).contiguous(), *_contiguous(positives, specific)
    drawn = _negative_bits(negatives, seed, anchors_per_image, anchors, negative_rate)
    specific_t = None if specific is None else _transposed(specific, anchors)
    relations = (positives, _transposed(positives, anchors), specific, specific_t, drawn, _transposed(drawn, anchors))
    grad_z = torch.empty_like(vectors)
    kernels = torch.ops.hpkernels_cpu
    if _sparse_is_less_work(positives, specific, drawn):
        kernels.contrastive_sparse_backward(vectors, 1 / temperature, *relations, rows, grad_z)
    else:
        for start, tile in _products(vectors):
            kernels.contrastive_dense_backward(tile, start, 1 / temperature, *relations, rows)
            torch.mm(tile, vectors, out=grad_z[start : start + len(tile)])
    return (grad_z * grad_loss).to(z.dtype)


def _negative_bits(negatives: Tensor | None, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
    """R bit-packed, (G, ceil(N / 32)) int32."""
    if negatives is not None:
        return pack_bits(negatives)
    bits = torch.empty((rows, words_per_row(columns)), dtype=torch.int32)
    torch.ops.hpkernels_cpu.draw_negatives(int(seed), columns, rate, bits)
    return bits


def _contiguous(positives: Tensor, specific: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return positives.contiguous(), None if specific is None else specific.contiguous()


def _transposed(bits: Tensor, columns: int) -> Tensor:
    transposed = bits.new_empty((columns, words_per_row(len(bits))))
    torch.ops.hpkernels_cpu.transpose_bits(bits, columns, transposed)
    return transposed


def _sparse_is_less_work(positives: Tensor, specific: Tensor | None, negatives: Tensor) -> bool:
    anchors, count = len(positives), torch.ops.hpkernels_cpu.count_bits
    pairs = count(positives) + count(negatives) * (anchors // len(negatives))
    if specific is not None:
        pairs += count(specific)
    return _SPARSE_COST * pairs < anchors * anchors


def _products(z: Tensor):
    """Blocks of z @ z.T and the row that each begins with; each block is overwritten by the next."""
    anchors = len(z)
    rows = min(anchors, max(1, _TILE // anchors))
    products = z.new_empty((rows, anchors))
    for start in range(0, anchors, rows):
        block = z[start : start + rows]
        yield start, torch.mm(block, z.T, out=products[: len(block)])
