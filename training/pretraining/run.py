"""A pretraining run put together from its configuration: photographs, and the state that learns from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from training.config import Config
from training.config_file import flat
from training.data import FolderData, SegmentationData, batch_of_step, root_of, steps_per_epoch
from training.data.loading import decode
from training.data.photographs import display_name
from training.data.procedural import ProceduralData
from training.pretraining.state import PretrainingState
from training.run import resolve_device
from training.runtime import checkpoint, parallel
from training.runtime.output import check_output, check_space, prepare_folder, remove_partial, remove_run
from training.runtime.resuming import check_images, check_same, identity

WEIGHTS = "backbone.safetensors"
"""The file in the output folder with the weights of the teacher, under timm's names."""

_MADE_BY = {"made by": "hpkernels training.pretrain"}
_KEYS = (
    *("seed", "output", "device", "epochs", "steps", "batch_size", "log_every", "checkpoint_every", "pretraining."),
    *("data.name", "data.root", "data.size", "data.fit", "data.train_images"),
    *("backbone.name", "backbone.layer", "backbone.class_token"),
)


@dataclass
class Pretraining:
    """What pretraining works on."""

    config: Config
    device: torch.device
    photographs: Tensor  # (n, 3, h, w) uint8, on the device
    grid: tuple[int, int]  # patches of a crop
    state: PretrainingState
    steps: int  # 0: as many as `pretraining.minutes` allow, not yet known
    images: dict[str, Any]  # `identity` of the photographs

    def batch(self, step: int) -> Tensor:
        """The indices (B,) of the photographs of a step."""
        chosen = batch_of_step(step, len(self.photographs), self.config.batch_size, self.config.seed)
        return chosen.to(self.device, non_blocking=True)

    def save(self) -> None:
        """Write everything that resume needs, atomically."""
        contents = {"config": self.config.model_dump(), "images": self.images, "steps": self.steps}
        checkpoint.save(_checkpoint(self.config), contents | {"pretraining": self.state.state_dict()})

    def write_weights(self) -> Path:
        """Write the teacher's ViT for `backbone.weights`, atomically."""
        path = Path(self.config.output) / WEIGHTS
        tensors = {name: value.cpu().contiguous() for name, value in self.state.teacher.vit.state_dict().items()}
        with checkpoint.written_whole(path) as file:
            file.write(safetensors.torch.save(tensors, _MADE_BY))
        return path


def _checkpoint(config: Config) -> Path:
    return Path(config.output) / "checkpoint.pt"


def check_config(config: Config) -> None:
    """Refuse what pretraining does not do.

    Raises:
        ValueError: a key that means nothing here is set, the data has no plain photographs, or torchrun was used.
    """
    values = flat(config.model_dump())
    defaults = flat(Config(steps=1).model_dump())
    for key, value in values.items():
        if value != defaults[key] and not key.startswith(_KEYS):
            raise ValueError(f"config: `{key}` means nothing to pretraining, so it must be left out, got {value}")
    if config.data.name not in ("folder", "procedural"):
        raise ValueError(
            f"config: `data.name` must be folder or procedural, got {config.data.name}: with data.name=folder"
            " `data.root` may be the folder of its photographs"
        )
    if parallel.launched():
        raise ValueError("pretraining runs on one device: start it without torchrun")


def open_pretraining(config: Config, *, fresh: bool = False) -> Pretraining:
    """Start a run, or go on with the one in its output folder if there is one.

    Raises:
        ValueError: the folder holds something else, or a run of another configuration or on other photographs; the
            photographs or the ViT do not fit; the disk is too small.
    """
    output, where = Path(config.output), _checkpoint(config)
    check_output(config, fresh)
    _check_weights(output / WEIGHTS)
    saved = _saved(config) if where.exists() and not fresh else None
    device = resolve_device(config.device)
    data = open_photographs(config)
    images = identity(data)
    if saved is not None:
        check_images(config, images, saved)
    steps = _steps(config, len(data), saved)
    state = PretrainingState(config, device)
    try:
        grid = state.backbone.grid(config.pretraining.crop)
    except ValueError as error:
        raise ValueError(str(error).replace("`data.size`", "`pretraining.crop`")) from error
    if saved is not None:
        try:
            state.load_state_dict(saved["pretraining"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"checkpoint: {where} cannot be used: {why}") from error
    if steps and steps < state.step:
        raise ValueError(
            f"config: {steps} steps are fewer than the {state.step} that the run in {config.output} has done: give at"
            " least as many, or start anew with --fresh"
        )
    prepare_folder(output, "config: `output`")
    check_space(output, {"checkpoint.pt": state.nbytes, WEIGHTS: state.nbytes // 4})
    if saved is None:
        (output / WEIGHTS).unlink(missing_ok=True)  # of a run that is no more
        if fresh:
            remove_run(output)
    remove_partial(output)
    pixels = decode(data, torch.arange(len(data)), pixels=True, labels=False).pixels
    return Pretraining(config, device, pixels.to(device), grid, state, steps, images)


def open_photographs(config: Config) -> SegmentationData:
    """The training photographs; no label is opened.

    Raises:
        ValueError: there are none.
    """
    data = config.data
    if data.name == "procedural":
        return ProceduralData(data.train_images or 64, data.size, seed=0)
    crop = data.fit == "crop"
    return FolderData(root_of(data), "train", data.size, (), data.train_images, crop=crop, labelled=False)


def _saved(config: Config) -> dict[str, Any]:
    """The checkpoint in the output folder."""
    saved = checkpoint.load(_checkpoint(config))
    if not {"pretraining", "config", "images", "steps"} <= saved.keys():
        raise ValueError(
            f"{config.output} holds a run of training.train; choose another `output`, or start anew with --fresh"
        )
    check_same(config, saved["config"])
    return saved


def _steps(config: Config, images: int, saved: dict[str, Any] | None) -> int:
    """How many steps the run has; 0 where `pretraining.minutes` will tell."""
    every = steps_per_epoch(images, config.batch_size)
    if config.pretraining.minutes is not None:
        return 0 if saved is None else saved["steps"]
    return config.steps or config.epochs * every


def _check_weights(path: Path) -> None:
    """Refuse to overwrite a weight file that pretraining has not written."""
    if not path.exists():
        return
    try:
        with safetensors.safe_open(path, "pt") as file:
            ours = file.metadata() == _MADE_BY
    except (OSError, safetensors.SafetensorError):
        ours = False
    if not ours:
        raise ValueError(
            f"config: `output` {display_name(path.parent)} holds a {WEIGHTS} that pretraining has not written: choose"
            " another, or remove the file"
        )
