"""A whole step of the training loop, from images to the optimizers, by hpkernels and in the published way.

It is `training.train.train_step` on procedural images and a ViT of random weights. Learning rates are 0 and the step is
always the same one, so that every repetition computes the same. No step here renews the pool.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

import hpkernels
from benchmarks import published
from hpkernels.ops._philox import bernoulli

if TYPE_CHECKING:
    from training.run import Run

_BACKBONES = {"cpu": ("vit_tiny_patch16_224", 16), "cuda": ("vit_small_patch8_224.dino", 8)}
"""The ViT by device, and the side of its patches in pixels."""
_POOL, _POOL_IMAGES, _DIM = 2048, 16, 512
NEGATIVE_RATE = 0.02
_STEPS, _STEP = 4, 1  # lambda is 0.5

Step = dict[str, Any]


def open_step(images: int, grid: tuple[int, int], device: str) -> Step:
    """A run of the training loop whose images are one batch, and the seconds of the parts of each step, by provider."""
    from training.backbones import build_backbone
    from training.config import Config
    from training.data import open_data
    from training.run import Run, open_bank
    from training.schedule import seed_step
    from training.state import TrainingState

    name, side = _BACKBONES[device]
    rates = ("head_lr", "projection_lr", "linear_probe_lr", "cluster_probe_lr")
    config = Config(
        device=device,
        steps=_STEPS,
        warmup=0,
        batch_size=images,
        data={
            "name": "procedural",
            "size": [side * length for length in grid],
            "train_images": images,
            "val_images": _POOL_IMAGES,
            "workers": 0,
        },
        backbone={"name": name},
        head={"dim": _DIM},
        pool={"size": _POOL},
        # So that each anchor has a negative even in small tests: the published loss has no gradient without.
        loss={"negative_rate": max(NEGATIVE_RATE, 10 / (images * grid[0] * grid[1]))},
        optim=dict.fromkeys(rates, 0.0),
        quirks={"drop_specific_only_anchors": True},
    )
    where, data = torch.device(device), open_data(config, "train")
    # A pool with patches of the batch would make ties of pairs and thresholds, which rounding decides.
    others = open_data(config, "val")
    with torch.random.fork_rng():
        backbone = build_backbone(config.backbone, config.seed, where, config.local)
        torch.manual_seed(config.seed)
        state = TrainingState(config, backbone.features_dim, len(data.classes), where)
        bank, other_bank = (open_bank(config, backbone, some, where) for some in (data, others))
        generator = seed_step(config.seed, -1)
        state.pools.fill_agnostic(other_bank, generator)
        state.pools.renew_specific(other_bank, state.ema_head, generator)
    run = Run(config, where, backbone, bank, other_bank, state, _STEPS, _STEPS, _STEPS, {}, "")
    return {"run": run, "parts": defaultdict(list)}


def end_to_end(inputs: Step, backend: str) -> dict[str, Tensor]:
    """The loss of a step and the gradient of a layer of the head, by a backend of hpkernels."""
    run = inputs["run"]
    run.config.backend = run.train_bank.backend = backend
    op = import_module("hpkernels.ops.ghp_contrastive")
    discovery = {name: _clocked(run, getattr(op, name)) for name in ("masked_topk", "hidden_positives")}
    return _step(inputs, backend, [patch.multiple(op, **discovery)])


def published_end_to_end(inputs: Step) -> dict[str, Tensor]:
    """The same with the functions of the published way in the place of those of hpkernels."""
    run = inputs["run"]
    clocked = partial(_clocked_pairs, run, published.image_pairs)
    replaced = [
        patch.object(hpkernels, "local_propagation_weights", _weights),
        patch.object(hpkernels, "apply_local_propagation", _apply),
        patch.object(hpkernels.distributed, "ghp_contrastive", _loss),
        patch.object(published, "image_pairs", clocked),
    ]
    return _step(inputs, "published", replaced)


def seconds_of_parts(inputs: Step, provider: str, repetitions: int, calls_of_each: int = 1) -> dict[str, list[float]]:
    """The seconds of each part of a provider's last steps, of the first of so many calls of each repetition.

    Nothing if the inputs are not those of a whole step.
    """
    taken = inputs.get("parts", {}).get(provider, [])
    taken = taken[len(taken) - repetitions * calls_of_each :: calls_of_each] if repetitions else []
    return {
        part: [step.get(part, 0.0) for step in taken] for part in dict.fromkeys(key for step in taken for key in step)
    }


def _step(inputs: Step, provider: str, replaced: Iterable[Any]) -> dict[str, Tensor]:
    from training.train import train_step

    run: Run = inputs["run"]
    run.state.step = _STEP
    run.train_bank._recent.clear()  # else it would have the features of the step before
    with ExitStack() as stack:
        for replacement in replaced:
            stack.enter_context(replacement)
        with run.train_bank.clock.step() as seconds:
            terms = train_step(run, torch.arange(run.config.batch_size))
    inputs["parts"][provider].append(dict(seconds))
    return {"loss": terms["contrastive"], "grad_w1": run.state.head.w1.weight.grad.clone()}


def _clocked(run: Run, function: Callable) -> Callable:
    def clocked(*arguments: Any, **keywords: Any) -> Any:
        with run.train_bank.clock.part("discovery"):
            return function(*arguments, **keywords)

    return clocked


def _clocked_pairs(run: Run, pairs: Callable[..., Iterator], *arguments: Any) -> Iterator:
    """Pairs as they are found, image by image."""
    found = pairs(*arguments)
    while True:
        with run.train_bank.clock.part("discovery"):
            image = next(found, None)
        if image is None:
            return
        yield image


def _weights(query: Tensor, key: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
    return published.attention(query.float(), key.float(), grid)


def _apply(code: Tensor, weights: Tensor, **options: Any) -> Tensor:
    return published.propagate(code, weights)


def _loss(z: Tensor, features: Tensor, pool: Tensor, *, z_mixed: Tensor, **options: Any) -> Tensor:
    group = options["anchors_per_image"]
    negatives = _negatives(int(options["seed"]), z.device, group, len(z), options["negative_rate"])
    kept = ("specific_weight", "anchors_per_image", "temperature", "base_temperature")
    settings = {name: options[name] for name in kept}
    specific = options["specific"], options["specific_pool"]
    return published.ghp_contrastive(z, z_mixed, features, pool, *specific, negatives, **settings)


@lru_cache(maxsize=1)  # given, as in the other calls
def _negatives(seed: int, device: torch.device, group: int, anchors: int, rate: float) -> Tensor:
    return bernoulli(torch.tensor(seed, device=device), group, anchors, rate)
