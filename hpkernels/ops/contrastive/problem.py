"""What the backends of `contrastive` compute with: the problem, and the tiles it is cut into."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hpkernels.ops.contrastive.relations import Relation


class Problem(NamedTuple):
    """Vectors and relations, checked, in the form that all backends share.

    Attributes:
        anchors: (N, D), contiguous.
        keys: (K, D), contiguous; None: the anchors.
        positives, excluded: pairs; the weights of `positives` count.
        key_bias: (K,) in the accumulation's dtype, or None.
        scale: 1 / temperature, 0-d in the accumulation's dtype.
        own: anchor i is key i + own, and that pair takes no part; -1: the anchors are no keys.
        triangle: the relations are symmetric and the keys are the anchors, so that only pairs i < j are computed.
        inside, decoupled, exclude_positives: see ``reference.py``.
    """

    anchors: Tensor
    keys: Tensor | None
    positives: Relation
    excluded: Relation
    key_bias: Tensor | None
    scale: Tensor
    own: int
    triangle: bool
    inside: bool
    decoupled: bool
    exclude_positives: bool

    @property
    def all_keys(self) -> Tensor:
        """(K, D)."""
        return self.anchors if self.keys is None else self.keys


class Tile(NamedTuple):
    """Some anchors and some keys; both start at multiples of 32."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
