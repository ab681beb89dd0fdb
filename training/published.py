"""Exchange trained heads with the checkpoint layout of the published Hidden Positives code.

The layout is that of https://github.com/hynnsk/HP (MIT licence), by Seong, Moon, Lee and Heo (CVPR 2023).

python -m training.published import  published.pth runs/imported/checkpoint.pt --config training/configs/coco27.yaml
python -m training.published export  runs/coco27/checkpoint.pt published.pth
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from training import checkpoint
from training.backbones import Backbone, build_backbone
from training.backbones.timm_vit import TimmViT
from training.backbones.weights import load_weights
from training.config import Config
from training.config_file import load_config
from training.photographs import display_name
from training.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.run import open_trained
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


def export_state(backbone: Backbone, state: TrainingState) -> dict[str, Any]:
    """A trained run in the published layout, which has no place for the projection of the loss.

    Raises:
        ValueError: the backbone is not a ViT.
    """
    if not isinstance(backbone, TimmViT):
        raise ValueError("published: the layout has a place for a ViT only, and this run has another backbone")
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
    } | dict.fromkeys(("net_optimizer", "cluster_optimizer", "linear_optimizer"))


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
    config.backbone.pretrained, config.backbone.weights = False, None
    backbone = build_backbone(config.backbone, config.seed, torch.device("cpu"))
    if not isinstance(backbone, TimmViT):
        raise ValueError("published: `backbone.name` must be the timm ViT of the checkpoint, got patch_dictionary")
    load_weights(backbone.vit, {name.removeprefix("model."): value for name, value in net.items()}, "the checkpoint")

    clusters = len(contents[cluster_part]["clusters"])
    classes = len(contents[linear_part]["bias"])
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
    state.saw_labels = True
    state.step = int(contents.get("iter") or 0)
    return config, backbone, state


def _head_state(net: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    weights = {f"{own}.weight": net[f"{published}.weight"].flatten(1) for published, own in names.items()}
    return weights | {f"{own}.bias": net[f"{published}.bias"] for published, own in names.items()}


def _some(contents: dict[str, Any]) -> str:
    """A few of the keys of a dictionary, for errors."""
    names = [str(name) for name in contents]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("published", __doc__)
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", type=expanded, help="the checkpoint to read")
    parser.add_argument("target", type=expanded, help="the file to write, which must not be there")
    parser.add_argument("--config", type=expanded, help="import: the YAML file that describes the backbone and head")
    add_overrides(parser, "import: edits, e.g. head.dim=90; --keys lists all")
    options = parse_with_overrides(parser, arguments)
    with one_sentence("published"):
        if os.path.lexists(options.target):
            raise ValueError(
                f"the target {display_name(options.target)} is there already: choose another, or remove it"
            )
        if options.direction == "export":
            if options.config is not None or options.overrides:
                raise ValueError("an export takes no --config and no key=value: a checkpoint has its configuration")
            _, backbone, state = open_trained(options.source, "cpu")
            with checkpoint.written_whole(options.target) as file:
                torch.save(export_state(backbone, state), file)
        elif options.config is None:
            raise ValueError("published: an import needs --config")
        else:
            config = load_config(options.config, options.overrides)
            config, backbone, state = import_state(config, checkpoint.load_tensors(options.source))
            contents = {"config": asdict(config), "backbone": backbone.state_dict(), "state": state.state_dict()}
            checkpoint.save(options.target, contents)
    print(f"{options.target} written")


if __name__ == "__main__":
    main()
