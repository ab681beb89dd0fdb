"""A run put together from its configuration: data, frozen backbone, feature banks and training state."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hpkernels import BackendUnavailableError
from hpkernels.backends import select
from training.backbones import Backbone, build_backbone
from training.config import BackboneConfig, Config
from training.config_file import config_from_dict, edited
from training.data import SegmentationData, image_size, open_data, steps_per_epoch
from training.data.loading import default_workers
from training.evaluation.clusterings import check_clusters
from training.evaluation.crf import check_crf
from training.features.bank import FeatureBank
from training.features.cache import default_folder
from training.features.inference import Windows, precision_of
from training.objectives import check_objective
from training.runtime import checkpoint, parallel
from training.runtime.output import check_output, check_space, prepare_folder, remove_partial, remove_run
from training.runtime.resuming import check_agreement, check_images, check_same, identity
from training.schedule import seed_step
from training.state import TrainingState, output_sizes

# Keys that decide, with the weights, what a backbone gives.
_BACKBONE = {"name", "layer", "class_token", "patch_size", "features_dim"}
_OPS = ("masked_topk", "hidden_positives", "multi_positive_contrastive", "local_propagation")


@dataclass
class Run:
    """What training and evaluation work on."""

    config: Config
    device: torch.device
    backbone: Backbone
    train_bank: FeatureBank
    val_bank: FeatureBank
    state: TrainingState
    steps: int
    steps_per_epoch: int
    planned_steps: int  # what `steps` was before the run went on
    images: dict[str, Any]  # `identity` of the training images
    backbone_sha256: str
    cluster_centres: Tensor | None = None  # (C, Df), of `loss.objective=clusters`, once they were needed
    nearest_images: Tensor | None = None  # (n, K) int64, of `loss.objective=stego`, likewise

    @property
    def checkpoint_path(self) -> Path:
        """Where the newest state is kept."""
        return checkpoint_path(self.config)

    @property
    def best_path(self) -> Path:
        """Where the state is kept that was best on labels, if the run chooses by them."""
        return self.checkpoint_path.with_name("best.pt")

    def save(self, path: Path | None = None) -> None:
        """Write everything that resume, evaluation and prediction need, atomically; of several ranks the first does."""
        if not parallel.is_first():
            return
        contents = {
            "config": self.config.model_dump(),
            "backbone_sha256": self.backbone_sha256,
            "state": self.state.state_dict(),
            "images": self.images,
        }
        checkpoint.save(path or self.checkpoint_path, contents)


def checkpoint_path(config: Config) -> Path:
    """The checkpoint in the output folder of a run."""
    return Path(config.output) / "checkpoint.pt"


def open_run(config: Config, *, fresh: bool = False) -> Run:
    """Start a run, or go on with the one in its output folder if there is one.

    Args:
        config: checked configuration.
        fresh: start anew even if the output folder holds a run.

    Raises:
        ValueError: the folder holds a run of another configuration or on other images, or has done more steps; the
            data does not fit; the disk is too small.
    """
    where, output = checkpoint_path(config), Path(config.output)
    check_output(config, fresh)
    saved = load_run(where) if where.exists() and not fresh else None
    if saved is not None:
        check_same(config, saved["config"])
    device = resolve_device(config.device)
    check_backend(config.backend, device)
    train_data, val_data = open_data(config, "train"), open_data(config, "val")
    images = identity(train_data)
    if saved is not None:
        check_images(config, images, saved)
    check_agreement(config, images, saved)
    every = steps_per_epoch(len(train_data), config.batch_size)
    steps = planned = config.steps or config.epochs * every
    if saved is not None:
        with _restoring(where):
            planned, done = saved["config"]["steps"] or saved["config"]["epochs"] * every, saved["state"]["step"]
        _check_length(config, steps, done)
    if config.warmup >= steps:
        raise ValueError(f"config: `warmup` must be less than the {steps} steps of the run, got {config.warmup}")
    number = clusters(train_data, config)
    check_objective(config, len(train_data), number)
    prepare_folder(output, "config: `output`")

    backbone = build_backbone(_own_weights(config, saved), config.seed, device, config.local)
    height, width = backbone.grid(config.data.size)
    check_evaluation_size(config, backbone)
    check_clusters(number, len(train_data), height * width)
    if saved is None:
        if parallel.is_first():
            backbone.fit(_images(train_data, config.seed))
        parallel.copy_first(backbone)
    else:
        with _restoring(where):
            backbone.load_state_dict(saved["backbone"])
    torch.manual_seed(config.seed)
    classes = len(train_data.classes) or number
    if saved is not None:  # older checkpoints have as many classes as clusters
        with _restoring(where):
            number, classes = output_sizes(saved["state"])
    state = TrainingState(config, backbone.features_dim, number, device, classes)
    if saved is not None:
        with _restoring(where):
            state.load_state_dict(saved["state"])
        if state.step < steps and state.clusterings.fitted and (output / "best.pt").is_file():
            raise ValueError(
                f"{config.output} holds a finished run of an older version, which kept its best state and not its last,"
                " so it cannot go on; choose another `output`, or start anew with --fresh"
            )
    weights = backbone.state_dict() if saved is None else saved["backbone"]
    check_space(output, expected_sizes(config, state, weights, images, steps))
    train_bank = open_bank(config, backbone, train_data, device, views=config.backbone.views)
    if not state.pools.agnostic.vectors.any():  # a new run, or one imported from the published code
        state.pools.fill_agnostic(train_bank, seed_step(config.seed, -1))
        if saved is not None:
            state.pools.renew_specific(train_bank, state.ema_head, seed_step(config.seed, -1))
    val_bank = open_bank(config, backbone, val_data, device, scored=True)
    sha256 = (saved or {}).get("backbone_sha256", "")
    if parallel.is_first():  # which alone saves
        if saved is None:
            remove_run(output) if fresh else (output / "best.pt").unlink(missing_ok=True)  # of a run that is no more
        remove_partial(output)
        sha256 = sha256 or checkpoint.write_backbone(output, weights)
    return Run(config, device, backbone, train_bank, val_bank, state, steps, every, planned, images, sha256)


def expected_sizes(
    config: Config, state: TrainingState, weights: dict[str, Tensor], images: dict[str, Any], steps: int
) -> dict[str, int]:
    """About how many bytes each file in the output folder will have."""
    logged = steps // config.log_every
    contents = state.nbytes + images["files"].nbytes + 300 * logged
    return {
        checkpoint.BACKBONE: sum(tensor.nbytes for tensor in weights.values()),
        "checkpoint.pt": contents * (2 if config.quirks.select_on_labels else 1),
        "best.pt": contents if config.quirks.select_on_labels else 0,
        "report.html": 5 << 20,
        "tensorboard": 2000 * logged,  # and log.jsonl
    }


def load_run(path: str | Path) -> dict[str, Any]:
    """What `Run.save` wrote, with the weights of the backbone, which the file itself may hold.

    Raises:
        ValueError: it cannot be read, a part is missing, or a weight is not finite.
    """
    saved = checkpoint.load(path)
    if "backbone_sha256" in saved:
        saved["backbone"] = checkpoint.read_backbone(path, saved["backbone_sha256"])
    with _restoring(path):
        modules = {"backbone": saved["backbone"]} | saved["state"]["modules"]
        for name, module in modules.items():
            for key, value in module.items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise ValueError(f"{name}.{key} is not finite")
        if not isinstance(saved["config"], dict):
            raise TypeError("its config is no mapping")
    return saved


@contextmanager
def _restoring(path: str | Path) -> Iterator[None]:
    """Say which checkpoint it is that does not fit together."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"checkpoint: {path} cannot be used: {why}") from error


