"""Accuracy and mIoU of a segmentation, from one confusion matrix; clusters are matched to classes first."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class SegmentationMetrics:
    """Accumulates predictions against labels, image batch by image batch.

    Args:
        classes: how many classes, and how many values a prediction may take.
        match: predictions are clusters without a name: match each to one class (Hungarian algorithm) before scoring.

    Attributes:
        confusion: (classes, classes) int64 pixel counts so far; rows predicted, columns labelled.

    Example:
        >>> metrics = SegmentationMetrics(2, match=True)
        >>> metrics.update(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, -1]))
        >>> metrics.assignment.tolist(), metrics.scores()
        ([1, 0], {'accuracy': 100.0, 'miou': 100.0})
    """

    def __init__(self, classes: int, *, match: bool = False) -> None:
        self.classes = classes
        self.match = match
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count predictions in [0, classes) against labels of the same shape, where a negative label is ignored."""
        self.confusion += confusion_matrix(prediction, label, self.classes).cpu()

    @property
    def assignment(self) -> Tensor:
        """The class (classes,) int64 of each prediction value; the identity unless clusters are matched."""
        return match_clusters(self.confusion) if self.match else torch.arange(self.classes)

    def class_iou(self) -> Tensor:
        """IoU of each class (classes,) float32 in percent; NaN for a class in neither predictions nor labels."""
        return 100 * class_iou(self._by_class())

    def scores(self) -> dict[str, float]:
        """Pixel accuracy and mean IoU in percent; NaN before anything was counted."""
        confusion = self._by_class()
        fractions = {"accuracy": accuracy(confusion), "miou": class_iou(confusion).nanmean()}
        return {name: 100 * fraction.item() for name, fraction in fractions.items()}

    def _by_class(self) -> Tensor:
        return self.confusion[self.assignment.argsort()]


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Pixel counts (classes, classes) int64 by predicted (row) and labelled (column) value.

    Args:
        prediction: integers in [0, classes).
        label: integers below `classes`, the same shape; negative: ignore the pixel.
        classes: how many values there are.

    Raises:
        TypeError: an argument is not a tensor of integers.
        ValueError: the shapes differ, or a value is out of range.
    """
    _check_integers("prediction", prediction)
    _check_integers("label", label)
    if prediction.shape != label.shape:
        expected, actual = tuple(label.shape), tuple(prediction.shape)
        raise ValueError(f"`prediction` must have the shape of `label` {expected}, got {actual}")
    prediction, label = prediction.long(), label.to(prediction.device).long()
    if ((prediction < 0) | (prediction >= classes)).any():
        raise ValueError(f"`prediction` must be in [0, {classes}), got {_span(prediction)}")
    if (label >= classes).any():
        raise ValueError(f"`label` must be below {classes} or negative (ignored), got {_span(label)}")
    counted = label >= 0
    pairs = prediction[counted] * classes + label[counted]
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def match_clusters(confusion: Tensor) -> Tensor:
    """The class (classes,) int64 of each cluster: one to one, with the most pixels right (Hungarian algorithm)."""
    _, assignment = linear_sum_assignment(confusion.numpy(), maximize=True)
    return torch.from_numpy(assignment)


def accuracy(confusion: Tensor) -> Tensor:
    """Share of counted pixels that are right, a float32 scalar in [0, 1]; NaN if none was counted."""
    return _ratio(confusion.diagonal().sum(), confusion.sum())


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class (classes,) float32 in [0, 1]; NaN for 0 / 0, which a nanmean leaves out."""
    intersection = confusion.diagonal()
    return _ratio(intersection, confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


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
