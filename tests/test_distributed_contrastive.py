"""`hpkernels.distributed.contrastive` in several processes against `hpkernels.contrastive` in one, on the whole batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import hpkernels
from hpkernels import Labels, PairLists, PositiveMask
from hpkernels.distributed import contrastive
from hpkernels.ops.contrastive import chunked
from hpkernels.ops.hidden_positives.bits import bits_of_columns, pack_bits, unpack_bits

DIM = 24
ANCHORS = {1: (50,), 2: (37, 71), 3: (5, 40, 33)}
KEYS = {1: (70,), 2: (64, 45), 3: (33, 1, 62)}
"""How many each rank has, by the number of ranks."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}


class Batch(NamedTuple):
    """All anchors and keys, and relations of each kind; without keys they are among the anchors."""

    ranks: int
    own: bool
    anchors: Tensor
    keys: Tensor | None
    ids: Tensor
    key_ids: Tensor
    mask: Tensor
    weights: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def drawn(cls, ranks: int, own: bool, dtype: torch.dtype) -> Batch:
        generator = torch.Generator().manual_seed(ranks)
        rand = functools.partial(torch.rand, generator=generator)
        count = sum(ANCHORS[ranks])
        columns = count if own else sum(KEYS[ranks])
        vectors = [normalize(rand(size, DIM, dtype=torch.float64) - 0.4).to(dtype) for size in (count, columns)]
        ids = [torch.randint(-1, 9, (size, 2), generator=generator) for size in (count, columns)]
        mask = rand(count, columns) < 0.1
        weights = rand(count, columns).where(rand(count, columns) < 0.1, 0)
        weight, bias = rand(count) * (rand(count) < 0.8), rand(columns) - 0.5
        return cls(ranks, own, vectors[0], None if own else vectors[1], *ids, mask, weights, weight, bias)

    def rows(self, rank: int | None) -> slice:
        return _part(ANCHORS[self.ranks], rank)

    def columns(self, rank: int | None) -> slice:
        return _part((ANCHORS if self.own else KEYS)[self.ranks], rank)

    def relation(self, kind: str, rank: int | None) -> Any:
        """Pairs of all anchors, or of those of a rank as it names them."""
        rows, columns = self.rows(rank), self.columns(rank)
        if kind == "label":
            return Labels(self.ids[rows, 0], None if self.own else self.key_ids[columns, 0])
        if kind == "labels":
            return Labels(self.ids[rows], self.key_ids[columns])
        if kind == "bool":
            return self.mask[rows]
        if kind == "mask":
            return PositiveMask.from_dense(self.mask[rows], keys=not self.own or rank is not None)
        lists = self.weights[rows].to_sparse_csr()
        offsets, indices = lists.crow_indices(), lists.col_indices()
        return PairLists(offsets, indices, lists.values() if kind == "weights" else None)


def _part(counts: tuple[int, ...], rank: int | None) -> slice:
    if rank is None:
        return slice(0, sum(counts))
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


class Options(NamedTuple):
    """A call, with the kinds of its relations."""

    own: bool
    positives: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    weighted: bool = False
    biased: bool = False
    settings: dict[str, Any] = {}


BOTH = {"both_directions": True}
OPTIONS = [
    Options(False, ("label",)),
    Options(False, ("labels",), ("mask",), weighted=True, biased=True),
    Options(False, ("bool",), ("lists",), settings={"exclude_positives": False, "positive_aggregation": "inside"}),
    Options(False, ("weights", "label"), settings={"denominator": "negatives", "reduction": "sum"}),
    Options(False, ("lists",), ("labels", "bool"), weighted=True, settings={"reduction": "none"}),
    Options(False, ("weights",), biased=True, settings={"positive_aggregation": "inside", "reduction": "none"}),
    Options(False, ("label",), settings=BOTH),
    Options(False, ("weights",), ("mask",), True, True, BOTH | {"positive_aggregation": "inside"}),
    Options(False, ("labels",), biased=True, settings=BOTH | {"denominator": "negatives", "reduction": "sum"}),
    Options(True, ("label",)),
    Options(True, ("label",), weighted=True, settings={"reduction": "none"}),
    Options(True, ("label",), weighted=True, settings={"positive_aggregation": "inside"}),
    Options(True, ("labels",), ("bool",), weighted=True, biased=True),
    Options(True, ("mask",), settings={"denominator": "negatives", "reduction": "none"}),
    Options(True, ("weights",), ("label",), settings=BOTH | {"exclude_positives": False}),
    Options(True, ("label",), settings=BOTH),
]


