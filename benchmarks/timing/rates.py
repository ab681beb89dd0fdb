"""What a time means: FLOP/s and bytes/s of useful work, and their shares of `torch.mm` and of the roofline.

Work and roofline are those of the best route of the one cost model, `hpkernels.estimate`, for the sizes, the dtype and
the positives at hand. What a provider computes beyond that does not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpkernels
from benchmarks.cases import Case, Inputs
from benchmarks.results import Row
from benchmarks.timing.timers import seconds_of
from hpkernels import PositiveMask
from hpkernels.cost import CHUNK_BYTES_ON_CPU, CHUNK_BYTES_ON_GPU, DEVICES, Device, RouteCost
from hpkernels.ops import _coarse
from hpkernels.ops._bits import bits_of_columns, population_count

MOST_FLOPS_ON_CPU = 2**36
"""Of the product that `torch.mm` is timed with there: of a larger one the first rows, which have the same rate."""
_REPETITIONS = 5  # of which the least counts
_COPIED = 2**28  # bytes
_ON_CPU, _ON_GPU = (512, 512, 2048), (8192, 8192, 8192)  # rows, inner and columns of the product that is a ceiling


class Product(NamedTuple):
    """A matrix product of the shape of a case: what computes it, and its FLOPs."""

    call: Callable[[], Tensor]
    flops: float


def fill(rows: Iterable[Row], case: Case, inputs: Inputs, mm: float | None) -> None:
    """Fill the columns of the rates, as far as the cost model knows the case.

    Args:
        rows: of the case, timed or not.
        case: which it is.
        inputs: of it.
        mm: FLOP/s of its `product` in the same run; None: there is none.
    """
    timed = [row for row in rows if row.median_ms]
    cost = cost_of(case, inputs) if timed else None
    for row in timed:
        seconds = row.median_ms / 1e3
        row.mm_tflops = _short(mm, 1e12)
        if cost is not None:
            row.tflops, row.gb_s = _short(cost.flops, 1e12 * seconds), _short(cost.bytes, 1e9 * seconds)
            row.of_mm = _short(cost.flops, seconds * mm) if mm else None
            row.of_roofline = _short(cost.milliseconds, row.median_ms)
            row.roofline = known_device(case.device) or "measured"


def _short(amount: float | None, unit: float) -> float | None:
    return float(f"{amount / unit:.4g}") if amount else None  # of no work there is no rate


def product(case: Case, inputs: Inputs) -> Product | None:
    """`torch.mm` of the vectors that the op compares, in their dtype; None: of an op that is no such product.

    In chunks of rows where the whole would be too large to hold.
    """
    if case.op not in _COMPARED:
        return None
    left, right = _COMPARED[case.op](inputs)
    on_gpu, flops_of_row = case.device == "cuda", 2.0 * right.numel()
    rows = len(left) if on_gpu else min(len(left), max(1, int(MOST_FLOPS_ON_CPU / flops_of_row)))
    chunk = (CHUNK_BYTES_ON_GPU if on_gpu else CHUNK_BYTES_ON_CPU) // (len(right) * left.element_size())
    blocks = left[:rows].split(max(1, chunk))
    out = left.new_empty((len(blocks[0]), len(right)))

    def call() -> Tensor:
        for block in blocks:
            torch.mm(block, right.T, out=out[: len(block)])
        return out

    return Product(call, rows * flops_of_row)


def _anchors_and_keys(inputs: Inputs) -> tuple[Tensor, Tensor]:
    keys = inputs["keys"]
    return inputs["anchors"], inputs["anchors"] if keys is None else keys


_COMPARED: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {
    "masked_topk": lambda inputs: (inputs["query"], inputs["pool"]),
    "hidden_positives": lambda inputs: (inputs["features"], inputs["features"]),
    "multi_positive_contrastive": lambda inputs: (inputs["z"], inputs["z"]),
    "ghp_contrastive": lambda inputs: (inputs["z"], inputs["z"]),
    "contrastive": _anchors_and_keys,
}


def cost_of(case: Case, inputs: Inputs) -> RouteCost | None:
    """What the case costs by the best route; None: the cost model does not know it."""
    sizes = _SIZES[case.op](case, inputs) if case.op in _SIZES else None
    if sizes is None:
        return None
    route = sizes.pop("route", None)
    device = known_device(case.device) or ceilings(case.device, case.dtype)
    cost = hpkernels.estimate(case.op, N=case.anchors, dtype=case.dtype, device=device, **sizes)
    return cost.routes[route or cost.best]


def _topk_sizes(case: Case, inputs: Inputs) -> dict[str, Any]:
    pool = inputs["pool"]
    return {"features_dim": pool.shape[1], "M": len(pool), "k": inputs["k"], **_per_image(case)}


def _discovery_sizes(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {"features_dim": inputs["features"].shape[1], **_per_image(case)}


def _loss_sizes(case: Case, inputs: Inputs) -> dict[str, Any]:
    settings = inputs["settings"]
    group = settings.get("anchors_per_image") or case.anchors
    rate = settings.get("negative_rate", 1.0)
    sizes = {"D": inputs["z"].shape[1], "anchors_per_image": group, "negative_rate": rate}
    return sizes | _density(inputs["positives"], group)


def _ghp_sizes(case: Case, inputs: Inputs) -> dict[str, Any]:
    settings, group = inputs["settings"], inputs["settings"]["anchors_per_image"]
    sources = [(inputs[name], inputs[pool]) for name, pool in (("features", "pool"), ("specific", "specific_pool"))]
    found = [
        hpkernels.hidden_positives(vectors, hpkernels.masked_topk(vectors, pool).values[:, 0])
        for vectors, pool in sources
    ]
    sizes = {"D": inputs["z"].shape[1], "features_dim": inputs["features"].shape[1], "M": len(inputs["pool"])}
    sizes |= {"anchors_per_image": group, "negative_rate": settings["negative_rate"]}
    return sizes | _density(found[0] | found[1], group)


def _contrastive_sizes(case: Case, inputs: Inputs) -> dict[str, Any] | None:
    if inputs["call"] == "queue":  # the model counts gradients of all vectors
        return None
    keys = None if inputs["keys"] is None else len(inputs["keys"])
    both = inputs["settings"]["both_directions"]
    return {"D": inputs["anchors"].shape[1], "keys": keys, "both_directions": both}


def _propagation_sizes(case: Case, inputs: Inputs) -> dict[str, Any] | None:
    # The model counts forward and backward.
    routes = {"apply+backward": "stencil (cached weights)", "whole+backward": "weights and stencil"}
    if inputs["call"] not in routes:
        return None
    heads, head_dim = inputs["query"].shape[1], inputs["query"].shape[3]
    sizes = {"D": inputs["code"].shape[1], "heads_dim": heads * head_dim, **_per_image(case)}
    return sizes | {"window": round(inputs["weights"].shape[1] ** 0.5), "route": routes[inputs["call"]]}


_SIZES: dict[str, Callable[[Case, Inputs], dict[str, Any] | None]] = {
    "masked_topk": _topk_sizes,
    "hidden_positives": _discovery_sizes,
    "multi_positive_contrastive": _loss_sizes,
    "ghp_contrastive": _ghp_sizes,
    "contrastive": _contrastive_sizes,
    "local_propagation": _propagation_sizes,
}


def _per_image(case: Case) -> dict[str, int]:
    return {"anchors_per_image": case.grid[0] * case.grid[1]}


def _density(positives: PositiveMask, group: int) -> dict[str, float]:
    """The share of all pairs that are positives, and of these that lie within images."""
    bits, anchors = positives.bits, len(positives)
    total = positives.count().sum().item()
    images = (slice(start, start + group) for start in range(0, anchors, group))
    within = sum(population_count(bits_of_columns(bits[own], own)).sum() for own in images)
    return {"density": total / anchors**2, "within_image_share": int(within) / max(1, total)}


def known_device(device: str) -> str | None:
    """The name by which the cost model knows the GPU; None: it does not, or `device` is the CPU."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((known for known in DEVICES if re.search(rf"\b{known}\b", name)), None)


