"""The typed configuration of a run: every key, its type, its default and its bounds stand here and nowhere else.

``config_file.py`` reads it from ``configs/*.yaml`` and ``key=value``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any


def bounded(default: Any, low: float, high: float = float("inf"), *, open_end: bool = False) -> Any:
    """A number, or several, with `default` that must lie in [low, high], or in [low, high) with an open end."""
    return field(default=default, metadata={"bounds": (low, high, open_end)})


def choice(default: str, *allowed: str) -> Any:
    """A string with `default` that must be one of `allowed`."""
    return field(default=default, metadata={"choices": allowed})


@dataclass
class DataConfig:
    """Which photographs, at which size."""

    name: str = choice("folder", "folder", "procedural", "coco27", "cityscapes27", "potsdam3")  # see docs/data.md
    root: str | None = None  # the folder of the data
    size: tuple[int, int] = bounded((224, 224), 1, 16384)  # in pixels, that images and labels are brought to
    fit: str = choice("squash", "squash", "crop")  # squash them; or shrink the shorter side, and crop the centre
    crops: str = choice("none", "none", "five")  # train on five crops of each image, which training.prepare makes
    classes: tuple[str, ...] = ()  # names in label order; label values from len(classes) on are ignored (void)
    clusters: int | None = bounded(None, 2)  # how many to find; None: as many as there are classes
    train_images: int | None = bounded(None, 1, 10**7)  # how many to use (procedural: to make); None: all there are
    val_images: int | None = bounded(None, 1, 10**7)  # likewise

    def __post_init__(self) -> None:
        twice = [name for index, name in enumerate(self.classes) if name in self.classes[:index]]
        if twice:
            raise ValueError(f"config: `data.classes` must be different names, got {twice[0]!r} twice")
        if self.root is not None:
            self.root = os.path.expanduser(self.root)


@dataclass
class BackboneConfig:
    """The frozen feature extractor."""

    name: str = "vit_small_patch8_224.dino"  # any timm ViT, or "patch_dictionary": weight-free, fitted on the images
    pretrained: bool = False  # timm: download the weights, unless there are `weights`
    weights: str | None = None  # timm: a local weight file (DINO, timm or SelfPatch layout)
    layer: int | None = bounded(None, 1, 1000)  # timm: the block, from 1 on, of the features; None: the last
    class_token: bool = True  # timm: SelfPatch weights come without one
    patch_size: int = bounded(8, 4, 16384)  # patch_dictionary: pixels a side of one patch
    features_dim: int = bounded(192, 1)  # patch_dictionary: Df
    cache: bool = False  # keep the features of the un-augmented view in memory
    views: int = bounded(0, 0, 1000)  # photometric views of each image to keep in memory; 0: a new one every time

    def __post_init__(self) -> None:
        if self.weights is not None:
            self.weights = os.path.expanduser(self.weights)


@dataclass
class LocalConfig:
    """What the weights of local propagation are taken from."""

    source: str = choice("auto", "auto", "attention", "tokens", "features")  # auto: by backbone, see docs/backbones.md
    layer: int | None = bounded(None, 1, 1000)  # features: of which block, from 1 on; None: that of the features


@dataclass
class HeadConfig:
    """The segmentation head and its exponential-moving-average copy."""

    dim: int = bounded(512, 1, 65536)  # D
    dropout: float = bounded(0.1, 0, 1, open_end=True)  # channel dropout on the head's input
    ema: float = bounded(0.99, 0, 1)  # momentum of the EMA head


@dataclass
class LossConfig:
    """The multi-positive contrastive loss (see `hpkernels.ghp_contrastive`) and the consistency term."""

    objective: str = choice("hp", "hp", "views", "clusters", "stego", "none")  # hp, or a baseline: docs/reproduce.md
    temperature: float = bounded(0.6, 1e-6)  # of the logits
    base_temperature: float = bounded(0.07, 1e-6)  # the loss is multiplied by temperature / base_temperature
    negative_rate: float = bounded(0.02, 0, 1)  # share of the other patches that are drawn as negatives
    variant: str = choice("joint", "joint", "separate")  # as in the published code, or as in the paper's equation
    reweight: bool = True  # anchors count by their number of positives
    agnostic: bool = True  # task-agnostic positives
    specific: bool = True  # task-specific positives
    symmetric: bool = True  # a positive of one anchor of a pair is one of the other
    local: bool = True  # the branch of local hidden positives
    consistency: float = bounded(0.05, 0)  # alpha
    stego_weights: tuple[float, float, float] = bounded((0.67, 0.25, 0.63), 0, 100)  # itself, nearest, random images
    stego_shifts: tuple[float, float, float] = bounded((0.18, 0.12, 0.46), -10, 10)  # likewise


@dataclass
class PoolConfig:
    """The reference pools."""

    size: int = bounded(2048, 1, 10**7)  # M
    renew_every: int = bounded(100, 1)  # steps between refills of the task-specific pool


@dataclass
class OptimConfig:
    """Learning rates and limits: AdamW for the head, Adam for the rest."""

    head_lr: float = bounded(5e-4, 0)  # AdamW
    head_weight_decay: float = bounded(0.1, 0)  # AdamW
    projection_lr: float = bounded(5e-4, 0)  # Adam, as for the probes
    linear_probe_lr: float = bounded(1e-3, 0)  # trained with labels
    cluster_probe_lr: float = bounded(5e-3, 0)  # trained without
    clip_grad_norm: float = bounded(10.0, 0)  # of the head; 0: not clipped


@dataclass
class EvaluationConfig:
    """How a run is scored."""

    size: tuple[int, int] | None = bounded(None, 1, 16384)  # in pixels, of the images that are scored; None: data.size
    flip: bool = False  # average the codes with those of the mirrored image
    window: int | None = bounded(None, 1, 16384)  # pixels a side of sliding windows; None: no windows
    stride: int | None = bounded(None, 1, 16384)  # pixels between windows; None: half a window
    match: str = choice("val", "val", "train")  # the images by whose labels clusters are matched to classes
    crf: str = choice("none", "none", "pydensecrf", "exact")  # refinement by a dense CRF
    knn: int = bounded(0, 0, 1000)  # neighbours of the kNN evaluation; 0: none


@dataclass
class QuirksConfig:
    """Behaviour of the published code that departs from the paper: the preset sets all, each can be set by itself."""

    preset: str = choice("corrected", "corrected", "published")  # all off, all on; None below: as the preset
    dropout_on_frozen: bool | None = None  # dropout also on f, s', mixed s and the pools, each drawn by itself
    ema_before_step: bool | None = None  # the EMA head averages the weights of before the step
    jitter_after_normalization: bool | None = None  # colour jitter on normalised images
    skip_renewal_at_epoch_start: bool | None = None  # no pool renewal at the first step of an epoch
    select_on_labels: bool | None = None  # keep the checkpoint that is best on the labelled validation set
    drop_specific_only_anchors: bool | None = None  # drop anchors whose only positives are task-specific

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                setattr(self, name, self.preset == "published")


@dataclass
class Config:
    """One run."""

    seed: int = bounded(0, 0, 2**32 - 1)  # of all randomness; k-means takes no greater one
    output: str = "runs/unnamed"  # the folder that receives checkpoint, metrics, log and report
    device: str = "auto"  # "auto": a GPU where there is one
    backend: str = choice("auto", "auto", "cuda", "triton", "cpu", "reference")  # of the hpkernels ops
    epochs: int | None = bounded(None, 1)  # length of the run: give this ...
    steps: int | None = bounded(None, 1)  # ... or this
    warmup: int = bounded(100, 0)  # steps with lambda = 0
    batch_size: int = bounded(64, 1, 10**6)  # images
    log_every: int = bounded(10, 1)  # steps
    checkpoint_every: int = bounded(100, 1)  # steps
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    quirks: QuirksConfig = field(default_factory=QuirksConfig)

    def __post_init__(self) -> None:
        self.output = os.path.expanduser(self.output)
        if self.epochs is None and self.steps is None:
            raise ValueError("config: give one of `epochs` and `steps`, got neither")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"config: give one of `epochs` and `steps`, got {self.epochs} and {self.steps}: add `steps=null` to"
                " train for epochs, or `epochs=null` to train for steps"
            )
