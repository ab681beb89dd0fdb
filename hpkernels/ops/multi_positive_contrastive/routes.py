"""What the GPU backends of `multi_positive_contrastive` share: two routes, and the order of their kernels.

Both routes give the same result. "blocks": tiles of all pairs. "lists": tiles of the pairs of each image, which hold
most positives; across images the sampled negatives of each patch position, which its anchors share, and the listed
positives. The host rules lists out where they cannot pay. Where they may, the kernels of both routes are launched, and
a number on the device lets those of one do nothing: whether all that had to be listed fits. So no call waits for the
device. A part of the anchors, as ``registration.py`` describes it, goes through blocks: the gradients of sampled
columns are sums over the anchors of all parts.

`prepare` finds all that does not depend on z, once for both branches and for backward. `Kernels` says what a backend
has; `forward` and `backward` call it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hpkernels.cost import MOST_LISTED_DENSITY, lists_may_be_faster
from hpkernels.ops._bits import as_bits, transposed_bits

_MOST_LISTED = 2**31 - 1  # positives across images; up to N = 378 000 their density is what bounds them
_STAGED_BYTES = 2**31  # of gradients of sampled columns at a time
_STAGED_IMAGES = 64  # that one row of them may be the sum over
GREATEST_G = 2.0**14
"""What ``g_ij + g_ji`` may be, of the 65504 of float16: see `Kernels.scale_rows`."""
MOST_APART = 40.0
"""Of log-denominators that share a shift: exp of it is far from the ends of float32. See `Kernels.scale_rows`."""

Reach = tuple[Tensor, float]
"""x and c, for a divisor of 1 + c x."""


class Lists(NamedTuple):
    """Pairs across images: positives by their first anchor, sampled negatives by patch position.

    Rows are listed in whatever order they come, each ascending: row i is ``columns[ranges[i, 0] : ranges[i, 1]]``. The
    gradients of sampled columns are staged, `stage_columns` columns at a time. Column j has the places
    ``slot_ranges[j, 0]`` to ``slot_ranges[j, 1] - 1`` of its stage, in the order of the positions that have drawn it:
    entry e of `sampled_columns` has ``slots[e]``.
    """

    ranges: Tensor  # (N, 2) int64
    columns: Tensor  # (capacity,) int32
    sampled_ranges: Tensor  # (G, 2) int64
    sampled_columns: Tensor  # (sampled capacity,) int32
    slots: Tensor  # (sampled capacity,) int32
    slot_ranges: Tensor  # (N, 2) int64


class Pairs(NamedTuple):
    """What is known of the pairs before any logit.

    Attributes:
        positives, specific: A and S bit-packed, (R, words) int32; S or None.
        negatives: R, (G, words), or None if every other anchor is a negative.
        group: G.
        weights: (R, 4) float32, of each anchor the numbers of A_i and of S_i, and what a pair in A and one in S counts
            in the loss of an image, before the mean over images; 0 for what is not kept.
        state: (5 + stages,) int64: 1 if something did not fit into the lists; images with a kept anchor, for A, and for
            S; how much is listed of positives; of sampled negatives; and how many places of each stage are taken.
        lists: None where only blocks are computed.
        anchors: N; as many as R but for a part.
        first: the anchor of the first row.
        transposed: A and S by columns (N, words of the rows), in backward where they are not symmetric: bit
            ``first % 32 + r`` of row j says whether row r is a positive of anchor j. None for all anchors, whose A and
            S are that themselves.
    """

    positives: Tensor
    specific: Tensor | None
    negatives: Tensor | None
    group: int
    weights: Tensor
    state: Tensor
    lists: Lists | None
    anchors: int
    first: int = 0
    transposed: tuple[Tensor, Tensor | None] | None = None

    @property
    def required_lists(self) -> Lists:
        """`lists`, for kernels that run only where there are some."""
        assert self.lists is not None
        return self.lists

    @property
    def stages(self) -> int:
        """How many times some of the sampled columns are staged."""
        return len(self.state) - 5

    @property
    def stage_columns(self) -> int:
        """How many columns are staged at a time, a multiple of 32."""
        return 32 * math.ceil(self.anchors / 32 / self.stages)

    def columns_of(self, stage: int | None) -> tuple[int, int]:
        """The columns [first, last) of a stage; all of them for None."""
        if stage is None:
            return 0, self.anchors
        return stage * self.stage_columns, min((stage + 1) * self.stage_columns, self.anchors)

    def stage_capacity(self, rate: float) -> int:
        """The places of a stage."""
        return sampled_capacity(self.group, self.stage_columns, rate)


class Kernels(Protocol):
    """What a backend has. All tensors are contiguous; rows of z start at multiples of 16 bytes, padded by zeros.

    Kernels of lists do nothing if ``pairs.state[0]``; of those of blocks of all pairs only then, if there are lists.
    """

    def aligned_rows(self, matrix: Tensor) -> Tensor:
        """A matrix as the kernels read it."""

    def draw(self, seed: Tensor, rows: int, columns: int, rate: float) -> Tensor:
        """The drawn negatives R bit-packed, (rows, words) int32."""

    def list_sampled(self, pairs: Pairs, slot_capacity: int) -> None:
        """List the set bits of R, with their slots."""

    def count_and_list(self, pairs: Pairs, counts: Tensor) -> None:
        """The numbers of A_i, S_i and Den_i, counts (R, 3) int32; if there are lists, those of A or S across images."""

    def weigh(
        self,
        pairs: Pairs,
        counts: Tensor,
        specific_weight: Tensor,
        variant: str,
        reweight: bool,
        keep_specific_only: bool,
    ) -> None:
        """Fill ``pairs.weights`` and count the images in ``pairs.state``: see ``reference.anchor_coefficients``."""

    def greatest_square(self, z: Tensor) -> Tensor:
        """The greatest |z_i|^2, 0-d float32: the greatest finite number if it is above that, NaN if z is not finite."""

    def blocks_parts(self, z: Tensor, pairs: Pairs, within: bool) -> int:
        """In how many parts `blocks_forward` cuts the columns."""

    def blocks_forward(
        self, z: Tensor, pairs: Pairs, within: bool, scale: float, square: Tensor, parts: Tensor
    ) -> None:
        """parts (parts, 3, R) float32, over tiles of all pairs, or of those of each image.

        log sum over Den_i of exp l, l = scale <z_i, z_j>; the sums of l over A_i and over S_i. No l is above
        ``scale * square``.
        """

    def sampled_forward(self, z: Tensor, pairs: Pairs, scale: float, log_sums: Tensor) -> None:
        """log_sums (N,): log sum of exp l over the sampled negatives in other images."""

    def rows_forward(
        self,
        z: Tensor,
        pairs: Pairs,
        scale: float,
        loss_scale: float,
        square: Tensor,
        parts: Tensor,
        within: Tensor | None,
        log_sums: Tensor | None,
        rows: Tensor,
    ) -> Tensor:
        """Add the listed positives to the parts of the route that is taken, and combine them.

        z are the anchors of the rows. rows (R, 4): log-denominator, 0 if Den is empty; push, pull and specific pull,
        which are those of ``weights`` times ``loss_scale / max(images, 1)``. Returns parts of the loss, float32, of
        which one is NaN if `square` is.
        """

    def scale_rows(
        self, rows: Tensor, grad_losses: Tensor, temperature: float, reach: Reach | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (branches, N, 4) as backward takes them: numbers (branches, N, 4), shifts and factors (branches,).

        The kernels round ``g_ij + g_ji`` to the dtype of z and multiply it with z. In float16 the coefficients of a
        large batch, or of an image with many anchors beside one with few, would be too small for that. So they are
        divided by the greatest of all over GREATEST_G / 4: each of the two is a push times a probability less at most
        two pulls; and by what sums of their products with z need, if they are kept in float16: see `_reach`. A gradient
        is multiplied by its factor in the end: the divisor times grad_loss / temperature.

        ``push_i exp(l - logDen_i)`` is ``f_i exp(l - r_i)``: numbers are (r_i, f_i, pull_i, specific_i). Where the
        log-denominators of a branch are within MOST_APART of one another, r_i is the greatest of them for all i, the
        shift: then g_ij and g_ji take one exponential. Else r_i is logDen_i, and the shift NaN.
        """

    def blocks_backward(
        self,
        z: Tensor,
        pairs: Pairs,
        within: bool,
        symmetric: bool,
        scale: float,
        numbers: Tensor,
        shift: Tensor,
        factor: Tensor,
        sums: Tensor,
    ) -> None:
        """sums_i = sum over the pairs of (g_ij + g_ji) z_j: within images (N, D) float32.

        Of all pairs (R, D) times `factor`, in the dtype of z, of as many features as `sums` has.
        """

    def staged_rows(self, z: Tensor, group: int) -> int:
        """How many rows `sampled_backward` stages at each place."""

    def sampled_backward(
        self, z: Tensor, pairs: Pairs, stage: int, scale: float, numbers: Tensor, sums: Tensor, staged: Tensor
    ) -> None:
        """Of the sampled negatives in other images that are columns of a stage: sums_i += sum of g_ij z_j.

        The gradients of the columns, sums of g_ij z_i, go to `staged` (places, rows, D) in the dtype of z.
        """

    def rows_backward(
        self,
        z: Tensor,
        pairs: Pairs,
        stage: int | None,
        scale: float,
        numbers: Tensor,
        sums: Tensor,
        staged: Tensor | None,
        factor: Tensor | None,
        out: Tensor,
    ) -> None:
        """Add what is staged to the sums of the columns of a stage.

        With `factor` also the listed positives, and `out` gets the sums times it, in the dtype of z, as many features
        as it has; else `out` is `sums`. Without a stage these are all anchors, and nothing is staged.
        """


