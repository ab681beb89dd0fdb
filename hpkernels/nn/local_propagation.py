"""Local propagation as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hpkernels import backends
from hpkernels.backends import Backend
from hpkernels.nn._settings import settings_of, text_of
from hpkernels.ops.local_propagation import check_settings, local_propagation

_SETTINGS = ("sigma", "quantiles", "window", "prefix_tokens")


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
        check_settings("LocalPropagation", **settings_of(self, _SETTINGS))
        backends.check_name(backend, "LocalPropagation: `backend`")

    def forward(self, code: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The mixed codes (B, D, H, W); arguments as those of `hpkernels.local_propagation`."""
        settings = settings_of(self, _SETTINGS)
        return local_propagation(code, query, key, backend=self.backend, **settings)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return text_of(settings_of(self, (*_SETTINGS, "backend")))
