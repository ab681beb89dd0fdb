"""Score a trained run on labelled images.

python -m training.evaluate --checkpoint runs/camvid/checkpoint.pt [--root DIR]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.config import Config
from training.data import open_data
from training.features import FeatureBank
from training.metrics import SegmentationMetrics, to_json
from training.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.run import open_bank, open_trained
from training.segment import CLUSTERED, SEGMENTATIONS, segment, why_unusable
from training.state import TrainingState

_EDITABLE = ("data.size", "data.val_images", "evaluation.size", "backend")  # keys that a checkpoint does not settle

HEADLINE = "kmeans"
"""The segmentation that stands for HP: the codes are clustered exactly as the baseline clusters the frozen features,
so that the two differ in the representation alone. ``docs/training.md`` says more."""


def evaluate(state: TrainingState, bank: FeatureBank, only: Iterable[str] = SEGMENTATIONS) -> dict[str, dict] | None:
    """Score each segmentation in `only` on all labelled images, and keep the classes that clusters were matched to.

    Segmentations that the state cannot give, because what they need was never fitted, are left out.

    Returns:
        for each segmentation accuracy and mIoU in percent, with clusters matched one to one, and the IoU of each class;
        for clusters also "majority", the scores with each cluster as the class that most of its pixels have. None
        without labels.
    """
    usable = [name for name in only if why_unusable(state, name) is None]
    classes = len(bank.data.classes) or state.classes
    metrics = {
        name: SegmentationMetrics(classes, state.clusters, match=True)
        if name in CLUSTERED
        else SegmentationMetrics(classes, state.classes)
        for name in usable
    }
    for images in tqdm(list(bank.batches(8)), desc="evaluate", unit="batch", leave=False):
        labels = bank.labels(images)
        if labels is None:
            return None
        maps = segment(state, bank.get(images).tokens, bank.grid, tuple(labels.shape[1:]))
        for name, metric in metrics.items():
            metric.update(maps[name], labels)
    scores: dict[str, dict] = {}
    for name, metric in metrics.items():
        scores[name] = metric.scores() | {"class_iou": metric.class_iou().tolist()}
        if name in CLUSTERED:
            scores[name]["majority"] = metric.majority_scores()
            if metric.counted:
                state.clusterings.set_assignment(CLUSTERED.index(name), metric.assignment)
    return scores


def images_scored(config: Config) -> str:
    """Which images are scored: "validation", or "training" where a folder sets none aside."""
    if config.data.name == "folder" and not (Path(config.data.root or "") / "imgs" / "val").is_dir():
        return "training"
    return "validation"


def summary(scores: dict[str, dict] | None) -> dict[str, dict]:
    """The scores as `metrics.json` has them.

    None in place of the figures of a segmentation that was not scored, and in place of a figure without any labelled
    pixel.
    """

    def figures(of: dict[str, float]) -> dict[str, float | None]:
        return {key: round(of[key], 3) if math.isfinite(of[key]) else None for key in ("accuracy", "miou")}

    def of(name: str) -> dict[str, Any] | None:
        if scores is None or name not in scores:
            return None
        if name not in CLUSTERED:
            return figures(scores[name])
        return figures(scores[name]) | {"matching": "one-to-one", "majority": figures(scores[name]["majority"])}

    return {
        "baseline": {"unsupervised": of("baseline")},
        "hp": {
            "unsupervised": of(HEADLINE),
            "kmeans": of("kmeans"),
            "cluster_probe": of("cluster_probe"),
            "linear": of("linear"),
        },
    }


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures of `summary` for people."""
    rows = [
        ("k-means on the frozen features (baseline)", metrics["baseline"]["unsupervised"]),
        ("HP, k-means on the codes", metrics["hp"]["kmeans"]),
        ("HP, cluster probe", metrics["hp"]["cluster_probe"]),
        ("HP, linear probe (trained with labels)", metrics["hp"]["linear"]),
    ]
    real = [(name, figures) for name, figures in rows if figures is not None]
    if not real:
        return "no labels, so nothing to score"
    heads = f"{'accuracy':>9} {'mIoU':>7}"
    lines = [f"{'':42} {'one to one':>16} {'majority':>16}", f"{'':42}{2 * heads}"]
    for name, figures in real:
        majority = figures.get("majority") or {}
        lines.append(f"{name:42}{_cells(figures)}{_cells(majority) if majority else ''}".rstrip())
    if any(figures["accuracy"] is None for _, figures in real):
        lines.append("-: no labelled pixels")
    if rows[1][1] is None:
        lines.append("no row of k-means: its centres are fitted when the run finishes")
    if rows[3][1] is None:
        lines.append("no row of the linear probe: it never saw a label")
    if "images" in metrics:
        lines.append(f"scored on the {metrics['images']} images")
    return "\n".join(lines)


def _cells(figures: dict[str, float | None]) -> str:
    accuracy, miou = ("-" if figures[key] is None else f"{figures[key]:.2f}%" for key in ("accuracy", "miou"))
    return f"{accuracy:>9} {miou:>7}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--checkpoint", required=True, type=expanded, help="written by training.train")
    parser.add_argument("--root", type=expanded, help="where the data to score is, instead of `data.root`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_overrides(parser, f"edits of {', '.join(_EDITABLE)}, e.g. data.val_images=100", keys=False)
    options = parse_with_overrides(parser, arguments)
    with one_sentence("evaluate"):
        config, backbone, state = open_trained(options.checkpoint, options.device, options.overrides, _EDITABLE)
        if options.root is not None:
            name = "folder" if config.data.name == "procedural" else config.data.name
            config.data = config.data.model_copy(update={"name": name, "root": str(options.root)})
        device = next(state.head.parameters()).device
        bank = open_bank(config, backbone, open_data(config, "val"), device)
        metrics = summary(evaluate(state, bank)) | {"images": images_scored(config)}
    print(to_json(metrics) if options.json else metrics_table(metrics))


if __name__ == "__main__":
    main()
