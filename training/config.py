"""The typed configuration of a run: every key, its type, default, bounds and meaning stand here and nowhere else.

A key is one line, from which ``--keys``, errors and checks follow:
``temperature: float = Field(0.6, ge=1e-6, description="of the logits")``. An integer with no upper bound is a `Count`.
``config_file.py`` reads the keys from ``configs/*.yaml`` and ``key=value``.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Side = Annotated[int, Field(ge=1, le=16384)]
Size = Annotated[
    tuple[Side, Side], BeforeValidator(lambda size: size if isinstance(size, list | tuple) else [size] * 2)
]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home folder
Count = Annotated[int, Field(le=2**31 - 1)]  # an integer without another upper bound
_CACHES = {  # what `backbone.cache` was: on or off
    **dict.fromkeys((True, "true", "on", "yes", "1"), "memory"),
    **dict.fromkeys((False, "false", "off", "no", "0"), "none"),
}
Cache = Annotated[
    Literal["none", "memory", "disk"],
    BeforeValidator(lambda cache: _CACHES.get(cache, cache) if isinstance(cache, str | bool) else cache),
]


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise ValueError(f"must be different names, got {twice[0]!r} twice")
    return names


class Section(BaseModel):
    """Keys of one subject."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_null(cls, values: Any) -> Any:
        """What stands for nothing in YAML; a section whose keys are all commented out has its defaults."""
        if values is None or values == "":
            return {}
        if not isinstance(values, dict):
            return values
        return {key: None if value in ("", "~", "null") else value for key, value in values.items()}


class DataConfig(Section):
    """Which photographs, at which size."""

    name: Literal["folder", "procedural", "coco27", "cityscapes27", "potsdam3"] = Field(
        "folder", description="the data set or layout, see docs/data.md"
    )
    root: UserPath | None = Field(None, description="the folder of the data")
    size: Size = Field((224, 224), description="in pixels, that images and labels are brought to")
    fit: Literal["squash", "crop"] = Field(
        "squash", description="squash them; or shrink the shorter side, and crop the centre"
    )
    crops: Literal["none", "five"] = Field(
        "none", description="train on five crops of each image, which training.prepare makes"
    )
    classes: Annotated[tuple[str, ...], AfterValidator(_different)] = Field(
        (), description="folder: names in label order; label values from their number on are ignored (void)"
    )
    clusters: Count | None = Field(None, ge=2, description="how many to find; null: as many as there are classes")
    train_images: int | None = Field(
        None, ge=1, le=10**7, description="how many to use (procedural: to make); null: all there are"
    )
    val_images: int | None = Field(None, ge=1, le=10**7, description="likewise")
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes that decode images ahead; null: up to 8 for a GPU, 0 for a CPU, which is busy itself",
    )


class BackboneConfig(Section):
    """The frozen feature extractor."""

    name: str = Field(
        "vit_small_patch8_224.dino",
        description='any timm ViT, or "patch_dictionary": weight-free, fitted on the images',
    )
    pretrained: bool = Field(False, description="timm: download the weights, unless there are `weights`")
    weights: UserPath | None = Field(None, description="timm: a local weight file, see docs/backbones.md")
    layer: int | None = Field(
        None, ge=1, le=1000, description="timm: the block, from 1 on, whose tokens are the features; null: the last"
    )
    class_token: bool = Field(True, description="timm: SelfPatch weights come without one")
    patch_size: int = Field(8, ge=4, le=16384, description="patch_dictionary: pixels a side of one patch")
    features_dim: Count = Field(192, ge=1, description="patch_dictionary: Df")
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="what it computes in; auto: float16 on a GPU, float32 on a CPU"
    )
    cache: Cache = Field(
        "none", description="keep the features of the un-augmented view: in memory, or on disk, rounded to float16"
    )
    cache_dir: UserPath | None = Field(
        None, description="disk: the folder of caches, shared by runs; null: hpkernels/features in the user's cache"
    )
    views: int = Field(
        0, ge=0, le=1000, description="photometric views of each image to keep likewise; 0: a new one every time"
    )


