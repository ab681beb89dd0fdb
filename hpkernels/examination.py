"""A small problem through all ops of a backend, forward and backward, against the reference in float64 on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels._native import Availability
from hpkernels.launches import Inputs, compile_ahead, pairs_of_each_form, recorded
from hpkernels.ops import _checks as check
from hpkernels.ops import _triton
from hpkernels.ops.contrastive import chunked
from hpkernels.ops.contrastive.problem import Problem
from hpkernels.ops.contrastive.relations import Relation
from hpkernels.testing.rows import row_errors


@dataclass(frozen=True)
class Sizes:
    """B, (H, W), D, Df and M of the problem; images, (H, W), heads and features of a head of the attention.

    All that Triton compiles for, being a multiple of 16 or not, is as in the paper's sizes, so that what is compiled
    here is what calls of such sizes run.
    """

    images: int = 8
    grid: tuple[int, int] = (8, 24)
    dim: int = 512
    feature_dim: int = 384
    pool_size: int = 1024
    attention: tuple[int, int, int, int, int] = (2, 28, 28, 6, 64)


def examine(backend: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Availability:
    """Compare all ops of `backend` with the reference in float64 on the CPU.

    Inner products of the features are exact, in whatever order summed, so that packed bits and indices must be equal.
    """
    sizes = sizes or Sizes()
    inputs = problem(dtype, sizes)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    given = {name: value.to(device) for name, value in inputs.items()}
    started = time.monotonic()
    if backend == "triton" and device.type == "cuda":
        _compile_ahead(device, dtype, sizes)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        found = zip(results(backend, backend, given, sizes), results("reference", backend, exact, sizes), strict=True)
        for (what, actual), (_, wanted) in found:
            wrong = wrong_rows(actual.detach().to("cpu"), wanted, dtype)
            if wrong:
                return Availability(False, f"{what}: {wrong} of {len(wanted)} rows differ from the reference")
    seconds = time.monotonic() - started
    return Availability(True, f"checked on this device in {seconds:.1f} s, {datetime.now(timezone.utc):%Y-%m-%d}")


def _compile_ahead(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Compile the kernels that the problem needs, several at a time."""
    with recorded(_triton.architecture(device)) as launches:
        for _ in results("triton", "triton", problem(dtype, sizes, torch.device("meta")), sizes):
            pass
    compile_ahead(launches, device)


def problem(dtype: torch.dtype, sizes: Sizes, device: torch.device | None = None) -> dict[str, Tensor]:
    """The inputs; on the CPU, if `device` is None, the same each time."""
    make = Inputs(dtype, device or torch.device("cpu"))
    anchors = sizes.images * sizes.grid[0] * sizes.grid[1]
    images, height, width, heads, head_dim = sizes.attention
    group = torch.arange(anchors, device=make.device) // (anchors // sizes.images)
    rows = {name: make.unit_rows(anchors, sizes.dim) for name in ("specific", "z", "z_mixed")}
    relations = {
        f"{form}.{field}": value
        for form, relation in pairs_of_each_form(make, anchors, anchors).items()
        for field, value in relation._asdict().items()
        if value is not None
    }
    return (
        rows
        | relations
        | {
            "features": make.unit_rows(anchors, sizes.feature_dim),
            "pool": make.unit_rows(sizes.pool_size, sizes.feature_dim),
            "specific_pool": make.unit_rows(sizes.pool_size, sizes.dim),
            "group": group,
            "pool_group": make.integers(sizes.images, sizes.pool_size),
            "grad_values": make.normal(anchors, 8).float(),
            "weight": make.scalar(0.5),
            # So large that float16 gradients, of a mean over all anchors, are normal numbers.
            "grad_losses": torch.tensor([256.0, 128.0], device=make.device),
            "seed": make.scalar(0, torch.int64),
            "query": make.normal(images, heads, 1 + height * width, head_dim),
            "key": make.normal(images, heads, 1 + height * width, head_dim),
            "code": make.normal(images, sizes.dim, height, width),
        }
    )


