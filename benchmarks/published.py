"""The published way to compute the losses: eager PyTorch, plain autograd, a matrix of all pairs for every step.

It follows the structure of the Hidden Positives repository (variant "joint"): image by image, a block of (G, N) for
each similarity, mask, logit and probability; autograd keeps those of all images until backward. In float32 where the
published code runs parts in half precision on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class ImagePairs(NamedTuple):
    """What the anchors of an image are compared with, as 0 and 1."""

    own: slice  # the anchors
    positives: Tensor  # (G, N)
    specific_positives: Tensor  # (G, N)
    denominator: Tensor  # (G, N)


def ghp_contrastive(
    z: Tensor,
    z_mixed: Tensor,
    features: Tensor,
    pool: Tensor,
    specific: Tensor,
    specific_pool: Tensor,
    negatives: Tensor,
    *,
    specific_weight: float,
    anchors_per_image: int,
    temperature: float,
    base_temperature: float,
    image_loss: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The reweighted loss of both branches; `image_loss` may be a compiled version of the function of that name."""
    image_loss = image_loss or globals()["image_loss"]
    images = len(z) // anchors_per_image
    loss = torch.zeros((), device=z.device)
    for own, *pairs in image_pairs(features, pool, specific, specific_pool, negatives, anchors_per_image):
        for branch in (z, z_mixed):
            loss = loss + image_loss(branch[own], branch, *pairs, specific_weight, temperature)
    return loss * (temperature / base_temperature) / images / 2


def image_pairs(
    features: Tensor, pool: Tensor, specific: Tensor, specific_pool: Tensor, negatives: Tensor, group: int
) -> Iterator[ImagePairs]:
    """The positives of the anchors of one image after another, and what their probabilities are divided by."""
    anchors = len(features)
    reference = (features @ pool.T).max(dim=1).values
    specific_reference = (specific @ specific_pool.T).max(dim=1).values
    # 0 where an anchor meets itself; moved on by G columns from image to image.
    not_self = torch.eye(group, anchors, device=features.device).logical_not().float()
    for start in range(0, anchors, group):
        own = slice(start, start + group)
        positives = positive_pairs(features, reference, own) * not_self
        specific_positives = positive_pairs(specific, specific_reference, own) * not_self
        denominator = torch.logical_or(positives, negatives).float() * not_self
        yield ImagePairs(own, positives, specific_positives, denominator)
        not_self = torch.roll(not_self, group, dims=1)


def positive_pairs(features: Tensor, reference: Tensor, own: slice) -> Tensor:
    """The pairs (G, N) of an image's anchors with all that exceed the reference of either, as 0 and 1."""
    similarity = features[own] @ features.T
    of_row = reference[own][:, None].repeat(1, len(features)) < similarity
    of_column = reference[:, None].repeat(1, similarity.shape[0]) < similarity.T
    return torch.logical_or(of_row, of_column.T).float()


def image_loss(
    anchors: Tensor,
    z: Tensor,
    positives: Tensor,
    specific_positives: Tensor,
    denominator: Tensor,
    specific_weight: float,
    temperature: float,
) -> Tensor:
    """The loss of one image and one branch before scaling."""
    logits = anchors @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    exp_logits = torch.exp(logits) * denominator
    log_probability = logits - torch.log(exp_logits.sum(dim=1, keepdim=True))

    kept = positives.sum(dim=1) != 0
    weights = positives[kept] + specific_weight * specific_positives[kept]
    mass = weights.sum(dim=1)
    mean_log_probability = (weights * log_probability[kept]).sum(dim=1) / mass
    return -(mean_log_probability * mass / mass.mean()).mean()


def attention(query: Tensor, key: Tensor, grid: tuple[int, int], *, sigma: float = 28.0) -> Tensor:
    """The attention (B, G, G) of each patch to its 3 x 3 neighbours, divided by their number; 0 elsewhere."""
    query, key = query[:, :, 1:], key[:, :, 1:]  # without the class token
    images = []
    neighbours = neighbour_mask(grid).to(query.device)
    for logits in (query @ key.mT).mean(dim=1) / query.shape[-1] ** 0.5:
        low, high = torch.quantile(logits, logits.new_tensor([0.1, 0.9]), dim=1, keepdim=True)
        weights = torch.softmax(logits.clamp(low, high), dim=1) * sigma
        weights = weights * (weights >= weights.mean(dim=1, keepdim=True))
        images.append(weights * neighbours / neighbours.sum(dim=1, keepdim=True))
    return torch.stack(images)


def neighbour_mask(grid: tuple[int, int]) -> Tensor:
    """1 where two patches are at most one row and one column apart, else 0, (G, G)."""
    height, width = grid
    row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    return near.float()


def propagate(code: Tensor, attention: Tensor) -> Tensor:
    """Mix codes (B, D, H, W): of each image the products of all pairs of patches with D numbers, summed."""
    mixed = []
    for own, weights in zip(code.flatten(2), attention, strict=True):
        rows = own.T
        mixed.append((weights.unsqueeze(-1) * rows.unsqueeze(0)).sum(dim=1).T)
    return torch.stack(mixed).view_as(code)
