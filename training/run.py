"""A run put together from its configuration: data, frozen backbone, feature banks and training state."""

from __future__ import annotations

import copy
import hashlib
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
from training import checkpoint, parallel
from training.backbones import Backbone, build_backbone
from training.clusterings import check_clusters
from training.config import BackboneConfig, Config
from training.config_file import config_from_dict, edited
from training.crf import check_crf
from training.data import SegmentationData, image_size, open_data, steps_per_epoch
from training.features import FeatureBank
from training.inference import Windows
from training.objectives import check_objective
from training.output import check_output, prepare_folder, remove_run
from training.schedule import seed_step
from training.state import TrainingState, output_sizes

# Keys that may differ between a run and its resumption: where and how it is computed, not what.
_PLACE = ("output", "device", "backend", "rank_timeout", "log_every", "checkpoint_every", "data.root")
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
            "backbone": self.backbone.state_dict(),
            "state": self.state.state_dict(),
            "images": _identity(self.train_bank.data),
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
        ValueError: the folder holds a run of another configuration, or the data does not fit.
    """
    where = checkpoint_path(config)
    check_output(config, fresh)
    saved = load_run(where) if where.exists() and not fresh else None
    if saved is not None:
        _check_same(config, saved["config"])
    device = resolve_device(config.device)
    check_backend(config.backend, device)
    train_data, val_data = open_data(config, "train"), open_data(config, "val")
    if saved is not None:
        _check_images(config, train_data, saved)
    _agree(config, train_data, saved)
    every = steps_per_epoch(len(train_data), config.batch_size)
    _check_ranks(config)
    steps = config.steps or config.epochs * every
    if config.warmup >= steps:
        raise ValueError(f"config: `warmup` must be less than the {steps} steps of the run, got {config.warmup}")
    number = clusters(train_data, config)
    check_objective(config, len(train_data), number)
    prepare_folder(Path(config.output), "config: `output`")

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
    train_bank = open_bank(config, backbone, train_data, device, views=config.backbone.views)
    torch.manual_seed(config.seed)
    classes = len(train_data.classes) or number
    if saved is not None:  # older checkpoints have as many classes as clusters
        with _restoring(where):
            number, classes = output_sizes(saved["state"])
    state = TrainingState(config, backbone.features_dim, number, device, classes)
    if saved is not None:
        with _restoring(where):
            state.load_state_dict(saved["state"])
    if not state.pools.agnostic.vectors.any():  # a new run, or one imported from the published code
        state.pools.fill_agnostic(train_bank, seed_step(config.seed, -1))
        if saved is not None:
            state.pools.renew_specific(train_bank, state.ema_head, seed_step(config.seed, -1))
    val_bank = open_bank(config, backbone, val_data, device, scored=True)
    if fresh and parallel.is_first():
        remove_run(Path(config.output))
    return Run(config, device, backbone, train_bank, val_bank, state, steps, every)


def load_run(path: str | Path) -> dict[str, Any]:
    """What `Run.save` wrote.

    Raises:
        ValueError: it cannot be read, a part is missing, or a weight is not finite.
    """
    saved = checkpoint.load(path)
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
    return FeatureBank(
        data,
        backbone,
        data.size,
        cache=config.backbone.cache and not (scored and not parallel.is_first()),  # which alone scores
        views=views,
        jitter_after_normalization=config.quirks.jitter_after_normalization,
        seed=config.seed,
        device=device,
        backend=config.backend,
        windows=scoring_windows(config, backbone) if scored else None,
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


def _identity(data: SegmentationData) -> dict[str, Any]:
    """What tells the images of a data set from others, wherever they are."""
    names = "\n".join(data.name(index) for index in range(len(data)))
    return {"number": len(data), "names": hashlib.sha256(names.encode()).hexdigest()}


def _check_images(config: Config, data: SegmentationData, saved: dict[str, Any]) -> None:
    """Refuse to go on with other images: the batches and pools of a step are indices into them."""
    before = saved.get("images", _identity(data))  # older checkpoints do not say
    if before != _identity(data):
        raise ValueError(
            f"{config.output} holds a run on {before['number']} training images, and the {len(data)} of now are not the"
            " same; choose another `output`, or start anew with --fresh"
        )


def _check_ranks(config: Config) -> None:
    """Refuse a batch or a pool of which a rank would have nothing."""
    ranks = parallel.ranks_of()
    for key, rows in (("batch_size", config.batch_size), ("pool.size", config.pool.size)):
        if rows < ranks:
            raise ValueError(f"config: `{key}` must be at least the {ranks} ranks, got {rows}")


def _agree(config: Config, data: SegmentationData, saved: dict[str, Any] | None) -> None:
    """Refuse ranks, perhaps on several machines, that would not take the same steps."""
    settings = {key: value for key, value in _flat(config.model_dump()).items() if key not in _PLACE}
    done = saved["state"]["step"] if saved else 0
    parallel.agree("train", **settings, **{"training images": _identity(data)["names"], "steps done": done})


def _check_same(config: Config, saved: dict[str, Any]) -> None:
    own = _flat(config.model_dump())
    differing = [key for key, value in _flat(saved).items() if key not in _PLACE and own.get(key) != value]
    if differing:
        raise ValueError(
            f"{config.output} holds a run that differs in {', '.join(differing)}; choose another `output`, or start"
            " anew with --fresh"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _images(data: SegmentationData, seed: int) -> Iterator[Tensor]:
    """All training images (3, h, w) in [0, 1], in random order, for backbones that learn from them."""
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    for index in tqdm(order, desc="fit backbone", unit="image", leave=False):
        yield data.image(index).float() / 255
