from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from training.evaluation.metrics import (
    UNMATCHED,
    SegmentationMetrics,
    accuracy,
    class_iou,
    confusion_matrix,
    majority_classes,
    match_clusters,
    to_json,
)


@pytest.mark.parametrize("name", ["metrics_5", "metrics_27_missing"])
def test_golden(golden, name):
    case = golden(name)
    classes = case.meta["classes"]
    cluster, linear = SegmentationMetrics(classes, match=True), SegmentationMetrics(classes)
    for prediction, label in zip(case.prediction, case.label, strict=True):
        cluster.update(prediction, label)
        linear.update(prediction, label)

    assert cluster.assignment.tolist() == case.assignment.tolist()
    for metrics, prefix in ((cluster, "cluster"), (linear, "linear")):
        scores = metrics.scores()
        assert scores["accuracy"] == pytest.approx(case.meta[f"{prefix}_Accuracy"], abs=1e-9)
        assert scores["miou"] == pytest.approx(case.meta[f"{prefix}_mIoU"], abs=1e-9)


def test_confusion_matrix_counts_pixels():
    prediction = torch.tensor([[0, 1, 1], [2, 0, 1]])
    label = torch.tensor([[0, 1, 2], [-1, -7, 1]])
    assert confusion_matrix(prediction, label, 3).tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 0]]


def test_scores_of_a_known_confusion():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [2, 0, 0]])
    assert accuracy(confusion).item() == pytest.approx(7 / 10)
    assert class_iou(confusion).tolist() == pytest.approx([3 / 6, 4 / 5, 0])


def test_absent_class_leaves_the_mean():
    metrics = SegmentationMetrics(4)
    metrics.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]))
    assert metrics.class_iou().tolist() == pytest.approx([50, 100 / 3, 0, math.nan], nan_ok=True)
    assert metrics.scores()["miou"] == pytest.approx((50 + 100 / 3 + 0) / 3)


def test_match_undoes_a_permutation():
    label = torch.arange(6).repeat_interleave(torch.tensor([5, 4, 6, 3, 7, 2]))
    cluster_of_class = torch.tensor([3, 5, 0, 1, 4, 2])
    metrics = SegmentationMetrics(6, match=True)
    metrics.update(cluster_of_class[label], label)
    assert metrics.assignment[cluster_of_class].tolist() == list(range(6))
    assert metrics.scores() == {"accuracy": 100.0, "miou": 100.0}


def test_match_is_optimal_not_greedy():
    # Greedily, cluster 0 takes class 0 for 10 pixels and leaves 0 for cluster 1; the best total is 9 + 9.
    assert match_clusters(torch.tensor([[10, 9], [9, 0]])).tolist() == [1, 0]


def test_unmatched_predictions_keep_their_value():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert metrics.assignment.tolist() == [0, 1]
    assert metrics.scores()["accuracy"] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    # 15 * 16 + 15 leaves the range of eight bits: pairs must not be formed in the dtype of the input.
    value = torch.full((3,), 15, dtype=dtype)
    assert confusion_matrix(value, value.short(), 16)[15, 15] == 3
    assert confusion_matrix(value.short(), value, 16)[15, 15] == 3


def test_batches_add_up():
    rng = np.random.default_rng(0)
    prediction, label = (torch.from_numpy(rng.integers(low, 5, (4, 9, 7))) for low in (0, -1))
    whole, parts = SegmentationMetrics(5, match=True), SegmentationMetrics(5, match=True)
    whole.update(prediction, label)
    for image in range(4):
        parts.update(prediction[image].T, label[image].T)
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.confusion.sum() == (label >= 0).sum()


def test_nothing_counted_is_nan():
    metrics = SegmentationMetrics(3, match=True)
    metrics.update(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), -1))
    metrics.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert all(math.isnan(score) for score in metrics.scores().values())
    assert metrics.class_iou().isnan().all()


@pytest.mark.parametrize(
    ("prediction", "label", "error", "message"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(3, 2).long(), ValueError, r"shape of `label` \(3, 2\), got \(2, 3\)"),
        (torch.tensor([0, 3]), torch.tensor([0, -1]), ValueError, r"`prediction` must be in \[0, 3\), got .* 0 to 3"),
        (torch.tensor([-1, 0]), torch.tensor([0, 0]), ValueError, r"`prediction` must be in \[0, 3\), got .* -1 to 0"),
        (torch.tensor([0, 1]), torch.tensor([0, 3]), ValueError, "`label` must be below 3 .* 0 to 3"),
        (torch.tensor([0.0]), torch.tensor([0]), TypeError, "`prediction` must hold integers, got torch.float32"),
        (torch.tensor([0]), torch.tensor([True]), TypeError, "`label` must hold integers, got torch.bool"),
        ([0], torch.tensor([0]), TypeError, "`prediction` must be a tensor, got list"),
    ],
)
def test_errors(prediction, label, error, message):
    metrics = SegmentationMetrics(3)
    with pytest.raises(error, match=message):
        metrics.update(prediction, label)
    assert not metrics.confusion.any()


def test_more_clusters_than_classes():
    # Clusters 0 and 1 are halves of class 0, cluster 2 is class 1: one to one, one half of class 0 is lost.
    metrics = SegmentationMetrics(2, 4, match=True)
    metrics.update(torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert metrics.assignment[:3].tolist() == [0, UNMATCHED, 1] and metrics.majority.tolist() == [0, 0, 1, UNMATCHED]
    assert metrics.scores() == pytest.approx({"accuracy": 100 * 5 / 6, "miou": (75 + 100) / 2})
    assert metrics.majority_scores() == {"accuracy": 100.0, "miou": 100.0}
    assert metrics.class_iou().tolist() == [75, 100]


def test_fewer_clusters_than_classes():
    # A class without a cluster exists, so it counts with an IoU of 0; a class without pixels leaves the mean.
    metrics = SegmentationMetrics(4, 2, match=True)
    metrics.update(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 2, 0, 0, 1]))
    assert metrics.assignment.tolist() == metrics.majority.tolist() == [2, 0]
    assert metrics.class_iou().tolist() == pytest.approx([200 / 3, 0, 100, math.nan], nan_ok=True)
    assert metrics.scores() == pytest.approx({"accuracy": 80, "miou": (200 / 3 + 0 + 100) / 3})


def test_majority_takes_the_class_of_most_pixels():
    assert majority_classes(torch.tensor([[10, 9], [9, 0], [0, 0]])).tolist() == [0, 0, UNMATCHED]


def test_json_has_null_for_what_is_not_finite():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    value = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": None, "e": "NaN", "f": 3}}
    read = json.loads(to_json(value), parse_constant=refuse)
    assert read == {"a": None, "b": [None, [None, 1.5]], "c": {"d": None, "e": "NaN", "f": 3}}
