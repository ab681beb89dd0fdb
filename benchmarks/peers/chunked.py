"""Plain PyTorch in blocks of rows: a product, an epilogue, and the gradient of the block at once, in two products more.

So nothing of all pairs is kept for backward. What a block computes may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import IN_IMAGES, Inputs
from benchmarks.peers.plain import sum_of_rows
from benchmarks.registry import BLOCKS_LIMIT, COMPILED_LIMIT, Outputs, compiled, leaf, provides
from hpkernels.cost import CHUNK_BYTES_ON_CPU, CHUNK_BYTES_ON_GPU
from hpkernels.ops._bits import unpack_bits


class _Product(torch.autograd.Function):
    """``rows @ keys.T`` in float32, whatever they are: rounded to half precision, logits would be others."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor) -> Tensor:
        if not rows.is_cuda:  # CPUs multiply in half precision slowly, and cannot give the products in float32
            rows, keys = rows.float(), keys.float()
        ctx.save_for_backward(rows, keys)
        return rows @ keys.T if rows.dtype == torch.float32 else torch.mm(rows, keys.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, keys = ctx.saved_tensors
        grad = grad.to(rows.dtype)
        return grad @ keys, grad.T @ rows


def _product(rows: Tensor, keys: Tensor) -> Tensor:
    return _Product.apply(rows, keys)


def _blocks(rows: Tensor, columns: int) -> Iterator[slice]:
    """Blocks of equally many rows, so that compiled code sees one size, whose products take a bounded workspace."""
    bytes_of_block = CHUNK_BYTES_ON_GPU if rows.is_cuda else CHUNK_BYTES_ON_CPU
    most = max(1, bytes_of_block // (4 * columns))
    size = next(size for size in range(min(most, len(rows)), 0, -1) if len(rows) % size == 0)
    return (slice(start, start + size) for start in range(0, len(rows), size))


@provides("masked_topk", "torch-chunked")
def _topk(inputs: Inputs, ranked: Callable | None = None) -> Outputs:
    query, pool, k = inputs["query"], inputs["pool"], inputs["k"]
    blocks = [(ranked or _ranked)(query[block], pool, k) for block in _blocks(query, len(pool))]
    values, indices = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return {"values": values, "indices": indices}


def _ranked(query: Tensor, pool: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _product(query, pool).topk(k, dim=1)


@provides("hidden_positives", "torch-chunked")
def _discovered(inputs: Inputs, exceeding: Callable | None = None) -> Outputs:
    features, threshold = inputs["features"], inputs["threshold"]
    mask = torch.empty((len(features), len(features)), dtype=torch.bool, device=features.device)
    for block in _blocks(features, len(features)):
        mask[block] = (exceeding or _exceeding)(features[block], features, threshold[block], threshold)
    return {"mask": mask.fill_diagonal_(False)}


def _exceeding(rows: Tensor, features: Tensor, row_threshold: Tensor, threshold: Tensor) -> Tensor:
    return _product(rows, features) > torch.minimum(row_threshold[:, None], threshold)


@provides("contrastive", "torch-chunked", most_anchors=BLOCKS_LIMIT)
@provides("multi_positive_contrastive", "torch-chunked", "labels", most_anchors=BLOCKS_LIMIT)
def _by_labels(inputs: Inputs, loss_of_block: Callable | None = None) -> Outputs:
    settings, labels = inputs["settings"], inputs["labels"]
    anchors = inputs["z"] if "z" in inputs else inputs["anchors"]
    given = inputs.get("keys")
    keys, key_labels = (anchors, labels) if given is None else (given, inputs["key_labels"])
    directions = [(anchors, labels, keys, key_labels)]
    if settings.get("both_directions"):
        directions.append((keys, key_labels, anchors, labels))

    gradients = {id(rows): torch.zeros_like(rows, dtype=torch.float32) for rows in (anchors, keys)}
    loss = torch.zeros((), device=anchors.device)
    for direction in directions:
        total, of_rows, of_columns = _direction(
            *direction, given is None, settings["temperature"], loss_of_block or _of_block
        )
        loss += total / len(directions)
        for rows, gradient in ((direction[0], of_rows), (direction[2], of_columns)):
            gradients[id(rows)] += gradient / len(directions)

    named = {"grad_z" if "z" in inputs else "grad_anchors": gradients[id(anchors)].to(anchors.dtype)}
    if given is not None and inputs["call"] != "queue":
        named["grad_keys"] = gradients[id(keys)].to(keys.dtype)
    return {"loss": loss} | named


def _direction(
    rows: Tensor,
    row_labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    own: bool,
    temperature: float,
    loss_of_block: Callable,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of rows against keys, which `own` says are the rows themselves, and the gradients of both."""
    place = torch.arange(len(rows), device=rows.device) if own else None
    loss, number = torch.zeros((), device=rows.device), torch.zeros((), device=rows.device)
    of_rows, of_keys = (torch.zeros_like(value, dtype=torch.float32) for value in (rows, keys))
    for block in _blocks(rows, len(keys)):
        row, key = leaf(rows[block]), leaf(keys)
        own_place = None if place is None else place[block]
        total, count = loss_of_block(row, key, row_labels[block], key_labels, own_place, temperature)
        grad_rows, grad_keys = torch.autograd.grad(total, (row, key))
        loss += total.detach()
        number += count
        of_rows[block] += grad_rows
        of_keys += grad_keys
    return loss / number, of_rows.div_(number), of_keys.div_(number)


def _of_block(
    rows: Tensor, keys: Tensor, row_labels: Tensor, key_labels: Tensor, place: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of a block of rows and how many have one; `place` is where they are among the keys."""
    logits = _product(rows, keys) / temperature
    positives = row_labels[:, None] == key_labels
    if place is not None:
        logits = logits.scatter(1, place[:, None], -torch.inf)
        positives = positives.scatter(1, place[:, None], False)
    return sum_of_rows(logits, positives)


@provides("multi_positive_contrastive", "torch-chunked", *IN_IMAGES, most_anchors=BLOCKS_LIMIT)
def _in_images(inputs: Inputs, loss_of_image: Callable | None = None) -> Outputs:
    bits, columns = inputs["positives"].bits, len(inputs["z"])
    masks = ((own, unpack_bits(bits[own], columns), None) for own in _images(inputs))
    return _image_by_image(inputs, ("z",), masks, loss_of_image)


@provides("ghp_contrastive", "torch-chunked", most_anchors=BLOCKS_LIMIT)
def _ghp(inputs: Inputs, loss_of_image: Callable | None = None) -> Outputs:
    thresholds = [_product(inputs[rows], inputs[pool]).amax(dim=1) for rows, pool in _SIMILAR]

    def masks() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for own in _images(inputs):
            found = [
                _exceeding(inputs[rows][own], inputs[rows], threshold[own], threshold)
                for (rows, _), threshold in zip(_SIMILAR, thresholds, strict=True)
            ]
            for mask in found:
                mask[:, own].fill_diagonal_(False)
            yield own, *found

    return _image_by_image(inputs, ("z", "z_mixed"), masks(), loss_of_image)


_SIMILAR = (("features", "pool"), ("specific", "specific_pool"))


def _images(inputs: Inputs) -> Iterator[slice]:
    group = inputs["settings"]["anchors_per_image"]
    return (slice(start, start + group) for start in range(0, len(inputs["z"]), group))


def _image_by_image(
    inputs: Inputs,
    branches: tuple[str, ...],
    masks: Iterable[tuple[slice, Tensor, Tensor | None]],
    loss_of_image: Callable | None,
) -> Outputs:
    """The loss of the branches and their gradients, each image's as soon as it has its loss."""
    settings = inputs["settings"]
    temperature, weight = settings["temperature"], settings.get("specific_weight", 0.0)
    gradients = {name: torch.zeros_like(inputs[name], dtype=torch.float32) for name in branches}
    loss = torch.zeros((), device=inputs["z"].device)
    for own, positives, specific in masks:
        denominator = positives | inputs["negatives"]
        denominator[:, own].fill_diagonal_(False)
        for name, gradient in gradients.items():
            rows, keys = leaf(inputs[name][own]), leaf(inputs[name])
            total, mass = (loss_of_image or _of_image)(
                rows, keys, positives, specific, denominator, weight, temperature
            )
            of_rows, of_keys = torch.autograd.grad(total, (rows, keys))
            loss += total.detach() / mass
            gradient[own] += of_rows.float() / mass
            gradient += of_keys.float() / mass
    scale = settings["anchors_per_image"] / len(inputs["z"]) / len(branches)
    scale *= temperature / settings.get("base_temperature", temperature)
    return {"loss": loss * scale} | {
        f"grad_{name}": gradient.mul_(scale).to(inputs[name].dtype) for name, gradient in gradients.items()
    }


def _of_image(
    rows: Tensor,
    keys: Tensor,
    positives: Tensor,
    specific: Tensor | None,
    denominator: Tensor,
    specific_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all pairs of an image as they weigh, and their weight: its loss is the ratio.

    The sum is what is differentiated: gradients of a mean over so many pairs are too small for half precision.
    """
    logits = _product(rows, keys) / temperature
    counted = positives.any(dim=1, keepdim=True)
    weights = (positives if specific is None else positives + specific_weight * specific) * counted
    log_sum = logits.where(denominator | ~counted, -torch.inf).logsumexp(dim=1)
    mass = weights.sum(dim=1)
    return (mass * log_sum).sum() - (weights * logits).sum(), mass.sum()


@provides("masked_topk", "compiled-chunked", compiles=True)
def _compiled_topk(inputs: Inputs) -> Outputs:
    return _topk(inputs, compiled(_ranked))


@provides("hidden_positives", "compiled-chunked", most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_discovered(inputs: Inputs) -> Outputs:
    return _discovered(inputs, compiled(_exceeding))


@provides("contrastive", "compiled-chunked", most_anchors=COMPILED_LIMIT, compiles=True)
@provides("multi_positive_contrastive", "compiled-chunked", "labels", most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_by_labels(inputs: Inputs) -> Outputs:
    return _by_labels(inputs, compiled(_of_block))


@provides("multi_positive_contrastive", "compiled-chunked", *IN_IMAGES, most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_in_images(inputs: Inputs) -> Outputs:
    return _in_images(inputs, compiled(_of_image))


@provides("ghp_contrastive", "compiled-chunked", most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_ghp(inputs: Inputs) -> Outputs:
    return _ghp(inputs, compiled(_of_image))
