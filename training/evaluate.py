"""Score a trained run on labelled images.

python -m training.evaluate --checkpoint runs/camvid/checkpoint.pt [--root DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable

from tqdm import tqdm

from training.data import open_data
from training.features import FeatureBank
from training.metrics import SegmentationMetrics
from training.run import open_bank, open_trained
from training.segment import CLUSTERED, SEGMENTATIONS, segment
from training.state import TrainingState

HEADLINE = "kmeans"
"""The segmentation that stands for HP: the codes are clustered exactly as the baseline clusters the frozen features,
so that the two differ in the representation alone. ``docs/training.md`` says more."""


def evaluate(state: TrainingState, bank: FeatureBank, only: Iterable[str] = SEGMENTATIONS) -> dict[str, dict] | None:
    """Score each segmentation in `only` on all labelled images, and keep the classes that clusters were matched to.

    Returns:
        for each segmentation accuracy and mIoU in percent and the IoU of each class; None without labels.
    """
    clusters = len(state.linear_probe.bias)
    metrics = {name: SegmentationMetrics(clusters, match=name in CLUSTERED) for name in only}
    for images in tqdm(list(bank.batches(8)), desc="evaluate", unit="batch", leave=False):
        labels = bank.labels(images)
        if labels is None:
            return None
        maps = segment(state, bank.get(images).tokens, bank.grid, tuple(labels.shape[1:]))
        for name, metric in metrics.items():
            metric.update(maps[name], labels)
    for row, name in enumerate(CLUSTERED):
        if name in metrics:
            state.clusterings.assignments[row] = metrics[name].assignment
    return {name: metric.scores() | {"class_iou": metric.class_iou().tolist()} for name, metric in metrics.items()}


def summary(scores: dict[str, dict] | None) -> dict[str, dict]:
    """The scores as `metrics.json` has them; None in place of figures where there were no labels."""

    def of(name: str) -> dict[str, float] | None:
        return None if scores is None else {key: round(scores[name][key], 3) for key in ("accuracy", "miou")}

    return {
        "baseline": {"unsupervised": of("baseline")},
        "hp": {
            "unsupervised": of(HEADLINE),
            "kmeans": of("kmeans"),
            "cluster_probe": of("cluster_probe"),
            "linear": of("linear"),
        },
    }


def metrics_table(metrics: dict[str, dict]) -> str:
    """The figures of `summary` for people."""
    rows = [
        ("k-means on the frozen features (baseline)", metrics["baseline"]["unsupervised"]),
        ("HP, k-means on the codes", metrics["hp"]["kmeans"]),
        ("HP, cluster probe", metrics["hp"]["cluster_probe"]),
        ("HP, linear probe (trained with labels)", metrics["hp"]["linear"]),
    ]
    if rows[0][1] is None:
        return "no labels, so nothing to score; the pictures are in the report"
    lines = [f"{'':42} {'accuracy':>8} {'mIoU':>6}"]
    lines += [f"{name:42} {figures['accuracy']:7.2f}% {figures['miou']:5.2f}%" for name, figures in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="written by training.train")
    parser.add_argument("--root", help="folder with imgs/val and labels/val, instead of the one trained on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        config, backbone, state = open_trained(options.checkpoint, options.device)
        if options.root is not None:
            config.data = dataclasses.replace(config.data, name="folder", root=options.root)
        device = next(state.head.parameters()).device
        bank = open_bank(config, backbone, open_data(config, "val"), device)
        metrics = summary(evaluate(state, bank))
    except (ValueError, TypeError) as error:
        sys.exit(f"evaluate: {error}")
    print(json.dumps(metrics, indent=2) if options.json else metrics_table(metrics))


if __name__ == "__main__":
    main()
