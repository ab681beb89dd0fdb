"""Exchange trained heads with the checkpoint layout of the published Hidden Positives code.

The layout is that of https://github.com/hynnsk/HP (MIT licence), by Seong, Moon, Lee and Heo (CVPR 2023). A target that
ends in .safetensors receives the same tensors and what the layout has no place for, with a .json beside it that says
the configuration.

python -m training.published import  published.pth runs/imported/checkpoint.pt --config coco27 data.root=DIR
python -m training.published export  runs/coco27/checkpoint.pt published.pth
python -m training.published export  runs/coco27/checkpoint.pt weights.safetensors
python -m training.published import  weights.safetensors runs/again/checkpoint.pt
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from training.backbones import Backbone, build_backbone
from training.backbones.timm_vit import TimmViT
from training.backbones.weights import load_weights
from training.config import Config
from training.config_file import config_from_dict, edited, known_keys, load_config
from training.data import open_data
from training.data.photographs import display_name
from training.evaluate import evaluate, matched_on
from training.evaluation.clusterings import check_clusters
from training.model import SegmentationHead
from training.run import check_backend, open_bank, open_trained, resolve_device
from training.runtime import checkpoint
from training.runtime.output import is_of_run, locked
from training.runtime.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.segment import CLUSTERED
from training.state import TrainingState

# Published name -> name in SegmentationHead; 1x1 convolutions there, linear layers here.
_HEAD = {"cluster1.0": "w1", "cluster2.0": "w2", "cluster2.2": "w3"}
_EMA_HEAD = {"ema_model1.0": "w1", "ema_model2.0": "w2", "ema_model2.2": "w3"}

# What an import needs of each part of a file, beside the backbone.
_ENTRIES = {
    "net_model_state_dict": [f"{name}.{kind}" for name in (*_HEAD, *_EMA_HEAD) for kind in ("weight", "bias")],
    "linear_model_state_dict": ["weight", "bias"],
    "cluster_model_state_dict": ["clusters"],
}

# What the published layout has no place for, and a safetensors file has.
_OWN = ("projection", "clusterings")


def export_state(backbone: Backbone, state: TrainingState) -> dict[str, Any]:
    """A trained run in the published layout, which has no place for the projection of the loss.

    Raises:
        ValueError: the backbone is not a ViT.
    """
    if not isinstance(backbone, TimmViT):
        raise ValueError("published: the layout has a place for a ViT only, and this run has another backbone")
    if not isinstance(state.head, SegmentationHead):
        raise ValueError("published: the layout has a place for a head, and this run (loss.objective=none) has none")
    net = {f"model.{name}": value for name, value in backbone.vit.state_dict().items()}
    for names, head in ((_HEAD, state.head), (_EMA_HEAD, state.ema_head)):
        for published, own in names.items():
            layer = getattr(head, own)
            net[f"{published}.weight"] = layer.weight.detach()[:, :, None, None]
            net[f"{published}.bias"] = layer.bias.detach()
    return {
        "epoch": 0,
        "iter": state.step,
        "net_model_state_dict": net,
        "linear_model_state_dict": state.linear_probe.state_dict(),
        "cluster_model_state_dict": state.cluster_probe.state_dict(),
    } | dict.fromkeys(f"{name}_optimizer_state_dict" for name in ("net", "linear", "cluster"))


def import_state(config: Config, contents: dict[str, Any]) -> tuple[Config, Backbone, TrainingState]:
    """A run from a checkpoint in the published layout.

    Args:
        config: of the backbone and head that the checkpoint holds; its weights are taken from there.
        contents: of the file.

    Raises:
        ValueError: an entry is missing or has another shape.
    """
    missing = [part for part in _ENTRIES if not isinstance(contents.get(part), dict)]
    if missing:
        raise ValueError(f"published: the file has no {', '.join(missing)}; it has {_some(contents)}")
    for part, entries in _ENTRIES.items():
        missing = [name for name in entries if not isinstance(contents[part].get(name), Tensor)]
        if missing:
            raise ValueError(f"published: {part} has no {', '.join(missing)}; it has {_some(contents[part])}")
    net_part, linear_part, cluster_part = _ENTRIES
    net = contents[net_part]
    own_backbone = copy.copy(config.backbone)
    own_backbone.pretrained, own_backbone.weights = False, None
    backbone = build_backbone(own_backbone, config.seed, torch.device("cpu"), config.local)
    if not isinstance(backbone, TimmViT):
        raise ValueError("published: `backbone.name` must be the timm ViT of the checkpoint, got patch_dictionary")
    load_weights(backbone.vit, {name.removeprefix("model."): value for name, value in net.items()}, "the checkpoint")

    clusters = len(contents[cluster_part]["clusters"])
    classes = len(contents[linear_part]["bias"])
    if len(config.data.classes) not in (0, classes):
        raise ValueError(
            f"published: `data.classes` must name the {classes} classes of the checkpoint, got"
            f" {len(config.data.classes)}"
        )
    state = TrainingState(config, backbone.features_dim, clusters, torch.device("cpu"), classes)
    for part, module, own in (
        (net_part, state.head, _head_state(net, _HEAD)),
        (net_part, state.ema_head, _head_state(net, _EMA_HEAD)),
        (linear_part, state.linear_probe, contents[linear_part]),
        (cluster_part, state.cluster_probe, contents[cluster_part]),
    ):
        for name, expected in module.state_dict().items():
            if own[name].shape != expected.shape:
                raise ValueError(
                    f"published: the checkpoint does not fit `head.dim` {config.head.dim} and `backbone.name`"
                    f" {config.backbone.name!r}: {part} has {name} of shape {tuple(own[name].shape)}, expected"
                    f" {tuple(expected.shape)}"
                )
        module.load_state_dict({name: own[name] for name in module.state_dict()})
    for name in _OWN:
        if name in contents:
            try:
                state.modules[name].load_state_dict(contents[name])
            except RuntimeError as error:
                raise ValueError(f"published: the checkpoint does not fit: its {name} has other shapes") from error
    state.saw_labels = True
    state.step = int(contents.get("iter") or 0)
    return config, backbone, state


def fit_missing(config: Config, backbone: Backbone, state: TrainingState) -> str:
    """Fit what a published file lacks on the images of `config`, as the end of a run does; returns what was done.

    The k-means centres of features and codes are fitted on the training images, and clusters matched to classes on the
    labelled validation images.

    Raises:
        ValueError: the data cannot be read.
    """
    device = resolve_device(config.device)
    check_backend(config.backend, device)
    train, val = open_data(config, "train"), open_data(config, "val")
    height, width = backbone.grid(config.data.size)
    check_clusters(state.clusters, len(train), height * width)
    for module in (backbone, *state.modules.values()):
        module.to(device)
    train_bank = open_bank(config, backbone, train, device)
    fitted = "as they are in the file"
    if not state.clusterings.fitted:
        state.clusterings.fit(train_bank, state.head, config.seed)
        fitted = f"fitted on {len(train)} training images"
    how = config.evaluation
    val_bank = open_bank(config, backbone, val, device, scored=True)
    scores = evaluate(state, val_bank, CLUSTERED, train_bank if how.match == "train" else None, how)
    matched = f"matched on the {matched_on(config)} images" if scores else "not matched, as there are no labels"
    return f"clusters {fitted}, {matched}"


def _flat(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a dictionary of dictionaries, as ``part/name``."""
    parts = {part: values for part, values in contents.items() if isinstance(values, dict)}
    return {f"{part}/{name}": value.contiguous() for part, values in parts.items() for name, value in values.items()}


