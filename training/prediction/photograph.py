"""One photograph, of any size, to a class map of its size: as a function, which `training.predict` calls as well."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from training.backbones import Backbone
from training.config import Config
from training.data import image_size, resized
from training.data.photographs import read_rgb
from training.evaluate import HEADLINE
from training.evaluation.crf import refined
from training.features.inference import Windows, blended_strips, features_of, fitted_size, precision_of
from training.model import to_map, to_rows
from training.run import scoring_windows
from training.segment import check_usable, class_table, decided, feature_maps, log_probabilities, score_strips
from training.state import TrainingState

_CRF_NUMBERS = 2**27  # probabilities that a CRF is given at most: it takes all of an image at once


class Prediction(NamedTuple):
    """What the pixels of a photograph are."""

    classes: Tensor  # (h, w) uint8, on the CPU; `training.segment.map_names` names the values
    confidence: Tensor  # (h, w) uint8, on the CPU: the probability of what `classes` says, in 255ths


def predict(
    config: Config,
    backbone: Backbone,
    state: TrainingState,
    photograph: Path | str | Image.Image | Tensor,
    kind: str = HEADLINE,
    *,
    scale: float | None = None,
    batch: int = 8,
) -> Prediction:
    """Segment one photograph, at its own size.

    Args:
        config: with `backbone` and `state` from `training.run.open_trained`.
        backbone: frozen.
        state: fitted.
        photograph: a file, a picture, or a tensor (3, h, w) uint8.
        kind: of `SEGMENTATIONS`.
        scale: how large the backbone sees it, as a multiple of its size; None: as large as the images that are scored.
        batch: how many windows go through the backbone at a time.

    Raises:
        TypeError: `photograph` is something else.
        ValueError: the file cannot be read, the state cannot give this segmentation, or the photograph is too large for
            a CRF.
    """
    if isinstance(photograph, Tensor) and photograph.dtype == torch.uint8 and photograph.shape[:-2] == (3,):
        photograph = Image.fromarray(photograph.permute(1, 2, 0).cpu().contiguous().numpy())
    elif isinstance(photograph, Path | str):
        photograph = read_rgb(Path(photograph))
    elif not isinstance(photograph, Image.Image):
        is_tensor = isinstance(photograph, Tensor)
        got = f"{photograph.dtype} of shape {tuple(photograph.shape)}" if is_tensor else type(photograph).__name__
        raise TypeError(f"predict: `photograph` must be a file, a picture or a tensor (3, h, w) uint8, got {got}")
    check_usable(state, kind)
    return predict_together(config, backbone, state, [photograph.convert("RGB")], kind, scale, batch)[0]


@torch.no_grad()
def predict_together(
    config: Config,
    backbone: Backbone,
    state: TrainingState,
    photographs: Sequence[Image.Image],
    kind: str,
    scale: float | None,
    batch: int,
) -> list[Prediction]:
    """Segment RGB photographs together; more than one only where there are no windows, so that all get one size."""
    if not photographs:
        return []
    how, device = config.evaluation, state.device
    windows, precision = windows_of(config, backbone, scale), precision_of(config.backbone.precision, device)
    full = [(photograph.height, photograph.width) for photograph in photographs]
    size = fitted_size(full[0], image_size(config, "val"), windows, backbone.patch_size, scale)
    images = torch.stack([resized(photograph, size) for photograph in photographs])

    def tokens(pixels: Tensor) -> Tensor:
        of = features_of(backbone, pixels.to(device).float() / 255, weights=False, precision=precision).tokens
        if precision != torch.float32 and not of.isfinite().all():
            raise ValueError("config: `backbone.precision` must be bfloat16 or float32, as features are beyond float16")
        return to_map(of, backbone.grid(tuple(pixels.shape[2:])))

    def strips(pixels: Tensor) -> Iterator[Tensor]:
        return blended_strips(pixels, windows, backbone.patch_size, tokens, batch)

    values, grid = class_table(state, kind).to(torch.uint8), backbone.grid(size)
    if how.crf == "none":
        turned = map(to_rows, strips(images.flip(3))) if how.flip else itertools.repeat(None)
        maps = (
            feature_maps(state, to_rows(strip), tuple(strip.shape[2:]), mirrored)
            for strip, mirrored in zip(strips(images), turned, strict=False)
        )
        scores: Iterable[Tensor] = score_strips(state, kind, maps)
    else:  # at the size that the backbone saw: at that of the photograph it would take all memory
        if len(values) * math.prod(size) > _CRF_NUMBERS:
            raise ValueError(
                f"a CRF takes all of an image at once, so with {len(values)} classes it must have at most"
                f" {_CRF_NUMBERS // len(values):,} pixels, got {size[1]} x {size[0]}: give a smaller --scale"
            )
        rows, mirrored = (
            to_rows(torch.cat(list(strips(of)), dim=2)) if of is not None else None
            for of in (images, images.flip(3) if how.flip else None)
        )
        logs = log_probabilities(state, rows, grid, size, kind, mirrored)
        scores, kind, grid = [refined(how.crf, images.to(device), {kind: logs})[kind]], "probabilities", size
    each = [scores] if len(full) == 1 else ([part] for part in torch.cat(list(scores), dim=2).split(1))
    return [
        Prediction(*(result.cpu() for result in decided(of, kind, values, grid, own)))
        for of, own in zip(each, full, strict=True)
    ]


def windows_of(config: Config, backbone: Backbone, scale: float | None) -> Windows | None:
    """The windows that photographs are cut into; with a `scale` there always are some.

    Raises:
        ValueError: the patches of the backbone do not fit them.
    """
    if scale is not None and config.evaluation.window is None:
        evaluation = config.evaluation.model_copy(update={"window": min(image_size(config, "val"))})
        config = config.model_copy(update={"evaluation": evaluation})
    return scoring_windows(config, backbone)
