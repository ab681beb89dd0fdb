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


def contrastive_of_pairs(
    anchors,
    keys,
    weights,
    excluded,
    *,
    temperature=0.07,
    key_bias=None,
    positive_aggregation="outside",
    denominator="all",
    both_directions=False,
    exclude_positives=True,
    anchor_weight=None,
    reduction="mean",
):
    """`hpkernels.contrastive` for dense weights of positives (N, K) and excluded pairs (N, K) bool."""
    own = keys is None
    keys = anchors if own else keys
    weights, excluded = weights.tolist(), excluded.tolist()
    bias = torch.zeros(len(keys), dtype=anchors.dtype) if key_bias is None else key_bias

    logits = anchors @ keys.T / temperature + bias

    def takes_part(i, j):
        return not (own and i == j) and not (excluded[i][j] and (exclude_positives or not weights[i][j] > 0))

    def loss_of(pairs):
        """Of one anchor or key, whose pairs (i, j) take part."""
        positives = [(i, j) for i, j in pairs if weights[i][j] > 0]
        others = pairs if denominator == "all" else [(i, j) for i, j in pairs if not weights[i][j] > 0]
        if not positives or not others:
            return None
        log_p = logits[tuple(zip(*positives, strict=True))] - logits[tuple(zip(*others, strict=True))].logsumexp(dim=0)
        shares = torch.tensor([weights[i][j] for i, j in positives], dtype=logits.dtype)
        shares = shares / shares.sum()
        return -(shares * log_p).sum() if positive_aggregation == "outside" else -(shares * log_p.exp()).sum().log()

    def reduced(all_pairs, of_each):
        losses = [loss_of(pairs) for pairs in all_pairs]
        if reduction == "none":
            zero = anchors.sum() * 0
            return torch.stack([zero if loss is None else of_each[i] * loss for i, loss in enumerate(losses)])
        kept = [i for i, loss in enumerate(losses) if loss is not None]
        total = sum((of_each[i] * losses[i] for i in kept), anchors.sum() * 0)
        mass = sum(of_each[i] for i in kept)
        return total if reduction == "sum" or mass == 0 else total / mass

    rows, columns = range(len(anchors)), range(len(keys))
    of_each = [1.0] * len(anchors) if anchor_weight is None else anchor_weight.tolist()
    loss = reduced([[(i, j) for j in columns if takes_part(i, j)] for i in rows], of_each)
    if both_directions:
        mirrored = reduced([[(i, j) for i in rows if takes_part(i, j)] for j in columns], [1.0] * len(keys))
        loss = (loss + mirrored) / 2
    return loss


def supcon(features, labels=None, mask=None, *, temperature, base_temperature=None, contrast_mode="all"):
    """SupCon of views (B, V, ...): the mean over all anchors, of which those without positives count as 0."""
    samples, views = features.shape[:2]
    rows = {(i, v): features[i, v].flatten() for i in range(samples) for v in range(views)}
    anchors = [(i, v) for i, v in rows if contrast_mode == "all" or v == 0]

    def weight(i, j):
        if mask is not None:
            return float(mask[i, j])
        return float(i == j if labels is None else labels[i] == labels[j])

    total = 0 * features.sum()
    for i, v in anchors:
        others = [(j, u) for j, u in rows if (j, u) != (i, v)]
        logits = torch.stack([rows[i, v] @ rows[other] for other in others]) / temperature
        weights = logits.new_tensor([weight(i, j) for j, _ in others])
        if weights.sum() > 0:
            total = total + (weights * (logits.logsumexp(0) - logits)).sum() / weights.sum()
    scale = 1 if base_temperature is None else temperature / base_temperature
    return total * scale / len(anchors)


def clip(images, texts, logit_scale):
    """The mean of two cross-entropies: of the texts for each image, and of the images for each text."""
    size, logits = len(images), logit_scale * images @ texts.T
    of_images = sum(logits[i].logsumexp(0) - logits[i, i] for i in range(size)) / size
    of_texts = sum(logits[:, i].logsumexp(0) - logits[i, i] for i in range(size)) / size
    return (of_images + of_texts) / 2


def supcon_of_metric_learning(rows, labels, keys=None, key_labels=None, *, temperature):
    """``SupConLoss()(rows, labels, ref_emb=keys, ref_labels=key_labels)`` of pytorch-metric-learning 2.9."""
    losses = [
        -torch.stack([logits[j] - logits.logsumexp(0) for j in positives]).mean()
        for logits, positives, _ in _cosines(rows, labels, keys, key_labels, temperature)
        if positives
    ]
    counted = [loss for loss in losses if loss > 0]
    return sum(counted) / len(counted)


def ntxent_of_metric_learning(rows, labels, keys=None, key_labels=None, *, temperature):
    """``NTXentLoss()`` of the same: each positive pair is alone among the negatives of its anchor."""
    losses = [
        torch.stack([logits[j], *(logits[k] for k in negatives)]).logsumexp(0) - logits[j]
        for logits, positives, negatives in _cosines(rows, labels, keys, key_labels, temperature)
        for j in positives
    ]
    return sum(losses) / len(losses)


def _cosines(rows, labels, keys, key_labels, temperature):
    """Of each anchor the logits of its keys, and which of those have its label and which have not."""
    own = keys is None
    keys, key_labels = (rows, labels) if own else (keys, key_labels)
    for i, row in enumerate(rows):
        others = [j for j in range(len(keys)) if not (own and j == i)]
        cosines = [row @ keys[j] / (row.norm() * keys[j].norm()) for j in others]
        same = [at for at, j in enumerate(others) if labels[i] == key_labels[j]]
        yield torch.stack(cosines) / temperature, same, [at for at in range(len(others)) if at not in same]
