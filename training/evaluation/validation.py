"""Looks at validation images while training: scores and pictures for TensorBoard, and the choice of the best state."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.data.batches import evenly_spread
from training.evaluate import evaluate
from training.report.figures import class_palette, colour_map, photograph
from training.report.page import Example
from training.results import examples
from training.run import Run
from training.runtime.parallel import is_first
from training.runtime.progress import Progress

_LOOKS = 10  # in a run, if `evaluation.every` does not say
_PICTURES = 4  # images that are shown
_GAP = 4  # pixels between pictures
_SEGMENTATIONS = ("cluster_probe", "linear")


def validate(run: Run, progress: Progress) -> None:
    """Look at validation images if that is due after the step that was just taken.

    Its time does not count as training, and no random number of a step depends on it. With `quirks.select_on_labels`
    all images are scored, and where the published code looks, the best state so far is kept in ``best.pt``.
    """
    config, step, last = run.config, run.state.step, run.state.step == run.steps
    every = max(1, run.steps // _LOOKS) if config.evaluation.every is None else config.evaluation.every
    look = every > 0 and (step % every == 0 or last)
    choosing = config.quirks.select_on_labels
    of_epoch = step % run.steps_per_epoch  # the published code counts in each epoch, and looks at its end
    choose = choosing and (of_epoch % config.checkpoint_every == 0 or last)
    if not ((look or choose) and is_first()):  # other ranks wait in the next step
        return
    with progress.outside_training("val/seconds", step - 1):
        images = evenly_spread(len(run.val_bank), len(run.val_bank) if choosing else config.evaluation.curve_images)
        how = config.evaluation.model_copy(update={"crf": "none"})  # which takes its time
        scores = evaluate(run.state, run.val_bank, only=_SEGMENTATIONS, how=how, images=images)
        if choose and scores is not None:
            keep_best(run, scores)
        if look:
            for example in examples(run, evenly_spread(len(run.val_bank), _PICTURES)):
                progress.writer.add_image(f"val/{example.name}", _side_by_side(example), step - 1, dataformats="HWC")
        figures = {
            f"val/{of}_{name}": score[of] for name, score in (scores or {}).items() for of in ("accuracy", "miou")
        }
        run.state.clusterings.forget()  # the matching is of this step alone
        progress.record(step - 1, figures)


def keep_best(run: Run, scores: dict[str, dict]) -> None:
    """Keep this state in ``best.pt`` if it is the best so far on the labelled images.

    As in the published code that is the sum of accuracy and mIoU of the cluster probe and of the linear probe.
    """
    total = sum(score["accuracy"] + score["miou"] for score in scores.values())
    if total >= run.state.best_score:  # of equals the later one
        run.state.best_score = total
        run.save(run.best_path)


def _side_by_side(example: Example) -> np.ndarray:
    """The photograph, the label and each segmentation, coloured as in the report: (h, w, 3) uint8."""
    palette = class_palette(1 + max(int(of_classes.max()) for of_classes in example.maps.values()))
    pictures = [photograph(example.image), *(colour_map(of_classes, palette) for of_classes in example.maps.values())]
    size = pictures[0].size
    parts = [np.asarray(picture.convert("RGB").resize(size, Image.Resampling.NEAREST)) for picture in pictures]
    gap = np.full((size[1], _GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in parts for part in (picture, gap)][:-1], axis=1)
