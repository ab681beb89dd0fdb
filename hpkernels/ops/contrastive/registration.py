"""`contrastive` as a PyTorch custom op: schema, dispatch to a backend, meta, autograd.

The op returns the loss, the statistics of anchors and keys (see ``reference.py``), and, where one pass finds them, the
gradients but for the factor that backward knows (see ``chunked.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _checks as check
from hpkernels.ops import _triton
from hpkernels.ops._kernels import full_precision, refuse_double_backward
from hpkernels.ops.contrastive import chunked, cpu, reference
from hpkernels.ops.contrastive.chunked import Needs
from hpkernels.ops.contrastive.problem import Problem
from hpkernels.ops.contrastive.relations import Relation

_triton.register("contrastive")
backends.register("contrastive", "cpu", cpu)
backends.register("contrastive", "reference", reference)

_RELATIONS = (
    "Tensor? anchor_ids, Tensor? key_ids, Tensor? bits, Tensor? offsets, Tensor? indices, Tensor? weights,"
    " Tensor? excluded_anchor_ids, Tensor? excluded_key_ids, Tensor? excluded_bits, Tensor? excluded_offsets,"
    " Tensor? excluded_indices, Tensor? excluded_weights"
)
_TENSORS = f"Tensor anchors, Tensor? keys, {_RELATIONS}, Tensor? key_bias, Tensor temperature, Tensor? anchor_weight"
_SETTINGS = (
    "bool triangle, bool inside, bool decoupled, bool exclude_positives, bool both, str reduction, bool[] needs,"
    " str backend"
)


class Arguments(NamedTuple):
    """The arguments of the op, in the order of its schema."""

    anchors: Tensor
    keys: Tensor | None
    positives: Relation
    excluded: Relation
    key_bias: Tensor | None
    temperature: Tensor
    anchor_weight: Tensor | None
    triangle: bool
    inside: bool
    decoupled: bool
    exclude_positives: bool
    both: bool
    reduction: str
    needs: Needs
    backend: str

    @classmethod
    def of(cls, arguments: Any) -> Arguments:
        """From the arguments as the schema has them."""
        anchors, keys, *rest = arguments
        positives, excluded, rest = Relation(*rest[:6]), Relation(*rest[6:12]), rest[12:]
        *others, needs, backend = rest
        return cls._make((anchors, keys, positives, excluded, *others, Needs(*needs), backend))

    def flat(self) -> list[Any]:
        """As the schema has them."""
        return [*self[:2], *self.positives, *self.excluded, *self[4:-2], list(self.needs), self.backend]

    def parts(self) -> tuple[list[Tensor | None], list[Any]]:
        """The tensors and the settings of the schema."""
        flat, settings = self.flat(), _SETTINGS.count(",") + 1
        return flat[:-settings], flat[-settings:]

    @property
    def one_pass(self) -> bool:
        """Whether forward finds the gradients as well."""
        return any(self.needs) and not self.both and not self.triangle and self.reduction != "none"

    def problem(self, kernels: Any) -> Problem:
        """What the backends compute with."""
        (accumulate,) = check.accumulation(self.anchors.dtype)
        return Problem(
            kernels.vectors(self.anchors),
            None if self.keys is None else kernels.vectors(self.keys),
            self.positives,
            self.excluded,
            None if self.key_bias is None else self.key_bias.detach().to(accumulate).contiguous(),
            1 / self.temperature.detach(),
            0 if self.keys is None else -1,
            self.triangle,
            self.inside,
            self.decoupled,
            self.exclude_positives,
        )


@torch.library.custom_op(
    "hpkernels::contrastive",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTINGS}) -> (Tensor loss, Tensor rows, Tensor columns, Tensor[] gradients)",
)
@full_precision
def contrastive(*flat: Any) -> Any:
    arguments = Arguments.of(flat)
    kernels = backends.implementation("contrastive", arguments.backend)
    problem = arguments.problem(kernels)
    found: list[Tensor] = []
    columns = None
    if arguments.one_pass:
        rows, gradients = chunked.one_pass(kernels, problem, arguments.anchor_weight, arguments.needs)
        mean = _divisor(rows, arguments.anchor_weight, arguments.reduction)
        found = [gradient.div_(mean) for gradient in gradients if gradient is not None]
    else:
        rows, columns = chunked.statistics(kernels, problem, arguments.both)
    loss = _loss(rows, arguments.anchor_weight, arguments)
    if columns is not None:
        loss = (loss + _loss(columns, None, arguments)) / 2
    for vectors in (problem.anchors, problem.keys, problem.key_bias):
        if vectors is not None:
            loss = loss + chunked.nothing_of(vectors).to(loss.dtype)
    return loss, rows, rows.new_empty(0) if columns is None else columns, found


@contrastive.register_fake
def _(*flat: Any) -> Any:
    arguments = Arguments.of(flat)
    anchors, keys, like = arguments.anchors, arguments.keys, arguments.temperature
    count = anchors.shape[0]
    key_count = count if keys is None else keys.shape[0]
    shapes = [anchors.shape, (key_count, anchors.shape[1]), (), (key_count,)]
    gradients = [like.new_empty(shape) for shape, needed in zip(shapes, arguments.needs, strict=True) if needed]
    return (
        like.new_empty(() if arguments.reduction != "none" else (count,)),
        like.new_empty((count, 4)),
        like.new_empty((key_count, 4) if arguments.both else (0,)),
        gradients if arguments.one_pass else [],
    )


@torch.library.custom_op(
    "hpkernels::contrastive_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor rows, Tensor columns, {_TENSORS}, {_SETTINGS}) -> Tensor[] gradients",
)
@full_precision
def contrastive_backward(grad_loss: Tensor, rows: Tensor, columns: Tensor, *flat: Any) -> Any:
    arguments = Arguments.of(flat)
    kernels = backends.implementation("contrastive", arguments.backend)
    of_rows = _coefficients(grad_loss, rows, arguments.anchor_weight, arguments)
    of_columns = _coefficients(grad_loss, columns, None, arguments) if arguments.both else None
    gradients = chunked.two_pass(kernels, arguments.problem(kernels), of_rows, of_columns, arguments.needs)
    return [gradient for gradient in gradients if gradient is not None]


@contrastive_backward.register_fake
def _(grad_loss: Tensor, rows: Tensor, columns: Tensor, *flat: Any) -> Any:
    arguments = Arguments.of(flat)
    anchors, keys = arguments.anchors, arguments.keys
    key_count = anchors.shape[0] if keys is None else keys.shape[0]
    shapes = [anchors.shape, (key_count, anchors.shape[1]), (), (key_count,)]
    return [rows.new_empty(shape) for shape, needed in zip(shapes, arguments.needs, strict=True) if needed]


@torch.library.custom_op(
    "hpkernels::contrastive_scaled",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor[] gradients, Tensor[] inputs) -> Tensor[]",
)
def contrastive_scaled(grad_loss: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients that forward has found, times that of the loss. They depend on `inputs`, so that autograd asks."""
    return [gradient * grad_loss for gradient in gradients]


