"""The configuration of a run small enough to train in seconds, and a batch to explore."""

import torch
from torch.nn import functional as F

import hpkernels
from hpkernels.ops.multi_positive_contrastive.relations import drawn_negatives
from training.evaluation.precision import Found
from training.report.explorer import Explorer


def tiny_values(output, **top):
    """The configuration of a run of a few steps on built-in images, as nested values."""
    return {
        "output": str(output),
        "device": "cpu",
        "steps": 6,
        "warmup": 2,
        "batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "data": {"name": "procedural", "size": [32, 40], "train_images": 10, "val_images": 4},
        "backbone": {"name": "patch_dictionary", "patch_size": 8, "features_dim": 24, "cache": True, "views": 1},
        "head": {"dim": 16},
        "pool": {"size": 32, "renew_every": 2},
        "evaluation": {"every": 0},
    } | top


def tiny_explorer(names=("sky", "road"), images=3, symmetric=True, labelled=True, grid=(4, 5), dim=8):
    """Random features of a few images, with the positives that the ops find."""
    generator = torch.Generator().manual_seed(1)
    patches = grid[0] * grid[1]
    anchors = images * patches
    found = {}
    for kind in ("agnostic", "specific"):
        unit, pool = (F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for rows in (anchors, 12))
        threshold = hpkernels.masked_topk(unit, pool).values[:, 0]
        found[kind] = Found(hpkernels.hidden_positives(unit, threshold, symmetric=symmetric), threshold, unit)
    before = torch.rand(images, 9, *grid, generator=generator)
    labels = torch.randint(-1, len(names), (anchors,), generator=generator) if labelled else None
    clusters = torch.randint(3, (anchors,), generator=generator)
    return Explorer(
        torch.arange(images),
        grid,
        found,
        symmetric,
        drawn_negatives(torch.tensor(5), patches, anchors, 0.2),
        0.2,
        5,
        before,
        before.where(before > 0.5, 0),
        labels,
        names,
        {"Codes, k-means": (clusters, [*names, "unmatched cluster 1"][:3])},
        [(7, "in many images"), (0, "median number")],
    )
