"""What groups of runs logged while they trained: the mean over seeds as a curve, and their spread as a band."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from training.report.figures import class_palette

Logged = Mapping[str, Mapping[int, float]]
"""What a run logged, by the name of the figure and step."""

TITLES = {
    "val/miou_linear": "mIoU of the linear probe on validation images, in percent",
    "val/miou_cluster_probe": "mIoU of the cluster probe on validation images, in percent",
    "loss": "loss",
    "positives_per_anchor": "hidden positives of an anchor",
}
"""The figures that are shown, and what they are."""

_INK = "#7d8799"  # to be read on white and on black


def group_curves(groups: Mapping[str, Sequence[Logged]]) -> list[tuple[str, str]]:
    """A title and a picture, as a URI, of each figure that some group logged at more than one step.

    Args:
        groups: what each run of a group logged, by the name of the group.
    """
    colours = dict(zip(groups, class_palette(len(groups)) / 255, strict=True))
    found = []
    for name, title in TITLES.items():
        logged = {group: [run[name] for run in runs if name in run] for group, runs in groups.items()}
        curves = {group: mean_and_spread(runs) for group, runs in logged.items() if runs}
        if any(len(steps) > 1 for steps, _, _ in curves.values()):
            found.append((title, _drawn(curves, colours)))
    return found


def mean_and_spread(runs: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps that all runs logged, and there the mean over runs and the standard deviation, 0 of a single run.

    Example:
        >>> mean_and_spread([{0: 1.0, 5: 2.0, 9: 7.0}, {0: 3.0, 5: 2.0}])
        (array([0, 5]), array([2., 2.]), array([1.41421356, 0.        ]))
    """
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    return np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1) if len(runs) > 1 else 0 * values[0]


def _drawn(curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colours: Mapping[str, np.ndarray]) -> str:
    style = {"svg.fonttype": "none", "svg.hashsalt": "curves", "text.parse_math": False}
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor", "text.color"), _INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for group, (steps, mean, spread) in curves.items():
            label = f" {group}"  # matplotlib leaves out labels that begin with an underscore
            axes.plot(steps, mean, color=colours[group], label=label, linewidth=1.6)
            axes.fill_between(steps, mean - spread, mean + spread, color=colours[group], alpha=0.2, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
        axes.set_xlabel("step")
        columns = max(1, 90 // (8 + max(map(len, curves))))
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize="small")
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