def write_safetensors(path: Path, config: Config, backbone: Backbone, state: TrainingState) -> None:
    """Write the weights of a run to `path`, and beside it a JSON file with its configuration and step."""
    contents = export_state(backbone, state) | {name: state.modules[name].state_dict() for name in _OWN}
    with checkpoint.written_whole(path) as file:
        file.write(safetensors.torch.save(_flat(contents)))
    about = {"iter": state.step, "saw_labels": state.saw_labels, "config": config.model_dump()}
    with checkpoint.written_whole(path.with_suffix(".json")) as file:
        file.write(json.dumps(about, indent=2, ensure_ascii=False).encode())


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of a file of `write_safetensors` in the published layout and beyond, and what is in the JSON file.

    Raises:
        ValueError: a file is missing or is something else.
    """
    contents: dict[str, Any] = {}
    for name, value in checkpoint.load_tensors(path).items():
        part, _, entry = name.partition("/")
        contents.setdefault(part, {})[entry] = value
    beside = path.with_suffix(".json")
    try:
        about = json.loads(beside.read_bytes()) if beside.is_file() else {}
    except ValueError as error:
        raise ValueError(f"published: {display_name(beside)} is not JSON") from error
    if not isinstance(about, dict) or not isinstance(about.get("config", {}), dict):
        raise ValueError(f"published: {display_name(beside)} must hold a `config`, as an export writes it")
    return contents | {"iter": about.get("iter", 0)}, about


def _head_state(net: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    weights = {f"{own}.weight": net[f"{published}.weight"].flatten(1) for published, own in names.items()}
    return weights | {f"{own}.bias": net[f"{published}.bias"] for published, own in names.items()}


def _some(contents: dict[str, Any]) -> str:
    """A few of the keys of a dictionary, for errors."""
    names = [str(name) for name in contents]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"


def import_file(source: Path, target: Path, config_file: Path | None, overrides: Sequence[str]) -> None:
    """Write the run in `source`, in the published layout or exported, as the checkpoint `target`.

    Raises:
        ValueError: it cannot be read, or does not fit the configuration.
    """
    about: dict[str, Any] = {}
    if source.suffix == ".safetensors":
        contents, about = read_safetensors(source)
    else:
        contents = checkpoint.load_tensors(source)
    if config_file is not None:
        config = load_config(config_file, overrides)
    elif "config" in about:
        config = config_from_dict(about["config"])
        config = edited(config, overrides, known_keys())
    else:
        raise ValueError("published: an import needs --config")
    config, backbone, state = import_state(config, contents)
    state.saw_labels = about.get("saw_labels", True)
    if "projection" not in contents:
        print("the published layout has no projection z of the loss: training goes on with a new one")
    if config.data.root is not None or config.data.name == "procedural":
        print(fit_missing(config, backbone, state))
    elif not state.clusterings.fitted:
        print(
            "the k-means centres are not in the file, and without `data.root` they are not fitted, nor clusters matched"
            " to classes: `evaluate` scores the two probes, and `predict --segmentation linear` names classes"
        )
    checkpoint.save(
        target, {"config": config.model_dump(), "backbone": backbone.state_dict(), "state": state.state_dict()}
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("published", __doc__)
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", type=expanded, help="the checkpoint to read")
    parser.add_argument("target", type=expanded, help="the file to write, which must not be there")
    parser.add_argument("--config", type=expanded, help="import: the YAML file that describes the backbone and head")
    add_overrides(
        parser, "import: edits, e.g. head.dim=90; with data.root=DIR clusters are fitted and matched; --keys lists all"
    )
    options = parse_with_overrides(parser, arguments)
    target = options.target
    with one_sentence("published"), locked(target.parent) if is_of_run(target.parent) else nullcontext():
        beside = [target.with_suffix(".json")] if target.suffix == ".safetensors" else []
        for path in (target, *beside):
            if os.path.lexists(path):
                raise ValueError(f"the target {display_name(path)} is there already: choose another, or remove it")
        if options.direction == "import":
            import_file(options.source, target, options.config, options.overrides)
        elif options.config is not None or options.overrides:
            raise ValueError("an export takes no --config and no key=value: a checkpoint has its configuration")
        else:
            config, backbone, state = open_trained(options.source, "cpu")
            if beside:
                write_safetensors(target, config, backbone, state)
            else:
                with checkpoint.written_whole(target) as file:
                    torch.save(export_state(backbone, state), file)
    print(f"{target} written")


if __name__ == "__main__":
    main()