def open_trained(
    path: str | Path, device: str = "auto", overrides: Sequence[str] = (), allowed: Sequence[str] = ()
) -> tuple[Config, Backbone, TrainingState]:
    """The configuration, backbone and state in a checkpoint, without the images they were trained on.

    Args:
        path: of the checkpoint.
        device: to load it to.
        overrides: ``key=value`` edits of the keys that are `allowed`.

    Raises:
        ValueError: the checkpoint, the device or an edit cannot be used.
    """
    saved = load_run(path)
    where = resolve_device(device)
    with _restoring(path):
        config = config_from_dict(saved["config"])
    config = edited(config, overrides, allowed)
    try:
        check_backend(config.backend, where)
    except ValueError:
        if any(override.partition("=")[0].strip() == "backend" for override in overrides):
            raise
        config.backend = "auto"  # the machine that trained had another device
        check_backend(config.backend, where)
    # The weights are in the checkpoint: neither a download nor the file they first came from is needed.
    config.backbone.pretrained = False
    config.backbone.weights = None
    with _restoring(path):
        backbone = build_backbone(config.backbone, config.seed, where, config.local)
        backbone.load_state_dict(saved["backbone"])
        number, classes = output_sizes(saved["state"])
        state = TrainingState(config, backbone.features_dim, number, where, classes)
        state.load_modules(saved["state"])
        state.step = saved["state"]["step"]
    edits = {override.partition("=")[0].strip() for override in overrides}
    if "data.size" in edits and "evaluation.size" not in edits and config.evaluation.size is not None:
        height, width = config.evaluation.size
        raise ValueError(
            "config: `data.size` changes nothing here, as the checkpoint has `evaluation.size`"
            f" {height} x {width}: edit that"
        )
    if overrides:
        backbone.grid(config.data.size)  # which an edit may not fit
        check_evaluation_size(config, backbone)
    return config, backbone, state