def results(backend: str, checked: str, given: dict[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """What the ops of `backend` give, by what it is, for the ops that `checked` has.

    The functions of the backend are called, not the public ops: no autograd, whose threads may be those that wait.
    """

    def has(op: str) -> bool:
        return (op, checked) in backends._modules

    def of(op: str) -> Any:
        return backends.implementation(op, backend)

    bits, own = {}, {}  # the relation and that which is not symmetric
    if has("masked_topk"):
        topk = of("masked_topk")
        for features, pool in (("features", "pool"), ("specific", "specific_pool")):
            top, indices = topk.forward(given[features], given[pool], 1, None, None, None)
            yield f"masked_topk of {features}, values", top
            yield f"masked_topk of {features}, indices", indices
            if has("hidden_positives"):
                bits[features] = of("hidden_positives").forward(given[features], top[:, 0])
                yield f"hidden_positives of {features}", bits[features]
                own[features] = of("hidden_positives").forward(given[features], top[:, 0], False)
                yield f"hidden_positives of {features}, not symmetric", own[features]
                yield from _rectangles(of("hidden_positives"), given[features], given[pool], top[:, 0], sizes)
        groups = given["group"], given["pool_group"]
        top, indices = topk.forward(given["features"], given["pool"], 8, None, *groups)
        yield "masked_topk with groups, values", top
        yield "masked_topk with groups, indices", indices
        gradients = topk.backward(given["grad_values"].to(top.dtype), indices, given["features"], given["pool"])
        yield from zip(("gradient of masked_topk, query", "gradient of masked_topk, pool"), gradients, strict=True)
    if has("multi_positive_contrastive") and bits:
        contrastive, branches = of("multi_positive_contrastive"), [given["z"], given["z_mixed"]]
        group = sizes.grid[0] * sizes.grid[1]
        for rate, with_specific, found in (
            (0.02, False, bits),
            (0.02, True, bits),
            (1.0, True, bits),
            (0.02, True, own),
        ):
            what = f"of the loss, rate {rate:g}{', specific' * with_specific}{', not symmetric' * (found is own)}"
            relations = found["features"], found["specific"] if with_specific else None
            weight, drawn, options = (
                given["weight"] * with_specific,
                (None, given["seed"]),
                ("joint", True, False),
            )
            row_bytes = sizes.dim * branches[0].element_size()
            pairs = contrastive.prepare(*relations, weight, *drawn, group, rate, *options, found is bits, row_bytes)
            losses, rows = contrastive.forward(
                branches, *relations, weight, *drawn, pairs, group, 0.6, 1.0, rate, *options
            )
            yield f"value {what}", losses
            gradients = contrastive.backward(
                given["grad_losses"].to(losses.dtype),
                branches, *relations, *drawn, pairs, rows, group, 0.6, rate, found is bits,
            )  # fmt: skip
            yield from ((f"gradient {what}", gradient) for gradient in gradients)
    if has("contrastive"):
        yield from _contrastive_results(of("contrastive"), given)
    if has("local_propagation"):
        local, (_, height, width, *_) = of("local_propagation"), sizes.attention
        weights = local.weights_forward(given["query"], given["key"], height, width, 28.0, 0.1, 0.9, 3, 1)
        yield "local_propagation, weights", weights
        yield "local_propagation", local.apply_forward(given["code"], weights)
        yield "gradient of local_propagation", local.apply_backward(given["code"], weights)


def _rectangles(
    discovery: Any, features: Tensor, pool: Tensor, nearest: Tensor, sizes: Sizes
) -> Iterator[tuple[str, Tensor]]:
    """Relations of anchors and keys: both thresholds count, one is not there, and the rows of an image."""
    near, pool_limit = nearest - 2**-4, nearest.new_full((len(pool),), 2**-3)
    found = discovery.between(features, pool, near, pool_limit, False, None)
    yield f"hidden_positives of {len(features)} anchors and {len(pool)} keys", found
    image = slice(len(features) - sizes.grid[0] * sizes.grid[1], len(features))
    for either, of_keys in ((True, nearest), (False, torch.full_like(nearest, -torch.inf))):
        found = discovery.between(features[image], features, nearest[image], of_keys, either, image.start)
        yield f"hidden_positives, rows of an image{'' if either else ', not symmetric'}", found


def _contrastive_results(kernels: Any, given: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Statistics and gradients of `contrastive` by each form of pairs, among the anchors and in both directions."""

    (accumulate,) = check.accumulation(given["z"].dtype)

    def relation(form: str | None) -> Relation:
        found = Relation(**{field: given.get(f"{form}.{field}") for field in Relation._fields})
        return found if found.weights is None else found._replace(weights=found.weights.to(accumulate))

    anchors, needs = kernels.vectors(given["z"]), chunked.Needs(True, True, True, True)
    bias, scale = given["grad_values"][:, 0] / 8, anchors.new_full((), 10, dtype=accumulate)
    for positives, excluded, own, both, inside in (
        ("weighted lists", "mask", False, True, False),
        ("lists", "labels", False, True, True),
        ("mask", "labels", True, False, False),
        ("labels", None, True, False, False),
    ):
        triangle = own and excluded is None
        problem = Problem(
            anchors,
            None if own else kernels.vectors(given["z_mixed"]),
            relation(positives),
            relation(excluded),
            bias.to(scale.dtype).contiguous() if both else None,
            scale,
            0 if own else -1,
            triangle,
            inside,
            decoupled=excluded == "labels",
            exclude_positives=not both,
        )
        what = f"contrastive, {positives}{f' without {excluded}' * (excluded is not None)}"
        if own and not triangle:
            rows, gradients = chunked.one_pass(kernels, problem, None, needs)
            statistics = [rows]
        else:
            statistics = [each for each in chunked.statistics(kernels, problem, both) if each is not None]
            numbers = [chunked.numbers_of(each, torch.ones_like(each[:, 0]), inside) for each in statistics]
            gradients = chunked.two_pass(kernels, problem, numbers[0], numbers[1] if both else None, needs)
        for of_each in statistics:
            yield f"statistics of {what}", of_each[:, 0]
            yield f"pull of {what}", of_each[:, 1]
            yield f"pairs of {what}", of_each[:, 2:]
        for name, gradient in gradients._asdict().items():
            if gradient is not None:  # numbers of which each may be a difference of large ones are one row
                yield f"gradient of {what}, {name}", gradient if gradient.dim() == 2 else gradient.reshape(1, -1)


def wrong_rows(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> int:
    """How many rows differ by more than rounding; whole numbers must be equal, and so must values of exact products."""
    if actual.shape != expected.shape:
        return len(expected)
    if not expected.is_floating_point():
        return int((actual != expected).flatten(1).any(dim=1).sum())
    norms = row_errors(expected, torch.zeros_like(expected))
    errors = row_errors(actual, expected)
    return int((~(errors <= _tolerance(dtype) * (norms + 0.01 * norms.max()))).sum())


def _tolerance(dtype: torch.dtype) -> float:
    """Of a row, relative: some roundings to `dtype`, or, where PyTorch's setting allows TF32, to that."""
    if dtype == torch.float64:
        return 1e-9
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return 1e-4
    return 8 * max(torch.finfo(dtype).eps, 2.0**-10)