def empty(
    positives: Tensor,
    negatives: Tensor | None,
    group: int,
    rate: float,
    symmetric: bool,
    row_bytes: int,
    anchors: int | None = None,
) -> list[Tensor]:
    """The tensors that `prepare` fills, for rows of z that have `row_bytes`."""
    rows, words = positives.shape
    anchors = rows if anchors is None else anchors
    drawn = group if negatives is None and rate < 1 else 0
    found = [positives.new_empty((drawn, words)), positives.new_empty((rows, 4), dtype=torch.float32)]
    if not (rows == anchors and symmetric and negatives is None and lists_may_be_faster(anchors, group, rate)):
        return [*found, positives.new_empty(5, dtype=torch.int64)]
    sampled = sampled_capacity(group, anchors, rate)
    stages = math.ceil(sampled * row_bytes * math.ceil(anchors / group / _STAGED_IMAGES) / _STAGED_BYTES)
    stages = math.ceil(words / math.ceil(words / stages))  # of whole words, and none of no columns
    lists = Lists(
        ranges=positives.new_empty((anchors, 2), dtype=torch.int64),
        columns=positives.new_empty(capacity(anchors)),
        sampled_ranges=positives.new_empty((group, 2), dtype=torch.int64),
        sampled_columns=positives.new_empty(sampled),
        slots=positives.new_empty(sampled),
        slot_ranges=positives.new_empty((anchors, 2), dtype=torch.int64),
    )
    return [*found, positives.new_empty(5 + stages, dtype=torch.int64), *lists]


