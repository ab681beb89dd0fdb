"""Frozen backbones: patch tokens and the last block's query and key."""

from __future__ import annotations

import torch

from training.backbones.base import Backbone
from training.backbones.patch_dictionary import PatchDictionary
from training.backbones.timm_vit import TimmViT
from training.config import BackboneConfig


def build_backbone(config: BackboneConfig, seed: int, device: torch.device) -> Backbone:
    """The backbone that `config` names, not yet fitted."""
    if config.name == "patch_dictionary":
        backbone = PatchDictionary(config.features_dim, config.patch_size, seed)
    else:
        backbone = TimmViT(config.name, config.pretrained, config.weights, config.class_token)
    return backbone.to(device)


__all__ = ["Backbone", "build_backbone"]
