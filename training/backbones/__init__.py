"""Frozen backbones: patch tokens, and the query and key that local propagation goes by."""

from __future__ import annotations

import torch

from training.backbones.base import Backbone
from training.backbones.patch_dictionary import PatchDictionary
from training.backbones.timm_vit import TimmViT
from training.config import BackboneConfig, LocalConfig


def build_backbone(
    config: BackboneConfig, seed: int, device: torch.device, local: LocalConfig | None = None
) -> Backbone:
    """The backbone that `config` names, not yet fitted.

    Raises:
        ValueError: the backbone, a layer of it or a weight file is not there.
    """
    local = local or LocalConfig()
    if local.layer is not None and local.source != "features":
        raise ValueError(f"config: `local.layer` must be null unless `local.source` is features, got {local.layer}")
    if config.name == "patch_dictionary":
        for key, value in (("backbone.layer", config.layer), ("local.layer", local.layer)):
            if value is not None:
                raise ValueError(f"config: `{key}` must be null, as patch_dictionary has no layers, got {value}")
        backbone = PatchDictionary(config.features_dim, config.patch_size, seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of random weights
            backbone = TimmViT(
                config.name,
                config.pretrained,
                config.weights,
                config.class_token,
                layer=config.layer,
                local_source=local.source,
                local_layer=local.layer,
            )
    return backbone.to(device)


__all__ = ["Backbone", "build_backbone"]
