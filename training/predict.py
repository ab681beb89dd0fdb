"""Segment photographs with a trained run: a class map and a coloured overlay of each.

python -m training.predict --checkpoint runs/camvid/checkpoint.pt --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.backbones import Backbone
from training.config import Config
from training.data import load_image
from training.evaluate import HEADLINE
from training.figures import class_palette
from training.photographs import display_name, list_images, read_rgb, size_of
from training.program import one_sentence
from training.run import open_trained
from training.segment import SEGMENTATIONS, check_usable, map_names, segment, to_classes
from training.state import TrainingState

_NAMES = "classes.json"


def predict(config: Config, backbone: Backbone, state: TrainingState, file: Path, kind: str) -> Tensor:
    """The class map (h, w) int64, on the CPU, of one photograph at its own size."""
    device = next(state.head.parameters()).device
    pixels = load_image(file, config.data.size)[None].to(device).float() / 255
    with torch.no_grad():
        tokens = backbone(backbone.normalize(pixels)).tokens.float()
    maps = segment(state, tokens, backbone.grid(config.data.size), size_of(file), only=[kind])
    return to_classes(state, maps)[kind][0].cpu()


def write_prediction(file: Path, classes: Tensor, count: int, class_map: Path, overlay: Path) -> None:
    """Write the class map (class indices with a palette) and the coloured overlay of the photograph `file`."""
    class_map.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(classes.numpy().astype(np.uint8))
    indexed.putpalette(class_palette(count).astype(np.uint8).flatten().tolist())
    indexed.save(class_map)
    Image.blend(read_rgb(file), indexed.convert("RGB"), 0.5).save(overlay)


def outputs(images: Path, out: Path) -> dict[Path, tuple[Path, Path]]:
    """The class map and the overlay that each photograph of `images`, a folder or one file, gets in `out`.

    They are ``<stem>.png`` and ``<stem>_overlay.jpg`` in the folders that the photographs are in; photographs that
    differ in their extension alone keep it.

    Raises:
        ValueError: there are no photographs, or something would be overwritten that is not an earlier prediction.
    """
    whole = images.parent if images.is_file() else images
    files = [images] if images.is_file() else list_images(images)
    if out.resolve() == images.resolve():
        raise ValueError(f"--out must be another folder than --images, got {display_name(out)}")
    if out.resolve() != whole.resolve():
        files = [file for file in files if out.resolve() not in file.resolve().parents]  # earlier predictions
    if not files:
        raise ValueError(f"there are no photographs in {display_name(images)} outside of --out")
    stems = Counter(str(file.relative_to(whole).with_suffix("")).casefold() for file in files)
    planned = {}
    for file in files:
        name = file.relative_to(whole)
        stem = name.with_suffix("") if stems[str(name.with_suffix("")).casefold()] == 1 else name
        planned[file] = out / f"{stem}.png", out / f"{stem}_overlay.jpg"
    ours = (out / _NAMES).is_file()
    photographs = {file.resolve() for file in files}
    for path in (path for pair in planned.values() for path in pair):
        if path.resolve() in photographs or (path.exists() and not ours):
            raise ValueError(f"{display_name(path)} is there already and is no prediction: choose another --out")
    return planned


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="written by training.train")
    parser.add_argument("--images", required=True, type=Path, help="a folder of photographs, or one photograph")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--segmentation", default=HEADLINE, choices=SEGMENTATIONS, help=f"which one ({HEADLINE})")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    with one_sentence("predict"):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Segment what the command line asks for; the bad files are told at the end.

    Raises:
        ValueError: nothing can be done, or some photographs could not be read.
    """
    out = options.out.expanduser()
    config, backbone, state = open_trained(Path(options.checkpoint).expanduser(), options.device)
    check_usable(state, options.segmentation)
    names = map_names(state, options.segmentation, config.data.classes)
    if len(names) > 256:
        raise ValueError(f"a class map has one byte a pixel, enough for 256 clusters, got {len(names)}")
    planned = outputs(options.images.expanduser(), out)
    out.mkdir(parents=True, exist_ok=True)
    # First, because it marks the folder as one of predictions.
    (out / _NAMES).write_text(json.dumps(dict(enumerate(names)), indent=2, ensure_ascii=False), encoding="utf-8")
    bad = []
    for file, paths in tqdm(planned.items(), desc="predict", unit="image"):
        try:
            classes = predict(config, backbone, state, file, options.segmentation)
            write_prediction(file, classes, len(names), *paths)
        except ValueError as error:
            bad.append(str(error))
    print(f"{len(planned) - len(bad)} images, {len(names)} classes, in {display_name(out)}")
    if bad:
        raise ValueError("; ".join([f"{len(bad)} of {len(planned)} images are left out", *bad]))


if __name__ == "__main__":
    main()
