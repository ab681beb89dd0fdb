"""What is measured: every op at its sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import hpkernels
from benchmarks.inputs import END_TO_END, Inputs, make

LARGEST_VERIFIED = 1568  # anchors: more are verified by the same case with this many
IN_IMAGES = ("sampled", "rate=", "density=")
"""The calls of `multi_positive_contrastive` whose anchors are those of images, with their own negatives."""


@dataclass(frozen=True)
class Case:
    """One call of an op on a batch of images.

    Attributes:
        op: stem of the op.
        call: what is called: a part of the op, or one of its settings.
        images: B.
        grid: (H, W), the patches of an image.
        device: "cpu" or "cuda".
        dtype: of the rows and codes; thresholds and weights are float32.
        memory_limit: GiB that a call may take beyond its inputs; None: what there is.
    """

    op: str
    call: str
    images: int
    grid: tuple[int, int] = (28, 28)
    device: str = "cpu"
    dtype: str = "float32"
    memory_limit: float | None = None

    @property
    def anchors(self) -> int:
        """N = B * H * W."""
        return self.images * self.grid[0] * self.grid[1]

    @property
    def tolerance(self) -> float:
        """By how much results may differ beyond rounding, in units of the greatest row.

        The features of a whole step are not exact, so a pair at the threshold may be found or not.
        """
        return 0.01 if self.call == END_TO_END else 0.0

    def __str__(self) -> str:
        name = f"{self.op} {self.call} N={self.anchors}"
        return name if (self.device, self.dtype) == ("cpu", "float32") else f"{name} {self.dtype} {self.device}"

    def verified(self) -> Case:
        """The same case at the size at which its results are compared with the reference."""
        return replace(
            self,
            images=min(self.images, max(1, LARGEST_VERIFIED // (self.grid[0] * self.grid[1]))),
            memory_limit=None,
        )

    def inputs(self) -> Inputs:
        """The tensors and settings of the call, the same every time and, up to rounding, on every device.

        Those on a GPU, which take longer to make than to use, are kept until others are made.
        """
        return dict(_kept(self)) if self.device == "cuda" else self._make()

    def _make(self) -> Inputs:
        made = {name: self._placed(name, value) for name, value in make(self).items()}
        return {"call": self.call} | made

    def _placed(self, name: str, value: Any) -> Any:
        """An input on the device and, if it is of those that have it, in the dtype of the case."""
        dtype = torch.float32 if name in _FLOAT32 else getattr(torch, self.dtype)
        if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.is_floating_point()):
            return value.to(self.device, dtype)
        return value.to(self.device) if isinstance(value, Tensor | hpkernels.PositiveMask) else value


DTYPES = ("float32", "float16", "bfloat16")
"""Of the inputs that `Case.dtype` can say."""
_FLOAT32 = ("threshold", "weights", "attention")
_FULL = {
    "masked_topk": {"k=1": (4, 16, 64), "k=8": (16, 64), "k=32": (16, 64)},
    "hidden_positives": {"forward": (1, 4, 16)},
    "multi_positive_contrastive": {"labels": (1, 4), "sampled": (1, 4, 16)},
    "local_propagation": {
        "weights": (4, 16),
        "apply": (4, 16),
        "apply+backward": (4, 16),
        "whole+backward": (1, 4),
    },
    "contrastive": {"keys": (1, 4, 8), "own": (1, 4, 8, 98), "queue": (1,), "both": (1, 4, 8), "clip": (1, 4)},
    "ghp_contrastive": {"forward+backward": (1, 4, 8, 16, 64)},
    "training_step": {"forward+backward": (1, 4), END_TO_END: (4,)},
}
_ONLY_ON_GPU = {
    "multi_positive_contrastive": ("rate=0.2", "rate=1", "density=0.001", "density=0.1"),
    "contrastive": ("dim=768",),
    "ghp_contrastive": ("rate=1",),
}
"""Negative rates other than the published 0.02; the share of pairs that are positives, by random labels; another D."""
_SIZES_ON_GPU = (16, 64)
_QUICK_IMAGES = {"masked_topk": 4, "local_propagation": 4}
_END_TO_END_DTYPES = {"cpu": "float32", "cuda": "float16"}
"""What the training loop computes in on a device."""

OPS = tuple(_FULL)
"""What can be asked for by ``--op``."""


def cases(
    op: str, quick: bool = False, device: str = "cpu", dtype: str = "float32", images: Iterable[int] | None = None
) -> list[Case]:
    """The cases of `op` on a device, small before large: with `images` those sizes, with `quick` one small case a call.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known are {', '.join(OPS)}")
    sizes = _FULL[op]
    if device == "cuda":
        sizes = dict.fromkeys((*sizes, *_ONLY_ON_GPU.get(op, ())), _SIZES_ON_GPU)
    if images is not None or quick:
        sizes = dict.fromkeys(sizes, tuple(images or (_QUICK_IMAGES.get(op, 1),)))
    return [
        Case(op, call, count, _grid(op, call, device), device, dtype)
        for call, counts in sizes.items()
        for count in counts
        if call != END_TO_END or dtype == _END_TO_END_DTYPES[device]
    ]


def _grid(op: str, call: str, device: str) -> tuple[int, int]:
    if op == "contrastive":  # sizes of batches, which are powers of two
        return 32, 32
    return (14, 14) if call == END_TO_END and device == "cpu" else Case.grid


@lru_cache(maxsize=1)
def _kept(case: Case) -> Inputs:
    return case._make()
