"""Launches of the Triton kernels: recording those of a call, and the calls that launch every kernel.

On the meta device the calls take no memory and compute nothing, so what they launch at the sizes of the paper can be
recorded, and compiled, on a machine without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hpkernels import backends
from hpkernels.ops import _triton
from hpkernels.ops._bits import words_per_row
from hpkernels.ops.contrastive import chunked
from hpkernels.ops.contrastive.problem import Problem, Tile
from hpkernels.ops.contrastive.relations import Relation

NEGATIVE_RATE, TEMPERATURE = 0.02, 0.6


@dataclass(frozen=True)
class Launch:
    """One launch: ``kernel[grid](*arguments, **constants)``, its constants with ``num_warps`` and ``num_stages``.

    `size` is the element size, or "any", of the entry of the configuration table that it was configured by.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    size: str

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the time of a launch depends on: shapes and strides, sizes and constants."""
        arguments = ((a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in self.arguments)
        return self.name, self.grid, *arguments, *sorted(self.constants.items())

    def make(self) -> None:
        """Make the launch, again."""
        _triton.launch(self.kernel, self.grid, *self.arguments, **self.constants)


@contextmanager
def recorded(architecture: str | None = None, *, run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches that this thread makes inside the ``with`` block; they are made only with `run`.

    Args:
        architecture: the column of the configuration tables to launch with; None: that of each tensor's device.
        run: make the launches as well.
    """
    recorder = _Recorder(architecture, run)
    token = _triton.recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _triton.recorder.reset(token)


class _Recorder:
    """Collects launches, for `recorded`."""

    def __init__(self, architecture: str | None, run: bool):
        self.architecture, self.run = architecture, run
        self.launches: list[Launch] = []
        self._sizes: dict[str, str] = {}

    def configured(self, kernel: Any, like: Tensor) -> None:
        size = str(like.element_size())
        known = _triton.table()[kernel.__name__][_triton.architecture(like.device)]
        self._sizes[kernel.__name__] = size if size in known else "any"

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, tuple(grid), arguments, constants, self._sizes[kernel.__name__]))


