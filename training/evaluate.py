"""Score a trained run on labelled images.

python -m training.evaluate --checkpoint runs/camvid/checkpoint.pt [--root DIR]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.config import WHILE_TRAINING, Config, EvaluationConfig
from training.config_file import known_keys
from training.data import open_data
from training.evaluation.crf import refined
from training.evaluation.metrics import SegmentationMetrics, merge_clusters, to_json
from training.evaluation.neighbours import knn_scores
from training.evaluation.position import position_score
from training.features.bank import FeatureBank
from training.model import patch_classes
from training.run import open_bank, open_trained
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.segment import CLUSTERED, SEGMENTATIONS, log_probabilities, segment, why_unusable
from training.state import TrainingState

# Keys that a checkpoint does not settle.
_EDITABLE = (
    "data.size",
    "data.val_images",
    *(key for key in known_keys() if key.startswith("evaluation.") and key not in WHILE_TRAINING),
    "backend",
)

HEADLINE = "kmeans"
"""The segmentation that stands for HP: the codes are clustered exactly as the baseline clusters the frozen features,
so that the two differ in the representation alone. ``docs/training.md`` says more."""


def evaluate(
    state: TrainingState,
    bank: FeatureBank,
    only: Iterable[str] = SEGMENTATIONS,
    match_on: FeatureBank | None = None,
    how: EvaluationConfig | None = None,
    images: Tensor | None = None,
) -> dict[str, dict] | None:
    """Score each segmentation in `only` on all labelled images, and keep the classes that clusters were matched to.

    Segmentations that the state cannot give, because what they need was never fitted, are left out.

    Args:
        state: with fitted clusterings and probes.
        bank: the images to score.
        only: names of segmentations.
        match_on: the images whose labels clusters are matched to classes by, if not those of `bank`. If they have none,
            clusters are not scored.
        how: whether mirrored images count, and which CRF. None: plainly.
        images: the indices (n,) of those to score. None: all.

    Returns:
        for each segmentation accuracy and mIoU in percent, with clusters matched one to one, the IoU of each class, and
        "confusion", pixel counts by segmented (row) and labelled class, where a last row is of no class; for clusters
        also "majority", the scores with each cluster as the class that most of its pixels have. None without labels.
    """
    usable = [name for name in only if why_unusable(state, name) is None]
    how = EvaluationConfig() if how is None else how
    metrics = _counted(state, bank, usable, how, images)
    clustered = [name for name in usable if name in CLUSTERED]
    matching = metrics if match_on is None else _counted(state, match_on, clustered, how)
    if metrics is None:
        return None
    scores: dict[str, dict] = {}
    for name, metric in metrics.items():
        if name in CLUSTERED:
            if match_on is not None and (matching is None or not matching[name].counted):
                continue  # nothing to match by
            metric.assignment = matching[name].assignment
        confusion = merge_clusters(metric.confusion, metric.assignment).tolist()
        scores[name] = metric.scores() | {"class_iou": metric.class_iou().tolist(), "confusion": confusion}
        if name in CLUSTERED:
            scores[name]["majority"] = metric.majority_scores()
            if matching[name].counted:
                state.clusterings.set_assignment(CLUSTERED.index(name), metric.assignment)
    return scores


def _counted(
    state: TrainingState, bank: FeatureBank, names: list[str], how: EvaluationConfig, chosen: Tensor | None = None
) -> dict[str, SegmentationMetrics] | None:
    """The pixels of all labelled images, or those chosen, by segmentation; None without labels."""
    classes = len(bank.data.classes) or state.classes
    metrics = {
        name: SegmentationMetrics(classes, state.clusters, match=True)
        if name in CLUSTERED
        else SegmentationMetrics(classes, state.classes)
        for name in names
    }
    batches = list(bank.batches(8) if chosen is None else chosen.split(8))
    for images in tqdm(batches, desc="evaluate", unit="batch", leave=False):
        labels = bank.labels(images)
        if labels is None:
            return None
        maps = _maps(state, bank, images, tuple(labels.shape[1:]), names, how)
        for name, metric in metrics.items():
            metric.update(maps[name], labels)
    return metrics


def _maps(
    state: TrainingState,
    bank: FeatureBank,
    images: Tensor,
    size: tuple[int, int],
    names: list[str],
    how: EvaluationConfig,
) -> dict[str, Tensor]:
    tokens = bank.get(images).tokens
    mirrored = bank.mirrored_tokens(images) if how.flip else None
    if how.crf == "none":
        return segment(state, tokens, bank.grid, size, names, mirrored)
    pictures = torch.stack([bank.data.image(index) for index in images.tolist()])
    logs = {name: log_probabilities(state, tokens, bank.grid, size, name, mirrored) for name in names}
    return {name: beliefs.argmax(dim=1) for name, beliefs in refined(how.crf, pictures, logs).items()}


def position_scores(state: TrainingState, bank: FeatureBank) -> dict[str, float]:
    """The position score in percent of each clustering that the state can give, and of "labels" if there are any."""
    usable = [name for name in CLUSTERED if why_unusable(state, name) is None]
    maps: dict[str, list[Tensor]] = {name: [] for name in usable}
    for images in bank.batches(8):
        found = segment(state, bank.get(images).tokens, bank.grid, bank.grid, only=usable)
        labels = patch_classes(bank.labels(images), bank.grid, len(bank.data.classes))
        for name, clusters in found.items() | ({} if labels is None else {"labels": labels}).items():
            maps.setdefault(name, []).append(clusters.flatten(1).cpu())
    return {name: position_score(torch.cat(parts)) for name, parts in maps.items()}


def images_scored(config: Config) -> str:
    """Which images are scored: "validation", or "training" where a folder sets none aside."""
    if config.data.name == "folder" and not (Path(config.data.root or "") / "imgs" / "val").is_dir():
        return "training"
    return "validation"


def matched_on(config: Config) -> str:
    """Which images clusters are matched to classes on."""
    return "training" if config.evaluation.match == "train" else images_scored(config)


def summary(scores: dict[str, dict] | None) -> dict[str, dict]:
    """Accuracy and mIoU as `metrics.json` has them.

    None in place of the figures of a segmentation that was not scored, and in place of a figure without any labelled
    pixel.
    """

    def figures(of: dict[str, float]) -> dict[str, float | None]:
        return {key: _rounded(of[key]) for key in ("accuracy", "miou")}

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


def score(
    config: Config, state: TrainingState, train: FeatureBank | None, val: FeatureBank
) -> tuple[dict[str, Any], dict[str, dict] | None]:
    """All that `metrics.json` says of the segmentations, and the scores of `evaluate`.

    Args:
        config: of the run.
        state: trained, with fitted clusterings.
        train: needed for ``evaluation.match=train`` and ``evaluation.knn``.
        val: the images to score.
    """
    how = config.evaluation
    scores = evaluate(state, val, match_on=train if how.match == "train" else None, how=how)
    # A run that is finished has gone back to its best state, if there was one.
    best = config.quirks.select_on_labels and state.best_score > 0 and bool(state.clusterings.fitted)
    metrics = all_scores(scores, position_scores(state, val), config, val.data.classes, best)
    if how.knn and train is not None:
        found = knn_scores(state, train, val, how.knn, config.seed, same_images=images_scored(config) == "training")
        for model in ("baseline", "hp"):
            figures = None if found is None else {name: _rounded(figure) for name, figure in found[model].items()}
            metrics[model]["knn"] = figures
    return metrics, scores


def all_scores(
    scores: dict[str, dict] | None,
    positions: dict[str, float],
    config: Config,
    classes: Sequence[str],
    best: bool = False,
) -> dict[str, Any]:
    """All that `metrics.json` says of the segmentations.

    Args:
        scores: of `evaluate`.
        positions: of `position_scores`.
        config: of the run.
        classes: names.
        best: whether the state is the best of those scored on labels, and not the last.
    """
    return summary(scores) | {
        "images": images_scored(config),
        "matched_on": None if scores is None else matched_on(config),
        "crf": config.evaluation.crf,
        "checkpoint": "best-on-val" if best else "last",
        "position_score": {name: _rounded(score) for name, score in positions.items()},
        "per_class": {"classes": list(classes)}
        | {
            name: {"iou": [_rounded(iou) for iou in of_name["class_iou"]], "confusion": of_name["confusion"]}
            for name, of_name in (scores or {}).items()
        },
    }


def _rounded(figure: float) -> float | None:
    return round(figure, 3) if math.isfinite(figure) else None


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures of `summary` for people."""
    rows = [
        ("k-means on the frozen features (baseline)", metrics["baseline"]["unsupervised"], "baseline"),
        ("k-means on the codes", metrics["hp"]["kmeans"], "kmeans"),
        ("cluster probe", metrics["hp"]["cluster_probe"], "cluster_probe"),
        ("linear probe (trained with labels)", metrics["hp"]["linear"], "linear"),
        ("neighbours in the features (with labels)", metrics["baseline"].get("knn"), "knn"),
        ("neighbours in the codes (with labels)", metrics["hp"].get("knn"), "knn"),
    ]
    positions = metrics.get("position_score", {})
    real = [(title, figures, name) for title, figures, name in rows if figures is not None]
    if not real:
        told = ", ".join(f"{title} {_cell(positions[name])}" for title, _, name in rows if name in positions)
        return "no labels, so nothing to score" + (f"\nposition score: {told}" if told else "")
    heads = f"{'accuracy':>9} {'mIoU':>7}"
    lines = [f"{'':42} {'one to one':>16} {'majority':>16}", f"{'':42}{2 * heads} {'position':>9}"]
    for title, figures, name in real:
        majority = _cells(figures["majority"]) if "majority" in figures else ""
        position = f" {_cell(positions[name]):>9}" if name in positions else ""
        lines.append(f"{title:42}{_cells(figures)}{majority}{position}".rstrip())
    if positions.get("labels") is not None:
        lines.append(f"{'the labels themselves':74} {_cell(positions['labels']):>9}")
    if any(figures["accuracy"] is None for _, figures, _ in real):
        lines.append("-: no labelled pixels")
    if rows[1][1] is None:
        unmatched = rows[2][1] is None  # nor of the cluster probe, which needs no fitting
        lines.append(
            "no rows of clusters: no training image has a label to match them by"
            if unmatched
            else "no row of k-means: its centres are fitted when the run finishes"
        )
    if rows[3][1] is None:
        lines.append("no row of the linear probe: it never saw a label")
    if "knn" in metrics["hp"] and rows[5][1] is None:
        lines.append("no row of neighbours: no patch of the training images has a label")
    if "images" in metrics:
        lines.append(
            f"scored on the {metrics['images']} images; clusters matched on the {metrics['matched_on']} images;"
            f" CRF: {metrics['crf']}; checkpoint: {metrics['checkpoint']}"
        )
    return "\n".join(lines)


def _cells(figures: dict[str, float | None]) -> str:
    return f"{_cell(figures['accuracy']):>9} {_cell(figures['miou']):>7}"


def _cell(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}%"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--checkpoint", required=True, type=expanded, help="written by training.train")
    parser.add_argument("--root", type=expanded, help="where the data to score is, instead of `data.root`")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one (auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_overrides(parser, f"edits of {', '.join(_EDITABLE)}, e.g. data.val_images=100", keys=False)
    options = parse_with_overrides(parser, arguments)
    with one_sentence("evaluate"):
        config, backbone, state = open_trained(options.checkpoint, options.device, options.overrides, _EDITABLE)
        if options.root is not None:
            name = "folder" if config.data.name == "procedural" else config.data.name
            config.data = config.data.model_copy(update={"name": name, "root": str(options.root)})
        bank = open_bank(config, backbone, open_data(config, "val"), state.device, scored=True)
        train = None
        if config.evaluation.match == "train" or config.evaluation.knn:
            train = open_bank(config, backbone, open_data(config, "train"), state.device)
        metrics = score(config, state, train, bank)[0]
    print(to_json(metrics) if options.json else metrics_table(metrics))


if __name__ == "__main__":
    main()
