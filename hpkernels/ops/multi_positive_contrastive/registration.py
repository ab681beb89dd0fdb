"""`multi_positive_contrastive` as a PyTorch custom op: schema, dispatch to a backend, meta, autograd.

The op takes one branch or two, z and z_mixed, with the same positives and negatives. It returns the loss of each branch
and the (4, N) statistics of its anchors (see ``reference.py``), all that backward keeps besides its inputs.
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
from hpkernels.ops.multi_positive_contrastive import cpu, reference

_cuda.register("multi_positive_contrastive")
_triton.register("multi_positive_contrastive")
backends.register("multi_positive_contrastive", "cpu", cpu)
backends.register("multi_positive_contrastive", "reference", reference)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive",
    mutates_args=(),
    schema="(Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor specific_weight, Tensor? negatives,"
    " Tensor seed, SymInt anchors_per_image, float temperature, float scale, float negative_rate, str variant,"
    " bool reweight, bool keep_specific_only, bool symmetric, str backend) -> (Tensor losses, Tensor rows)",
)
@full_precision
def multi_positive_contrastive(z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    *options, _, backend = arguments  # whether the relations are symmetric matters to backward only
    for bits in options[:2]:
        if bits is not None and bits.device.type == "cpu":  # a mask may have been made or changed where nothing is read
            check_bits(bits)
    implementation = backends.implementation("multi_positive_contrastive", backend)
    return implementation.forward(_branches(z, z_mixed), *options)


@multi_positive_contrastive.register_fake
def _(z: Tensor, z_mixed: Tensor | None, *arguments: Any) -> Any:
    (accumulate,) = check.accumulation(z.dtype)
    count = len(_branches(z, z_mixed))
    return z.new_empty((count,), dtype=accumulate), z.new_empty((count, 4, z.shape[0]), dtype=accumulate)


@torch.library.custom_op(
    "hpkernels::multi_positive_contrastive_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor z, Tensor? z_mixed, Tensor positives, Tensor? specific, Tensor? negatives,"
    " Tensor seed, Tensor rows, SymInt anchors_per_image, float temperature, float negative_rate, bool symmetric,"
    " str backend) -> Tensor[] grads",
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, z_mixed, positives, specific, _, negatives, seed, *constants = inputs
    anchors_per_image, temperature, _, negative_rate, *_, symmetric, backend = constants
    _, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(z, z_mixed, positives, specific, negatives, seed, rows)
    ctx.constants = (anchors_per_image, temperature, negative_rate, symmetric, backend)


def _backward(ctx: Any, grad_losses: Tensor, _grad_rows: Tensor | None) -> tuple[Tensor | None, ...]:
    *branches, positives, specific, negatives, seed, rows = ctx.saved_tensors
    needs_z, needs_mixed, *_ = ctx.needs_input_grad
    asked = slice(0 if needs_z else 1, 2 if needs_mixed else 1)  # a branch that needs no gradient is left out
    first, second = (*branches[asked], None)[:2]
    grads = multi_positive_contrastive_backward(
        grad_losses[asked], first, second, positives, specific, negatives, seed, rows[asked], *ctx.constants
    )
    return grads[0] if needs_z else None, grads[-1] if needs_mixed else None, *(None,) * 14


multi_positive_contrastive.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("multi_positive_contrastive", multi_positive_contrastive_backward)
