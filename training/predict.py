"""Segment photographs with a trained run: a class map and a coloured overlay of each.

python -m training.predict --checkpoint runs/camvid/checkpoint.pt --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from training.backbones import Backbone
from training.config import Config
from training.crf import refined
from training.data import class_names, image_size, resized
from training.evaluate import HEADLINE
from training.figures import class_palette
from training.inference import features_of, fitted_size
from training.output import prepare_folder
from training.photographs import MARK, display_name, is_prediction, list_images, read_rgb, real, visible_files
from training.program import Parser, add_overrides, expanded, one_sentence, parse_with_overrides
from training.run import open_trained, scoring_windows
from training.segment import (
    SEGMENTATIONS,
    check_usable,
    greatest,
    log_probabilities,
    map_names,
    segment,
    to_classes,
)
from training.state import TrainingState

# Keys that a checkpoint does not settle.
_EDITABLE = ("data.size", *(f"evaluation.{key}" for key in ("size", "flip", "window", "stride", "crf")), "backend")
_NAMES = "classes.json"


def predict(config: Config, backbone: Backbone, state: TrainingState, file: Path, kind: str) -> Tensor:
    """The class map (h, w) int64, on the CPU, of one photograph at its own size."""
    device, how = state.device, config.evaluation
    windows = scoring_windows(config, backbone)
    photograph = read_rgb(file)
    full = photograph.height, photograph.width
    size = fitted_size(full, image_size(config, "val"), windows, backbone.patch_size)
    image = resized(photograph, size)[None].to(device)

    def tokens(pixels: Tensor) -> Tensor:
        return features_of(backbone, pixels, weights=False, windows=windows).tokens

    pixels, grid = image.float() / 255, backbone.grid(size)
    features, mirrored = tokens(pixels), tokens(pixels.flip(3)) if how.flip else None
    if how.crf == "none":
        maps = segment(state, features, grid, full, [kind], mirrored)
    else:  # at the size that the backbone saw: at that of the photograph it would take all memory
        logs = log_probabilities(state, features, grid, size, kind, mirrored)
        maps = {kind: greatest(refined(how.crf, image, {kind: logs})[kind], full)}
    return to_classes(state, maps)[kind][0].cpu()


def write_prediction(file: Path, classes: Tensor, count: int, class_map: Path, overlay: Path) -> None:
    """Write the class map (class indices with a palette) and the coloured overlay of the photograph `file`."""
    class_map.parent.mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(classes.numpy().astype(np.uint8))
    indexed.putpalette(class_palette(count).astype(np.uint8).flatten().tolist())
    text = PngInfo()
    text.add_text("Software", MARK)
    indexed.save(class_map, pnginfo=text)
    Image.blend(read_rgb(file), indexed.convert("RGB"), 0.5).save(overlay, comment=MARK)


def outputs(images: Path, out: Path) -> dict[Path, tuple[Path, Path]]:
    """The class map and the overlay that each photograph of `images`, a folder or one file, gets in `out`.

    They are ``<stem>.png`` and ``<stem>_overlay.jpg`` in the folders that the photographs are in; photographs that
    differ in their extension alone keep it.

    Raises:
        ValueError: there are no photographs, or something would be overwritten that is not an earlier prediction.
    """
    images = images.absolute()
    whole = images.parent if images.is_file() else images
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got the file {display_name(out)}")
    if real(out) == real(images):
        raise ValueError(f"--out must be another folder than --images, got {display_name(out)}")
    files = [images] if images.is_file() else list_images(images)
    folded = _folded if _folds_case(out) else str
    names = [file.relative_to(whole) for file in files]
    stems = Counter(folded(name.with_suffix("")) for name in names)

    def short(name: Path) -> Path:
        return name.with_suffix("") if stems[folded(name.with_suffix(""))] == 1 else name

    # A name with its extension may be the stem of another photograph (a.jpg, a.png and a.jpg.jpg): then all keep it.
    plain = max(Counter(folded(short(name)) for name in names).values()) == 1
    planned = {}
    source: dict[str, Path] = {}
    for file, name in zip(files, names, strict=True):
        stem = short(name) if plain else name
        planned[file] = out / f"{stem}.png", out / f"{stem}_overlay.jpg"
        for path in planned[file]:
            other = source.setdefault(folded(path), file)
            if other != file:
                raise ValueError(
                    f"{display_name(other)} and {display_name(file)} would both be written to {display_name(path)}"
                )
    photographs = {real(file) for file in files}
    for path in (path for pair in planned.values() for path in pair):
        if real(path) in photographs or (os.path.lexists(path) and not is_prediction(path)):
            raise ValueError(f"{display_name(path)} is there already and is no prediction: choose another --out")
    return planned


def _folded(name: Path) -> str:
    """`name` as file systems see it that do not tell upper from lower case."""
    return str(name).casefold()


def _folds_case(folder: Path) -> bool:
    """Whether the file system of `folder`, or of the folder it will be made in, does not tell upper from lower case."""
    for parent in (real(folder), *real(folder).parents):
        other = parent.with_name(parent.name.swapcase()) if parent.name else parent
        if parent.exists() and other != parent:
            return other.exists() and other.samefile(parent)
    return False


def write_names(out: Path, names: list[str]) -> None:
    """Write what each value of the class maps is.

    Raises:
        ValueError: a file of that name is there, says something else, and lies beside no prediction.
    """
    file, text = out / _NAMES, json.dumps(dict(enumerate(names)), indent=2, ensure_ascii=False)
    if os.path.lexists(file):
        same = file.is_file() and file.read_bytes() == text.encode()
        if not same and not (file.is_file() and any(is_prediction(path) for path in visible_files(out))):
            raise ValueError(f"{display_name(file)} is there already and is not of predictions: choose another --out")
    file.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("predict", __doc__)
    parser.add_argument("--checkpoint", required=True, type=expanded, help="written by training.train")
    parser.add_argument("--images", required=True, type=expanded, help="a folder of photographs, or one photograph")
    parser.add_argument("--out", required=True, type=expanded, help="the folder to write to")
    parser.add_argument("--segmentation", default=HEADLINE, choices=SEGMENTATIONS, help=f"which one ({HEADLINE})")
    parser.add_argument("--device", default="auto")
    add_overrides(parser, f"edits of {', '.join(_EDITABLE)}, e.g. evaluation.flip=true", keys=False)
    options = parse_with_overrides(parser, arguments)
    with one_sentence("predict"):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Segment what the command line asks for; the bad files are told at the end.

    Raises:
        ValueError: nothing can be done, or some photographs could not be read.
    """
    out = options.out
    config, backbone, state = open_trained(options.checkpoint, options.device, options.overrides, _EDITABLE)
    check_usable(state, options.segmentation)
    names = map_names(state, options.segmentation, class_names(config.data))
    if len(names) > 256:
        raise ValueError(f"a class map has one byte a pixel, enough for 256 clusters, got {len(names)}")
    planned = outputs(options.images, out)
    prepare_folder(out, "--out")
    write_names(out, names)
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
            for path in paths:  # half a result
                with suppress(OSError):
                    path.unlink()
            if error.errno == errno.ENOSPC:
                raise
            bad.append(f"the prediction of {display_name(file)} cannot be written: {error}")
    print(f"{len(planned) - len(bad)} images, {len(names)} classes, in {display_name(out)}")
    if bad:
        raise ValueError("; ".join([f"{len(bad)} of {len(planned)} images are left out", *bad]))


if __name__ == "__main__":
    main()
