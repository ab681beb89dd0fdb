"""The report of a run as one HTML file: results, curves, segmentations, hidden positives, local propagation, settings.

It knows nothing of the loop: fill in a `Report`, call `write_report`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from training import figures, page
from training.checkpoint import written_whole

_METHODS = {
    ("baseline", "unsupervised"): "Baseline: k-means of the frozen features",
    ("hp", "unsupervised"): "Hidden Positives, unsupervised",
    ("hp", "kmeans"): "Hidden Positives: k-means of the codes",
    ("hp", "cluster_probe"): "Hidden Positives: cluster probe",
    ("hp", "linear"): "Hidden Positives: linear probe (learns from labels)",
}
_CURVES = {
    "loss": "Loss",
    "contrastive": "Contrastive loss",
    "consistency": "Consistency loss",
    "cluster_probe": "Cluster probe loss",
    "linear_probe": "Linear probe loss",
    "lambda": "λ, weight of task-specific positives",
    "positives_per_anchor": "Hidden positives per anchor",
}


@dataclass
class Example:
    """One image and its segmentations, class numbers (h, w) with negative for ignored."""

    name: str
    image: Tensor  # (3, h, w) uint8
    baseline: Tensor
    hp: Tensor
    label: Tensor | None = None


@dataclass
class AnchorPositives:
    """The hidden positives of one anchor."""

    images: Tensor  # (n, 3, h, w) uint8; the anchor is in the first
    anchor: tuple[int, int]  # its row and column of patches
    positives: Tensor  # (n, H, W) bool


@dataclass
class PropagationWeights:
    """The weights of local propagation on one image, and an anchor whose window is shown in figures."""

    image: Tensor  # (3, h, w) uint8
    weights: Tensor  # (window², H, W), of hpkernels.local_propagation_weights
    anchor: tuple[int, int]


@dataclass
class Report:
    """What a report shows; what is empty is left out."""

    title: str
    metrics: Mapping[str, Any]  # metrics.json: {model: {evaluation: {"accuracy", "miou"}}} and "config"
    class_names: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()  # figures of the logged steps, each with "step"
    examples: Sequence[Example] = ()
    positives: Sequence[AnchorPositives] = ()
    propagation: Sequence[PropagationWeights] = ()
    class_iou: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of each class in percent, by column title
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    wall_time: float | None = None  # seconds


def write_report(path: str | Path, report: Report) -> None:
    """Write the report to one HTML file that needs no other file, no network and no script."""
    sections = {
        "Results": _results(report.metrics),
        "Training": _curves(report.history),
        "Segmentations": _segmentations(report.examples, report.class_names),
        "Global hidden positives": _positives(report.positives),
        "Local propagation": _propagation(report.propagation),
        "IoU of each class": _class_iou(report.class_iou, report.class_names),
        "Versions": _versions(report.versions),
        "Configuration": _configuration(report.metrics.get("config")),
    }
    shown = [(heading, html) for heading, html in sections.items() if html]
    with written_whole(path) as file:
        file.write(page.page(report.title, _header(report), shown).encode())


def _header(report: Report) -> str:
    took = page.duration(report.wall_time) if report.wall_time is not None else ""
    facts = " · ".join(fact for fact in (report.date, report.device, took) if fact)
    return f"<h1>{escape(report.title)}</h1>{page.paragraph(facts)}"


def _results(metrics: Mapping[str, Any]) -> str:
    scores = {
        (model, evaluation): score
        for model, evaluations in metrics.items()
        if model != "config" and isinstance(evaluations, Mapping)
        for evaluation, score in evaluations.items()
        if isinstance(score, Mapping) and "miou" in score
    }
    if not scores:
        return page.paragraph("There are no labels to score the segmentations with.")
    majority = any("majority" in score for score in scores.values())
    rows = [
        (_METHODS.get(method, " ".join(method)), _figures(score, majority))
        for method, score in sorted(scores.items(), key=lambda item: _position(_METHODS, item[0]))
        if not _repeats_another(method, scores)
    ]
    columns = ("Method", "mIoU, %", "Accuracy, %")
    caption = f"{str(metrics.get('images', 'validation')).capitalize()} images. "
    caption += "Clusters are matched one to one to classes; pixels of a cluster left over are wrong."
    if majority:
        columns += ("mIoU, majority, %", "Accuracy, majority, %")
        caption += " Majority: each cluster is the class that most of its pixels have."
    if any(score["miou"] is None for score in scores.values()):
        caption += " A dash: there are no labelled pixels."
    return _headline(scores) + page.percent_table(columns, rows, caption)


def _figures(score: Mapping[str, Any], with_majority: bool) -> tuple[float | None, ...]:
    names = ("miou", "accuracy")
    majority = score.get("majority", {})
    return tuple(score.get(name) for name in names) + tuple(majority.get(name) for name in names if with_majority)


def _repeats_another(method: tuple[str, str], scores: Mapping[tuple[str, str], Mapping[str, float]]) -> bool:
    """Whether a model's "unsupervised" score is that of another row, which says how it was got."""
    model, evaluation = method
    others = [score for other, score in scores.items() if other[0] == model and other != method]
    return evaluation == "unsupervised" and scores[method] in others


