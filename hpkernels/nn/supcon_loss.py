"""Supervised contrastive learning as its widely used implementation has it, as a module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.nn._settings import settings_of, text_of
from hpkernels.ops import _checks as check
from hpkernels.ops.contrastive import Labels, PairLists, contrastive

ContrastMode = Literal["one", "all"]

_OP = "SupConLoss"


class SupConLoss(nn.Module):
    """SupCon and SimCLR, with the arguments and the loss of the ``SupConLoss`` of the SupContrast repository.

    Each view of a sample is an anchor or, with ``contrast_mode="one"``, the first views alone are; all other views of
    the batch are its keys. Of an anchor with positive pairs of weights ``w_j`` and logits ``l_j = <anchor, key_j> /
    temperature`` the loss is ``temperature / base_temperature * sum_j w_j (log sum_k exp l_k - l_j) / sum_j w_j``
    (Khosla et al., NeurIPS 2020, L_out). The result is the mean over all anchors: those without positives count as 0.
    That is what SupContrast does since it has ``mask_pos_pairs`` (before, they made the loss NaN), and where
    `hpkernels.contrastive` differs: its mean leaves them out.

    `hpkernels.compat.SupConLoss` is another class of that name: the one of the published Hidden Positives repository,
    whose `forward` takes features and pools in the place of labels.

    Args:
        temperature: of the logits.
        contrast_mode: "all", every view is an anchor, or "one", the first view of each sample.
        base_temperature: the loss is multiplied by temperature / base_temperature.
        backend: see `hpkernels.contrastive`.

    Raises:
        TypeError, ValueError: a setting is not as described.

    Examples:
        >>> import torch, hpkernels
        >>> features = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=2).requires_grad_()
        >>> criterion = hpkernels.nn.SupConLoss(temperature=0.1)
        >>> criterion(features, labels=torch.tensor([0, 1, 1, 2])).backward()
        >>> features.grad.shape
        torch.Size([4, 2, 8])
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: ContrastMode = "all",
        base_temperature: float = 0.07,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name, value in {"temperature": temperature, "base_temperature": base_temperature}.items():
            check.reciprocal(_OP, name, value, torch.float32)
        check.choice(_OP, "contrast_mode", contrast_mode, ("one", "all"))
        backends.check_name(backend, f"{_OP}: `backend`")
        self.temperature = temperature
        self.contrast_mode: ContrastMode = contrast_mode
        self.base_temperature = base_temperature
        self.backend: Backend = backend

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The 0-d loss. Without `labels` and `mask` the other views of a sample are its positives (SimCLR).

        Args:
            features: (B, views, D) or (B, views, ...) floating-point, usually L2-normalised; gradients reach them.
            labels: B numbers of any dtype. Samples with an equal one, be it negative, are positives of each other.
            mask: (B, B) of any dtype: how much the views of sample j count as positives of those of sample i, at least
                0, whether symmetric or not; ``mask[i, i]`` is about the other views of the sample. No gradient.

        Returns:
            The loss, float32 (float64 for float64 `features`), 0-d.

        Raises:
            TypeError, ValueError: an argument is not as described, or `labels` and `mask` are both given.

        Notes:
            A mask with other values than 0 and 1 becomes lists of weighted pairs. To find out, masks that are not bool
            are read: on a GPU that waits for it, and ``torch.compile(fullgraph=True)`` takes labels and bool masks
            only. SupContrast divides by 1 in the place of weights that sum to less than 1e-6; here they are divided by
            their sum.
        """
        shape = ("B", "views", *["..."] * max(1, features.dim() - 2 if isinstance(features, Tensor) else 1))
        check.tensor(_OP, "features", features, shape)
        samples, views = features.shape[:2]
        if labels is not None and mask is not None:
            raise ValueError(f"{_OP}: `mask` must be None where `labels` are given, got both")
        rows = features.flatten(2).flatten(0, 1)
        every = self.contrast_mode == "all" or views == 1
        positives: Labels | PairLists | Tensor
        if mask is not None:
            positives = _tiled(mask, features, views if every else 1, views)
        else:
            ids = torch.arange(samples, device=features.device) if labels is None else _ids(labels, features)
            of_rows = ids.repeat_interleave(views)
            positives = Labels(of_rows) if every else Labels(ids, of_rows)
        loss = contrastive(
            rows if every else rows[::views],
            None if every else rows,
            positives=positives,
            exclude=None if every else _own(samples, views, features.device),
            temperature=self.temperature,
            reduction="sum",
            backend=self.backend,
        )
        anchors = samples * views if every else samples
        return loss * (self.temperature / self.base_temperature / anchors)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return text_of(settings_of(self, ("temperature", "contrast_mode", "base_temperature", "backend")))


def _own(samples: int, views: int, device: torch.device) -> Labels:
    """The pairs of the first view of each sample with itself, of samples and all views."""
    numbers = torch.arange(samples, device=device)
    of_views = numbers.new_full((samples, views), -1)
    of_views[:, 0] = numbers
    return Labels(numbers, of_views.flatten())


def _ids(labels: Tensor, features: Tensor) -> Tensor:
    """Numbers from 0 on, (B,) int64, that are equal where `labels` are."""
    samples = features.shape[0]
    dims = labels.shape if isinstance(labels, Tensor) and labels.numel() == samples else (samples,)
    check.tensor(_OP, "labels", labels, dims, check.NUMERIC)
    values = labels.detach().flatten().to(features.device)
    if not values.is_floating_point():
        values = values.long()
    # By sorting and not by torch.unique, whose result has a size that nobody knows ahead.
    ordered, order = values.sort()
    steps = torch.cat((order.new_zeros(1), (ordered[1:] != ordered[:-1]).long()))
    ids = torch.empty_like(order).scatter_(0, order, steps.cumsum(0))
    return ids.masked_fill(values.isnan(), -1) if values.is_floating_point() else ids  # NaN is equal to nothing


def _tiled(mask: Tensor, features: Tensor, anchor_views: int, views: int) -> Tensor | PairLists:
    """`mask` for all views of its samples: bool, or weighted lists."""
    samples = features.shape[0]
    check.tensor(_OP, "mask", mask, (samples, samples), check.NUMERIC)
    check.constant(_OP, "mask", mask)
    mask = mask.detach().to(features.device)
    weighted = False
    if mask.dtype != torch.bool:
        (accumulate,) = check.accumulation(features.dtype)
        weights = mask.to(accumulate)
        mask = weights > 0
        weighted = bool((weights != mask).any())
    mask = mask.repeat_interleave(anchor_views, dim=0).repeat_interleave(views, dim=1)
    if not weighted:
        return mask
    wrong = ~((weights >= 0) & weights.isfinite())
    if wrong.any():
        raise ValueError(f"{_OP}: `mask` must be finite and at least 0, got {weights[wrong][0].item():g}")
    anchors, keys = mask.nonzero(as_tuple=True)
    offsets = torch.cat((anchors.new_zeros(1), mask.sum(dim=1).cumsum(0)))
    return PairLists(offsets, keys, weights[anchors // anchor_views, keys // views])
