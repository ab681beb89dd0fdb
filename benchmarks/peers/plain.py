"""Short plain PyTorch that holds all pairs, and ``torch.compile`` of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases import Inputs
from benchmarks.peers.published import attention_of
from benchmarks.registry import PAIRS_LIMIT, Outputs, applied, compiled, contrasted, provides


@provides("masked_topk", "torch-topk")
def _topk(inputs: Inputs, ranked: Callable | None = None) -> Outputs:
    values, indices = (ranked or _ranked)(inputs["query"], inputs["pool"], inputs["k"])
    return {"values": values, "indices": indices}


def _ranked(query: Tensor, pool: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (query @ pool.T).topk(k, dim=1)


@provides("masked_topk", "compiled", compiles=True)
def _compiled_topk(inputs: Inputs) -> Outputs:
    return _topk(inputs, compiled(_ranked))


@provides("hidden_positives", "torch-matmul", most_anchors=PAIRS_LIMIT)
def _matmul(inputs: Inputs, exceeding: Callable | None = None) -> Outputs:
    features = inputs["features"].float()  # similarities rounded to half precision would give other pairs
    return {"mask": (exceeding or _exceeding)(features, inputs["threshold"]).fill_diagonal_(False)}


def _exceeding(features: Tensor, threshold: Tensor) -> Tensor:
    return features @ features.T > torch.minimum(threshold[:, None], threshold)


@provides("hidden_positives", "compiled", most_anchors=PAIRS_LIMIT, compiles=True)
def _compiled_matmul(inputs: Inputs) -> Outputs:
    return _matmul(inputs, compiled(_exceeding))


@provides("contrastive", "torch-dense", most_anchors=PAIRS_LIMIT)
def _dense(inputs: Inputs, loss_of: Callable | None = None) -> Outputs:
    def loss(anchors: Tensor, keys: Tensor | None) -> Tensor:
        # In float32: logits rounded to half precision, and then divided by the temperature, would be other logits.
        anchors, own = anchors.float(), keys is None
        keys = anchors if keys is None else keys.float()
        labels = inputs["labels"], inputs["key_labels"]
        return (loss_of or _dense_loss)(anchors, keys, *labels, own=own, **inputs["settings"])

    return contrasted(inputs, loss)


def _dense_loss(
    anchors: Tensor,
    keys: Tensor,
    labels: Tensor,
    key_labels: Tensor,
    *,
    own: bool,
    temperature: float,
    both_directions: bool,
) -> Tensor:
    logits = (anchors / temperature) @ keys.T
    positives = labels[:, None] == key_labels
    if own:
        logits.fill_diagonal_(-torch.inf)
        positives.fill_diagonal_(False)
    loss = _mean(*sum_of_rows(logits, positives))
    return (loss + _mean(*sum_of_rows(logits.T, positives.T))) / 2 if both_directions else loss


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count


def sum_of_rows(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the anchors that have positives, and how many these are."""
    counts = positives.sum(dim=1)
    losses = logits.logsumexp(dim=1) - logits.where(positives, 0).sum(dim=1) / counts.clamp(min=1)
    return losses.where(counts > 0, 0).sum(), (counts > 0).sum()


@provides("contrastive", "compiled", most_anchors=PAIRS_LIMIT, compiles=True)
def _compiled_dense(inputs: Inputs) -> Outputs:
    return _dense(inputs, compiled(_dense_loss))


@provides("local_propagation", "torch-bmm", "apply", "apply+backward", "whole+backward")
def _bmm(inputs: Inputs) -> Outputs:
    attention = attention_of(inputs)

    def apply(code: Tensor) -> Tensor:
        return torch.bmm(code.flatten(2), attention.mT).view_as(code)

    return applied(inputs, apply)


@provides("local_propagation", "torch-shifts", "apply", "apply+backward")
def _shifts(inputs: Inputs) -> Outputs:
    weights = inputs["weights"]

    def apply(code: Tensor) -> Tensor:
        height, width = code.shape[2:]
        padded = pad(code, (1, 1, 1, 1))
        return sum(
            padded[:, :, cell // 3 : cell // 3 + height, cell % 3 : cell % 3 + width] * weights[:, cell, None]
            for cell in range(9)
        ).to(code.dtype)

    return applied(inputs, apply)
