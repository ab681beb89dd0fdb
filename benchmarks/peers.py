"""Other ways to compute an op: plain PyTorch written for speed, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases import Inputs
from benchmarks.providers import Outputs, applied, attention_of, compiled, differentiate, leaf, provides


@provides("masked_topk", "torch-topk")
def _topk(inputs: Inputs, ranked: Callable | None = None) -> Outputs:
    values, indices = (ranked or _ranked)(inputs["query"], inputs["pool"], inputs["k"])
    return {"values": values, "indices": indices}


def _ranked(query: Tensor, pool: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (query @ pool.T).topk(k, dim=1)


@provides("masked_topk", "compiled", compiles=True)
def _compiled_topk(inputs: Inputs) -> Outputs:
    return _topk(inputs, compiled(_ranked))


@provides("masked_topk", "faiss", package="faiss", only=("cpu", "float32"))
def _faiss(inputs: Inputs) -> Outputs:
    import faiss

    index = faiss.IndexFlatIP(inputs["pool"].shape[1])
    index.add(inputs["pool"].numpy())
    values, indices = index.search(inputs["query"].numpy(), inputs["k"])
    return {"values": torch.from_numpy(values), "indices": torch.from_numpy(indices)}


@provides("hidden_positives", "torch-matmul", most_anchors=12544)
def _matmul(inputs: Inputs, exceeding: Callable | None = None) -> Outputs:
    features = inputs["features"].float()  # similarities rounded to half precision would give other pairs
    return {"mask": (exceeding or _exceeding)(features, inputs["threshold"]).fill_diagonal_(False)}


def _exceeding(features: Tensor, threshold: Tensor) -> Tensor:
    return features @ features.T > torch.minimum(threshold[:, None], threshold)


@provides("hidden_positives", "compiled", most_anchors=12544, compiles=True)
def _compiled_matmul(inputs: Inputs) -> Outputs:
    return _matmul(inputs, compiled(_exceeding))


@provides(
    "multi_positive_contrastive",
    "pytorch-metric-learning",
    "labels",
    package="pytorch_metric_learning",
    most_anchors=3136,
    only=("cpu", "float32"),
)
def _metric_learning(inputs: Inputs) -> Outputs:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    z = leaf(inputs["z"])
    similarity = DotProductSimilarity(normalize_embeddings=False)  # the rows are unit vectors already
    loss = SupConLoss(inputs["settings"]["temperature"], distance=similarity)
    return differentiate(loss(z, inputs["labels"]), z=z)


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