def check_evaluation_size(config: Config, backbone: Backbone) -> None:
    """Refuse an `evaluation.size` that the patches of the backbone do not fit.

    Raises:
        ValueError: it is such.
    """
    try:
        backbone.grid(image_size(config, "val"))
        scoring_windows(config, backbone)
        check_crf(config.evaluation.crf)
    except ValueError as error:
        raise ValueError(str(error).replace("`data.size`", "`evaluation.size`")) from error


def open_bank(
    config: Config,
    backbone: Backbone,
    data: SegmentationData,
    device: torch.device,
    views: int = 0,
    *,
    scored: bool = False,
) -> FeatureBank:
    """The features of a data set as the configuration wants them kept; of images to score by windows, if it says so."""
    unused = scored and not parallel.is_first()  # which alone scores
    return FeatureBank(
        data,
        backbone,
        data.size,
        cache="none" if unused else config.backbone.cache,
        views=views,
        jitter_after_normalization=config.quirks.jitter_after_normalization,
        seed=config.seed,
        device=device,
        backend=config.backend,
        precision=precision_of(config.backbone.precision, device),
        workers=default_workers(device) if config.data.workers is None else config.data.workers,
        windows=scoring_windows(config, backbone) if scored else None,
        cache_dir=Path(config.backbone.cache_dir) if config.backbone.cache_dir else default_folder(),
        identity=config.backbone.model_dump(include=_BACKBONE) | {"local": config.local.model_dump()},
    )


def scoring_windows(config: Config, backbone: Backbone) -> Windows | None:
    """The windows that images to score are cut into.

    Raises:
        ValueError: the patches of the backbone do not fit them, or they leave gaps.
    """
    side, stride, patch = config.evaluation.window, config.evaluation.stride, backbone.patch_size
    if side is None:
        if stride is not None:
            raise ValueError(f"config: `evaluation.stride` needs an `evaluation.window`, got {stride} alone")
        return None
    stride = max(patch, side // 2 // patch * patch) if stride is None else stride
    for name, value in (("window", side), ("stride", stride)):
        if value % patch:
            raise ValueError(f"config: `evaluation.{name}` must be a multiple of the patch size {patch}, got {value}")
    if stride > side:
        raise ValueError(f"config: `evaluation.stride` must be at most the window, {side}, got {stride}")
    return Windows(side, stride)


def _own_weights(config: Config, saved: dict[str, Any] | None) -> BackboneConfig:
    """The backbone to build; weights are not fetched for a run whose checkpoint has them."""
    backbone = copy.copy(config.backbone)
    if saved is not None:
        backbone.pretrained, backbone.weights = False, None
    return backbone


def _check_length(config: Config, steps: int, done: int) -> None:
    """Refuse a run of fewer steps than are done."""
    if steps < done:
        key = "epochs" if config.steps is None else "steps"
        raise ValueError(
            f"config: `{key}` gives {steps} steps, and the run in {config.output} has done {done}: give at least as"
            " many, or start anew with --fresh"
        )


def clusters(data: SegmentationData, config: Config) -> int:
    """How many clusters to find: as many as there are classes, unless the configuration says otherwise."""
    number = config.data.clusters or len(data.classes)
    if number == 1:
        raise ValueError(f"config: `data.classes` must name at least 2 classes, got {list(data.classes)}")
    if number == 0:
        raise ValueError("config: without `data.classes`, `data.clusters` must say how many clusters to find")
    return number


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = parallel.device_of_rank(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"config: `device` {name!r} cannot be used here: there is no such kind of device") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problem = None
    if device.type == "meta":
        problem = "it holds no numbers"
    elif device.type == "cuda" and not gpus:
        problem = "PyTorch finds no GPU"
    elif device.type == "cuda" and device.index is not None and device.index >= gpus:
        problem = f"the last GPU is cuda:{gpus - 1}"
    else:
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            problem = str(error).partition("\n")[0].partition(". ")[0]
    if problem is not None:
        raise ValueError(f"config: `device` {name!r} cannot be used here: {problem}")
    return device


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that cannot run the ops of the loop on `device`.

    Raises:
        ValueError: it cannot.
    """
    for op in _OPS:
        try:
            select(op, name, torch.empty(0, device=device))
        except BackendUnavailableError as error:
            raise ValueError(f"config: `backend` {name!r} cannot be used on {device}: {error}") from error


def _images(data: SegmentationData, seed: int) -> Iterator[Tensor]:
    """All training images (3, h, w) in [0, 1], in random order, for backbones that learn from them."""
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    for index in tqdm(order, desc="fit backbone", unit="image", leave=False):
        yield data.image(index).float() / 255