def _headline(scores: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    baseline, hp = (scores.get((model, "unsupervised"), {}).get("miou") for model in ("baseline", "hp"))
    if not (_is_number(baseline) and _is_number(hp)):
        return ""
    cards = (
        (page.percent(baseline), "mIoU of the baseline, %"),
        (page.percent(hp), "mIoU of Hidden Positives, %"),
        (f"{hp - baseline:+.1f}".replace("-", "−"), "difference in points, no labels used"),
    )
    return (
        f'<div class="cards">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in cards)}</div>'
    )


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    names = sorted({name for entry in history for name in entry} - {"step"}, key=lambda name: _position(_CURVES, name))
    panels = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if _is_number(entry.get(name))]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        title = _CURVES.get(name, name.replace("_", " "))
        alt = f"{title}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}"
        panels.append(f"<div><h3>{escape(title)}</h3>{page.figure(figures.curve(steps, values), alt)}</div>")
    return f'<div class="curves">{"".join(panels)}</div>' if panels else ""


def _segmentations(examples: Sequence[Example], class_names: Sequence[str]) -> str:
    if not examples:
        return ""
    maps = [m for example in examples for m in (example.label, example.baseline, example.hp) if m is not None]
    classes = max(len(class_names), 1 + max(int(m.max()) for m in maps))
    names = _names(class_names, classes)
    palette = figures.class_palette(classes)
    entries = list(zip(names, palette.tolist(), strict=True))
    if any((m < 0).any() for m in maps):
        entries.append(("ignored", figures.IGNORED))
    rows = []
    for example in examples:
        columns = {"Label": example.label, "Baseline": example.baseline, "Hidden Positives": example.hp}
        columns = {column: classes_of for column, classes_of in columns.items() if classes_of is not None}
        pictures = [page.figure(figures.photograph(example.image), f"{example.name}: photograph", example.name)]
        pictures += [
            page.figure(
                figures.colour_map(m, palette), f"{example.name}, {column}: {_shares(m, names)}", column, pixelated=True
            )
            for column, m in columns.items()
        ]
        rows.append(f'<div class="row{" three" if len(pictures) == 3 else ""}">{"".join(pictures)}</div>')
    return page.legend(entries) + "".join(rows)


def _positives(anchors: Sequence[AnchorPositives]) -> str:
    if not anchors:
        return ""
    text = (
        "Each row shows one anchor (pink frame) and the patches that the method takes as its positives (in colour): "
        "first in the anchor's own image, then in other images."
    )
    return page.paragraph(text) + "".join(map(_positives_row, anchors))


def _positives_row(sample: AnchorPositives) -> str:
    pictures = []
    for image, chosen in zip(sample.images, sample.positives, strict=True):
        anchor = None if pictures else sample.anchor
        count = int(chosen.sum())
        caption = f"{'own' if anchor else 'other'} image: {count} positive{'' if count == 1 else 's'}"
        where = f"; anchor at row {anchor[0]}, column {anchor[1]}" if anchor else ""
        pictures.append(
            page.figure(figures.patches_overlay(image, chosen, anchor), f"Photograph, {caption}{where}", caption)
        )
    return f'<div class="row">{"".join(pictures)}</div>'