def capacity(anchors: int) -> int:
    """How many positives across images are listed: half of the bytes of a packed mask."""
    return min(math.ceil(MOST_LISTED_DENSITY * anchors**2), _MOST_LISTED)


def sampled_capacity(positions: int, anchors: int, rate: float) -> int:
    """What the negatives drawn at some positions take, ten standard deviations above their expected number."""
    expected = rate * positions * anchors
    # Not math.sqrt, which would make a symbolic number of anchors a constant of a compiled graph.
    deviation: float = expected**0.5
    return math.ceil(min(expected + 10 * deviation + 64, positions * anchors))


def prepare(
    kernels: Kernels,
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    group: int,
    rate: float,
    variant: str,
    reweight: bool,
    keep_specific_only: bool,
    symmetric: bool,
    row_bytes: int,
    anchors: int | None = None,
    first: int = 0,
) -> list[Tensor]:
    """All that does not depend on z, which has rows of `row_bytes`: what `_pairs` takes."""
    anchors = len(positives) if anchors is None else anchors
    prepared = empty(positives, negatives, group, rate, symmetric, row_bytes, anchors)
    if len(prepared[0]):
        prepared[0] = kernels.draw(seed, group, anchors, rate)
    pairs = _pairs(prepared, positives, specific, negatives, group, anchors, first)
    pairs.state.zero_()
    if pairs.lists is not None:
        kernels.list_sampled(pairs, pairs.stage_capacity(rate))
    counts = positives.new_empty((len(positives), 3))
    kernels.count_and_list(pairs, counts)
    kernels.weigh(pairs, counts, specific_weight, variant, reweight, keep_specific_only)
    return prepared


def _pairs(
    prepared: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    negatives: Tensor | None,
    group: int,
    anchors: int | None = None,
    first: int = 0,
) -> Pairs:
    drawn, weights, state, *lists = prepared
    negatives = as_bits(negatives) if negatives is not None else drawn if len(drawn) else None
    specific = None if specific is None else specific.contiguous()
    found = weights, state, Lists(*lists) if lists else None
    anchors = len(positives) if anchors is None else anchors
    return Pairs(positives.contiguous(), specific, negatives, group, *found, anchors, first)


def images_of(prepared: list[Tensor]) -> Tensor:
    """How many images have a kept anchor, in the A and in the S term: (2,) int64."""
    return prepared[2][1:3]


