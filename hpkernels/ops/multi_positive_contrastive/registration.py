"""`multi_positive_contrastive` as a PyTorch custom op: schema, dispatch to a backend, meta, autograd.

The op takes one branch or two, z and z_mixed, with the same positives and negatives. It returns the loss of each branch
and the (N, 4) statistics of its anchors (see ``reference.py``). What a backend finds of the pairs before any logit,
`contrastive_pairs` returns first; with the inputs and the statistics that is what backward keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _checks as check
from hpkernels.ops import _cuda, _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.hidden_positives.positive_mask import check_bits
from hpkernels.ops.multi_positive_contrastive import cpu, reference, routes

_cuda.register("multi_positive_contrastive")
_triton.register("multi_positive_contrastive")
backends.register("multi_positive_contrastive", "cpu", cpu)
backends.register("multi_positive_contrastive", "reference", reference)


@torch.library.custom_op(
    "hpkernels::contrastive_pairs",
    mutates_args=(),
    schema="(Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives, Tensor seed,"
    " SymInt anchors_per_image, float negative_rate, str variant, bool reweight, bool keep_specific_only,"
    " bool symmetric, SymInt row_bytes, str backend) -> Tensor[]",
)
@full_precision
def contrastive_pairs(positives: Tensor, specific: Tensor | None, *arguments: Any) -> Any:
    *options, backend = arguments
    _check_masks(positives, specific)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.prepare(positives, specific, *options)


@contrastive_pairs.register_fake
def _(positives: Tensor, specific: Tensor | None, specific_weight: Tensor, negatives: Tensor | None, *rest: Any) -> Any:
    _, group, rate, *_, symmetric, row_bytes, backend = rest
    if backend in ("cpu", "reference"):
        return []
    return routes.empty(positives, negatives, group, rate, symmetric, row_bytes)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive",
    mutates_args=(),
    schema="(Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives,"
    " Tensor seed, Tensor[] pairs, SymInt anchors_per_image, float temperature, float scale, float negative_rate,"
    " str variant, bool reweight, bool keep_specific_only, bool symmetric, str backend)"
    " -> (Tensor losses, Tensor rows)",
)
@full_precision
def multi_positive_contrastive(
    z: Tensor, z_mixed: Tensor | None, positives: Tensor, specific: Tensor | None, *arguments: Any
) -> Any:
    *options, _, backend = arguments  # whether the relations are symmetric matters to backward only
    _check_masks(positives, specific)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.forward(_branches(z, z_mixed), positives, specific, *options)


@multi_positive_contrastive.register_fake
def _(z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    (accumulate,) = check.accumulation(z.dtype)
    count = len(_branches(z, z_mixed))
    return z.new_empty((count,), dtype=accumulate), z.new_empty((count, z.shape[0], 4), dtype=accumulate)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor? negatives,"
    " Tensor seed, Tensor[] pairs, Tensor rows, SymInt anchors_per_image, float temperature, float negative_rate,"
    " bool symmetric, str backend) -> Tensor[] grads",
)
@full_precision
def multi_positive_contrastive_backward(grad_losses: Tensor, z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    *options, backend = arguments
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.backward(grad_losses, _branches(z, z_mixed), *options)


@multi_positive_contrastive_backward.register_fake
def _(grad_losses: Tensor, z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    return [z.new_empty(z.shape) for _ in _branches(z, z_mixed)]


def _branches(z: Tensor, z_mixed: Tensor | None) -> list[Tensor]:
    return [z] if z_mixed is None else [z, z_mixed]


def _check_masks(*masks: Tensor | None) -> None:
    for bits in masks:
        if bits is not None and bits.device.type == "cpu":  # a mask may have been made or changed where nothing is read
            check_bits(bits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, z_mixed, positives, specific, _, negatives, seed, pairs, *constants = inputs
    anchors_per_image, temperature, _, negative_rate, *_, symmetric, backend = constants
    _, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(z, z_mixed, positives, specific, negatives, seed, rows, *pairs)
    ctx.constants = (anchors_per_image, temperature, negative_rate, symmetric, backend)


def _backward(ctx: Any, grad_losses: Tensor, _grad_rows: Tensor | None) -> tuple[Any, ...]:
    z, z_mixed, positives, specific, negatives, seed, rows, *pairs = ctx.saved_tensors
    needs_z, needs_mixed, *_ = ctx.needs_input_grad
    asked = slice(0 if needs_z else 1, 2 if needs_mixed else 1)  # a branch that needs no gradient is left out
    first, second = (*(z, z_mixed)[asked], None)[:2]
    grads = multi_positive_contrastive_backward(
        grad_losses[asked], first, second, positives, specific, negatives, seed, pairs, rows[asked], *ctx.constants
    )
    none = (*[None] * 5, [None] * len(pairs), *[None] * 9)
    return grads[0] if needs_z else None, grads[-1] if needs_mixed else None, *none


multi_positive_contrastive.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("multi_positive_contrastive", multi_positive_contrastive_backward)