class Computed(NamedTuple):
    """Of one call."""

    loss: Tensor
    statistics: hpkernels.ContrastiveStatistics
    anchors: Tensor
    keys: Tensor | None
    temperature: Tensor
    bias: Tensor | None


def compute(function: Any, batch: Batch, options: Options, rank: int | None, **more: Any) -> Computed:
    """The whole batch, or a rank's part of it."""
    rows, columns = batch.rows(rank), batch.columns(rank)
    anchors = batch.anchors[rows].clone().requires_grad_()
    keys = None if batch.keys is None else batch.keys[columns].clone().requires_grad_()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    bias = batch.bias[columns].clone().requires_grad_() if options.biased else None
    positives, excluded = (
        tuple(batch.relation(kind, rank) for kind in kinds) for kinds in (options.positives, options.exclude)
    )
    loss, statistics = function(
        anchors,
        keys,
        positives=positives if len(positives) > 1 else positives[0],
        exclude=excluded or None,
        temperature=temperature,
        key_bias=bias,
        anchor_weight=batch.weight[rows] if options.weighted else None,
        return_statistics=True,
        **options.settings,
        **more,
    )
    objective = loss * torch.arange(rows.start, rows.stop) if options.settings.get("reduction") == "none" else 3 * loss
    objective.sum().backward()
    inputs = (anchors, keys, temperature, bias)
    return Computed(loss.detach(), statistics, *(None if part is None else part.grad for part in inputs))


def assert_close(found: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    """Equal but for `tolerance` of the greatest value."""
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    difference = (found - wanted).where(found != wanted, 0).abs().max()
    assert difference <= tolerance * wanted.where(wanted.isfinite(), 0).abs().max(), (found, wanted)


def check_case(batch: Batch, options: Options, rank: int, **more: Any) -> None:
    """One rank's part of a call against the same in one process."""
    whole = compute(hpkernels.contrastive, batch, options, None, backend=more["backend"])
    part = compute(contrastive, batch, options, rank, **more)
    tolerance, rows, columns = TOLERANCE[batch.anchors.dtype], batch.rows(rank), batch.columns(rank)
    wanted_loss = whole.loss[rows] if options.settings.get("reduction") == "none" else whole.loss
    close = functools.partial(assert_close, tolerance=tolerance)
    close(part.loss, wanted_loss)
    close(part.anchors, whole.anchors[rows])
    close(part.keys, None if whole.keys is None else whole.keys[columns])
    close(part.bias, None if whole.bias is None else whole.bias[columns])
    close(part.temperature, whole.temperature)
    places = (rows, rows, columns, columns)
    for found, wanted, place in zip(part.statistics, whole.statistics, places, strict=True):
        close(found, None if wanted is None else wanted[place])


def check_all(rank: int, ranks: int, dtype: torch.dtype, backend: str) -> None:
    for own in (False, True):
        batch = Batch.drawn(ranks, own, dtype)
        for options in (options for options in OPTIONS if options.own == own):
            for exchange in ("gather", "ring"):
                try:
                    check_case(batch, options, rank, exchange=exchange, backend=backend, ddp=False)
                except Exception as error:
                    raise AssertionError(f"{options}, {exchange}, {dtype}, rank {rank}") from error


def in_processes(tmp_path: Any, ranks: int, function: Any, *arguments: Any) -> None:
    """Run ``function(rank, ranks, *arguments)`` in processes that form a group."""
    torch.multiprocessing.spawn(_run, (ranks, tmp_path / "group", function, arguments), ranks)


def _run(rank: int, ranks: int, file: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    function(rank, ranks, *arguments)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_process(dtype):
    check_all(0, 1, dtype, "auto")


def _check_processes(rank: int, ranks: int) -> None:
    check_all(rank, ranks, torch.float64, "reference")
    check_all(rank, ranks, torch.float32, "auto")
    chunked.CPU_WORKSPACE = 1  # blocks of 32 anchors
    check_all(rank, ranks, torch.float64, "auto")


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes(tmp_path, ranks):
    in_processes(tmp_path, ranks, _check_processes)
