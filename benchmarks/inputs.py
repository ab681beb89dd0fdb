"""The inputs of a case, which all providers share: the same every time and, up to rounding, on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels
from benchmarks.end_to_end import NEGATIVE_RATE, open_step
from hpkernels.ops._philox import bernoulli
from hpkernels.testing import Problem, random_problem
from training.model import Projection, SegmentationHead

if TYPE_CHECKING:
    from benchmarks.cases import Case

Inputs = dict[str, Any]

DIM, FEATURE_DIM, POOL_SIZE = 512, 384, 2048
HEADS, HEAD_DIM, PREFIX_TOKENS = 6, 64, 1  # ViT-S
SPECIFIC_WEIGHT, TEMPERATURE, SEED = 0.5, 0.6, 0
CLASSES, QUEUE, CLIP_DIM = 100, 65536, 768
END_TO_END = "end-to-end"
"""The call of `training_step` that is a whole step of the training loop."""


def make(case: Case) -> Inputs:
    """The tensors and settings of a case, on the CPU in float32."""
    return _MAKERS[case.op](case)


@lru_cache(maxsize=1)  # the calls of an op follow each other, and large problems must not pile up
def _problem(images: int, grid: tuple[int, int], dim: int, pool_size: int = POOL_SIZE) -> Problem:
    height, width = grid
    return random_problem(
        SEED, images=images, height=height, width=width, dim=dim, feature_dim=FEATURE_DIM, pool_size=pool_size
    )


def _exact(rows: Tensor) -> Tensor:
    """`rows` rounded to multiples of 2^-8: their inner products are then exact in float32, in whatever order summed.

    So every provider finds the same positives, and results can be compared to rounding.
    """
    return (rows * 256).round() / 256


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _masked_topk(case: Case) -> Inputs:
    problem = _problem(case.images, case.grid, dim=1)
    return {"query": _exact(problem.features), "pool": _exact(problem.pool), "k": int(case.call.removeprefix("k="))}


def _hidden_positives(case: Case) -> Inputs:
    problem = _problem(case.images, case.grid, dim=1)
    features = _exact(problem.features)
    return {"features": features, "threshold": hpkernels.masked_topk(features, _exact(problem.pool)).values[:, 0]}


def _multi_positive_contrastive(case: Case) -> Inputs:
    problem = _problem(case.images, case.grid, DIM)
    if case.call == "labels":
        labels = torch.randint(27, (case.anchors,), generator=_generator())
        return {
            "z": problem.z,
            "labels": labels,
            "positives": hpkernels.PositiveMask.from_labels(labels),
            "settings": {"temperature": 0.1},
        }
    settings = {
        "temperature": TEMPERATURE,
        "negative_rate": _negative_rate(case),
        "seed": SEED,
        "anchors_per_image": problem.anchors_per_image,
        "reweight": True,
    }
    name, _, density = case.call.partition("=")
    if name == "density":
        labels = torch.randint(round(1 / float(density)), (case.anchors,), generator=_generator())
        positives = hpkernels.PositiveMask.from_labels(labels)
    else:
        positives = hpkernels.hidden_positives(**_hidden_positives(case))
    return {"z": problem.z, "positives": positives, "negatives": _negatives(case), "settings": settings}


def _negative_rate(case: Case) -> float:
    name, _, value = case.call.partition("=")
    return float(value) if name == "rate" else NEGATIVE_RATE


def _local_propagation(case: Case) -> Inputs:
    height, width = case.grid
    generator = _generator()
    code = torch.randn((case.images, DIM, height, width), generator=generator)
    tokens = (2, case.images, HEADS, PREFIX_TOKENS + height * width, HEAD_DIM)
    query, key = torch.randn(tokens, generator=generator)
    weights = hpkernels.local_propagation_weights(query, key, case.grid)
    grad = torch.randn(code.shape, generator=generator)
    inputs = {"code": code, "query": query, "key": key, "grid": case.grid, "weights": weights, "grad": grad}
    return inputs | ({"attention": _dense(weights)} if case.call.startswith("apply") else {})


def _dense(weights: Tensor) -> Tensor:
    """The weights (B, window², H, W) as (B, G, G) matrices over all pairs of patches, which published code keeps."""
    batch, cells, height, width = weights.shape
    patches = height * width
    identity = torch.eye(patches).view(patches, 1, height, width)
    window = round(cells**0.5)
    neighbours = torch.nn.functional.unfold(identity, window, padding=window // 2)  # (source, cell, target)
    return torch.stack([torch.einsum("sct,ct->ts", neighbours, own.flatten(1)) for own in weights])


def _contrastive(case: Case) -> Inputs:
    """Unit rows and their labels; without `keys` the anchors are each other's."""
    generator = _generator()
    dim = CLIP_DIM if case.call in ("dim=768", "clip") else DIM

    def rows(count: int) -> tuple[Tensor, Tensor]:
        vectors = torch.randn((count, dim), generator=generator)
        return normalize(vectors), torch.randint(CLASSES, (count,), generator=generator)

    anchors, labels = rows(case.anchors)
    keys, key_labels = None, labels
    if case.call != "own":
        keys, key_labels = rows(QUEUE if case.call == "queue" else case.anchors)
    if case.call == "clip":
        labels = key_labels = torch.arange(case.anchors)
    settings = {"temperature": 0.07, "both_directions": case.call in ("both", "clip")}
    return {"anchors": anchors, "keys": keys, "labels": labels, "key_labels": key_labels, "settings": settings}


