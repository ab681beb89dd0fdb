"""How near the CPU backend comes to `hpkernels.estimate`, with the rates that PyTorch has on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import hpkernels
from benchmarks.timing.rates import ceilings, least
from hpkernels.cost import estimate
from hpkernels.testing import random_problem

_IMAGES, _SIDE, _DIM, _FEATURES, _POOL, _RATE = 4, 28, 512, 384, 2048, 0.02


def add_estimates(commands: Any) -> None:
    """Enter the command `estimates` into those of ``python -m benchmarks``."""
    command = commands.add_parser("estimates", help="compare the time of the CPU backend with hpkernels.estimate")
    command.set_defaults(command=_estimates)


def _estimates(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for line in lines():
        print(line, flush=True)
    return 0


def lines() -> Iterator[str]:
    """A line an op: the time measured, the time estimated, and how many times as long that is."""
    device = ceilings("cpu", "float32")
    for op, call, density in _calls():
        sizes = {"N": _IMAGES * _SIDE**2, "anchors_per_image": _SIDE**2, "M": _POOL, "features_dim": _FEATURES, "k": 1}
        sizes |= {"D": _DIM, "negative_rate": _RATE, "density": density, "within_image_share": 1.0}
        cost = estimate(op, dtype="float32", device=device, **sizes)
        measured, estimated = 1e3 * least(call), cost.routes[cost.best].milliseconds
        yield f"{op:28} {measured:9.2f} ms, estimated {estimated:9.2f} ms, {measured / estimated:6.2f} times"


def _calls() -> Iterator[tuple[str, Callable[[], object], float]]:
    problem = random_problem(
        images=_IMAGES, height=_SIDE, width=_SIDE, dim=_DIM, feature_dim=_FEATURES, pool_size=_POOL
    )
    features, pool, z = problem.features, problem.pool, problem.z.requires_grad_()
    threshold = hpkernels.masked_topk(features, pool, backend="cpu").values[:, 0]
    positives = hpkernels.hidden_positives(features, threshold, backend="cpu")
    density = positives.count().sum().item() / len(z) ** 2

    def loss() -> None:
        options = {"anchors_per_image": _SIDE**2, "negative_rate": _RATE, "seed": 0, "backend": "cpu"}
        hpkernels.multi_positive_contrastive(z, positives, **options).backward()

    yield "masked_topk", lambda: hpkernels.masked_topk(features, pool, backend="cpu"), density
    yield "hidden_positives", lambda: hpkernels.hidden_positives(features, threshold, backend="cpu"), density
    yield "multi_positive_contrastive", loss, density
