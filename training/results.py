"""What a finished run leaves behind: the scores, the last checkpoint, ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from training import checkpoint
from training.evaluate import HEADLINE, score
from training.figures import kept_fraction
from training.metrics import to_json
from training.precision import positive_precision
from training.report import AnchorPositives, Example, PropagationWeights, Report, duration, write_report
from training.run import Run
from training.segment import map_names, segment, to_classes, why_unusable

_EXAMPLES = 6  # images segmented in the report
_ANCHORS = 4  # how many anchors are shown with their positives
_SEARCHED = 256  # images among which the positives of an anchor are searched
_TITLES = {
    "baseline": "Baseline",
    HEADLINE: "Codes, k-means",
    "cluster_probe": "Codes, cluster probe",
    "linear": "Codes, linear probe",
}


def write_results(run: Run) -> tuple[Path, dict[str, Any]]:
    """Cluster, score and describe a trained run.

    Returns:
        the path of the report, and what ``metrics.json`` holds.
    """
    if run.config.quirks.select_on_labels and run.best_path.is_file():
        run.state.take_best(checkpoint.load(run.best_path)["state"])
    run.state.clusterings.fit(run.train_bank, run.state.head, run.config.seed)
    scored, scores = score(run.config, run.state, run.train_bank, run.val_bank)
    run.save()
    metrics = scored | {
        "positives": positive_precision(run),
        "config": run.config.model_dump(),
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
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "training_images": len(run.train_bank),
        "scored_images": len(run.val_bank),
        "finished": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "training_seconds": round(run.state.seconds, 1),
        "steps": run.state.step,
    }


def _commit() -> str | None:
    """The commit of the code, with "-dirty" where files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.no_grad()
def describe(run: Run, metrics: dict[str, Any], scores: dict[str, dict] | None) -> Report:
    """The report of a run whose clusters have been matched."""
    about = metrics["run"]
    images = _spread(len(run.val_bank), _EXAMPLES)
    # Without a labelled pixel nothing was matched, and no class has an IoU.
    matched = scores is not None and bool(run.state.clusterings.matched.all())
    scored = {title: scores[name] for name, title in _TITLES.items() if matched and name in scores}
    commit = f"commit {about['commit']}" if about["commit"] else ""
    facts = [
        (about["finished"], about["device"], f"{duration(about['training_seconds'])} for {about['steps']} steps"),
        (
            run.config.backbone.name,
            "" if run.config.loss.objective == "hp" else f"loss.objective: {run.config.loss.objective}",
            f"trained on {about['training_images']:,} images",
            f"{about['scored_images']:,} {metrics['images']} images segmented",
            commit,
        ),
    ]
    return Report(
        title=f"Hidden Positives: {Path(run.config.output).name}",
        metrics=metrics,
        class_names=map_names(run.state, HEADLINE, run.val_bank.data.classes),
        history=run.state.history,
        examples=examples(run, images),
        positives=anchor_positives(run, images[:_ANCHORS]),
        propagation=propagation_weights(run, images[:3]),
        class_iou={title: score["class_iou"] for title, score in scored.items()},
        confusion={title: score["confusion"] for title, score in scored.items() if "confusion" in score},
        facts=[" · ".join(filter(None, line)) for line in facts],
        command=about["command"],
        versions=about["versions"],
    )


def examples(run: Run, images: Tensor) -> list[Example]:
    """Validation images beside their label and each segmentation that the run can give."""
    bank, state = run.val_bank, run.state
    usable = [name for name in _TITLES if why_unusable(state, name) is None]
    maps = to_classes(state, segment(state, bank.get(images).tokens, bank.grid, bank.data.size, only=usable))
    shown = []
    for row, index in enumerate(images.tolist()):
        label = bank.data.label(index)
        labelled = {} if label is None else {"Label": label}
        own = {_TITLES[name]: of_classes[row].cpu() for name, of_classes in maps.items()}
        shown.append(Example(bank.data.name(index), bank.data.image(index), labelled | own))
    return shown


def anchor_positives(run: Run, images: Tensor) -> list[AnchorPositives]:
    """The task-agnostic positives of one anchor of each image: in its own, and in those that have the most of them.

    Anchors are of those that have positives in other images: from few in the first image to many in the last, because
    the median of every image may be the same sky.
    """
    bank, pool, symmetric = run.val_bank, run.state.pools.agnostic(), run.config.loss.symmetric
    height, width = bank.grid

    def features(of: Tensor) -> tuple[Tensor, Tensor]:
        rows = F.normalize(bank.get(of).tokens, dim=-1).flatten(0, 1)
        return rows, hpkernels.masked_topk(rows, pool, backend=run.config.backend).values[:, 0]

    def positives(anchors: Tensor, limits: Tensor, of: Tensor) -> Tensor:  # (anchors, images, G)
        keys, key_limits = features(of)
        limits = torch.minimum(limits[:, None], key_limits) if symmetric else limits[:, None]
        return (anchors @ keys.T > limits).unflatten(1, (len(of), -1))

    searched = _spread(len(bank), _SEARCHED)
    shown = []
    for row, index in enumerate(images.tolist()):
        anchors, limits = features(torch.tensor([index]))
        counts = torch.cat([positives(anchors, limits, some).sum(dim=2) for some in searched.split(8)], dim=1).cpu()
        counts[:, searched == index] = 0
        elsewhere = counts.sum(dim=1)
        order = elsewhere.argsort(stable=True)[int((elsewhere == 0).sum()) :]
        anchor = int(order[len(order) * (2 * row + 1) // (2 * len(images))]) if len(order) else len(elsewhere) // 2
        nearest = counts[anchor].argsort(descending=True, stable=True)[: min(3, int((counts[anchor] > 0).sum()))]
        of = torch.cat([torch.tensor([index]), searched[nearest]])
        chosen = positives(anchors[anchor, None], limits[anchor, None], of)[0].cpu()
        chosen[0, anchor] = False
        pictures = torch.stack([bank.data.image(image) for image in of.tolist()])
        shown.append(AnchorPositives(pictures, divmod(anchor, width), chosen.unflatten(1, (height, width))))
    return shown


def propagation_weights(run: Run, images: Tensor) -> list[PropagationWeights]:
    """The local-propagation weights of images, and the patch that keeps the least of its window."""
    bank = run.val_bank
    shown = []
    for index, weights in zip(images.tolist(), bank.get(images).weights.cpu(), strict=True):
        anchor = divmod(int(kept_fraction(weights).argmin()), bank.grid[1])
        shown.append(PropagationWeights(bank.data.image(index), weights, anchor))
    return shown


def _spread(count: int, chosen: int) -> Tensor:
    """Up to `chosen` indices, evenly spread over `count`."""
    return torch.from_numpy(np.unique(np.linspace(0, count - 1, min(count, chosen)).round().astype(np.int64)))
