"""The report of a run as one HTML file: this gathers what ``report.html.j2`` lays out.

It knows nothing of the loop: fill in a `Report`, call `write_report`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from training.config_file import Setting
from training.report import figures
from training.runtime.checkpoint import written_whole

_METHODS = {
    ("baseline", "unsupervised"): "Baseline: k-means of the frozen features",
    ("hp", "kmeans"): "Codes: k-means",
    ("hp", "cluster_probe"): "Codes: cluster probe",
    ("hp", "linear"): "Codes: linear probe (learns from labels)",
    ("baseline", "knn"): "Baseline: nearest neighbours of the frozen features (learns from labels)",
    ("hp", "knn"): "Codes: nearest neighbours (learns from labels)",
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
_POINTS = 500  # of a curve at most


@dataclass
class Example:
    """One image and its segmentations by title, class numbers (h, w) with negative for ignored."""

    name: str
    image: Tensor  # (3, h, w) uint8
    maps: Mapping[str, Tensor]
    miou: Mapping[str, float] = field(default_factory=dict)  # of this image, in percent, by title


@dataclass
class Report:
    """What a report shows; what is empty is left out."""

    title: str
    metrics: Mapping[str, Any]  # metrics.json: {model: {evaluation: {"accuracy", "miou"}}}, "config" and others
    class_names: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()  # figures of the logged steps, each with "step"
    examples: Sequence[Example] = ()
    explorer: Mapping[str, Any] | None = None  # of training.report.explorer.packed
    explorer_images: Sequence[tuple[str, Tensor]] = ()  # name and (3, h, w) uint8 of each image of the explorer
    explorer_note: str = ""
    class_iou: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of each class in percent, by column title
    # By title: pixels by segmented (row) and labelled class; a row after that of the last class is of no class.
    confusion: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    assignments: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what each cluster is, by column title
    facts: Sequence[str] = ()  # lines below the title
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)  # what else to know to reproduce the run
    settings: Sequence[Setting] = ()


class Picture(NamedTuple):
    """An image with a description for those who do not see it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str = ""
    pixelated: bool = False


class Table(NamedTuple):
    """Rows of figures, each with its name."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    caption: str = ""
    bars: bool = True  # the figures are percentages


def write_report(path: str | Path, report: Report) -> None:
    """Write the report to one HTML file that needs no other file and no network; what moves needs JavaScript."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = percent
    examples, legend = _segmentations(report.examples, report.class_names)
    html = environment.get_template("report.html.j2").render(
        report=report,
        scores=_scores(report.metrics),
        cards=_cards(report.metrics),
        examples=examples,
        legend=legend,
        photographs=[_photograph(image, name) for name, image in report.explorer_images],
        precision=_precision(report.metrics.get("positives")),
        class_iou=_class_iou(report.class_iou, report.class_names),
        confusion={title: _confusion(pixels, report.class_names) for title, pixels in report.confusion.items()},
        provenance=list(_flat(report.provenance)),
        configuration=_yaml(report.metrics.get("config")),
        assignments=list(zip(*report.assignments.values(), strict=True)),
        data={
            "explorer": report.explorer,
            "curves": list(_curves(report.history)),
            "legend": legend,
            "titles": ["Photograph", *(report.examples[0].maps if report.examples else ())],
            "miou": [
                dict(filter(lambda score: _is_number(score[1]), example.miou.items())) for example in report.examples
            ],
        },
        style=Markup(_beside("report.css")),
        script=Markup(_beside("explorer.js") + _beside("report.js")),
    )
    with written_whole(path) as file:
        file.write(html.encode())


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def percent(value: float | None, digits: int = 1) -> str:
    """A figure in percent; a dash where there is none."""
    return f"{value:.{digits}f}" if _is_number(value) else "–"


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _scores(metrics: Mapping[str, Any]) -> Table:
    positions = metrics.get("position_score", {})
    scores = {}
    for (model, name), title in _METHODS.items():
        if (score := _at(metrics, model, name)) is not None:
            position = positions.get("baseline" if (model, name) == ("baseline", "unsupervised") else name)
            scores[title] = score if position is None else score | {"position_score": position}
    columns = {"mIoU, %": ["miou"], "Accuracy, %": ["accuracy"]}
    caption = f"{str(metrics.get('images', 'validation')).capitalize()} images. "
    caption += "Clusters are matched one to one to classes; pixels of a cluster left over are wrong."
    if metrics.get("matched_on") not in (None, metrics.get("images")):
        caption += f" They are matched on the {metrics['matched_on']} images."
    if metrics.get("checkpoint") == "best-on-val":
        caption += " The checkpoint is the best of those scored on the labels of these images."
    if any("majority" in score for score in scores.values()):
        columns |= {"mIoU, majority, %": ["majority", "miou"], "Accuracy, majority, %": ["majority", "accuracy"]}
        caption += " Majority: each cluster is the class that most of its pixels have."
    if any("position_score" in score for score in scores.values()):
        columns |= {"Position score, %": ["position_score"]}
        caption += " Position score: how far the place of a patch in its image tells its cluster, chance taken off"
        caption += f"; of the labels themselves {percent(positions['labels'])}." if positions.get("labels") else "."
    if any(score.get("miou") is None for score in scores.values()):
        caption += " A dash: there are no labelled pixels."
    rows = [(title, [_at(score, *path) for path in columns.values()]) for title, score in scores.items()]
    return Table(("Method", *columns), rows, caption)