def compile_ahead(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile all that `launches` need on a GPU, several kernels at a time, so that no launch waits for its own.

    Each is specialised as when it is launched, by the arguments, which may be on the meta device. This process keeps
    what is compiled, and so does Triton's cache on disk.

    Raises:
        Exception: that of the first kernel that does not compile.
    """
    with (
        torch.cuda.device(device),
        ThreadPoolExecutor(thread_name_prefix="compile") as threads,
        _triton.triton.AsyncCompileMode(threads),  # type: ignore[attr-defined]  # None where there is no Triton
    ):
        for launch in launches:
            launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)


@dataclass(frozen=True)
class Sizes:
    """B, (H, W), D, Df and M of a training step, heads and features of each of the attention; as in the paper.

    A row of logits of `large_grid` takes several warps.
    """

    images: int = 64
    grid: tuple[int, int] = (28, 28)
    dim: int = 512
    feature_dim: int = 384
    pool_size: int = 2048
    heads: int = 6
    head_dim: int = 64
    large_grid: tuple[int, int] = (64, 64)

    @property
    def group(self) -> int:
        """G = H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def anchors(self) -> int:
        """N = B * G."""
        return self.images * self.group


Calls = dict[str, Callable[[], Any]]


def kernel_calls(
    op: str, dtype: torch.dtype, device: torch.device | str, sizes: Sizes | None = None, backend: str = "triton"
) -> Calls:
    """Calls of the functions of a backend of the op that between them launch each of its kernels in each variant.

    Args:
        op: the name under which the op's backends are registered.
        dtype: of the inputs.
        device: of the inputs; "meta" only to record.
        sizes: of the inputs; None: those of the paper.
        backend: "triton" or "cuda".

    Returns:
        Functions without arguments by a name that says what is called.
    """
    make = Inputs(dtype, torch.device(device), backend)
    return _CALLS[op](backends.implementation(op, backend), make, sizes or Sizes())


class Inputs:
    """Random tensors of one dtype on one device, the same each time.

    They are of multiples of 2^-8, so that inner products are exact, in whatever order summed.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, backend: str = "reference"):
        self.dtype, self.device, self.backend = dtype, device, backend
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, deviation: float = 1.0) -> Tensor:
        """Normally distributed."""
        numbers = deviation * torch.randn(shape, generator=self._generator, device=self.device)
        return ((numbers * 256).round() / 256).to(self.dtype)

    def unit_rows(self, count: int, dim: int) -> Tensor:
        """About L2-normalised rows."""
        return self.normal(count, dim, deviation=1 / math.sqrt(dim))

    def integers(self, below: int, *shape: int) -> Tensor:
        """From 0 to `below` - 1, int64."""
        return torch.randint(below, shape, generator=self._generator, device=self.device)

    def threshold(self, count: int, dim: int) -> Tensor:
        """What one of a thousand products of `unit_rows` exceeds: 3.1 of their standard deviations."""
        return torch.full((count,), 3.1 / math.sqrt(dim), device=self.device)

    def bernoulli(self, rate: float, *shape: int) -> Tensor:
        """True at that rate."""
        return torch.rand(shape, generator=self._generator, device=self.device) < rate

    def scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """One number, 0-d."""
        return torch.full((), value, dtype=dtype, device=self.device)


def pairs_of_each_form(make: Inputs, anchors: int, keys: int) -> dict[str, Relation]:
    """Relations by label, of a hundred classes, by mask, by list and by weighted list, of a few pairs an anchor."""
    ids = make.integers(100, anchors, 1)
    listed = 4
    offsets = torch.arange(0, listed * anchors + 1, listed, device=make.device)
    indices, weights = make.integers(keys, listed * anchors), make.integers(8, listed * anchors).float() / 4
    words = make.integers(2**31, anchors, words_per_row(keys))
    return {
        "labels": Relation(ids, ids if keys == anchors else make.integers(100, keys, 1)),
        "mask": Relation(bits=words.int()),
        "lists": Relation(offsets=offsets, indices=indices),
        "weighted lists": Relation(offsets=offsets, indices=indices, weights=weights),
    }


def _contrastive(kernels: Any, make: Inputs, sizes: Sizes) -> Calls:
    """Of one tile of the blocks that all anchors are cut into."""
    vectors, none = make.unit_rows(sizes.anchors, sizes.dim), Relation()
    of_form = pairs_of_each_form(make, sizes.anchors, sizes.anchors)
    scale, bias = make.scalar(1 / TEMPERATURE), make.normal(sizes.anchors).float()

    def call(
        positives: str, excluded: str | None = None, own: bool = False, both: bool = False, triangle: bool = False,
        inside: bool = False, decoupled: bool = False, exclude_positives: bool = True,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        problem = Problem(
            vectors,
            None if own else vectors,
            of_form[positives],
            none if excluded is None else of_form[excluded],
            bias if both else None,
            scale,
            0 if own else -1,
            triangle,
            inside,
            decoupled,
            exclude_positives,
        )
        rows_of_block = chunked.rows_of_block(problem, kernels.pair_bytes(problem))
        tile = Tile(slice(0, min(rows_of_block, sizes.anchors)), slice(0, sizes.anchors))
        products = make.normal(*tile.shape).float()
        pairs = kernels.pairs(products, tile, problem, kernels.prepare(problem))
        statistics, numbers = [], []
        for count in tile.shape if both or triangle else tile.shape[:1]:
            statistics.append(chunked.empty_statistics(problem, count))
        rows, columns = statistics if len(statistics) == 2 else (*statistics, None)
        kernels.statistics(products, tile, problem, pairs, rows, columns)
        for found in statistics:
            numbers.append(chunked.numbers_of(found, torch.ones_like(found[:, 0]), inside))
        rows, columns = numbers if len(numbers) == 2 else (*numbers, None)
        return *statistics, kernels.gradient(products, tile, problem, pairs, rows, columns)

    return {
        "labels": partial(call, "labels"),
        "labels among the anchors": partial(call, "labels", own=True, triangle=True),
        "mask": partial(call, "mask", "labels", own=True, decoupled=True),
        "lists, both directions": partial(call, "lists", "lists", both=True, inside=True, exclude_positives=False),
        "lists among the anchors": partial(call, "lists", "mask", own=True, inside=True),
        "weighted lists, both directions": partial(call, "weighted lists", "mask", own=True, both=True),
    }


def _masked_topk(kernels: Any, make: Inputs, sizes: Sizes) -> Calls:
    query, pool = make.unit_rows(sizes.anchors, sizes.feature_dim), make.unit_rows(sizes.pool_size, sizes.feature_dim)
    few = query[: sizes.group]
    mask = make.bernoulli(0.9, len(few), len(pool))
    groups = make.integers(sizes.images, len(query)), make.integers(2 * sizes.images, len(pool))
    calls: Calls = {}
    for k in (1, 8, 32, 128):
        if k <= len(pool):
            calls[f"forward, k={k}"] = partial(kernels.forward, query, pool, k)
            calls[f"forward, k={k}, few queries"] = partial(kernels.forward, few, pool, k)
    for k in (1, 8):
        calls[f"forward, k={k}, mask"] = partial(kernels.forward, few, pool, k, mask)
        calls[f"forward, k={k}, groups"] = partial(kernels.forward, query, pool, k, None, *groups)
        calls[f"forward, k={k}, mask and groups"] = partial(
            kernels.forward, few, pool, k, mask, groups[0][: len(few)], groups[1]
        )
        grad, indices = make.normal(len(query), k).float(), make.integers(len(pool), len(query), k)
        calls[f"backward, k={k}"] = partial(kernels.backward, grad, indices, query, pool)
    return calls


def _hidden_positives(kernels: Any, make: Inputs, sizes: Sizes) -> Calls:
    calls: Calls = {}
    for dim in (sizes.feature_dim, sizes.dim):
        features, threshold = make.unit_rows(sizes.anchors, dim), make.threshold(sizes.anchors, dim)
        for symmetric in (True, False):
            name = f"forward, D={dim}{'' if symmetric else ', not symmetric'}"
            calls[name] = partial(kernels.forward, features, threshold, symmetric)
        keys, key_threshold = make.unit_rows(sizes.pool_size, dim), make.threshold(sizes.pool_size, dim)
        calls[f"between, D={dim}"] = partial(kernels.between, features, keys, threshold, key_threshold, False, None)
        image = slice(sizes.anchors - sizes.group, sizes.anchors)
        calls[f"rows, D={dim}"] = partial(
            kernels.between, features[image], features, threshold[image], threshold, True, image.start
        )
    return calls


def _multi_positive_contrastive(kernels: Any, make: Inputs, sizes: Sizes) -> Calls:
    z, other = make.unit_rows(sizes.anchors, sizes.dim), make.unit_rows(sizes.anchors, sizes.dim)
    threshold = make.threshold(sizes.anchors, sizes.dim)
    weight, grad_losses, seed = make.scalar(0.5), make.scalar(1.0)[None], make.scalar(0, torch.int64)
    discover = cache(backends.implementation("hidden_positives", make.backend).forward)

    def call(rate: float, with_specific: bool, symmetric: bool = True) -> tuple[Tensor, ...]:
        relations = (discover(z, threshold), discover(other, threshold) if with_specific else None)
        drawn, options, row_bytes = (None, seed), ("joint", True, False), sizes.dim * z.element_size()
        pairs = kernels.prepare(*relations, weight, *drawn, sizes.group, rate, *options, symmetric, row_bytes)
        settings = (sizes.group, TEMPERATURE, 1.0, rate)
        losses, rows = kernels.forward([z], *relations, weight, *drawn, pairs, *settings, *options)
        settings = (sizes.group, TEMPERATURE, rate, symmetric)
        return losses, rows, *kernels.backward(grad_losses, [z], *relations, *drawn, pairs, rows, *settings)

    def call_part(rate: float, symmetric: bool) -> tuple[Tensor, ...]:
        """Of the anchors of half the images, as a rank of two devices computes them."""
        first = sizes.images // 2 * sizes.group
        relations = [discover(features, threshold)[first:] for features in (z, other)]
        drawn, options, row_bytes = (None, seed), ("joint", True, False), sizes.dim * z.element_size()
        weighting, part = (*options, symmetric, row_bytes), {"anchors": sizes.anchors, "first": first}
        pairs = kernels.prepare(*relations, weight, *drawn, sizes.group, rate, *weighting, **part)
        settings, images = (sizes.group, TEMPERATURE, 1.0, rate), kernels.images_of(pairs)
        losses, rows = kernels.forward(
            [z], *relations, weight, *drawn, pairs, *settings, *options, images=images, first=first
        )
        rows, settings = rows.new_zeros((1, sizes.anchors, 4)), (sizes.group, TEMPERATURE, rate, symmetric)
        transposed = {} if symmetric else {"transposed": relations}
        of_all = (grad_losses, [z], *relations, *drawn, pairs, rows, *settings)
        return losses, rows, *kernels.backward(*of_all, first=first, **transposed)

    return {
        "sampled": partial(call, NEGATIVE_RATE, False),
        "sampled, specific": partial(call, NEGATIVE_RATE, True),
        "sampled, specific, not symmetric": partial(call, NEGATIVE_RATE, True, symmetric=False),
        "all": partial(call, 1.0, False),
        "all, specific": partial(call, 1.0, True),
        "all, not symmetric": partial(call, 1.0, False, symmetric=False),
        "all, specific, not symmetric": partial(call, 1.0, True, symmetric=False),
        "part, sampled, specific": partial(call_part, NEGATIVE_RATE, True),
        "part, all, specific, not symmetric": partial(call_part, 1.0, False),
    }


def _local_propagation(kernels: Any, make: Inputs, sizes: Sizes) -> Calls:
    calls: Calls = {}
    for height, width in (sizes.grid, (sizes.grid[0] // 2, sizes.grid[1] // 2), sizes.large_grid):
        images = sizes.images if (height, width) == sizes.grid else 1
        # As a ViT computes them: one matrix of queries, keys and values.
        tokens = make.normal(images, 1 + height * width, 3, sizes.heads, sizes.head_dim).permute(2, 0, 3, 1, 4)
        options = (height, width, 28.0, 0.1, 0.9, 3, 1)
        calls[f"weights, {height} x {width}"] = partial(kernels.weights_forward, tokens[0], tokens[1], *options)
    planes = make.normal(sizes.images, sizes.dim, *sizes.grid)
    layouts = {"planes": planes, "channels last": planes.contiguous(memory_format=torch.channels_last)}
    for window in (3, 5):
        weights = make.normal(sizes.images, window * window, *sizes.grid).float()
        for layout, code in layouts.items():
            for name in ("apply_forward", "apply_backward"):
                calls[f"{name}, window {window}, {layout}"] = partial(getattr(kernels, name), code, weights)
    return calls


_CALLS: dict[str, Callable[[Any, Inputs, Sizes], Calls]] = {
    "contrastive": _contrastive,
    "hidden_positives": _hidden_positives,
    "local_propagation": _local_propagation,
    "masked_topk": _masked_topk,
    "multi_positive_contrastive": _multi_positive_contrastive,
}
