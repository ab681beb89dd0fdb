"""Accuracy and mIoU of a segmentation, from one confusion matrix; clusters are matched to classes first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

UNMATCHED = -1
"""The class of a cluster that no class was matched to: its pixels are wrong."""


class SegmentationMetrics:
    """Accumulates predictions against labels, image batch by image batch.

    Args:
        classes: how many classes there are.
        clusters: how many values a prediction may take. None: as many as there are classes.
        match: predictions are clusters without a name: match each to a class before scoring.

    Attributes:
        confusion: (clusters, classes) int64 pixel counts so far; rows predicted, columns labelled.

    Example:
        >>> metrics = SegmentationMetrics(2, match=True)
        >>> metrics.update(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, -1]))
        >>> metrics.assignment.tolist(), metrics.scores()
        ([1, 0], {'accuracy': 100.0, 'miou': 100.0})
    """

    def __init__(self, classes: int, clusters: int | None = None, *, match: bool = False) -> None:
        self.classes = classes
        self.clusters = classes if clusters is None else clusters
        self.match = match
        self.confusion = torch.zeros(self.clusters, classes, dtype=torch.int64)
        self._assignment: Tensor | None = None

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count predictions in [0, clusters) against labels of the same shape, where a negative label is ignored."""
        self.confusion += confusion_matrix(prediction, label, self.classes, self.clusters).cpu()

    @property
    def counted(self) -> int:
        """How many labelled pixels were counted."""
        return int(self.confusion.sum())

    @property
    def assignment(self) -> Tensor:
        """The class (clusters,) int64 of each prediction value, one to one, `UNMATCHED` for the clusters left over.

        Values that need no matching are their own classes.
        """
        if self._assignment is not None:
            return self._assignment
        if self.match:
            return match_clusters(self.confusion)
        own = torch.arange(self.clusters)
        return own.where(own < self.classes, UNMATCHED)

    @assignment.setter
    def assignment(self, assignment: Tensor) -> None:
        """Take a matching that was made elsewhere."""
        self._assignment = assignment

    @property
    def majority(self) -> Tensor:
        """The class (clusters,) int64 that most pixels of each cluster have: many clusters may be one class."""
        return majority_classes(self.confusion)

    def class_iou(self) -> Tensor:
        """IoU of each class (classes,) float32 in percent; NaN for a class in neither predictions nor labels."""
        return 100 * class_iou(merge_clusters(self.confusion, self.assignment))

    def scores(self) -> dict[str, float]:
        """Pixel accuracy and mean IoU in percent; NaN before anything was counted."""
        return self._scores(self.assignment)

    def majority_scores(self) -> dict[str, float]:
        """The same with each cluster as the class that most of its pixels have."""
        return self._scores(self.majority)

    def _scores(self, assignment: Tensor) -> dict[str, float]:
        confusion = merge_clusters(self.confusion, assignment)
        fractions = {"accuracy": accuracy(confusion), "miou": class_iou(confusion).nanmean()}
        return {name: 100 * fraction.item() for name, fraction in fractions.items()}


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int, clusters: int | None = None) -> Tensor:
    """Pixel counts (clusters, classes) int64 by predicted (row) and labelled (column) value.

    Args:
        prediction: integers in [0, clusters).
        label: integers below `classes`, the same shape; negative: ignore the pixel.
        classes: how many labels there are.
        clusters: how many values a prediction may take. None: `classes`.

    Raises:
        TypeError: an argument is not a tensor of integers.
        ValueError: the shapes differ, or a value is out of range.
    """
    _check_integers("prediction", prediction)
    _check_integers("label", label)
    if prediction.shape != label.shape:
        expected, actual = tuple(label.shape), tuple(prediction.shape)
        raise ValueError(f"`prediction` must have the shape of `label` {expected}, got {actual}")
    clusters = classes if clusters is None else clusters
    prediction, label = prediction.long(), label.to(prediction.device).long()
    if ((prediction < 0) | (prediction >= clusters)).any():
        raise ValueError(f"`prediction` must be in [0, {clusters}), got {_span(prediction)}")
    if (label >= classes).any():
        raise ValueError(f"`label` must be below {classes} or negative (ignored), got {_span(label)}")
    counted = label >= 0
    pairs = prediction[counted] * classes + label[counted]
    return pairs.bincount(minlength=clusters * classes).view(clusters, classes)


def match_clusters(confusion: Tensor) -> Tensor:
    """The class (clusters,) int64 of each cluster: one to one, with the most pixels right (Hungarian algorithm).

    With more clusters than classes those left over are `UNMATCHED`; with fewer, some classes have no cluster.
    """
    clusters, classes = linear_sum_assignment(confusion.numpy(), maximize=True)
    assignment = torch.full((len(confusion),), UNMATCHED)
    assignment[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return assignment


def majority_classes(confusion: Tensor) -> Tensor:
    """The class (clusters,) int64 that most pixels of each cluster have; `UNMATCHED` for a cluster without pixels."""
    return confusion.argmax(dim=1).where(confusion.any(dim=1), UNMATCHED)


def merge_clusters(confusion: Tensor, assignment: Tensor) -> Tensor:
    """Pixel counts (classes + 1, classes) int64 by class: row c adds up the clusters of class c, the last the rest."""
    classes = confusion.shape[1]
    rows = assignment.where(assignment >= 0, classes)
    return torch.zeros(classes + 1, classes, dtype=confusion.dtype).index_add_(0, rows, confusion)


def accuracy(confusion: Tensor) -> Tensor:
    """Share of counted pixels that are right, a float32 scalar in [0, 1]; NaN if none was counted."""
    return _ratio(confusion.diagonal().sum(), confusion.sum())


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class (classes,) float32 in [0, 1]; NaN for 0 / 0, which a nanmean leaves out.

    Rows after that of the last class are predictions of no class: they are in no class's prediction.
    """
    intersection = confusion.diagonal()
    predicted = confusion.sum(dim=1)[: len(intersection)]
    return _ratio(intersection, confusion.sum(dim=0) + predicted - intersection)


def to_json(value: Any) -> str:
    """JSON of plain values; a number that is not finite becomes null, because JSON has no name for it."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # float32, as in the published code: its figures are then met to the last bit.
    return part.float() / whole.float()


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise TypeError(f"`{name}` must hold integers, got {value.dtype}")


def _span(values: Tensor) -> str:
    return f"values from {values.min().item()} to {values.max().item()}"
