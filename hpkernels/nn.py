"""Thin modules over the ops, for models built from modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.ops import _checks as check
from hpkernels.ops.ghp_contrastive import ghp_contrastive
from hpkernels.ops.local_propagation import check_settings as check_propagation
from hpkernels.ops.local_propagation import local_propagation
from hpkernels.ops.multi_positive_contrastive.options import Variant, check_settings

__all__ = ["HiddenPositiveLoss", "LocalPropagation", "ReferencePool"]

_LOSS_SETTINGS = (
    "anchors_per_image",
    "temperature",
    "base_temperature",
    "negative_rate",
    "variant",
    "reweight",
    "keep_specific_only",
)
_PROPAGATION_SETTINGS = ("sigma", "quantiles", "window", "prefix_tokens")


class ReferencePool(nn.Module):
    """M L2-normalised reference vectors, saved with the model but not trained.

    Args:
        size: M.
        dim: D.

    Attributes:
        vectors: (size, dim) float32 buffer, zero until `fill`.
    """

    vectors: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        check.integer("ReferencePool", "size", size, 1)
        check.integer("ReferencePool", "dim", dim, 1)
        self.register_buffer("vectors", torch.zeros(size, dim))
        self._filled: tuple[int, int] | None = None  # which values were last seen to be there

    @torch.no_grad()
    def fill(self, vectors: Tensor) -> None:
        """Replace the pool by `vectors` (size, dim), which are L2-normalised here.

        Raises:
            TypeError, ValueError: another shape or dtype, or a vector that is not finite.
        """
        check.tensor("ReferencePool.fill", "vectors", vectors, tuple(self.vectors.shape))
        check.finite("ReferencePool.fill", "vectors", vectors)
        # Not in half precision, and divided by the greatest entry first, so that no square overflows or vanishes.
        (accumulate,) = check.accumulation(vectors.dtype)
        rows = vectors.to(self.vectors.device, accumulate)
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(accumulate).tiny)
        self.vectors.copy_(F.normalize(rows, dim=1))

    def forward(self) -> Tensor:
        """The vectors (size, dim).

        Raises:
            RuntimeError: the pool was never filled, neither by `fill` nor by loading a state. Under ``torch.compile``
                the vectors are NaN instead.
        """
        if torch.compiler.is_compiling():
            return self.vectors.where(self.vectors.any(), torch.nan)
        if self.vectors.is_meta:
            return self.vectors
        # Read once for each time that the vectors change, so that nobody waits for a GPU.
        state = None if self.vectors.is_inference() else (id(self.vectors), self.vectors._version)
        if state is None or state != self._filled:
            if not self.vectors.any():
                raise RuntimeError("ReferencePool: the pool must be filled before use (see `fill`), got zeros alone")
            self._filled = state
        return self.vectors

    def extra_repr(self) -> str:
        """The size, for ``print``."""
        return f"size={self.vectors.shape[0]}, dim={self.vectors.shape[1]}"


class HiddenPositiveLoss(nn.Module):
    """`hpkernels.ghp_contrastive` with its settings kept; `forward` takes the tensors of one step.

    The settings are checked when the module is made, and are its attributes.

    Args:
        anchors_per_image, temperature, base_temperature, negative_rate, variant, reweight, keep_specific_only,
            symmetric, backend: see `hpkernels.ghp_contrastive`.
    """

    def __init__(
        self,
        anchors_per_image: int,
        *,
        temperature: float = 0.6,
        base_temperature: float | None = 0.07,
        negative_rate: float = 0.02,
        variant: Variant = "joint",
        reweight: bool = True,
        keep_specific_only: bool = False,
        symmetric: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.anchors_per_image = anchors_per_image
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.negative_rate = negative_rate
        self.variant: Variant = variant
        self.reweight = reweight
        self.keep_specific_only = keep_specific_only
        self.symmetric = symmetric
        self.backend: Backend = backend
        check_settings("HiddenPositiveLoss", **_settings(self, _LOSS_SETTINGS))
        check.flag("HiddenPositiveLoss", "symmetric", symmetric)
        backends.check_name(backend, "HiddenPositiveLoss: `backend`")

    def forward(
        self,
        z: Tensor,
        features: Tensor,
        pool: Tensor,
        *,
        specific: Tensor | None = None,
        specific_pool: Tensor | None = None,
        specific_weight: float | Tensor = 0.0,
        z_mixed: Tensor | None = None,
        negatives: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """The 0-d loss; arguments as those of `hpkernels.ghp_contrastive`."""
        return ghp_contrastive(
            z,
            features,
            pool,
            specific=specific,
            specific_pool=specific_pool,
            specific_weight=specific_weight,
            z_mixed=z_mixed,
            negatives=negatives,
            seed=seed,
            symmetric=self.symmetric,
            backend=self.backend,
            **_settings(self, _LOSS_SETTINGS),
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return _text(_settings(self, (*_LOSS_SETTINGS, "symmetric", "backend")))


class LocalPropagation(nn.Module):
    """`hpkernels.local_propagation` with its settings kept: they are checked at once, and are attributes.

    Args:
        sigma, quantiles, window, prefix_tokens, backend: see `hpkernels.local_propagation`.
    """

    def __init__(
        self,
        *,
        sigma: float = 28.0,
        quantiles: tuple[float, float] = (0.1, 0.9),
        window: int = 3,
        prefix_tokens: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.sigma = sigma
        self.quantiles = quantiles
        self.window = window
        self.prefix_tokens = prefix_tokens
        self.backend: Backend = backend
        check_propagation("LocalPropagation", **_settings(self, _PROPAGATION_SETTINGS))
        backends.check_name(backend, "LocalPropagation: `backend`")

    def forward(self, code: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The mixed codes (B, D, H, W); arguments as those of `hpkernels.local_propagation`."""
        settings = _settings(self, _PROPAGATION_SETTINGS)
        return local_propagation(code, query, key, backend=self.backend, **settings)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return _text(_settings(self, (*_PROPAGATION_SETTINGS, "backend")))


def _settings(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