@cache
def ceilings(device: str, dtype: str) -> Device:
    """A device with the rates that PyTorch's matrix products and copies have here; `device` is "cpu" or "cuda"."""
    on_gpu = device == "cuda"
    single = _product_rate(device, torch.float32)
    matrix = {"float32": single}
    # The CPU backend computes half precision in float32.
    matrix[dtype] = max(single, _product_rate(device, getattr(torch, dtype)))
    ranking = _product_rate(device, torch.int8) if not on_gpu and _coarse.int8_is_fast() else None
    capability = torch.cuda.get_device_capability() if on_gpu and not torch.version.hip else None
    source, target = torch.ones(2, _COPIED // 4, device=device)
    bandwidth = 2 * _COPIED / least(lambda: target.copy_(source))
    return Device(matrix, single, bandwidth, "measured", ranking=ranking, capability=capability)


def _product_rate(device: str, dtype: torch.dtype) -> float:
    rows, inner, columns = _ON_GPU if device == "cuda" else _ON_CPU
    left, right = (torch.rand(shape, device=device) for shape in ((rows, inner), (columns, inner)))
    if dtype == torch.int8:
        codes, other_codes = (127 * left).to(dtype), (127 * right).to(dtype)
        seconds = least(lambda: torch._int_mm(codes, other_codes.T))
    else:
        left, right = left.to(dtype), right.to(dtype)
        seconds = least(lambda: left @ right.T)
    return 2.0 * rows * inner * columns / seconds


def least(call: Callable[[], object]) -> float:
    """The least seconds of some calls, for a model that knows no other processes."""
    return min(seconds_of(call) for _ in range(_REPETITIONS))
