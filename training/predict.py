"""Segment photographs with a trained run: a class map and a coloured overlay of each.

python -m training.predict --checkpoint runs/camvid/checkpoint.pt --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.backbones import Backbone
from training.config import Config
from training.data import list_images, load_image
from training.evaluate import HEADLINE
from training.figures import class_palette
from training.run import open_trained
from training.segment import SEGMENTATIONS, check_usable, map_names, segment, to_classes
from training.state import TrainingState


def predict(config: Config, backbone: Backbone, state: TrainingState, file: Path, kind: str) -> Tensor:
    """The class map (h, w) int64, on the CPU, of one photograph at its own size."""
    device = next(state.head.parameters()).device
    with Image.open(file) as image:
        width, height = image.size
    pixels = load_image(file, config.data.size)[None].to(device).float() / 255
    with torch.no_grad():
        tokens = backbone(backbone.normalize(pixels)).tokens.float()
    maps = segment(state, tokens, backbone.grid(config.data.size), (height, width))
    return to_classes(state, maps)[kind][0].cpu()


def write_prediction(file: Path, classes: Tensor, count: int, out: Path) -> None:
    """Write ``<stem>.png`` (class indices with a palette) and ``<stem>_overlay.jpg`` of the photograph `file`."""
    palette = class_palette(count)
    indexed = Image.fromarray(classes.numpy().astype(np.uint8))
    indexed.putpalette(palette.astype(np.uint8).flatten().tolist())
    indexed.save(out / f"{file.stem}.png")
    with Image.open(file) as image:
        Image.blend(image.convert("RGB"), indexed.convert("RGB"), 0.5).save(out / f"{file.stem}_overlay.jpg")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="written by training.train")
    parser.add_argument("--images", required=True, type=Path, help="a folder of JPEG or PNG files")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--segmentation", default=HEADLINE, choices=SEGMENTATIONS, help=f"which one ({HEADLINE})")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        config, backbone, state = open_trained(options.checkpoint, options.device)
        check_usable(state, options.segmentation)
        files = list_images(options.images)
        options.out.mkdir(parents=True, exist_ok=True)
        names = map_names(state, options.segmentation, config.data.classes)
        count = len(names)
        for file in tqdm(files, desc="predict", unit="image"):
            write_prediction(file, predict(config, backbone, state, file, options.segmentation), count, options.out)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"predict: {error}")
    (options.out / "classes.json").write_text(json.dumps(dict(enumerate(names)), indent=2))
    print(f"{len(files)} images, {count} classes, in {options.out}")


if __name__ == "__main__":
    main()
