"""What is measured: every op at its sizes, and the inputs, which all providers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import hpkernels
from benchmarks.end_to_end import NEGATIVE_RATE, open_step
from hpkernels.ops._philox import bernoulli
from hpkernels.testing import Problem, random_problem
from training.model import Projection, SegmentationHead

Inputs = dict[str, Any]

DIM, FEATURE_DIM, POOL_SIZE = 512, 384, 2048
HEADS, HEAD_DIM, PREFIX_TOKENS = 6, 64, 1  # ViT-S
SPECIFIC_WEIGHT, TEMPERATURE, SEED = 0.5, 0.6, 0
CLASSES, QUEUE, CLIP_DIM = 100, 65536, 768
LARGEST_VERIFIED = 1568  # anchors: more are verified by the same case with this many
END_TO_END = "end-to-end"
"""The call of `training_step` that is a whole step of the training loop."""
IN_IMAGES = ("sampled", "rate=", "density=")
"""The calls of `multi_positive_contrastive` whose anchors are those of images, with their own negatives."""


@dataclass(frozen=True)
class Case:
    """One call of an op on a batch of images.

    Attributes:
        op: stem of the op.
        call: what is called: a part of the op, or one of its settings.
        images: B.
        grid: (H, W), the patches of an image.
        device: "cpu" or "cuda".
        dtype: of the rows and codes; thresholds and weights are float32.
        memory_limit: GiB that a call may take beyond its inputs; None: what there is.
    """

    op: str
    call: str
    images: int
    grid: tuple[int, int] = (28, 28)
    device: str = "cpu"
    dtype: str = "float32"
    memory_limit: float | None = None

    @property
    def anchors(self) -> int:
        """N = B * H * W."""
        return self.images * self.grid[0] * self.grid[1]

    @property
    def tolerance(self) -> float:
        """By how much results may differ beyond rounding, in units of the greatest row.

        The features of a whole step are not exact, so a pair at the threshold may be found or not.
        """
        return 0.01 if self.call == END_TO_END else 0.0

    def __str__(self) -> str:
        name = f"{self.op} {self.call} N={self.anchors}"
        return name if (self.device, self.dtype) == ("cpu", "float32") else f"{name} {self.dtype} {self.device}"

    def verified(self) -> Case:
        """The same case at the size at which its results are compared with the reference."""
        return replace(
            self,
            images=min(self.images, max(1, LARGEST_VERIFIED // (self.grid[0] * self.grid[1]))),
            memory_limit=None,
        )

    def inputs(self) -> Inputs:
        """The tensors and settings of the call, the same every time and, up to rounding, on every device.

        Those on a GPU, which take longer to make than to use, are kept until others are made.
        """
        return dict(_kept(self)) if self.device == "cuda" else self._make()

    def _make(self) -> Inputs:
        made = {name: self._placed(name, value) for name, value in _INPUTS[self.op](self).items()}
        return {"call": self.call} | made

    def _placed(self, name: str, value: Any) -> Any:
        """An input on the device and, if it is of those that have it, in the dtype of the case."""
        dtype = torch.float32 if name in _FLOAT32 else getattr(torch, self.dtype)
        if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.is_floating_point()):
            return value.to(self.device, dtype)
        return value.to(self.device) if isinstance(value, Tensor | hpkernels.PositiveMask) else value


DTYPES = ("float32", "float16", "bfloat16")
"""Of the inputs that `Case.dtype` can say."""
_FLOAT32 = ("threshold", "weights", "attention")
_FULL = {
    "masked_topk": {"k=1": (4, 16, 64), "k=8": (16, 64), "k=32": (16, 64)},
    "hidden_positives": {"forward": (1, 4, 16)},
    "multi_positive_contrastive": {"labels": (1, 4), "sampled": (1, 4, 16)},
    "local_propagation": {
        "weights": (4, 16),
        "apply": (4, 16),
        "apply+backward": (4, 16),
        "whole+backward": (1, 4),
    },
    "contrastive": {"keys": (1, 4, 8), "own": (1, 4, 8, 98), "queue": (1,), "both": (1, 4, 8), "clip": (1, 4)},
    "ghp_contrastive": {"forward+backward": (1, 4, 8, 16, 64)},
    "training_step": {"forward+backward": (1, 4), END_TO_END: (4,)},
}
_ONLY_ON_GPU = {
    "multi_positive_contrastive": ("rate=0.2", "rate=1", "density=0.001", "density=0.1"),
    "contrastive": ("dim=768",),
    "ghp_contrastive": ("rate=1",),
}
"""Negative rates other than the published 0.02; the share of pairs that are positives, by random labels; another D."""
_SIZES_ON_GPU = (16, 64)
_QUICK_IMAGES = {"masked_topk": 4, "local_propagation": 4}
_END_TO_END_DTYPES = {"cpu": "float32", "cuda": "float16"}
"""What the training loop computes in on a device."""

OPS = tuple(_FULL)
"""What can be asked for by ``--op``."""


def cases(
    op: str, quick: bool = False, device: str = "cpu", dtype: str = "float32", images: Iterable[int] | None = None
) -> list[Case]:
    """The cases of `op` on a device, small before large: with `images` those sizes, with `quick` one small case a call.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known are {', '.join(OPS)}")
    sizes = _FULL[op]
    if device == "cuda":
        sizes = dict.fromkeys((*sizes, *_ONLY_ON_GPU.get(op, ())), _SIZES_ON_GPU)
    if images is not None or quick:
        sizes = dict.fromkeys(sizes, tuple(images or (_QUICK_IMAGES.get(op, 1),)))
    return [
        Case(op, call, count, _grid(op, call, device), device, dtype)
        for call, counts in sizes.items()
        for count in counts
        if call != END_TO_END or dtype == _END_TO_END_DTYPES[device]
    ]


def _grid(op: str, call: str, device: str) -> tuple[int, int]:
    if op == "contrastive":  # sizes of batches, which are powers of two
        return 32, 32
    return (14, 14) if call == END_TO_END and device == "cpu" else Case.grid


@lru_cache(maxsize=1)
def _kept(case: Case) -> Inputs:
    return case._make()


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
    """
    generator, labels = _generator(), round(1 / float(case.call.partition("=")[2]))
    made = {}
    for rows, pool, dim in (("features", "pool", FEATURE_DIM), ("specific", "specific_pool", DIM)):

        def unit(count: int, dim: int = dim) -> Tensor:
            return normalize(torch.randn((count, dim), generator=generator))

        centres, chosen = unit(labels), torch.randint(labels, (case.anchors,), generator=generator)
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


_INPUTS: dict[str, Callable[[Case], Inputs]] = {
    "masked_topk": _masked_topk,
    "hidden_positives": _hidden_positives,
    "multi_positive_contrastive": _multi_positive_contrastive,
    "local_propagation": _local_propagation,
    "contrastive": _contrastive,
    "ghp_contrastive": _ghp_contrastive,
    "training_step": _training_step,
}
