"""Segment photographs with a trained run: class maps, overlays, confidence, and pseudo-labels for other programs.

python -m training.predict --checkpoint runs/camvid/checkpoint.pt --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

import hpkernels
from training.config import Config
from training.data import class_names
from training.data.photographs import LARGEST, allow_pixels, display_name, read_rgb
from training.evaluate import HEADLINE
from training.prediction.manifest import Manifest, sha256
from training.prediction.photograph import Prediction, predict, predict_together, windows_of
from training.prediction.pictures import OUTPUTS, Writer, check_jpeg, outputs, write_names
from training.prediction.pseudo_labels import IGNORED, check_panoptic, class_ids, read_ids, write_panoptic
from training.run import open_trained
from training.runtime.output import prepare_folder
from training.runtime.program import (
    Parser,
    SeveralMistakes,
    add_overrides,
    expanded,
    one_sentence,
    parse_with_overrides,
)
from training.segment import SEGMENTATIONS, check_usable, is_matched, map_names
from training.state import TrainingState

__all__ = ["Prediction", "main", "predict", "run"]

# Keys that a checkpoint does not settle.
_EDITABLE = (
    "data.size",
    *(f"evaluation.{key}" for key in ("size", "flip", "window", "stride", "crf")),
    "backend",
    "backbone.precision",
)


def read_ahead(
    todo: Mapping[Path, Mapping[str, Path]], number: int
) -> Iterator[list[tuple[Path, Image.Image | ValueError]]]:
    """The photographs that are the keys of `todo`, `number` at a time, or why one cannot be read or drawn upon.

    The next are decoded meanwhile.
    """

    def read(file: Path) -> tuple[Path, Image.Image | ValueError]:
        try:
            photograph = read_rgb(file)
        except ValueError as error:
            return file, error
        try:  # here, not after the photograph was segmented
            if "overlay" in todo[file]:
                check_jpeg(photograph.size)
        except ValueError as error:
            return file, ValueError(_unwritten(file, error))
        return file, photograph

    files = list(todo)
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for at in range(0, len(files), number):
            following = pool.submit(lambda some: list(map(read, some)), files[at : at + number])
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def predict_all(
    todo: Mapping[Path, Mapping[str, Path]],
    number: int,
    segment: Callable[[list[Image.Image]], list[Prediction]],
    write: Callable[[Path, Image.Image, Prediction], None],
    bar: tqdm,
) -> list[str]:
    """Segment the photographs that are the keys of `todo`, `number` at a time, and write their pictures, the values.

    Returns:
        which are left out, and why.

    Raises:
        OSError: the disk is full.
    """
    bad = []
    for some in read_ahead(todo, number):
        good = [(file, photograph) for file, photograph in some if isinstance(photograph, Image.Image)]
        bad += [_why(error) for _, error in some if isinstance(error, ValueError)]
        try:
            found = segment([photograph for _, photograph in good])
        except ValueError as error:
            bad += [f"{display_name(file)} cannot be segmented: {error}" for file, _ in good]
            good, found = [], []
        for (file, photograph), prediction in zip(good, found, strict=True):
            try:
                write(file, photograph, prediction)
            except (OSError, ValueError) as error:
                for path in todo[file].values():  # some may be of an earlier run
                    with suppress(OSError):
                        path.unlink()
                if errno.ENOSPC in (getattr(each, "errno", None) for each in (error, error.__cause__)):
                    raise
                bad.append(_unwritten(file, error))
        bar.update(len(some))
    return bad


def _unwritten(file: Path, error: Exception) -> str:
    return f"the prediction of {display_name(file)} cannot be written: {error}"


def _number(least: float, most: float, kind: type = float) -> Callable[[str], Any]:
    """A type of argparse: a number above or at `least`, up to `most`."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(
            f"must be {'an integer' if kind is int else 'a number'} of {least} to {most}, got {text}"
        )

    return parse


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    unknown = [kind for kind in kinds if kind not in OUTPUTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must list some of {', '.join(OUTPUTS)}, got {unknown[0] or 'nothing'}")
    return [kind for kind in OUTPUTS if kind in kinds]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser("predict", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=expanded, help="written by training.train")
    add("--images", required=True, type=expanded, help="a folder of photographs, or one photograph")
    add("--out", required=True, type=expanded, help="the folder to write to")
    add("--segmentation", default=HEADLINE, choices=SEGMENTATIONS, help=f"which one ({HEADLINE})")
    add("--write", default="classes,overlay", type=_kinds, help=f"a list of {', '.join(OUTPUTS)} (classes,overlay)")
    add("--legend", action="store_true", help="name the colours below each overlay")
    add("--scale", type=_number(0.01, 16), help="segment at so many times the photograph's size, by windows")
    add("--min-confidence", type=_number(0, 1), default=0.0, help="pseudo-labels leave out pixels below it (0)")
    add("--ids", type=expanded, help="YAML or JSON: the id of each class in pseudo-labels, or null")
    add("--things", type=lambda text: text.split(","), default=[], help="coco: classes whose parts are segments each")
    add("--batch", type=_number(1, 4096, int), default=8, help="images or windows through the backbone at a time (8)")
    add("--max-megapixels", type=_number(1, 10**6), help=f"refuse larger photographs ({LARGEST // 10**6})")
    add("--device", default="auto", help="auto: a GPU where there is one (auto)")
    add_overrides(parser, f"edits of {', '.join(_EDITABLE)}, e.g. evaluation.flip=true", keys=False)
    options = parse_with_overrides(parser, arguments)
    with one_sentence("predict"):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Segment what the command line asks for and what was not done before; the bad files are told at the end.

    Raises:
        ValueError: nothing can be done.
        SeveralMistakes: some photographs are left out.
    """
    out, kind = options.out, options.segmentation
    if options.max_megapixels is not None:
        allow_pixels(int(options.max_megapixels * 10**6))
    config, backbone, state = open_trained(options.checkpoint, options.device, options.overrides, _EDITABLE)
    check_usable(state, kind)
    together = options.batch if windows_of(config, backbone, options.scale) is None else 1
    names = map_names(state, kind, class_names(config.data))
    if len(names) > 256:
        raise ValueError(f"a class map has one byte a pixel, enough for 256 clusters, got {len(names)}")
    ids = _ids(options, names[: state.classes] if is_matched(state, kind) else names)
    writer = Writer(names, legend=options.legend, ids=ids, things=options.things, least=options.min_confidence)
    planned = outputs(options.images, out, options.write)
    prepare_folder(out, "--out")
    if "coco" in ids:
        check_panoptic(out)
    write_names(out, names)
    top = options.images.absolute().parent if options.images.is_file() else options.images.absolute()
    images = {file: display_name(file.relative_to(top).as_posix()) for file in planned}
    if any(path.stem.startswith(file.name) for file, paths in planned.items() for path in paths.values()):
        print("photographs that differ in their extension alone keep it in the names of their predictions")
    segment = partial(predict_together, config, backbone, state, kind=kind, scale=options.scale, batch=options.batch)
    with _alone(out):
        manifest = Manifest(out, _settings(options, config, names, ids), _about(options, state), list(images.values()))
        todo = {file: paths for file, paths in planned.items() if not manifest.done(images[file], file, paths)}

        def write(file: Path, photograph: Image.Image, found: Prediction) -> None:
            manifest.add(images[file], file, todo[file], writer.write(photograph, found, todo[file]))

        with tqdm(total=len(planned), initial=len(planned) - len(todo), desc="predict", unit="image") as bar:
            bad = predict_all(todo, together, segment, write, bar)
        manifest.write()
        if "coco" in ids:
            write_panoptic(out, manifest.entries(), ids["coco"], options.things)
    before = f" ({len(planned) - len(todo)} of them were done before)" if len(todo) < len(planned) else ""
    print(f"{len(planned) - len(bad)} images, {len(names)} classes, in {display_name(out)}{before}")
    if bad:
        raise SeveralMistakes(f"{len(bad)} of {len(planned)} images are left out", bad)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep `out` for this process inside the ``with`` block.

    Raises:
        ValueError: another process writes into it.
    """
    try:
        with FileLock(out / ".predict.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"--out {display_name(out)} is being written by another process") from error


def _why(error: ValueError) -> str:
    large = isinstance(error.__cause__, Image.DecompressionBombError)
    return f"{error}{' (--max-megapixels allows more)' if large else ''}"


def _ids(options: argparse.Namespace, classes: list[str]) -> dict[str, dict[str, int | None]]:
    """The ids of `classes` in each kind of pseudo-labels that is asked for.

    Raises:
        ValueError: there are none for them, or an option has no use.
    """
    kinds = [kind for kind in options.write if kind in IGNORED]
    for name, needed in (("min_confidence", "labels, cityscapes or coco"), ("ids", "the same"), ("things", "coco")):
        if getattr(options, name) and not ("coco" in kinds if name == "things" else kinds):
            raise ValueError(f"--{name.replace('_', '-')} needs {needed} in --write, got {','.join(options.write)}")
    if options.legend and "overlay" not in options.write:
        raise ValueError(f"--legend needs overlay in --write, got {','.join(options.write)}")
    unknown = [name for name in options.things if name not in classes]
    if unknown:
        raise ValueError(f"--things must be some of {', '.join(classes)}, got {unknown[0]}")
    own = None if options.ids is None else read_ids(options.ids)
    return {kind: class_ids(kind, classes, own) for kind in kinds}


def _settings(
    options: argparse.Namespace, config: Config, names: list[str], ids: dict[str, dict[str, int | None]]
) -> dict[str, Any]:
    """All that predictions depend on besides the photograph."""
    chosen = ("segmentation", "write", "legend", "scale", "min_confidence", "things")
    return {
        "checkpoint": sha256(options.checkpoint),
        **{name: getattr(options, name) for name in chosen},
        "data.size": config.data.size,
        "backbone.precision": config.backbone.precision,
        "evaluation": config.evaluation.model_dump(include={"size", "flip", "window", "stride", "crf"}),
        "classes": names,
        "ids": ids,
    }


def _about(options: argparse.Namespace, state: TrainingState) -> dict[str, Any]:
    """Where predictions came from, for the reader of a manifest."""
    versions = {"hpkernels": hpkernels.__version__, "PyTorch": torch.__version__, "Pillow": PIL.__version__}
    return {
        "checkpoint": display_name(options.checkpoint.absolute()),
        "step": state.step,
        "images": display_name(options.images.absolute()),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
