"""What a finished run leaves behind: the scores, the last checkpoint, ``metrics.json`` and ``report.html``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import hpkernels
from training import checkpoint
from training.evaluate import evaluate, summary
from training.run import Run


def write_results(run: Run) -> tuple[Path, dict[str, Any]]:
    """Cluster, score and describe a trained run.

    Returns:
        the path of the report, and what ``metrics.json`` holds.
    """
    if run.best_path.is_file() and run.config.quirks.select_on_labels:
        run.state.load_modules(checkpoint.load(run.best_path)["state"])
    run.state.clusterings.fit(run.train_bank, run.state.head, run.config.seed)
    scores = evaluate(run.state, run.val_bank)
    run.save()
    metrics = summary(scores) | {"config": asdict(run.config), "run": provenance(run)}
    output = Path(run.config.output)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return output, metrics


def provenance(run: Run) -> dict[str, Any]:
    """On what, when and how long."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    return {
        "device": f"{run.device.type} ({device})",
        "threads": torch.get_num_threads(),
        "hpkernels": hpkernels.__version__,
        "torch": torch.__version__,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "training_seconds": round(run.state.seconds, 1),
    }
