"""Everything of a pretraining run that changes while it trains: what a checkpoint holds and what resume restores."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from training.backbones import build_backbone
from training.backbones.timm_vit import TimmViT
from training.config import Config
from training.pretraining.distillation import Distilled


class PretrainingState:
    """Student, teacher and optimizer, initialised from `config.seed`.

    Args:
        config: of the run.
        device: where the modules are.

    Attributes:
        backbone: the ViT that learns, with its patches and its normalisation of images.
        step: steps done so far.
        seconds: time spent in them.

    Raises:
        ValueError: the backbone is not a ViT of timm.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        backbone = build_backbone(config.backbone, config.seed, torch.device("cpu"))
        if not isinstance(backbone, TimmViT):
            raise ValueError(f"config: `backbone.name` must be a ViT of timm, got {config.backbone.name}")
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.student = Distilled(backbone, config.pretraining.prototypes).to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(_groups(self.student, config.pretraining.weight_decay), lr=0.0)
        self.step = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with ``weights_only=True``."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("student", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    @property
    def nbytes(self) -> int:
        """Of student, teacher and the optimizer's two moments."""
        return 4 * sum(parameter.nbytes for parameter in self.student.parameters())


def _groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases, norms, embeddings of positions, class token and prototypes do not."""
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        matrix = name.endswith(".weight") and parameter.ndim > 1
        (decays if matrix else others).append(parameter)
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(done: float, peak: float, warmup: float) -> float:
    """Of a run of which the share `done` is over: a linear rise, then a cosine down to 0."""
    if done < warmup:
        return peak * done / warmup
    return peak * _cosine((done - warmup) / (1 - warmup))


def momentum(done: float, start: float) -> float:
    """Of the teacher: from `start` along a cosine up to 1, as in DINO."""
    return 1 - (1 - start) * _cosine(done)


def _cosine(done: float) -> float:
    """From 1 down to 0."""
    return (1 + math.cos(math.pi * done)) / 2
