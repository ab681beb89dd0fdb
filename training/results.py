"""What a finished run leaves behind: the scores, the last checkpoint, ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hpkernels
from training.config_file import settings_of
from training.data.batches import evenly_spread
from training.evaluate import HEADLINE, score
from training.evaluation.metrics import class_iou, confusion_matrix, to_json
from training.evaluation.precision import positive_precision
from training.report.explorer import TITLES, explored
from training.report.page import Example, Report, duration, write_report
from training.run import Run
from training.runtime import checkpoint
from training.runtime.resuming import fingerprint
from training.segment import CLUSTERED, map_names, segment, to_classes, why_unusable

_EXAMPLES = 8  # images segmented in the report


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
        "training_data_sha256": fingerprint(run.images),
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
    about, data = metrics["run"], run.config.data
    images = evenly_spread(len(run.val_bank), _EXAMPLES)
    # Without a labelled pixel nothing was matched, and no class has an IoU.
    matched = scores is not None and bool(run.state.clusterings.matched.all())
    scored = {title: scores[name] for name, title in TITLES.items() if matched and name in scores}
    batch = explored(run)
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
        explorer=None if batch is None else batch[1],
        explorer_images=[] if batch is None else _photographs(run, batch[0]),
        explorer_note=_objective_note(run) if batch else "One image has too many patches to explore them here.",
        class_iou={title: score["class_iou"] for title, score in scored.items()},
        confusion={title: score["confusion"] for title, score in scored.items() if "confusion" in score},
        assignments=_assignments(run),
        facts=[" · ".join(filter(None, line)) for line in facts],
        command=about["command"],
        provenance={"seed": run.config.seed, "data": ": ".join(filter(None, (data.name, data.root)))} | about,
        settings=settings_of(run.config),
    )


def _photographs(run: Run, images: Tensor) -> list[tuple[str, Tensor]]:
    data = run.train_bank.data
    return [(data.name(index), data.image(index)) for index in images.tolist()]


def _objective_note(run: Run) -> str:
    """What a reader must know where the loss did not use all of these positives."""
    loss = run.config.loss
    if loss.objective != "hp":
        return f"This run did not learn from them: its loss.objective is {loss.objective}."
    unused = [kind for kind in ("agnostic", "specific") if not getattr(loss, kind)]
    return f"The loss of this run left out the task-{unused[0]} ones." if unused else ""


def _assignments(run: Run) -> dict[str, list[str]]:
    """The class that each cluster was matched to, of each clustering that was matched."""
    names = run.val_bank.data.classes
    clusterings = run.state.clusterings
    return {
        TITLES[name]: [
            "none" if chosen < 0 else map_names(run.state, name, names)[chosen]
            for chosen in clusterings.assignments[row].tolist()
        ]
        for row, name in enumerate(CLUSTERED)
        if clusterings.matched[row]
    }


def examples(run: Run, images: Tensor) -> list[Example]:
    """Validation images beside their label and each segmentation that the run can give."""
    bank, state = run.val_bank, run.state
    usable = [name for name in TITLES if why_unusable(state, name) is None]
    maps = to_classes(state, segment(state, bank.get(images).tokens, bank.grid, bank.data.size, only=usable))
    matched = {name for row, name in enumerate(CLUSTERED) if state.clusterings.matched[row]}
    shown = []
    for row, index in enumerate(images.tolist()):
        label = bank.data.label(index)
        own = {name: of_classes[row].cpu() for name, of_classes in maps.items()}
        scored = () if label is None else [name for name in own if name == "linear" or name in matched]
        miou = {TITLES[name]: _miou(own[name], label, state.classes) for name in scored}
        labelled = {} if label is None else {"Label": label}
        titled = labelled | {TITLES[name]: of_classes for name, of_classes in own.items()}
        shown.append(Example(bank.data.name(index), bank.data.image(index), titled, miou))
    return shown


def _miou(of_classes: Tensor, label: Tensor, classes: int) -> float:
    """The mIoU in percent of one image over the classes that it or its segmentation has; NaN without labels."""
    values = max(classes, int(of_classes.max()) + 1)  # those from `classes` on are clusters of no class
    return 100 * class_iou(confusion_matrix(of_classes, label, classes, values)).nanmean().item()
