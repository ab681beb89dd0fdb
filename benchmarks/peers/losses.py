"""Contrastive losses of other libraries. All in float32 but memeff: they would round logits to half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import Inputs
from benchmarks.registry import PAIRS_LIMIT, PRODUCTS_LIMIT, Outputs, contrasted, differentiate, leaf, provides


@provides(
    "multi_positive_contrastive",
    "pytorch-metric-learning",
    "labels",
    package="pytorch_metric_learning",
    most_anchors=PRODUCTS_LIMIT,
)
def _metric_learning(inputs: Inputs) -> Outputs:
    z = leaf(inputs["z"])
    return differentiate(_sup_con(inputs)(z.float(), inputs["labels"]), z=z)


@provides(
    "contrastive",
    "pytorch-metric-learning",
    "keys",
    "own",
    "queue",
    "dim=768",
    package="pytorch_metric_learning",
    most_anchors=PAIRS_LIMIT,
)
def _metric_learning_of_keys(inputs: Inputs) -> Outputs:
    loss, labels = _sup_con(inputs), inputs["labels"]

    def loss_of(anchors: Tensor, keys: Tensor | None) -> Tensor:
        others = {} if keys is None else {"ref_emb": keys.float(), "ref_labels": inputs["key_labels"]}
        return loss(anchors.float(), labels, **others)

    return contrasted(inputs, loss_of)


def _sup_con(inputs: Inputs) -> Callable:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    similarity = DotProductSimilarity(normalize_embeddings=False)  # the rows are unit vectors already
    return SupConLoss(inputs["settings"]["temperature"], distance=similarity)


@provides("contrastive", "open_clip", "clip", package="open_clip", most_anchors=PAIRS_LIMIT)
def _open_clip(inputs: Inputs) -> Outputs:
    from open_clip import ClipLoss

    scale = 1 / inputs["settings"]["temperature"]
    return contrasted(inputs, lambda images, texts: ClipLoss()(images.float(), texts.float(), scale))


@provides("contrastive", "memeff", "clip", package="memeff", only=("cuda", "bfloat16"))
def _memeff(inputs: Inputs) -> Outputs:
    from memeff import MemoryEfficientCLIPLoss

    # Otherwise gradients are multiplied by a number that grows with the batch.
    loss = MemoryEfficientCLIPLoss(inputs["settings"]["temperature"], normalized_inputs=True, stable=False)
    return contrasted(inputs, loss)
