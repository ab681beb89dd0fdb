"""`multi_positive_contrastive` as a PyTorch custom op: schema, dispatch to a backend, meta, autograd.

The op returns the loss and (4, N) statistics of the anchors (see ``reference.py``), all that backward keeps besides
its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _checks as check
from hpkernels.ops import _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.multi_positive_contrastive import cpu, reference

_triton.register("multi_positive_contrastive")
backends.register("multi_positive_contrastive", "cpu", cpu)
backends.register("multi_positive_contrastive", "reference", reference)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive",
    mutates_args=(),
    schema="(Tensor z, Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives, Tensor seed,"
    " SymInt anchors_per_image, float temperature, float scale, float negative_rate, str variant, bool reweight,"
    " bool keep_specific_only, bool symmetric, str backend) -> (Tensor loss, Tensor rows)",
)
@full_precision
def multi_positive_contrastive(z, *arguments):
    *arguments, _, backend = arguments  # whether the relations are symmetric matters to backward only
    return backends.implementation("multi_positive_contrastive", backend).forward(z, *arguments)


@multi_positive_contrastive.register_fake
def _(z, *arguments):
    (accumulate,) = check.accumulation(z.dtype)
    return z.new_empty((), dtype=accumulate), z.new_empty((4, z.shape[0]), dtype=accumulate)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, Tensor seed,"
    " Tensor rows, SymInt anchors_per_image, float temperature, float negative_rate, bool symmetric, str backend)"
    " -> Tensor grad_z",
)
@full_precision
def multi_positive_contrastive_backward(grad_loss, *arguments):
    *arguments, backend = arguments
    return backends.implementation("multi_positive_contrastive", backend).backward(grad_loss, *arguments)


@multi_positive_contrastive_backward.register_fake
def _(grad_loss, z, *arguments):
    return z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    z, positives, specific, _, negatives, seed, anchors_per_image, temperature, _, negative_rate, *others = inputs
    _, rows = output
    symmetric, backend = others[-2:]
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(z, positives, specific, negatives, seed, rows)
    ctx.constants = (anchors_per_image, temperature, negative_rate, symmetric, backend)


def _backward(ctx: Any, grad_loss: Tensor, _grad_rows: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_z = multi_positive_contrastive_backward(grad_loss, *ctx.saved_tensors, *ctx.constants)
    return grad_z, *(None,) * 14


multi_positive_contrastive.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("multi_positive_contrastive", multi_positive_contrastive_backward)