@contrastive_scaled.register_fake
def _(grad_loss: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _divisor(statistics: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """What the sum of the losses is divided by."""
    if reduction != "mean":
        return statistics.new_ones(())
    counts = chunked.kept(statistics).to(statistics.dtype)
    mass = (counts if weight is None else counts * weight).sum()
    return mass.where(mass > 0, 1)


def _loss(statistics: Tensor, weight: Tensor | None, arguments: Arguments) -> Tensor:
    losses = chunked.losses_of(statistics, arguments.inside)
    if weight is not None:
        losses = losses * weight
    if arguments.reduction == "none":
        return losses
    return losses.sum() / _divisor(statistics, weight, arguments.reduction)


def _coefficients(grad_loss: Tensor, statistics: Tensor, weight: Tensor | None, arguments: Arguments) -> Tensor:
    """The numbers of backward, of the anchors or of the keys."""
    of_each = (
        grad_loss if arguments.reduction == "none" else grad_loss / _divisor(statistics, weight, arguments.reduction)
    )
    if arguments.both:
        of_each = of_each / 2
    coefficients = of_each.expand(len(statistics)) if weight is None else of_each * weight
    return chunked.numbers_of(statistics, coefficients, arguments.inside)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    arguments = Arguments.of(inputs)
    _, rows, columns, found = output
    ctx.mark_non_differentiable(rows, columns, *found)
    ctx.set_materialize_grads(False)  # of outputs as large as the gradients, which have none
    ctx.one_pass = arguments.one_pass
    ctx.dtypes = [None if value is None else value.dtype for value in _differentiable(arguments)]
    ctx.needs = arguments.needs
    if arguments.one_pass:
        ctx.found = len(found)
        # Of the inputs those that need gradients, for `contrastive_scaled`; a bank of keys may be written meanwhile.
        differentiable = zip(_differentiable(arguments), arguments.needs, strict=True)
        ctx.save_for_backward(*found, *(value for value, needed in differentiable if needed))
        return
    tensors, ctx.settings = arguments.parts()
    ctx.save_for_backward(rows, columns, *tensors)


def _differentiable(arguments: Arguments) -> tuple[Tensor | None, ...]:
    return arguments.anchors, arguments.keys, arguments.temperature, arguments.key_bias


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:  # statistics alone were used
        return (None,) * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors  # once: hooks such as checkpointing's refuse to give them again
    if ctx.one_pass:
        found = contrastive_scaled(grad_loss, saved[: ctx.found], saved[ctx.found :])
    else:
        rows, columns, *tensors = saved
        found = contrastive_backward(grad_loss, rows, columns, *tensors, *ctx.settings)
    left = iter(found)
    anchors, keys, temperature, key_bias = (
        next(left).to(dtype) if needed else None for needed, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
    )
    none = [None] * 12
    return anchors, keys, *none, key_bias, temperature, None, *[None] * 8


contrastive.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("contrastive", contrastive_backward)
refuse_double_backward("contrastive", contrastive_scaled)