class LocalConfig(Section):
    """What the weights of local propagation are taken from."""

    source: Literal["auto", "attention", "tokens", "features"] = Field(
        "auto", description="auto: by backbone, see docs/backbones.md"
    )
    layer: int | None = Field(
        None, ge=1, le=1000, description="features: of which block, from 1 on; null: that of the features"
    )


class HeadConfig(Section):
    """The segmentation head and its exponential-moving-average copy."""

    dim: int = Field(512, ge=1, le=65536, description="D, of the codes")
    dropout: float = Field(0.1, ge=0, lt=1, description="channel dropout on the head's input")
    ema: float = Field(0.99, ge=0, le=1, description="momentum of the EMA head")


class LossConfig(Section):
    """The multi-positive contrastive loss (see `hpkernels.ghp_contrastive`) and the consistency term."""

    objective: Literal["hp", "views", "clusters", "stego", "none"] = Field(
        "hp", description="hp, or a baseline: docs/reproduce.md"
    )
    temperature: float = Field(0.6, ge=1e-6, description="of the logits")
    base_temperature: float = Field(
        0.07, ge=1e-6, description="the loss is multiplied by temperature / base_temperature"
    )
    negative_rate: float = Field(0.02, ge=0, le=1, description="share of the other patches drawn as negatives")
    variant: Literal["joint", "separate"] = Field(
        "joint", description="as in the published code, or as in the paper's equation"
    )
    reweight: bool = Field(True, description="anchors count by their number of positives")
    agnostic: bool = Field(True, description="task-agnostic positives")
    specific: bool = Field(True, description="task-specific positives")
    symmetric: bool = Field(True, description="a positive of one anchor of a pair is one of the other")
    local: bool = Field(True, description="the branch of local hidden positives")
    consistency: float = Field(0.05, ge=0, description="alpha, the weight of the consistency term")
    stego_weights: tuple[float, float, float] = Field(
        (0.67, 0.25, 0.63), description="stego: of the image with itself, with its nearest and with a random one"
    )
    stego_shifts: tuple[float, float, float] = Field((0.18, 0.12, 0.46), description="stego: likewise")

    @model_validator(mode="after")
    def _some_positives(self) -> LossConfig:
        if not (self.agnostic or self.specific):
            raise ValueError("must have `agnostic` or `specific` positives, got neither")
        return self


class PoolConfig(Section):
    """The reference pools."""

    size: int = Field(2048, ge=1, le=10**7, description="M, of each")
    renew_every: Count = Field(100, ge=1, description="steps between refills of the task-specific pool")


class OptimConfig(Section):
    """Learning rates and limits: AdamW for the head, Adam for the rest."""

    head_lr: float = Field(5e-4, ge=0, description="AdamW")
    head_weight_decay: float = Field(0.1, ge=0, description="AdamW")
    projection_lr: float = Field(5e-4, ge=0, description="Adam, as for the probes")
    linear_probe_lr: float = Field(1e-3, ge=0, description="trained with labels")
    cluster_probe_lr: float = Field(5e-3, ge=0, description="trained without")
    clip_grad_norm: float = Field(10.0, ge=0, description="of the head; 0: not clipped")


class EvaluationConfig(Section):
    """How a run is scored."""

    size: Size | None = Field(None, description="in pixels, of the images that are scored; null: data.size")
    flip: bool = Field(False, description="average the codes with those of the mirrored image")
    window: Side | None = Field(
        None, description="pixels a side of sliding windows over larger images; null: no windows"
    )
    stride: Side | None = Field(None, description="pixels between windows; null: half a window")
    match: Literal["val", "train"] = Field(
        "val", description="the images by whose labels clusters are matched to classes"
    )
    crf: Literal["none", "pydensecrf", "exact"] = Field("none", description="refinement by a dense CRF")
    knn: int = Field(0, ge=0, le=1000, description="neighbours of the kNN evaluation; 0: none")
    every: Count | None = Field(
        None, ge=0, description="steps between looks at validation images while training; null: ten looks, 0: none"
    )
    curve_images: Count = Field(64, ge=1, description="how many validation images are scored at such a look")