def _propagation(samples: Sequence[PropagationWeights]) -> str:
    if not samples:
        return ""
    text = (
        "Local propagation mixes the code of each patch with those neighbours that the backbone attends to more than "
        "on average. Left: an anchor (pink) in its window. Middle: the share of its window that each patch keeps. "
        "Right: the weights of the anchor's window."
    )
    return page.paragraph(text) + "".join(map(_propagation_row, samples))


def _propagation_row(sample: PropagationWeights) -> str:
    window, grid = math.isqrt(len(sample.weights)), tuple(sample.weights.shape[1:])
    row, column = sample.anchor
    photo = figures.anchor_overlay(sample.image, grid, sample.anchor, window)
    cells = _window(sample.weights[:, row, column].view(window, window), sample.anchor, grid)
    kept = figures.kept_fraction(sample.weights)
    heat = figures.heat_map(kept, (photo.height, photo.width))
    mean = f"{100 * kept.mean():.0f} % on average"
    scale = f'<div class="scale" style="background:linear-gradient(90deg,{",".join(figures.heat_colours(9))})"></div>'
    alt, alt_heat = f"Photograph with an anchor at row {row}, column {column}", f"Heat map of the share kept: {mean}"
    return (
        f'<div class="row three">{page.figure(photo, alt, f"anchor at row {row}, column {column}")}'
        f"{page.figure(heat, alt_heat, f'0 to 100 % of the window kept; {mean}', pixelated=True, below_html=scale)}"
        f"{page.shaded_table(cells, 'weights of the window of the anchor')}</div>"
    )


def _window(weights: Tensor, anchor: tuple[int, int], grid: tuple[int, int]) -> list[list[float | None]]:
    """The weights of one window, None for cells outside the image."""
    radius = len(weights) // 2

    def inside(dy: int, dx: int) -> bool:
        return 0 <= anchor[0] + dy < grid[0] and 0 <= anchor[1] + dx < grid[1]

    return [
        [weight if inside(dy, dx) else None for dx, weight in enumerate(line, start=-radius)]
        for dy, line in enumerate(weights.tolist(), start=-radius)
    ]


def _class_iou(columns: Mapping[str, Sequence[float]], class_names: Sequence[str]) -> str:
    if not columns:
        return ""
    per_class = list(zip(*columns.values(), strict=True))
    rows = list(zip(_names(class_names, len(per_class)), per_class, strict=True))
    caption = "In percent. A dash: the class is neither labelled nor predicted, and leaves the mean."
    return page.percent_table(("Class", *columns), rows, caption)


def _versions(versions: Mapping[str, str]) -> str:
    row = '<tr><th scope="row">{}</th><td>{}</td></tr>'
    rows = "".join(row.format(escape(name), escape(version)) for name, version in versions.items())
    return f"<table>{rows}</table>" if rows else ""


def _configuration(config: Any) -> str:
    if not config:
        return ""
    # Through JSON, because YAML has no plain form for tuples.
    plain = json.loads(json.dumps(config, default=str))
    return f"<pre>{escape(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))}</pre>"


def _names(class_names: Sequence[str], classes: int) -> list[str]:
    return [*class_names, *(f"class {index}" for index in range(len(class_names), classes))][:classes]


def _shares(classes: Tensor, names: Sequence[str]) -> str:
    """The three most frequent classes of a map in words."""
    counts = torch.bincount(classes[classes >= 0].long().flatten(), minlength=len(names))
    largest = counts.argsort(descending=True)[:3].tolist()
    shares = [f"{names[index]} {100 * counts[index] / counts.sum():.0f} %" for index in largest if counts[index]]
    return ", ".join(shares) or "no classes"


def _position(order: Mapping[Any, str], key: Any) -> tuple[int, str]:
    """Sort key: the known in their order, then the rest by name."""
    known = list(order)
    return (known.index(key) if key in known else len(known), str(key))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
