"""The dense formula of every op in plain PyTorch, all of it in the dtype of the inputs, with autograd's gradients.

What a user gets who writes the formula down. The peers that are timed keep float32 where half precision would change
their results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.cases import Inputs
from benchmarks.peers.plain import _bmm, _dense_loss, _exceeding, _ranked
from benchmarks.providers import Outputs, contrasted, differentiate, leaf
from hpkernels.ops._bits import unpack_bits


def outputs_of(op: str, inputs: Inputs) -> Outputs | None:
    """The results of `op`, or None where PyTorch has no operator in this dtype."""
    return _FORMULAS[op](inputs)


def _masked_topk(inputs: Inputs) -> Outputs:
    return ranked(inputs, lambda query, pool: _ranked(query, pool, inputs["k"])[0])


def ranked(inputs: Inputs, values_of: Callable[[Tensor, Tensor], Tensor]) -> Outputs:
    """The values of the top k, and the gradients of query and pool for a gradient of ones."""
    query, pool = leaf(inputs["query"]), leaf(inputs["pool"])
    values = values_of(query, pool)
    grad_query, grad_pool = torch.autograd.grad(values, (query, pool), torch.ones_like(values))
    return {"values": values.detach(), "grad_query": grad_query, "grad_pool": grad_pool}


def _hidden_positives(inputs: Inputs) -> Outputs:
    return {"mask": _exceeding(inputs["features"], inputs["threshold"]).fill_diagonal_(False)}


def _contrastive(inputs: Inputs) -> Outputs:
    labels, own = (inputs["labels"], inputs["key_labels"]), inputs["keys"] is None

    def loss(anchors: Tensor, keys: Tensor | None) -> Tensor:
        return _dense_loss(anchors, anchors if keys is None else keys, *labels, own=own, **inputs["settings"])

    return contrasted(inputs, loss)


def _multi_positive_contrastive(inputs: Inputs) -> Outputs:
    z, settings = leaf(inputs["z"]), inputs["settings"]
    anchors = len(z)
    group = settings.get("anchors_per_image", anchors)
    every = torch.ones((), dtype=torch.bool, device=z.device).expand(group, anchors)
    losses = []
    for start in range(0, anchors, group):
        own = slice(start, start + group)
        positives = unpack_bits(inputs["positives"].bits[own], anchors)
        denominator = positives | inputs.get("negatives", every)
        denominator[:, own].fill_diagonal_(False)
        weights = positives.to(z.dtype)
        losses.append(
            published.image_loss(z[own], z, weights, weights, denominator.to(z.dtype), 0.0, settings["temperature"])
        )
    return differentiate(torch.stack(losses).mean(), z=z)


def _ghp_contrastive(inputs: Inputs) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    # Similarities in float32: those in half precision would find other positives, which is another problem.
    names = ("features", "pool", "specific", "specific_pool")
    similarities = {name: inputs[name].to(torch.promote_types(z.dtype, torch.float32)) for name in names}
    settings = {name: value for name, value in inputs["settings"].items() if name not in ("negative_rate", "seed")}
    loss = published.ghp_contrastive(z, z_mixed, **similarities, negatives=inputs["negatives"], **settings)
    return differentiate(loss, z=z, z_mixed=z_mixed)


def _local_propagation(inputs: Inputs) -> Outputs | None:
    if inputs["call"] != "weights":
        return _bmm(inputs)
    if inputs["query"].element_size() == 2:
        return None  # torch.quantile takes no half precision
    height, width = inputs["grid"]
    attention = published.attention(inputs["query"], inputs["key"], inputs["grid"])
    return {"weights": _of_windows(attention, height, width)}


def _of_windows(attention: Tensor, height: int, width: int) -> Tensor:
    """The nine cells around each patch of a dense attention (B, G, G), as (B, 9, H, W)."""
    maps = torch.nn.functional.pad(attention.unflatten(2, (height, width)), (1, 1, 1, 1))
    rows = torch.arange(height, device=maps.device)[:, None].expand(height, width).flatten()
    columns = torch.arange(width, device=maps.device).expand(height, width).flatten()
    patches = torch.arange(height * width, device=maps.device)
    cells = [maps[:, patches, rows + y, columns + x] for y in range(3) for x in range(3)]
    return torch.stack(cells, dim=1).unflatten(2, (height, width))


_FORMULAS: dict[str, Callable[[Inputs], Outputs | None]] = {
    "masked_topk": _masked_topk,
    "hidden_positives": _hidden_positives,
    "multi_positive_contrastive": _multi_positive_contrastive,
    "ghp_contrastive": _ghp_contrastive,
    "local_propagation": _local_propagation,
    "contrastive": _contrastive,
}