WHILE_TRAINING = ("evaluation.every", "evaluation.curve_images")
"""Keys of what is looked at while training, which no result depends on."""


class QuirksConfig(Section):
    """Behaviour of the published code that departs from the paper: the preset sets all, each can be set by itself."""

    preset: Literal["corrected", "published"] = Field(
        "corrected", description="all off, all on; null below: as the preset"
    )
    dropout_on_frozen: bool | None = Field(
        None, description="dropout also on f, s', mixed s and the pools, each drawn by itself"
    )
    ema_before_step: bool | None = Field(None, description="the EMA head averages the weights of before the step")
    late_lambda: bool | None = Field(None, description="lambda is that of the step before, so that it never reaches 1")
    jitter_after_normalization: bool | None = Field(None, description="colour jitter on normalised images")
    skip_renewal_at_epoch_start: bool | None = Field(None, description="no pool renewal at the first step of an epoch")
    nearest_resize: bool | None = Field(
        None, description="images are resized by nearest neighbour too, which aliases fine texture"
    )
    select_on_labels: bool | None = Field(
        None, description="best-on-val: keep the checkpoint that is best on the labelled validation images"
    )
    drop_specific_only_anchors: bool | None = Field(
        None, description="drop anchors whose only positives are task-specific"
    )

    @model_validator(mode="after")
    def _follow_preset(self) -> QuirksConfig:
        for name, value in self:
            if value is None:
                setattr(self, name, self.preset == "published")
        return self


class PretrainingConfig(Section):
    """Self-supervised training of a ViT by training.pretrain, see docs/pretraining.md; other programs ignore them."""

    minutes: float | None = Field(
        None, gt=0, le=10**5, description="in the place of `steps`: as many as the device takes in so many minutes"
    )
    crop: Size = Field((224, 224), description="in pixels, of the two crops of each photograph")
    least_scale: float = Field(0.25, gt=0, le=1, description="share of the photograph that a crop has at least")
    mask: float = Field(0.5, ge=0, lt=1, description="share of the patches of a crop that are hidden at most")
    prototypes: int = Field(1024, ge=2, le=65536, description="K, which patches are assigned to")
    temperature: float = Field(0.1, ge=1e-3, description="of the student")
    teacher_temperature: float = Field(0.03, ge=1e-3, description="of the teacher's assignments")
    ema: float = Field(0.99, ge=0, le=1, description="momentum of the teacher at the start; it rises to 1")
    peak_lr: float = Field(1e-3, ge=0, description="AdamW, at the end of the warm-up; it falls to 0")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.05, ge=0, description="AdamW")
    clip_grad_norm: float = Field(1.0, ge=0, description="0: not clipped")


class Config(Section):
    """One run."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="of all randomness; k-means takes no greater one")
    output: UserPath = Field("runs/unnamed", description="the folder that receives checkpoint, metrics, log and report")
    device: str = Field("auto", description="auto: a GPU where there is one")
    backend: Literal["auto", "cuda", "triton", "cpu", "reference"] = Field("auto", description="of the hpkernels ops")
    rank_timeout: float = Field(
        60, gt=0, le=10**6, description="minutes that a rank of torchrun waits for another, which may be scoring"
    )
    epochs: Count | None = Field(None, ge=1, description="length of the run: give this ...")
    steps: Count | None = Field(None, ge=1, description="... or this")
    warmup: Count = Field(100, ge=0, description="steps with lambda = 0")
    batch_size: int = Field(64, ge=1, le=10**6, description="images")
    log_every: Count = Field(10, ge=1, description="steps")
    checkpoint_every: Count = Field(100, ge=1, description="steps")
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    local: LocalConfig = LocalConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    pool: PoolConfig = PoolConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    quirks: QuirksConfig = QuirksConfig()
    pretraining: PretrainingConfig = PretrainingConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Config:
        if self.epochs is None and self.steps is None:
            raise ValueError("give one of `epochs` and `steps`, got neither")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"give one of `epochs` and `steps`, got {self.epochs} and {self.steps}: add `steps=null` to train for"
                " epochs, or `epochs=null` to train for steps"
            )
        return self
