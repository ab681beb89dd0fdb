"""`multi_positive_contrastive` as a PyTorch custom op: schema, dispatch to a backend, meta, autograd.

The op takes one branch or two, z and z_mixed, with the same positives and negatives. It returns the loss of each branch
and the (N, 4) statistics of its anchors (see ``reference.py``). What a backend finds of the pairs before any logit,
`contrastive_pairs` returns first; with the inputs and the statistics that is what backward keeps.

All three also serve a part of the N anchors, the rows of some whole images, which is what a rank of many devices has:
`positives` and `specific` have R rows then, those of anchors from `first` on. ``hpkernels/distributed`` calls them so:
it adds up the numbers of images that `images_of` finds in each part, hands them to forward, and hands the statistics of
all anchors to backward, which returns the gradients of the R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _checks as check
from hpkernels.ops import _cuda, _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.multi_positive_contrastive import cpu, reference, routes
from hpkernels.positive_mask import check_bits

_cuda.register("multi_positive_contrastive")
_triton.register("multi_positive_contrastive")
backends.register("multi_positive_contrastive", "cpu", cpu)
backends.register("multi_positive_contrastive", "reference", reference)


@torch.library.custom_op(
    "hpkernels::contrastive_pairs",
    mutates_args=(),
    schema="(Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives, Tensor seed,"
    " SymInt anchors_per_image, float negative_rate, str variant, bool reweight, bool keep_specific_only,"
    " bool symmetric, SymInt row_bytes, SymInt anchors, SymInt first, str backend) -> Tensor[]",
)
@full_precision
def contrastive_pairs(positives: Tensor, specific: Tensor | None, *arguments: Any) -> Any:
    *options, anchors, first, backend = arguments
    _check_masks(anchors, positives, specific)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.prepare(positives, specific, *options, anchors=anchors, first=first)


@contrastive_pairs.register_fake
def _(positives: Tensor, specific: Tensor | None, specific_weight: Tensor, negatives: Tensor | None, *rest: Any) -> Any:
    _, group, rate, *_, symmetric, row_bytes, anchors, _, backend = rest
    if backend in ("cpu", "reference"):
        return [] if positives.shape[0] == anchors else [positives.new_empty(2, dtype=torch.int64)]
    return routes.empty(positives, negatives, group, rate, symmetric, row_bytes, anchors)


def images_of(pairs: list[Tensor], backend: str) -> Tensor:
    """How many images of a part have a kept anchor, in the A and in the S term: (2,) int64."""
    found: Tensor = backends.implementation("multi_positive_contrastive", backend).images_of(pairs)
    return found


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive",
    mutates_args=(),
    schema="(Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives,"
    " Tensor seed, Tensor[] pairs, SymInt anchors_per_image, float temperature, float scale, float negative_rate,"
    " str variant, bool reweight, bool keep_specific_only, bool symmetric, Tensor? images, SymInt first, str backend)"
    " -> (Tensor losses, Tensor rows)",
)
@full_precision
def multi_positive_contrastive(
    z: Tensor, z_mixed: Tensor | None, positives: Tensor, specific: Tensor | None, *arguments: Any
) -> Any:
    # Whether the relations are symmetric matters to backward only.
    *options, _, images, first, backend = arguments
    _check_masks(len(z), positives, specific)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.forward(_branches(z, z_mixed), positives, specific, *options, images=images, first=first)


@multi_positive_contrastive.register_fake
def _(z: Tensor, z_mixed: Tensor | None, positives: Tensor, *arguments: Any) -> Any:
    (accumulate,) = check.accumulation(z.dtype)
    count = len(_branches(z, z_mixed))
    return z.new_empty((count,), dtype=accumulate), z.new_empty((count, positives.shape[0], 4), dtype=accumulate)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor? negatives,"
    " Tensor seed, Tensor[] pairs, Tensor rows, SymInt anchors_per_image, float temperature, float negative_rate,"
    " bool symmetric, Tensor? positives_t, Tensor? specific_t, SymInt first, str backend) -> Tensor[] grads",
)
@full_precision
def multi_positive_contrastive_backward(grad_losses: Tensor, z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    # Of relations that are not symmetric a part also needs its rows of their transposes.
    *options, positives_t, specific_t, first, backend = arguments
    transposed = None if positives_t is None else (positives_t, specific_t)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.backward(grad_losses, _branches(z, z_mixed), *options, transposed=transposed, first=first)


@multi_positive_contrastive_backward.register_fake
def _(grad_losses: Tensor, z: Tensor, z_mixed: Tensor | None, positives: Tensor, *arguments: Any) -> Any:
    return [z.new_empty((positives.shape[0], z.shape[1])) for _ in _branches(z, z_mixed)]


def _branches(z: Tensor, z_mixed: Tensor | None) -> list[Tensor]:
    return [z] if z_mixed is None else [z, z_mixed]


def _check_masks(anchors: int, *masks: Tensor | None) -> None:
    for bits in masks:
        if bits is not None and bits.device.type == "cpu":  # a mask may have been made or changed where nothing is read
            check_bits(bits, None if len(bits) == anchors else anchors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, z_mixed, positives, specific, _, negatives, seed, pairs, *constants = inputs
    anchors_per_image, temperature, _, negative_rate, *_, symmetric, _, first, backend = constants
    _, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(z, z_mixed, positives, specific, negatives, seed, rows, *pairs)
    ctx.constants = (anchors_per_image, temperature, negative_rate, symmetric, None, None, first, backend)


def _backward(ctx: Any, grad_losses: Tensor, _grad_rows: Tensor | None) -> tuple[Any, ...]:
    z, z_mixed, positives, specific, negatives, seed, rows, *pairs = ctx.saved_tensors
    if rows.shape[1] != z.shape[0]:
        raise RuntimeError("multi_positive_contrastive: a part has not the statistics that backward takes")
    needs_z, needs_mixed, *_ = ctx.needs_input_grad
    asked = slice(0 if needs_z else 1, 2 if needs_mixed else 1)  # a branch that needs no gradient is left out
    first, second = (*(z, z_mixed)[asked], None)[:2]
    grads = multi_positive_contrastive_backward(
        grad_losses[asked], first, second, positives, specific, negatives, seed, pairs, rows[asked], *ctx.constants
    )
    none = (*[None] * 5, [None] * len(pairs), *[None] * 11)
    return grads[0] if needs_z else None, grads[-1] if needs_mixed else None, *none


multi_positive_contrastive.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("multi_positive_contrastive", multi_positive_contrastive_backward)