def forward(
    kernels: Kernels,
    branches: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    specific_weight: Tensor,
    negatives: Tensor | None,
    seed: Tensor,
    prepared: list[Tensor],
    group: int,
    temperature: float,
    scale: float,
    *_: object,
    images: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The losses (branches,) and row statistics (branches, R, 4), for bit-packed positives (R, ceil(N / 32)).

    What else the op is given, `prepare` has taken into account. `images` are those of all parts.
    """
    pairs = _pairs(prepared, positives, specific, negatives, group, len(branches[0]), first)
    if images is not None:
        pairs = pairs._replace(state=torch.cat((pairs.state[:1], images, pairs.state[3:])))
    rows = pairs.weights.new_empty((len(branches), *pairs.weights.shape))
    parts_of_losses = []
    for branch, statistics in zip(branches, rows, strict=True):
        z = kernels.aligned_rows(branch)
        square = kernels.greatest_square(z)
        parts = _blocks_forward(kernels, z, pairs, False, 1 / temperature, square)
        within = log_sums = None
        if pairs.lists is not None:
            within = _blocks_forward(kernels, z, pairs, True, 1 / temperature, square)
            log_sums = parts.new_empty(len(z))
            kernels.sampled_forward(z, pairs, 1 / temperature, log_sums)
        of_route = (parts, within, log_sums)
        own = z[first : first + len(positives)]
        of_branch = kernels.rows_forward(own, pairs, 1 / temperature, scale, square, *of_route, statistics)
        parts_of_losses.append(of_branch)
    losses = torch.stack(parts_of_losses).sum(dim=1)
    return losses, rows.add_(losses[:, None, None], alpha=0)  # a loss that is not finite has a gradient of NaN


def _blocks_forward(kernels: Kernels, z: Tensor, pairs: Pairs, within: bool, scale: float, square: Tensor) -> Tensor:
    parts = z.new_empty((kernels.blocks_parts(z, pairs, within), 3, len(pairs.positives)), dtype=torch.float32)
    kernels.blocks_forward(z, pairs, within, scale, square, parts)
    return parts


def backward(
    kernels: Kernels,
    grad_losses: Tensor,
    branches: list[Tensor],
    positives: Tensor,
    specific: Tensor | None,
    negatives: Tensor | None,
    seed: Tensor,
    prepared: list[Tensor],
    rows: Tensor,
    group: int,
    temperature: float,
    rate: float,
    symmetric: bool,
    transposed: tuple[Tensor, Tensor | None] | None = None,
    first: int = 0,
) -> list[Tensor]:
    """The gradients of the branches from their row statistics; logits are computed again.

    Which rows and statistics are given, and which gradients returned, is as in the reference.
    """
    pairs = _pairs(prepared, positives, specific, negatives, group, len(branches[0]), first)
    if transposed is not None:
        of_a, of_s = transposed
        by_columns = _by_columns(of_a, pairs.anchors, first)
        pairs = pairs._replace(
            transposed=(by_columns, None if of_s is None else _by_columns(of_s, pairs.anchors, first))
        )
    scale, vectors = 1 / temperature, [kernels.aligned_rows(z) for z in branches]
    grads = [z.new_empty((len(positives), z.shape[1])) for z in branches]
    if pairs.lists is not None:  # what one branch needs, the next can take over
        places = (pairs.stage_capacity(rate), kernels.staged_rows(vectors[0], group))
        staged = vectors[0].new_empty((*places, vectors[0].shape[1]))
        sums = torch.empty_like(vectors[0], dtype=torch.float32)
    reach = None
    if pairs.lists is not None and branches[0].dtype == torch.float16:
        reach = _reach(branches, len(rows[0]) / group / kernels.staged_rows(vectors[0], group))
    # The gradient of a sum is one number, expanded; kernels read as many as there are branches.
    scaled = kernels.scale_rows(rows, grad_losses.contiguous(), temperature, reach)
    of_branches = zip(vectors, grads, *scaled, strict=True)
    for z, grad, numbers, shift, factor in of_branches:
        kernels.blocks_backward(z, pairs, False, symmetric, scale, numbers, shift, factor, grad)
        if pairs.lists is None:
            continue
        kernels.blocks_backward(z, pairs, True, symmetric, scale, numbers, shift, factor, sums)
        for stage in range(pairs.stages):
            kernels.sampled_backward(z, pairs, stage, scale, numbers, sums, staged)
            # With one stage the sums are complete then, and all is done in one.
            last = (factor, grad) if pairs.stages == 1 else (None, sums)
            kernels.rows_backward(z, pairs, stage, scale, numbers, sums, staged, *last)
        if pairs.stages > 1:
            kernels.rows_backward(z, pairs, None, scale, numbers, sums, None, factor, grad)
    return grads


def _by_columns(rows: Tensor, anchors: int, first: int) -> Tensor:
    """Packed rows (R, words) of anchors from `first` on as columns; these begin where a word of all anchors does."""
    before = rows.new_zeros((first % 32, rows.shape[1]))
    columns: Tensor = transposed_bits(torch.cat((before, rows)), anchors)
    return columns


def _reach(branches: list[Tensor], images: float) -> Reach:
    """So that sums of `images` products of z with g, which is at most a quarter of GREATEST_G, stay below 2^15."""
    longest = [torch.linalg.vector_norm(z.detach(), torch.inf, dtype=torch.float32) for z in branches]
    return functools.reduce(torch.maximum, longest), images * GREATEST_G / 4 / 2**15
