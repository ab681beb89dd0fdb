"""Segment photographs with a trained run: a class map and a coloured overlay of each.

python -m training.predict --checkpoint runs/camvid/checkpoint.pt --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import errno
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from training.backbones import Backbone
from training.config import Config
from training.data import resized
from training.evaluate import HEADLINE
from training.figures import class_palette
from training.photographs import display_name, list_images, opened, read_rgb
from training.program import expanded, one_sentence
from training.run import open_trained
from training.segment import SEGMENTATIONS, check_usable, map_names, segment, to_classes
from training.state import TrainingState

_NAMES = "classes.json"
_MARK = "hpkernels training.predict"  # in every picture written here: only those are ever overwritten


def predict(config: Config, backbone: Backbone, state: TrainingState, file: Path, kind: str) -> Tensor:
    """The class map (h, w) int64, on the CPU, of one photograph at its own size."""
    device = next(state.head.parameters()).device
    photograph = read_rgb(file)
    pixels = resized(photograph, config.data.size)[None].to(device).float() / 255
    with torch.no_grad():
        tokens = backbone(backbone.normalize(pixels)).tokens.float()
    maps = segment(state, tokens, backbone.grid(config.data.size), (photograph.height, photograph.width), only=[kind])
    return to_classes(state, maps)[kind][0].cpu()


def write_prediction(file: Path, classes: Tensor, count: int, class_map: Path, overlay: Path) -> None:
    """Write the class map (class indices with a palette) and the coloured overlay of the photograph `file`."""
    class_map.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(classes.numpy().astype(np.uint8))
    indexed.putpalette(class_palette(count).astype(np.uint8).flatten().tolist())
    text = PngInfo()
    text.add_text("Software", _MARK)
    indexed.save(class_map, pnginfo=text)
    Image.blend(read_rgb(file), indexed.convert("RGB"), 0.5).save(overlay, comment=_MARK)


def is_prediction(file: Path) -> bool:
    """Whether `write_prediction` wrote `file`."""
    try:
        with opened(file) as image:
            return image.info.get("Software") == _MARK or image.info.get("comment") == _MARK.encode()
    except ValueError:
        return False


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
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {display_name(out)}")
    if not images.is_file():
        inside = out.resolve()
        files = [file for file in files if inside not in file.resolve().parents or not is_prediction(file)]
    if not files:
        raise ValueError(f"there are no photographs in {display_name(images)} outside of --out")
    names = [file.relative_to(whole) for file in files]
    stems = Counter(_folded(name.with_suffix("")) for name in names)
    # A name with its extension may be the stem of another photograph (a.jpg, a.png and a.jpg.jpg): then all keep it.
    taken = Counter(_folded(_short(name, stems)) for name in names)
    plain = max(taken.values()) == 1
    planned = {}
    for file, name in zip(files, names, strict=True):
        stem = _short(name, stems) if plain else name
        planned[file] = out / f"{stem}.png", out / f"{stem}_overlay.jpg"
    written = [path for pair in planned.values() for path in pair]
    again = [path for path, count in Counter(_folded(path) for path in written).items() if count > 1]
    if again:
        raise ValueError(f"two photographs in {display_name(images)} would be written to {display_name(again[0])}")
    photographs = {file.resolve() for file in files}
    for path in written:
        if path.resolve() in photographs or (path.exists() and not is_prediction(path)):
            raise ValueError(f"{display_name(path)} is there already and is no prediction: choose another --out")
    _check_names(out / _NAMES)
    return planned


def _short(name: Path, stems: Counter[str]) -> Path:
    """`name` without its extension, if no other photograph has that stem."""
    stem = name.with_suffix("")
    return stem if stems[_folded(stem)] == 1 else name


def _folded(name: Path) -> str:
    """`name` as file systems see it that do not tell upper from lower case."""
    return str(name).casefold()


def _check_names(file: Path) -> None:
    """Refuse to overwrite a `classes.json` that is not in the form of ours."""
    if not file.exists():
        return
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        names = None
    if not isinstance(names, dict) or list(names) != [str(index) for index in range(len(names))]:
        raise ValueError(f"{display_name(file)} is there already and is not of predictions: choose another --out")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, type=expanded, help="written by training.train")
    parser.add_argument("--images", required=True, type=expanded, help="a folder of photographs, or one photograph")
    parser.add_argument("--out", required=True, type=expanded, help="the folder to write to")
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
    out = options.out
    config, backbone, state = open_trained(options.checkpoint, options.device)
    check_usable(state, options.segmentation)
    names = map_names(state, options.segmentation, config.data.classes)
    if len(names) > 256:
        raise ValueError(f"a class map has one byte a pixel, enough for 256 clusters, got {len(names)}")
    planned = outputs(options.images, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _NAMES).write_text(json.dumps(dict(enumerate(names)), indent=2, ensure_ascii=False), encoding="utf-8")
    if any(paths[0].name == f"{file.name}.png" for file, paths in planned.items()):
        print("photographs that differ in their extension alone keep it in the names of their predictions")
    bad = []
    for file, paths in tqdm(planned.items(), desc="predict", unit="image"):
        try:
            classes = predict(config, backbone, state, file, options.segmentation)
            write_prediction(file, classes, len(names), *paths)
        except ValueError as error:
            bad.append(str(error))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            bad.append(f"the prediction of {display_name(file)} cannot be written: {error}")
    print(f"{len(planned) - len(bad)} images, {len(names)} classes, in {display_name(out)}")
    if bad:
        raise ValueError("; ".join([f"{len(bad)} of {len(planned)} images are left out", *bad]))


if __name__ == "__main__":
    main()