def _cards(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    baseline, hp = (_at(metrics, model, "unsupervised", "miou") for model in ("baseline", "hp"))
    if not (_is_number(baseline) and _is_number(hp)):
        return []
    return [
        (percent(baseline), "mIoU of the baseline, %"),
        (percent(hp), "mIoU of the codes, %"),
        (f"{hp - baseline:+.1f}".replace("-", "−"), "difference in points, no labels used"),
    ]


def _precision(positives: Mapping[str, Any] | None) -> Table | None:
    """The figures about positives, whatever figures of whatever kinds there are."""
    rows = list(_figures(positives or {}))
    columns = dict.fromkeys(name for _, numbers in rows for name in numbers)
    table = [(title.capitalize(), [numbers.get(name) for name in columns]) for title, numbers in rows]
    heads = ("Positives", *(name.replace("_", " ") for name in columns))
    caption = "Positives of an anchor, and the share of them that have its class, in percent."
    return Table(heads, table, caption, bars=False) if rows else None


def _figures(values: Mapping[str, Any], title: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """The numbers of each of nested mappings, with the way to it."""
    numbers = {name: value for name, value in values.items() if _is_number(value)}
    if title and numbers:
        yield title, numbers
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{title} {name.replace('_', ' ')}".strip())


def _curves(history: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Title and points of every figure that was logged; of long curves every k-th point, and the last."""
    logged = {name for entry in history for name in entry} - {"step"}
    for name in [*_CURVES, *sorted(logged - _CURVES.keys())]:
        points = [(entry["step"], float(f"{entry[name]:.5g}")) for entry in history if _is_number(entry.get(name))]
        every = -(-len(points) // _POINTS)
        if points and not (name == "loss" and "contrastive" in logged):  # the sum of others that are shown
            shown = points[:-1:every] + points[-1:]
            yield {
                "title": _CURVES.get(
                    name, name.replace("val/", "Validation ").replace("_", " ").replace("miou", "mIoU")
                ),
                "points": shown,
                "every": every,
            }


def _segmentations(
    examples: Sequence[Example], class_names: Sequence[str]
) -> tuple[list[tuple[Example, list[Picture]]], list[tuple[str, Sequence[int]]]]:
    """Each example with its pictures, and the names of the colours."""
    maps = [of_classes for example in examples for of_classes in example.maps.values()]
    classes = max([len(class_names), *(1 + int(of_classes.max()) for of_classes in maps)])
    names, palette = _names(class_names, classes), figures.class_palette(classes)
    legend = list(zip(names, palette.tolist(), strict=True))
    if any((of_classes < 0).any() for of_classes in maps):
        legend.append(("ignored", figures.IGNORED))
    rows = []
    for example in examples:
        row = [_photograph(example.image, example.name)]
        for title, of_classes in example.maps.items():
            picture = figures.shrunk(figures.colour_map(of_classes, palette), Image.Resampling.NEAREST)
            alt = f"{example.name}, {title}: {_shares(of_classes, names)}"
            caption = f"{title}, mIoU {percent(example.miou[title])} %" if title in example.miou else title
            row.append(Picture(figures.png_uri(picture), *picture.size, alt, caption, pixelated=True))
        rows.append((example, row))
    return rows, legend


def _photograph(image: Tensor, name: str) -> Picture:
    picture = figures.shrunk(figures.photograph(image), Image.Resampling.BICUBIC)
    return Picture(figures.jpeg_uri(picture), *picture.size, f"{name}: photograph", name)


def _class_iou(columns: Mapping[str, Sequence[float]], class_names: Sequence[str]) -> Table | None:
    if not columns:
        return None
    per_class = list(zip(*columns.values(), strict=True))
    rows = list(zip(_names(class_names, len(per_class)), per_class, strict=True))
    caption = "In percent. A dash: the class is neither labelled nor predicted, and leaves the mean."
    return Table(("Class", *columns), rows, caption)


def _confusion(pixels: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[tuple[str, list[tuple]]]:
    """Name of each row, and of each of its cells the pixels and the share in percent of their labelled class."""
    counts = torch.tensor(pixels, dtype=torch.float64)
    shares = (100 * counts / counts.sum(dim=0)).tolist()  # NaN for a class that is not labelled
    names = _names(class_names, counts.shape[1])
    rows = [*names, *["no class"] * (len(counts) - len(names))]
    cells = [list(zip(*row, strict=True)) for row in zip(pixels, shares, strict=True)]
    return list(zip(rows, cells, strict=True))


def _flat(values: Mapping[str, Any], title: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested mappings, each with the way to it."""
    for name, value in values.items():
        path = f"{title} {name.replace('_', ' ')}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        elif value is not None:
            yield path, f"{value:,}" if isinstance(value, int) else str(value)


def _yaml(config: Any) -> str:
    # Through JSON, because YAML has no plain form for tuples.
    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if config else ""


def _names(class_names: Sequence[str], classes: int) -> list[str]:
    return [*class_names, *(f"class {index}" for index in range(len(class_names), classes))][:classes]


def _shares(classes: Tensor, names: Sequence[str]) -> str:
    """The three most frequent classes of a map in words."""
    counts = torch.bincount(classes[classes >= 0].long().flatten(), minlength=len(names))
    largest = counts.argsort(descending=True)[:3].tolist()
    shares = [f"{names[index]} {100 * counts[index] / counts.sum():.0f} %" for index in largest if counts[index]]
    return ", ".join(shares) or "no classes"


def _at(values: Any, *path: str) -> Any:
    """What stands at `path` in nested mappings; None where there is no such place."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
