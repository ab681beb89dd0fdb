"""Compare what local propagation can go by, on the validation images: docs/backbones.md says how to read the table.

python -m training.backbones.compare --config training/configs/camvid.yaml data.root=DIR
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hpkernels
from training.backbones import Backbone, build_backbone
from training.config import Config
from training.config_file import load_config
from training.data import SegmentationData, open_data
from training.evaluation.kmeans import closeness, kmeans
from training.model import patch_classes
from training.run import check_backend, resolve_device
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides

_CHUNK = 16  # images at a time


class Comparison(NamedTuple):
    """Figures of one source, as shares of 1; NaN without labels."""

    kept: float  # neighbours, of those inside the image, that get a weight
    same_class: float  # of the weight on neighbours, what goes to the patch's own class
    position: float  # of the variance of the weights between images and positions, what position explains
    key_position: float  # of the entropy of clusters of the keys, what position tells


@torch.no_grad()
def compare(backbone: Backbone, images: Tensor, labels: Tensor | None, clusters: int, ops: str = "auto") -> Comparison:
    """Figures of the source that `backbone` was built with.

    Args:
        images: (B, 3, h, w) uint8.
        labels: (B, H, W) int64 classes of patches, negative for void.
        clusters: how many clusters of keys to find.
        ops: the backend of hpkernels.
    """
    device = next(iter(backbone.state_dict().values())).device
    grid = backbone.grid(tuple(images.shape[2:]))
    keys, weights = [], []
    for chunk in tqdm(images.split(_CHUNK), desc="features", leave=False):
        _, query, key = backbone(backbone.normalize(chunk.to(device).float() / 255))
        prefix = backbone.prefix_tokens
        weights.append(hpkernels.local_propagation_weights(query, key, grid, prefix_tokens=prefix, backend=ops).cpu())
        keys.append(key[:, :, prefix:].transpose(1, 2).flatten(2).cpu())
    local, key = torch.cat(weights), torch.cat(keys)
    centres = kmeans(key.flatten(0, 1), clusters, seed=0, restarts=1)
    found = closeness(key.flatten(0, 1), centres).argmax(dim=1).unflatten(0, key.shape[:2])
    kept, same = _neighbours(local, labels)
    return Comparison(kept, same, _explained_by_position(local), _told_by_position(found))


def uniform_agreement(labels: Tensor) -> float:
    """How much of the weight goes to the patch's own class where all neighbours weigh the same."""
    return _neighbours(torch.ones(len(labels), 9, *labels.shape[1:]), labels)[1]


def _neighbours(weights: Tensor, labels: Tensor | None) -> tuple[float, float]:
    """The share of neighbours that get a weight, and the share of their weight that goes to the same class."""
    side = math.isqrt(weights.shape[1])
    height, width = weights.shape[2:]

    def windows(of_patches: Tensor) -> Tensor:
        padded = F.pad(of_patches, (side // 2,) * 4, value=-1)
        cells = [padded[:, y : y + height, x : x + width] for y in range(side) for x in range(side)]
        return torch.stack(cells, dim=1)

    other = torch.ones(side**2, dtype=torch.bool)
    other[side**2 // 2] = False
    inside = (windows(torch.zeros(1, height, width)) >= 0) & other[:, None, None]
    kept = (weights > 0)[inside.expand_as(weights)].double().mean().item()
    if labels is None:
        return kept, math.nan
    around = windows(labels)
    counted = weights.double() * (inside & (around >= 0) & (labels >= 0)[:, None])
    return kept, (counted[around == labels[:, None]].sum() / counted.sum()).item()


def _explained_by_position(weights: Tensor) -> float:
    """Variance between positions over all variance, of the windows that are whole (those at the border never are)."""
    whole = weights[:, :, 1:-1, 1:-1].double()
    of_position = whole.mean(dim=0, keepdim=True)
    total = (whole - whole.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    return 1 - ((whole - of_position).square().sum() / total).item() if total > 0 else math.nan


def _told_by_position(clusters: Tensor) -> float:
    """Mutual information of clusters (B, G) and position, over the entropy of the clusters."""
    share = torch.bincount(clusters.flatten()).double() / clusters.numel()
    entropy = -torch.special.xlogy(share, share).sum().item()
    position = torch.arange(clusters.shape[1]).expand_as(clusters)
    return mutual_info_score(clusters.flatten().numpy(), position.flatten().numpy()) / entropy if entropy else math.nan


def _labels(data: SegmentationData, patch: int) -> Tensor | None:
    labels = [data.label(index) for index in range(len(data))]
    if any(label is None for label in labels) or not data.classes:
        return None
    stacked = torch.stack(labels)
    grid = (stacked.shape[1] // patch, stacked.shape[2] // patch)
    return patch_classes(stacked, grid, len(data.classes))


def rows(config: Config) -> list[str]:
    """The table, a row a source."""
    device = resolve_device(config.device)
    check_backend(config.backend, device)
    train, val = open_data(config, "train"), open_data(config, "val")
    images = torch.stack([val.image(index) for index in range(len(val))])
    local = copy.copy(config.local)
    table, labels, state = [f"{'':24}{'kept':>8}{'own class':>11}{'position':>10}{'of keys':>9}"], None, None
    for source in ("attention", "tokens") if local.layer is None else ("attention", "tokens", "features"):
        local.source, local.layer = source, config.local.layer if source == "features" else None
        torch.manual_seed(config.seed)
        backbone = build_backbone(config.backbone, config.seed, device, local)
        if state is None:
            backbone.fit(train.image(index).float() / 255 for index in range(len(train)))
            state = backbone.state_dict()
            labels = _labels(val, backbone.patch_size)
        backbone.load_state_dict(state)
        figures = compare(backbone, images, labels, config.data.clusters or len(val.classes) or 27, config.backend)
        name = source if source != "features" else f"features of layer {local.layer}"
        table.append(f"{name:24}{figures[0]:8.3f}{figures[1]:11.3f}{figures[2]:10.3f}{figures[3]:9.3f}")
    if labels is not None:
        table.append(f"{'all neighbours alike':24}{1:8.3f}{uniform_agreement(labels):11.3f}")
        table.append(f"{'the classes themselves':43}{'':10}{_told_by_position(labels.flatten(1) + 1):9.3f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("backbones.compare", __doc__)
    parser.add_argument("--config", required=True, type=expanded, help="a YAML file, or the name of a preset")
    add_overrides(parser, "edits of the configuration; local.layer=N adds the features of layer N")
    options = parse_with_overrides(parser, arguments)
    with one_sentence("backbones.compare"):
        print("\n".join(rows(load_config(options.config, options.overrides))))


if __name__ == "__main__":
    main()
