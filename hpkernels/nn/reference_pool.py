"""Reference vectors, which hidden positives are found by, as a part of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpkernels.ops import _checks as check


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
