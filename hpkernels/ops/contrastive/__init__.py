"""The contrastive loss for everyone: many positives, anchors against keys, no N x K tensor."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.contrastive import fused, registration
from hpkernels.ops.contrastive.arguments import Aggregation, Denominator, Reduction, arguments_of, check_loss
from hpkernels.ops.contrastive.relations import Labels, PairLists, Pairs

__all__ = ["ContrastiveStatistics", "Labels", "PairLists", "contrastive"]


class ContrastiveStatistics(NamedTuple):
    """What the loss knows of its anchors and, in both directions, of its keys; without gradients.

    Attributes:
        log_denominator: (N,) log of the sum of the exponentials of an anchor's logits; -inf for an empty denominator.
        positives: (N,) int64, how many positives an anchor has.
        key_log_denominator: (K,) the same of the keys, or None.
        key_positives: (K,) int64, or None.
    """

    log_denominator: Tensor
    positives: Tensor
    key_log_denominator: Tensor | None = None
    key_positives: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor | None) -> ContrastiveStatistics:
        """From the statistics (N, 4) of anchors and (K, 4) of keys that kernels find."""
        of_keys = (None, None) if columns is None else (columns[:, 0], columns[:, 3].long())
        return cls(rows[:, 0], rows[:, 3].long(), *of_keys)


@overload
def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, ContrastiveStatistics]: ...


def contrastive(
    anchors: Tensor,
    keys: Tensor | None = None,
    *,
    positives: Pairs | tuple[Pairs, ...],
    exclude: Pairs | tuple[Pairs, ...] | None = None,
    exclude_positives: bool = True,
    temperature: float | Tensor = 0.07,
    key_bias: Tensor | None = None,
    positive_aggregation: Aggregation = "outside",
    denominator: Denominator = "all",
    both_directions: bool = False,
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_statistics: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ContrastiveStatistics]:
    """Compute a softmax contrastive loss with any number of positives for each anchor, without any N x K tensor.

    With ``l_ij = <anchors_i, keys_j> / temperature + key_bias_j``, positives of weights ``w_ij`` (1 but for weighted
    lists) and ``n_i = sum_j w_ij``, the loss of an anchor is
    ``L_i = log sum_{k in Den_i} exp l_ik - sum_j w_ij l_ij / n_i`` (SupCon, Khosla et al., NeurIPS 2020, L_out).
    InfoNCE and CLIP are the case of one positive.

    Args:
        anchors: (N, D) floating-point rows, any strides; usually L2-normalised, but any rows whose products do not
            overflow are safe.
        keys: (K, D), the dtype and device of `anchors`. None: the anchors are each other's keys, and none its own.
        positives: which pairs are positives: `Labels`, a `PositiveMask`, `PairLists`, or a tuple of them, whose union
            they are. An integer tensor stands for ``Labels`` of it, a bool tensor (N, K) for a mask. A pair that
            several forms name counts by the greatest of its weights.
        exclude: pairs that take no part, in the same forms: they are in no denominator, and no positives. Lists have
            no weights here.
        exclude_positives: False: a pair that `positives` and `exclude` both name stays a positive, so that `exclude`
            names false negatives alone.
        temperature: positive, a float or a 0-d floating-point tensor, which receives a gradient (1 / logit scale).
        key_bias: (K,) floating-point, added to the logits of each key, with a gradient; minus the log of a key's
            sampling probability is the log-Q correction.
        positive_aggregation: "outside" as above, or "inside": ``L_i = log sum_{Den_i} exp l_ik - log (sum_j w_ij exp
            l_ij / n_i)`` (SupCon's L_in; the form of MIL-NCE, Miech et al., CVPR 2020, but for ``log n_i``).
        denominator: Den_i are all pairs that take part ("all"), or those that are no positives ("negatives", decoupled
            contrastive learning, Yeh et al., ECCV 2022).
        both_directions: also the same loss of the keys with the anchors as their keys, from the same logits, and the
            mean of both (CLIP).
        anchor_weight: (N,) floating-point, at least 0, what each anchor's loss counts; no gradient. It has no say in
            the loss of the keys.
        reduction: "mean": the mean over the anchors that have positives and a denominator, weighted by
            `anchor_weight`; "sum"; or "none": (N,), not in both directions.
        return_statistics: also return `ContrastiveStatistics`.
        backend: "auto", "cuda", "triton", "cpu" or "reference". "cuda" takes those problems alone that are
            `multi_positive_contrastive`'s, which "auto" leaves to its kernels on a GPU where D is below 768.

    Returns:
        The loss, float32 (float64 for float64 `anchors`), 0-d or (N,); with `return_statistics` it and the statistics.
        Anchors without positives, or whose denominator is empty, contribute zero loss and gradient, and are left out
        of the mean; if nothing is left the loss is 0.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU, outside
            ``torch.compile``, values that are not finite, and lists with offsets or keys out of range, are a
            ValueError; elsewhere the loss is NaN, and listed keys out of range are no pairs.

    Notes:
        Logits and sums are float32 (float64) whatever the dtype of `anchors`. Gradients reach `anchors`, `keys`,
        `temperature` and `key_bias`; double backward is refused. Deterministic. Under autocast keys of another
        floating dtype are cast to that of the anchors. Memory: blocks of anchors with all keys in 32 MiB on the CPU
        and 1 GiB on a GPU, in up to four times that where those hold fewer than 256 anchors, and of 32 at least. With
        "mean" or "sum" in one direction the gradients are found forward, and kept in the accumulation's dtype;
        otherwise logits are computed again. Where the keys are the anchors and the relations symmetric, pairs i < j
        alone are computed.

    Examples:
        >>> import torch, hpkernels
        >>> from torch.nn.functional import normalize
        >>> images, texts = normalize(torch.eye(3) + 0.1), normalize(torch.eye(3) - 0.1).requires_grad_()
        >>> matching = hpkernels.Labels(torch.arange(3))
        >>> loss = hpkernels.contrastive(images, texts, positives=matching, both_directions=True)
        >>> loss.backward()
        >>> texts.grad.shape
        torch.Size([3, 3])
    """
    op = "contrastive"
    check.flag(op, "return_statistics", return_statistics)
    arguments = arguments_of(
        op,
        anchors,
        keys,
        positives=positives,
        exclude=exclude,
        exclude_positives=exclude_positives,
        temperature=temperature,
        key_bias=key_bias,
        positive_aggregation=positive_aggregation,
        denominator=denominator,
        both_directions=both_directions,
        anchor_weight=anchor_weight,
        reduction=reduction,
        backend=None,
    )
    if not return_statistics and (by := fused.chosen_backend(op, arguments, temperature, backend)) is not None:
        return fused.loss_of(op, arguments, temperature, by)
    arguments = arguments._replace(backend=backends.select(op, backend, anchors))
    loss, rows, columns, _ = registration.contrastive(*arguments.flat())
    check_loss(arguments, op, loss)
    if not return_statistics:
        return loss  # type: ignore[no-any-return]
    return loss, ContrastiveStatistics.of(rows, columns if both_directions else None)
