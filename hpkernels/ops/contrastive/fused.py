"""Problems of `contrastive` that the fused kernels of `multi_positive_contrastive` compute: those of its formula.

Anchors that are each other's keys, symmetric positives by one label or by mask, SupCon's loss and its mean. There is no
product in memory then, but the relation, N² / 8 bytes. Where rows are short the fused kernels are expected to take less
time on a GPU: see `hpkernels.cost.fused_is_faster`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpkernels import backends
from hpkernels.backends import Backend, BackendUnavailableError
from hpkernels.cost import fused_is_faster
from hpkernels.ops.contrastive.registration import Arguments
from hpkernels.ops.multi_positive_contrastive import mean_loss
from hpkernels.ops.multi_positive_contrastive.options import ContrastiveOptions, check_options
from hpkernels.positive_mask import PositiveMask

_OP = "multi_positive_contrastive"


def chosen_backend(op: str, arguments: Arguments, temperature: float | Tensor, backend: Backend) -> Backend | None:
    """The backend of the fused kernels that takes the problem, or None.

    Raises:
        BackendUnavailableError: "cuda" is asked for, which has fused kernels alone, and cannot take the problem.
    """
    asked, anchors = backends.requested(backend, op), arguments.anchors
    if asked in ("cpu", "reference"):
        return None
    fits = not isinstance(temperature, Tensor) and _has_its_formula(arguments)
    if asked == "cuda":
        if not fits:
            raise BackendUnavailableError(
                f"{op}: backend 'cuda' is not available: it takes the mean loss of anchors that are their own keys,"
                " with one label or a symmetric mask of positives, at a temperature that is a float, and no other"
                " options; use backend='triton'"
            )
        return backends.select(_OP, asked, anchors, op)
    if not fits or anchors.device.type == "cpu" or not fused_is_faster(*anchors.shape):
        return None
    chosen = backends.select(_OP, asked, anchors, op)
    return chosen if chosen in ("cuda", "triton") else None


def _has_its_formula(arguments: Arguments) -> bool:
    positives = arguments.positives
    forms = [positives.anchor_ids is not None, positives.bits is not None, positives.offsets is not None]
    one_label = positives.anchor_ids is None or positives.anchor_ids.shape[1] == 1
    nothing_else = arguments.anchor_weight is None and all(form is None for form in arguments.excluded)
    its_options = not arguments.inside and not arguments.decoupled and arguments.reduction == "mean"
    return arguments.triangle and sum(forms) == 1 and one_label and nothing_else and its_options


def loss_of(op: str, arguments: Arguments, temperature: Any, backend: Backend) -> Tensor:
    """The loss by the fused kernels of `backend`."""
    anchors, positives = arguments.anchors, arguments.positives
    if positives.bits is not None:
        mask = PositiveMask(positives.bits, len(anchors), symmetric=True)
    else:
        assert positives.anchor_ids is not None
        mask = PositiveMask.from_labels(positives.anchor_ids[:, 0])
    options = ContrastiveOptions(
        specific_weight=0.0,
        anchors_per_image=anchors.shape[0],
        temperature=temperature,
        base_temperature=None,
        negative_rate=1.0,
        negatives=None,
        seed=0,
        variant="joint",
        reweight=False,
        keep_specific_only=False,
    )
    return mean_loss(op, anchors, None, mask, None, check_options(op, anchors, options, has_specific=False), backend)
