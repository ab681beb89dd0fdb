"""The batch that one explores in a report: its patches, their hidden positives, and all of it packed for the page.

`explore` takes a batch of a trained run, `packed` makes it small. ``report.js`` unpacks and draws it.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpkernels.ops.multi_positive_contrastive.relations import drawn_negatives
from training.backbones.base import Backbone
from training.data.batches import evenly_spread
from training.evaluation.precision import Found, discovered
from training.model import patch_classes
from training.run import Run
from training.schedule import seed_step
from training.segment import map_names, segment, to_classes, why_unusable

TITLES = {
    "baseline": "Baseline",
    "kmeans": "Codes, k-means",
    "cluster_probe": "Codes, cluster probe",
    "linear": "Codes, linear probe",
}
"""What a report calls each segmentation."""

_SEARCHED_PATCHES = 8192  # among the images of so many patches the batch is chosen
_PATCHES = 4096  # of the batch at most
_IMAGES = 12  # of the batch at most
_BYTES = 2_400_000  # of the packed batch at most, so that the page stays below 5 MB
_TOLERANCE = 0.005  # by which a similarity in the page may be wrong


@dataclass
class Explorer:
    """A batch of B images of H x W patches; N = B H W anchors, image by image."""

    images: Tensor  # (B,) their indices in the training images
    grid: tuple[int, int]  # (H, W)
    found: Mapping[str, Found]  # "agnostic" and "specific"
    symmetric: bool  # whether a positive of one anchor of a pair is one of the other
    negatives: Tensor  # (G, ceil(N / 32)) int32, R bit-packed; the row is the position of the anchor
    negative_rate: float
    seed: int  # of the draw of the negatives
    before: Tensor  # (B, 9, H, W), weights of local propagation before the threshold
    after: Tensor  # (B, 9, H, W), the weights that propagation uses
    labels: Tensor | None  # (N,) the class of most pixels of a patch, negative: none
    class_names: Sequence[str]
    clusters: Mapping[str, tuple[Tensor, Sequence[str]]]  # by title: the cluster (N,) of a patch, what each one is
    anchors: Sequence[tuple[int, str]]  # to begin with: which, and what it shows


@torch.no_grad()
def explore(run: Run, most_images: int = _IMAGES) -> Explorer | None:
    """A batch of training images that have positives in each other; None where one image has too many patches.

    The batch is chosen by task-agnostic positives alone, labels take no part. Positives are those of the trained run,
    with the dropout that the loss sees.

    Args:
        run: trained, with fitted clusterings if there are to be any.
        most_images: B at most.
    """
    bank, state, config = run.train_bank, run.state, run.config
    number = min(most_images, len(bank), _PATCHES // bank.anchors_per_image)
    if number == 0:
        return None
    seed_step(config.seed, run.steps)
    images = _together(run, number)
    found = discovered(run, images)
    features = bank.get(images)
    pixels = torch.stack([bank.data.image(index) for index in images.tolist()]).to(run.device).float() / 255
    labels = patch_classes(bank.labels(images), bank.grid, len(bank.data.classes))
    labels = None if labels is None else labels.flatten().cpu()
    usable = [name for name in TITLES if why_unusable(state, name) is None]
    clusters = segment(state, features.tokens, bank.grid, bank.grid, only=usable)
    anchors, seed = len(images) * bank.anchors_per_image, torch.tensor(config.seed, device=run.device)
    return Explorer(
        images,
        bank.grid,
        found,
        config.loss.symmetric,
        drawn_negatives(seed, bank.anchors_per_image, anchors, config.loss.negative_rate).cpu(),
        config.loss.negative_rate,
        config.seed,
        torch.cat([window_weights(run.backbone, image[None]) for image in pixels]),
        features.weights,
        labels,
        map_names(state, "linear", bank.data.classes),
        {TITLES[name]: (of.flatten().cpu(), _meanings(run, name)) for name, of in clusters.items()},
        telling_anchors(found, labels, bank.anchors_per_image),
    )


def window_weights(backbone: Backbone, image: Tensor) -> Tensor:
    """The weights (1, 9, H, W) of local propagation of an image (1, 3, h, w) in [0, 1], before small ones become 0.

    As `hpkernels.local_propagation_weights` with its defaults, but for the threshold.
    """
    grid = backbone.grid(tuple(image.shape[2:]))
    _, query, key = backbone(backbone.normalize(image))
    query, key = (tokens[0, :, backbone.prefix_tokens :].float() for tokens in (query, key))
    logits = (query @ key.mT).mean(dim=0) / query.shape[-1] ** 0.5
    low, high = logits.quantile(torch.tensor([0.1, 0.9], device=logits.device), dim=1)[:, :, None]
    attention = 28 * logits.clamp(low, high).softmax(dim=1)  # (G, G)
    numbers = torch.arange(1, len(attention) + 1, device=image.device, dtype=torch.float32).view(1, 1, *grid)
    cells = F.unfold(numbers, 3, padding=1)[0].T.long()  # (G, 9), 0 outside of the image
    inside = cells > 0
    weights = attention.gather(1, (cells - 1).clamp(min=0)).where(inside, 0) / inside.sum(dim=1, keepdim=True)
    return weights.T.reshape(1, 9, *grid)


def _together(run: Run, number: int) -> Tensor:
    """The indices of `number` training images that have many positives in each other, found greedily."""
    bank = run.train_bank
    searched = max(number, min(len(bank), _SEARCHED_PATCHES // bank.anchors_per_image))
    candidates = evenly_spread(len(bank), searched)
    positives = discovered(run, candidates)["agnostic"].positives.to_dense().cpu()
    patches = bank.anchors_per_image
    pairs = positives.view(searched, patches, searched, patches).sum(dim=(1, 3)).double()
    # The logarithm: images that all have some count more than two that have many.
    gain = (pairs + pairs.T).fill_diagonal_(0).log1p()
    chosen = [int(gain.sum(dim=1).argmax())]
    while len(chosen) < number:
        left = gain[chosen].sum(dim=0)
        left[chosen] = -1
        chosen.append(int(left.argmax()))
    return candidates[torch.tensor(chosen)]


def _meanings(run: Run, name: str) -> list[str]:
    """What each value of a segmentation is: its class, or its number where that is not known."""
    state = run.state
    values = torch.arange(state.classes if name == "linear" else state.clusters, device=state.device)
    names = map_names(state, name, run.train_bank.data.classes)
    return [names[value] for value in to_classes(state, {name: values})[name].tolist()]


def telling_anchors(found: Mapping[str, Found], labels: Tensor | None, patches: int) -> list[tuple[int, str]]:
    """Anchors that show what the method is about, what it gets wrong, and a typical one."""
    agnostic, specific = (found[kind].positives.to_dense().cpu() for kind in ("agnostic", "specific"))
    image = torch.arange(len(agnostic)) // patches
    elsewhere = image[:, None] != image
    same = elsewhere if labels is None else elsewhere & (labels[:, None] == labels) & (labels >= 0)
    right = "" if labels is None else "right "

    known = elsewhere if labels is None else elsewhere & (labels[:, None] >= 0) & (labels >= 0)

    def in_images(pairs: Tensor) -> Tensor:  # in how many images, and to break ties how many
        counts = pairs.unflatten(1, (-1, patches)).sum(dim=2)
        return (counts > 0).sum(dim=1).double() + counts.sum(dim=1) / pairs.shape[1]

    def telling(pairs: Tensor) -> Tensor:  # in many images, and not at the price of wrong ones
        precision = (pairs & same).sum(dim=1) / (pairs & known).sum(dim=1).clamp(min=1)
        return in_images(pairs & same) * precision**4

    by_both = torch.minimum(telling(agnostic), telling(specific))
    scores = {
        f"{right}in many images": by_both if by_both.any() else telling(agnostic),
        f"{right}by codes alone": in_images(specific & same & ~agnostic),
    }
    if labels is not None:
        scores["wrong in many images"] = in_images(agnostic & known & ~same)
    anchors = [(int(score.argmax()), title) for title, score in scores.items() if score.any()]
    count = (agnostic | specific).sum(dim=1)
    return [*anchors, (int(count.argsort(stable=True)[len(count) // 2]), "median number")]


def explored(run: Run) -> tuple[Tensor, dict[str, Any]] | None:
    """The images (B,) of `explore`, as many as keep the page small, and what `packed` makes of them."""
    most = _IMAGES
    while (explorer := explore(run, most)) is not None:
        data = packed(explorer)
        number, size = len(explorer.images), len(data["data"]) * 3 / 4
        if size <= _BYTES or number == 1:
            return explorer.images, data
        most = max(1, min(number - 1, int(number * _BYTES / size)))
    return None


def packed(explorer: Explorer) -> dict[str, Any]:
    """An explorer as plain values for JSON; arrays are compressed together, in ``data``.

    Each of ``arrays`` is its dtype, as JavaScript calls it, and where it begins in the decompressed bytes.
    Similarities are to be computed from the features and may be wrong by ``error``; all else is exact, but for 16-bit
    weights. Of symmetric positives, the pairs i < j are there.
    """
    arrays: dict[str, np.ndarray] = {
        "negatives": explorer.negatives.numpy().view(np.uint8),
        "before": _levels(explorer.before),
        "after": _levels(explorer.after),
    }
    kinds = {}
    for kind, found in explorer.found.items():
        pairs = found.positives.to_dense().cpu().numpy()
        pairs = np.triu(pairs) if explorer.symmetric else pairs
        arrays[f"{kind}.positives"] = np.packbits(pairs, axis=1, bitorder="little")
        arrays[f"{kind}.threshold"] = found.threshold.cpu().float().numpy()
        planes, step, error = _rounded(found.features.cpu().float())
        arrays[f"{kind}.features"] = planes
        kinds[kind] = {"step": step, "dims": planes.shape[1], "error": error}
    if explorer.labels is not None:
        arrays["labels"] = explorer.labels.numpy().astype(np.int16)
    for number, (of_patches, _) in enumerate(explorer.clusters.values()):
        arrays[f"clusters.{number}"] = of_patches.numpy().astype(np.int16)
    places, data = {}, b""
    for name, array in arrays.items():
        kind = {"uint8": "Uint8", "uint16": "Uint16", "int16": "Int16", "float32": "Float32"}[array.dtype.name]
        places[name] = [f"{kind}Array", len(data), array.size]
        data += array.tobytes() + bytes(-array.nbytes % 4)  # typed arrays begin at a multiple of their item
    return {
        "grid": explorer.grid,
        "number": len(explorer.images),
        "symmetric": explorer.symmetric,
        "negative_rate": explorer.negative_rate,
        "seed": explorer.seed,
        "kinds": kinds,
        "class_names": list(explorer.class_names),
        "clusterings": [[title, list(names)] for title, (_, names) in explorer.clusters.items()],
        "anchors": [list(anchor) for anchor in explorer.anchors],
        "greatest": {"before": float(explorer.before.max()), "after": float(explorer.after.max())},
        "arrays": places,
        "data": base64.b64encode(zlib.compress(data, 9)).decode("ascii"),
    }


def _levels(weights: Tensor) -> np.ndarray:
    """Weights (B, 9, H, W) in 65 535 steps of the greatest, patch by patch, (N, 9)."""
    rows = weights.flatten(2).mT.flatten(0, 1).cpu().double().numpy()
    return (65535 * rows / max(rows.max(), 1e-300)).round().astype(np.uint16)


def _rounded(features: Tensor) -> tuple[np.ndarray, float, float]:
    """Unit rows (N, D) in few bytes: their principal components, each rounded to a multiple of one step.

    Returns:
        the multiples, zigzag coded, as planes of low and of high bytes (2, d, N), component by component, for the sake
        of compression; the step; the greatest error of an inner product of two rows.
    """
    axes = torch.linalg.eigh((features.mT @ features).double()).eigenvectors.flip(1).float()
    turned, step = features @ axes, 0.008
    while True:
        multiples = (turned / step).round()
        error = max(
            float((multiples[rows] @ multiples.mT * step**2 - features[rows] @ features.mT).abs().max())
            for rows in torch.arange(len(features)).split(1024)
        )
        if error <= _TOLERANCE:
            break
        step *= 0.8
    kept = multiples.any(dim=0)
    whole = multiples[:, kept].T.int().numpy()
    zigzag = (whole << 1) ^ (whole >> 31)
    return np.stack([zigzag & 255, zigzag >> 8]).astype(np.uint8), step, error
