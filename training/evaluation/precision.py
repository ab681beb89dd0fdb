"""How often discovered positives are right: the share of positive pairs whose patches have the same class."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from hpkernels import PositiveMask
from training.data import batch_of_step
from training.model import channel_dropout, patch_classes
from training.run import Run
from training.schedule import seed_step

_BATCHES = 4
_KINDS = ("agnostic", "specific")


class Found(NamedTuple):
    """Positives of one kind among N anchors, and what they were found by."""

    positives: PositiveMask
    threshold: Tensor  # (N,)
    features: Tensor  # (N, D) unit rows


@torch.no_grad()
def positive_precision(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    """Positives of a few batches of training images, as the loss of the trained run would find them.

    Returns:
        for "agnostic" and "specific" positives, apart for pairs "within" an image and "across" images: "per_anchor",
        their mean number, and "precision", the share in percent of the pairs of two labelled patches that have the same
        class; NaN without such pairs. The class of a patch is that of most of its pixels.
    """
    counts = {kind: {where: torch.zeros(3, dtype=torch.int64) for where in ("within", "across")} for kind in _KINDS}
    anchors = 0
    for step in range(run.steps, run.steps + _BATCHES):
        seed_step(run.config.seed, step)
        images = batch_of_step(step, len(run.train_bank), run.config.batch_size, run.config.seed)
        image = torch.arange(len(images), device=run.device).repeat_interleave(run.train_bank.anchors_per_image)
        same_image = PositiveMask.from_labels(image)
        classes = patch_classes(run.train_bank.labels(images), run.train_bank.grid, len(run.train_bank.data.classes))
        relevant: list[PositiveMask] = []  # pairs of labelled patches, and of those of one class
        if classes is not None:
            known = torch.where(classes.flatten() >= 0, 0, -1)
            relevant = [PositiveMask.from_labels(known), PositiveMask.from_labels(classes.flatten())]
        for kind, (positives, *_) in discovered(run, images).items():
            within = positives & same_image
            counts[kind]["within"][0] += _count(within)
            counts[kind]["across"][0] += _count(positives) - _count(within)
            for place, mask in enumerate(relevant, start=1):
                inside = _count(within & mask)
                counts[kind]["within"][place] += inside
                counts[kind]["across"][place] += _count(positives & mask) - inside
        anchors += len(image)
    return {
        kind: {
            where: {
                "per_anchor": int(number) / anchors,
                "precision": 100 * int(right) / int(labelled) if labelled else math.nan,
            }
            for where, (number, labelled, right) in of_kind.items()
        }
        for kind, of_kind in counts.items()
    }


def discovered(run: Run, images: Tensor) -> dict[str, Found]:
    """The task-agnostic and task-specific positives of the images (B,), with the dropout that the loss sees."""
    config, state = run.config, run.state
    quirk, rate = config.quirks.dropout_on_frozen, config.head.dropout
    tokens = run.train_bank.get(images).tokens
    codes = channel_dropout(state.ema_head.train(quirk)(tokens), rate, quirk)
    rows = {"agnostic": channel_dropout(tokens, rate, quirk), "specific": codes}
    pools = {"agnostic": state.pools.agnostic(), "specific": state.pools.specific()}
    found = {}
    for kind, features in rows.items():
        unit = F.normalize(features.float(), dim=-1).flatten(0, 1)
        threshold = hpkernels.masked_topk(unit, pools[kind], backend=config.backend).values[:, 0]
        positives = hpkernels.hidden_positives(unit, threshold, symmetric=config.loss.symmetric, backend=config.backend)
        found[kind] = Found(positives, threshold, unit)
    return found


def _count(mask: PositiveMask) -> int:
    return int(mask.count().sum())
