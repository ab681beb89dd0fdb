"""What a finished run leaves behind: the scores, the last checkpoint, ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from training import checkpoint
from training.evaluate import HEADLINE, evaluate, images_scored, summary
from training.metrics import to_json
from training.report import AnchorPositives, Example, PropagationWeights, Report, write_report
from training.run import Run
from training.segment import map_names, segment, to_classes

_EXAMPLES = 6  # images segmented in the report
_IMAGES_OF_POSITIVES = 4  # images among which the positives of an anchor are shown


def write_results(run: Run) -> tuple[Path, dict[str, Any]]:
    """Cluster, score and describe a trained run.

    Returns:
        the path of the report, and what ``metrics.json`` holds.
    """
    if run.config.quirks.select_on_labels and run.best_path.is_file():
        run.state.load_modules(checkpoint.load(run.best_path)["state"])
    run.state.clusterings.fit(run.train_bank, run.state.head, run.config.seed)
    scores = evaluate(run.state, run.val_bank)
    run.save()
    metrics = summary(scores) | {
        "images": images_scored(run.config),
        "config": asdict(run.config),
        "run": provenance(run),
    }
    output = Path(run.config.output)
    with checkpoint.written_whole(output / "metrics.json") as file:
        file.write(to_json(metrics).encode())
    write_report(output / "report.html", describe(run, metrics, scores))
    return output / "report.html", metrics


def provenance(run: Run) -> dict[str, Any]:
    """On what, when and how long."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    return {
        "device": f"{run.device.type} ({device}, {torch.get_num_threads()} threads)",
        "versions": {
            "hpkernels": hpkernels.__version__,
            "PyTorch": torch.__version__,
            "Python": platform.python_version(),
        },
        "finished": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "training_seconds": round(run.state.seconds, 1),
        "steps": run.state.step,
    }


@torch.no_grad()
def describe(run: Run, metrics: dict[str, Any], scores: dict[str, dict] | None) -> Report:
    """The report of a run whose clusters have been matched."""
    about = metrics["run"]
    images = _spread(len(run.val_bank), _EXAMPLES)
    columns = {"baseline": "Baseline", HEADLINE: "HP", "linear": "HP, linear probe"}
    scored = {name: title for name, title in columns.items() if scores is not None and name in scores}
    # Without a labelled pixel nothing was matched, and no class has an IoU.
    matched = bool(run.state.clusterings.matched.all())
    class_iou = {title: scores[name]["class_iou"] for name, title in scored.items()} if matched else {}
    return Report(
        title=f"Hidden Positives: {Path(run.config.output).name}",
        metrics=metrics,
        class_names=map_names(run.state, HEADLINE, run.val_bank.data.classes),
        history=run.state.history,
        examples=examples(run, images),
        positives=anchor_positives(run, images[:_IMAGES_OF_POSITIVES]),
        propagation=propagation_weights(run, images[:3]),
        class_iou=class_iou,
        device=about["device"],
        versions=about["versions"],
        date=about["finished"],
        wall_time=about["training_seconds"],
    )


def examples(run: Run, images: Tensor) -> list[Example]:
    """Validation images beside their label, the baseline and HP."""
    bank = run.val_bank
    maps = to_classes(run.state, segment(run.state, bank.get(images).tokens, bank.grid, bank.data.size))
    return [
        Example(
            name=bank.data.name(index),
            image=bank.data.image(index),
            baseline=maps["baseline"][row].cpu(),
            hp=maps[HEADLINE][row].cpu(),
            label=bank.data.label(index),
        )
        for row, index in enumerate(images.tolist())
    ]


def anchor_positives(run: Run, images: Tensor) -> list[AnchorPositives]:
    """The hidden positives, among a few images, of one anchor of each: that with the median number of positives."""
    bank, backend = run.val_bank, run.config.backend
    features = F.normalize(bank.get(images).tokens, dim=-1).flatten(0, 1)
    threshold = hpkernels.masked_topk(features, run.state.pools.agnostic(), backend=backend).values[:, 0]
    positives = hpkernels.hidden_positives(features, threshold, backend=backend).to_dense().cpu()
    height, width = bank.grid
    shown = []
    for row in range(len(images)):
        own = positives.unflatten(0, (len(images), -1))[row]
        anchor = int(own.sum(dim=1).argsort()[len(own) // 2])
        order = [row] + [other for other in range(len(images)) if other != row]
        shown.append(
            AnchorPositives(
                images=torch.stack([bank.data.image(int(images[image])) for image in order]),
                anchor=divmod(anchor, width),
                positives=own[anchor].view(len(images), height, width)[order],
            )
        )
    return shown


def propagation_weights(run: Run, images: Tensor) -> list[PropagationWeights]:
    """The local-propagation weights of images, and those of the patch in the middle."""
    bank = run.val_bank
    height, width = bank.grid
    weights = bank.get(images).weights.cpu()
    middle = (height // 2, width // 2)
    pictures = [bank.data.image(index) for index in images.tolist()]
    return [PropagationWeights(picture, own, middle) for picture, own in zip(pictures, weights, strict=True)]


def _spread(count: int, chosen: int) -> Tensor:
    """Up to `chosen` indices, evenly spread over `count`."""
    return torch.from_numpy(np.unique(np.linspace(0, count - 1, min(count, chosen)).round().astype(np.int64)))
