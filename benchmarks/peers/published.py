"""The published way (``benchmarks/published.py``), and ``torch.compile`` of its inner functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.cases import END_TO_END, IN_IMAGES, Inputs
from benchmarks.end_to_end import published_end_to_end
from benchmarks.published import ImagePairs
from benchmarks.registry import (
    COMPILED_LIMIT,
    PAIRS_LIMIT,
    PRODUCTS_LIMIT,
    Outputs,
    applied,
    compiled,
    differentiate,
    leaf,
    provides,
    training_step,
)
from hpkernels.ops._bits import unpack_bits


def _published_loss(inputs: Inputs, z: Tensor, z_mixed: Tensor, image_loss: Callable | None = None) -> Tensor:
    # In float32 whatever the inputs: similarities rounded to half precision would change the positives.
    names = ("features", "pool", "specific", "specific_pool")
    similarities = {name: inputs[name].float() for name in names} | {"negatives": inputs["negatives"]}
    settings = {name: value for name, value in inputs["settings"].items() if name not in ("negative_rate", "seed")}
    return published.ghp_contrastive(z.float(), z_mixed.float(), **similarities, **settings, image_loss=image_loss)


def given_pairs(inputs: Inputs) -> Iterator[ImagePairs]:
    """The pairs of one image after another, of a mask of positives, which in the published way comes unpacked."""
    anchors, group = len(inputs["z"]), inputs["settings"]["anchors_per_image"]
    for start in range(0, anchors, group):
        own = slice(start, start + group)
        positives = unpack_bits(inputs["positives"].bits[own], anchors)
        denominator = torch.logical_or(positives, inputs["negatives"])
        denominator[:, own].fill_diagonal_(False)
        weights = positives.float()
        yield ImagePairs(own, weights, weights, denominator.float())


@provides("multi_positive_contrastive", "published", *IN_IMAGES, most_anchors=PAIRS_LIMIT)
def _published_contrastive(inputs: Inputs, image_loss: Callable = published.image_loss) -> Outputs:
    z, settings = leaf(inputs["z"]), inputs["settings"]
    rows, loss = z.float(), torch.zeros((), device=z.device)
    for own, *pairs in given_pairs(inputs):
        loss = loss + image_loss(rows[own], rows, *pairs, 0.0, settings["temperature"])
    return differentiate(loss * settings["anchors_per_image"] / len(z), z=z)


@provides("multi_positive_contrastive", "compiled", *IN_IMAGES, most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_contrastive(inputs: Inputs) -> Outputs:
    return _published_contrastive(inputs, compiled(published.image_loss))


@provides("ghp_contrastive", "published", most_anchors=PAIRS_LIMIT)
def _published_ghp(inputs: Inputs) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    return differentiate(_published_loss(inputs, z, z_mixed), z=z, z_mixed=z_mixed)


@provides("ghp_contrastive", "compiled", most_anchors=COMPILED_LIMIT, compiles=True)
def _compiled_ghp(inputs: Inputs) -> Outputs:
    z, z_mixed = leaf(inputs["z"]), leaf(inputs["z_mixed"])
    loss = _published_loss(inputs, z, z_mixed, compiled(published.image_loss))
    return differentiate(loss, z=z, z_mixed=z_mixed)


@provides("local_propagation", "published", "apply", "apply+backward", "whole+backward", most_anchors=PRODUCTS_LIMIT)
def _published_propagation(inputs: Inputs) -> Outputs:
    attention = attention_of(inputs)
    return applied(inputs, lambda code: published.propagate(code, attention))


def attention_of(inputs: Inputs) -> Tensor:
    """The masked attention (B, G, G): given, or computed in the published way where the call includes that."""
    if "attention" in inputs:
        return inputs["attention"].to(inputs["code"].dtype)
    attention = published.attention(inputs["query"].float(), inputs["key"].float(), inputs["grid"])
    return attention.to(inputs["code"].dtype)


@provides("local_propagation", "compiled", "apply", "apply+backward", most_anchors=PRODUCTS_LIMIT, compiles=True)
def _compiled_propagation(inputs: Inputs) -> Outputs:
    propagate = compiled(published.propagate)
    return applied(inputs, lambda code: propagate(code, attention_of(inputs)))


@provides("training_step", "published", most_anchors=PAIRS_LIMIT)
def _published_step(inputs: Inputs) -> Outputs:
    if inputs["call"] == END_TO_END:
        return published_end_to_end(inputs)

    def apply(code: Tensor) -> Tensor:
        return published.propagate(code, inputs["attention"].to(code.dtype))

    return training_step(inputs, apply, lambda z, z_mixed: _published_loss(inputs, z, z_mixed))
