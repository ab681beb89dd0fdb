"""Problems that rounding errors are measured on: usual ones, and hard ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import hpkernels
from benchmarks.cases import DTYPES, Case, Inputs

USUAL = "usual"
SIZES = ((2, (5, 7)), (2, (16, 16)))  # images, and the patches of each
SEEDS = (0, 1)
_REFERENCES = 300  # of the pool that queries are ranked with

_CALLS = {
    "masked_topk": ("k=1", "k=8"),
    "hidden_positives": ("forward",),
    "multi_positive_contrastive": ("density=0.1",),
    "ghp_contrastive": ("forward+backward",),
    "local_propagation": ("weights", "apply+backward"),
    "contrastive": ("own", "both"),
}
OPS = tuple(_CALLS)
"""Those whose errors are measured."""
_VECTORS = {
    "masked_topk": ("query", "pool"),
    "hidden_positives": ("features",),
    "multi_positive_contrastive": ("z",),
    "ghp_contrastive": ("z", "z_mixed"),
    "local_propagation": ("query", "key", "code", "grad"),
    "contrastive": ("anchors", "keys"),
}


@dataclass(frozen=True)
class Regime:
    """How hard the numbers of a problem are.

    Attributes:
        length: of the rows; of tokens and codes, which are not normalised, the standard deviation.
        spread: rows are a common direction and noise of this size; None: noise alone.
        settings: in the place of those of the case.
        needs: the inputs of which a case must have one.
        change: of other inputs.
    """

    length: float = 1.0
    spread: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ("call",)
    change: Callable[[Inputs], Inputs] | None = None

    def inputs(self, case: Case, seed: int) -> Inputs:
        """The inputs of `case` with other vectors, in its dtype."""
        inputs, generator = case.inputs(), torch.Generator().manual_seed(seed)
        if case.op == "masked_topk":
            inputs["pool"] = inputs["pool"][:_REFERENCES]
        for name in _VECTORS[case.op]:
            if isinstance(inputs.get(name), Tensor):
                rows = self._rows(inputs[name].shape, generator, case.op != "local_propagation")
                inputs[name] = rows.to(inputs[name])
        if case.op == "hidden_positives":
            inputs["threshold"] = _quantiles(inputs)
        if self.settings:
            inputs["settings"] = inputs["settings"] | dict(self.settings)
        return inputs if self.change is None else self.change(inputs)

    def _rows(self, shape: torch.Size, generator: torch.Generator, unit: bool) -> Tensor:
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.spread is not None:
            rows = torch.randn(shape[-1], generator=generator, dtype=torch.float64) + self.spread * rows
        return self.length * (normalize(rows, dim=-1) if unit else rows)


def _products(inputs: Inputs) -> Tensor:
    features = inputs["features"].double()
    return features @ features.T


def _quantiles(inputs: Inputs) -> Tensor:
    """Thresholds (N,) that about one pair in twenty exceeds."""
    return _products(inputs).quantile(0.97, dim=1).float()


def _ties(inputs: Inputs) -> Inputs:
    """Thresholds that are the anchor's product with another, rounded."""
    products = _products(inputs)
    return inputs | {"threshold": products.roll(1, dims=1).diagonal().float()}


def _one_class(inputs: Inputs) -> Inputs:
    if "positives" in inputs:
        labels = torch.zeros(len(inputs["z"]), dtype=torch.long, device=inputs["z"].device)
        return inputs | {"positives": hpkernels.PositiveMask.from_labels(labels)}
    return inputs | {name: torch.zeros_like(inputs[name]) for name in ("labels", "key_labels")}


REGIMES = {
    USUAL: Regime(),
    "rows nearly equal": Regime(spread=0.01),
    "rows of length 30": Regime(length=30.0),
    # Not of tokens: attention that is equal up to rounding is decided by rounding.
    "rows of length 0.001": Regime(length=1e-3, needs=("pool", "features", "z", "anchors")),
    "temperature 0.005": Regime(settings=(("temperature", 0.005),), needs=("settings",)),
    "temperature 10": Regime(settings=(("temperature", 10.0),), needs=("settings",)),
    "all pairs positive": Regime(needs=("labels", "positives"), change=_one_class),
    "thresholds that are products": Regime(needs=("threshold",), change=_ties),
}


def problems(op: str, device: str, quick: bool = False) -> Iterator[tuple[Case, str, Inputs]]:
    """Each case of `op`, the name of its regime, and its inputs; `quick`: small ones of one seed."""
    for images, grid in SIZES[:1] if quick else SIZES:
        for call in _CALLS[op]:
            for dtype in DTYPES:
                case = Case(op, call, images, grid, device, dtype)
                given = case.inputs()
                for regime_name, regime in REGIMES.items():
                    if any(name in given for name in regime.needs):
                        for seed in SEEDS[:1] if quick else SEEDS:
                            yield case, regime_name, regime.inputs(case, seed)