def _ghp_contrastive(case: Case) -> Inputs:
    problem = _problem(case.images, case.grid, DIM)
    similar = _of_labels(case) if case.call.startswith("density=") else _of_problem(problem)
    return {
        "z": problem.z,
        "z_mixed": problem.z_mixed,
        **similar,
        "negatives": _negatives(case),
        "settings": _ghp_settings(case, problem),
    }


def _of_problem(problem: Problem) -> dict[str, Tensor]:
    """The features that positives are found by, and the pools."""
    return {name: _exact(getattr(problem, name)) for name in ("features", "pool", "specific", "specific_pool")}


def _of_labels(case: Case) -> dict[str, Tensor]:
    """Such features that the positives of an anchor are those of its random label, which give the density of the call.

    Rows of one label are alike (0.9), and the pool has a row for each label, half as like (0.5); others are orthogonal.
    Task-specific positives are the task-agnostic ones: both together are of that density.
    """
    generator, labels = _generator(), round(1 / float(case.call.partition("=")[2]))
    chosen, made = torch.randint(labels, (case.anchors,), generator=generator), {}
    for rows, pool, dim in (("features", "pool", FEATURE_DIM), ("specific", "specific_pool", DIM)):

        def unit(count: int, dim: int = dim) -> Tensor:
            return normalize(torch.randn((count, dim), generator=generator))

        centres = unit(labels)
        made[rows] = _exact(normalize(centres[chosen] + 0.33 * unit(case.anchors)))
        made[pool] = _exact(normalize(centres[torch.arange(POOL_SIZE) % labels] + 1.7 * unit(POOL_SIZE)))
    return made


@lru_cache(maxsize=1)
def _drawn(group: int, anchors: int, rate: float) -> Tensor:
    return bernoulli(torch.tensor(SEED), group, anchors, rate)


def _negatives(case: Case) -> Tensor:
    """The mask that hpkernels draws from the seed, for providers that are given one."""
    return _drawn(case.grid[0] * case.grid[1], case.anchors, _negative_rate(case))


def _ghp_settings(case: Case, problem: Problem) -> dict[str, Any]:
    return {
        "specific_weight": SPECIFIC_WEIGHT,
        "anchors_per_image": problem.anchors_per_image,
        "temperature": TEMPERATURE,
        "base_temperature": 0.07,
        "negative_rate": _negative_rate(case),
        "seed": SEED,
    }


def _training_step(case: Case) -> Inputs:
    if case.call == END_TO_END:
        return open_step(case.images, case.grid, case.device)
    problem = _problem(case.images, case.grid, DIM)
    local = _local_propagation(replace(case, call="apply"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head, projection = SegmentationHead(FEATURE_DIM, DIM, dropout=0.0), Projection(DIM)
    return {
        "head": head,
        "projection": projection,
        "features": _exact(problem.features),
        "pool": _exact(problem.pool),
        "specific": _exact(problem.specific),  # what the EMA head gives, which is not a part of the measured step
        "specific_pool": _exact(problem.specific_pool),
        "negatives": _negatives(case),
        "settings": _ghp_settings(case, problem),
        "grid": case.grid,
        "attention": local["attention"],
        "weights": local["weights"],
    }


_MAKERS: dict[str, Callable[[Case], Inputs]] = {
    "masked_topk": _masked_topk,
    "hidden_positives": _hidden_positives,
    "multi_positive_contrastive": _multi_positive_contrastive,
    "local_propagation": _local_propagation,
    "contrastive": _contrastive,
    "ghp_contrastive": _ghp_contrastive,
    "training_step": _training_step,
}
