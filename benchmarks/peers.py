"""Other ways to compute an op: plain PyTorch written for speed, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cases import Inputs
from benchmarks.providers import Outputs, applied, attention_of, compiled, contrasted, differentiate, leaf, provides


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
    z = leaf(inputs["z"])
    return differentiate(_sup_con(inputs)(z, inputs["labels"]), z=z)


def _sup_con(inputs: Inputs) -> Callable:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    similarity = DotProductSimilarity(normalize_embeddings=False)  # the rows are unit vectors already
    return SupConLoss(inputs["settings"]["temperature"], distance=similarity)


@provides(
    "contrastive",
    "pytorch-metric-learning",
    "keys",
    "own",
    "queue",
    package="pytorch_metric_learning",
    most_anchors=12544,
    only=("cpu", "float32"),
)
def _metric_learning_of_keys(inputs: Inputs) -> Outputs:
    loss, labels = _sup_con(inputs), inputs["labels"]
    others = {} if inputs["keys"] is None else {"ref_labels": inputs["key_labels"]}
    return contrasted(inputs, lambda anchors, keys: loss(anchors, labels, ref_emb=keys, **others))


@provides("contrastive", "memeff", "clip", package="memeff", only=("cuda", "bfloat16"))
def _memeff(inputs: Inputs) -> Outputs:
    from memeff import MemoryEfficientCLIPLoss

    # Otherwise gradients are multiplied by a number that grows with the batch.
    loss = MemoryEfficientCLIPLoss(inputs["settings"]["temperature"], normalized_inputs=True, stable=False)
    return contrasted(inputs, loss)


@provides("contrastive", "torch-dense", most_anchors=12544)
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
    loss = _of_rows(logits, positives)
    return (loss + _of_rows(logits.T, positives.T)) / 2 if both_directions else loss


def _of_rows(logits: Tensor, positives: Tensor) -> Tensor:
    counts = positives.sum(dim=1)
    losses = logits.logsumexp(dim=1) - logits.where(positives, 0).sum(dim=1) / counts.clamp(min=1)
    return losses.where(counts > 0, 0).sum() / (counts > 0).sum()


@provides("contrastive", "compiled", most_anchors=12544, compiles=True)
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
