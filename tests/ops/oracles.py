"""The method written down once more, anchor by anchor as in its equations, to judge the references by.

Slow and of any precision: with float64 inputs the exact result, with float32 inputs what plain PyTorch makes of them.
"""

from __future__ import annotations

import torch


def similar_pairs(features, threshold, symmetric=True):
    """A_ij = i != j and <f_i, f_j> > min(r_i, r_j), or > r_i if not symmetric, as (N, N) bool; by how much."""
    size = len(features)
    margin = torch.empty(size, size, dtype=features.dtype)
    for i in range(size):
        for j in range(size):
            limit = min(threshold[i], threshold[j]) if symmetric else threshold[i]
            margin[i, j] = features[i] @ features[j] - limit
    return (margin > 0) & ~torch.eye(size, dtype=torch.bool), margin


def similar_keys(features, keys, threshold=None, key_threshold=None):
    """<f_i, k_j> > threshold_i and > key_threshold_j, of those that are given, as (N, K) bool; the smaller margin."""
    margin = torch.full((len(features), len(keys)), torch.inf, dtype=features.dtype)
    for i in range(len(features)):
        for j in range(len(keys)):
            for limits, place in ((threshold, i), (key_threshold, j)):
                if limits is not None:
                    margin[i, j] = min(margin[i, j], features[i] @ keys[j] - limits[place])
    return margin > 0, margin


def contrastive(
    z,
    positives,
    specific,
    lam,
    negatives,
    *,
    temperature,
    anchors_per_image=None,
    base_temperature=None,
    variant="joint",
    reweight=False,
    keep_specific_only=False,
):
    """The loss of one branch for dense masks; differentiable in z. `specific` may be None."""
    size = len(z)
    group = size if anchors_per_image is None else anchors_per_image
    agnostic = positives.to(z.dtype)
    task = torch.zeros_like(agnostic) if specific is None else specific.to(z.dtype)
    logits = z @ z.T / temperature
    positive_lists, negative_lists = positives.tolist(), negatives.tolist()

    def log_probabilities(i):
        allowed = [k for k in range(size) if k != i and (positive_lists[i][k] or negative_lists[i % group][k])]
        return logits[i] - torch.logsumexp(logits[i, allowed], dim=0) if allowed else None

    def mean_over_images(weights, keep):
        image_losses = []
        for first in range(0, size, group):
            kept = []
            for i in range(first, first + group):
                log_p, mass = log_probabilities(i), weights[i].sum()
                if log_p is not None and keep(i, mass):
                    kept.append((mass, -(weights[i] * log_p).sum() / mass))
            if not kept:
                continue
            mean_mass = sum(mass for mass, _ in kept) / len(kept)
            omegas = [mass / mean_mass if reweight else 1.0 for mass, _ in kept]
            image_losses.append(sum(omega * loss for omega, (_, loss) in zip(omegas, kept, strict=True)) / len(kept))
        return sum(image_losses) / len(image_losses) if image_losses else (z * 0).sum()

    if variant == "joint":
        loss = mean_over_images(
            agnostic + lam * task, lambda i, mass: agnostic[i].any() or (keep_specific_only and mass > 0)
        )
    else:
        loss = mean_over_images(agnostic, lambda i, mass: mass > 0)
        loss = loss + lam * mean_over_images(task, lambda i, mass: mass > 0)
    return loss if base_temperature is None else loss * temperature / base_temperature
