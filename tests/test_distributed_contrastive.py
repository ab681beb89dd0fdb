"""`hpkernels.distributed.contrastive` on several ranks against `hpkernels.contrastive` of the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import raised, run_ranks
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import hpkernels
from benchmarks import __main__ as command
from benchmarks import distributed as benchmark
from hpkernels import Labels, PairLists, PositiveMask, backends
from hpkernels.distributed import contrastive
from hpkernels.ops._bits import bits_of_columns, pack_bits, unpack_bits
from hpkernels.ops.contrastive import chunked

DIM = 24
ANCHORS = {1: (50,), 2: (37, 71), 3: (5, 40, 33)}
KEYS = {1: (70,), 2: (64, 45), 3: (33, 1, 62)}
"""How many each rank has, by the number of ranks."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}


class Batch(NamedTuple):
    """All anchors and keys, and relations of each kind; without keys they are among the anchors."""

    counts: tuple[int, ...]
    key_counts: tuple[int, ...]
    anchors: Tensor
    keys: Tensor | None
    ids: Tensor
    key_ids: Tensor
    mask: Tensor
    weights: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def drawn(cls, ranks: int, own: bool, dtype: torch.dtype, counts: Any = None) -> Batch:
        counts = counts or ANCHORS[ranks]
        key_counts = counts if own else KEYS[ranks]
        generator = torch.Generator().manual_seed(ranks)
        rand = functools.partial(torch.rand, generator=generator)
        count, columns = sum(counts), sum(key_counts)
        vectors = [normalize(rand(size, DIM, dtype=torch.float64) - 0.4).to(dtype) for size in (count, columns)]
        ids = [torch.randint(-1, 9, (size, 2), generator=generator) for size in (count, columns)]
        mask = rand(count, columns) < 0.1
        weights = rand(count, columns).where(rand(count, columns) < 0.1, 0)
        weight, bias = rand(count) * (rand(count) < 0.8), rand(columns) - 0.5
        return cls(counts, key_counts, vectors[0], None if own else vectors[1], *ids, mask, weights, weight, bias)

    @property
    def own(self) -> bool:
        return self.keys is None

    def rows(self, rank: int | None) -> slice:
        return _part(self.counts, rank)

    def columns(self, rank: int | None) -> slice:
        return _part(self.key_counts, rank)

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
        weights = self.weights[rows]
        listed = weights > 0
        offsets = nn.functional.pad(listed.sum(dim=1).cumsum(0), (1, 0))
        return PairLists(offsets, listed.nonzero()[:, 1], weights[listed] if kind == "weights" else None)


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
    rows, columns = batch.rows(rank), batch.columns(rank)
    ranks = len(batch.counts)
    factor = ranks if more["ddp"] else 1
    close = functools.partial(assert_close, tolerance=TOLERANCE[batch.anchors.dtype])
    close(part.loss, whole.loss[rows] if options.settings.get("reduction") == "none" else whole.loss)
    close(part.anchors, factor * whole.anchors[rows])
    close(part.keys, None if whole.keys is None else factor * whole.keys[columns])
    close(part.bias, None if whole.bias is None else factor * whole.bias[columns])
    close(part.temperature, factor / ranks * whole.temperature)
    places = (rows, rows, columns, columns)
    for found, wanted, place in zip(part.statistics, whole.statistics, places, strict=True):
        close(found, None if wanted is None else wanted[place])


def check_all(rank: int, ranks: int, dtype: torch.dtype, backend: str, ddp: bool = False) -> None:
    for own in (False, True):
        batch = Batch.drawn(ranks, own, dtype)
        for options in (options for options in OPTIONS if options.own == own):
            for exchange in ("gather", "ring"):
                try:
                    check_case(batch, options, rank, exchange=exchange, backend=backend, ddp=ddp)
                except Exception as error:
                    raise AssertionError(f"{options}, {exchange}, {dtype}, rank {rank}") from error


@contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        yield


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_process(dtype):
    check_all(0, 1, dtype, "auto")


def _check_ranks(rank: int, ranks: int) -> None:
    check_all(rank, ranks, torch.float64, "reference")
    check_all(rank, ranks, torch.float32, "auto", ddp=True)
    with patched(chunked, CHUNK_BYTES_ON_CPU=1):  # blocks of 32 anchors
        check_all(rank, ranks, torch.bfloat16, "auto")
    if ranks == 2 and backends.availability("contrastive", "triton").ok:
        batch = Batch.drawn(ranks, True, torch.float32, (9, 24))
        options = Options(True, ("weights", "label"), ("mask", "lists"), True, True, BOTH)
        for exchange in ("gather", "ring"):
            check_case(batch, options, rank, exchange=exchange, backend="triton", ddp=True)
    for check in (
        _check_blocks,
        _check_deterministic,
        _check_ddp,
        _check_compiled,
        _check_settings,
        _check_failures,
        _check_group,
    ):
        check(rank, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(tmp_path, ranks):
    run_ranks(_check_ranks, ranks, tmp_path, ranks)


def _check_blocks(rank: int, ranks: int) -> None:
    """Of all keys at once, and then with the bits of one process; or of those of one rank at a time."""
    seen: list[int] = []

    def visited(kernels: Any, problem: Any, both: bool) -> Any:
        seen.append(len(problem.keys))
        return statistics(kernels, problem, both)

    batch, statistics, counts = Batch.drawn(ranks, False, torch.float32), chunked.statistics, KEYS[ranks]
    for settings in ({}, BOTH):
        options = Options(False, ("label",), settings=settings)
        whole = compute(hpkernels.contrastive, batch, options, None)
        part = compute(contrastive, batch, options, rank, exchange="gather")
        assert torch.equal(part.statistics.log_denominator, whole.statistics.log_denominator[batch.rows(rank)])
    with patched(chunked, statistics=visited):
        compute(contrastive, batch, Options(False, ("label",), settings=BOTH), rank, exchange="gather")
        assert seen == [sum(counts)]
        compute(contrastive, batch, Options(False, ("label",), settings=BOTH), rank, exchange="ring")
    assert seen[1:] == [counts[(rank - step) % ranks] for step in range(ranks)]


def _check_deterministic(rank: int, ranks: int) -> None:
    """The same bits twice, and a loss and a gradient of the temperature that are the same on all ranks."""
    for own, exchange in ((False, "gather"), (False, "ring"), (True, "ring")):
        batch = Batch.drawn(ranks, own, torch.float32)
        options = Options(own, ("label",), biased=True, settings=BOTH)
        first, again = (compute(contrastive, batch, options, rank, exchange=exchange) for _ in range(2))
        for found, repeated in zip(first, again, strict=True):
            assert found is first.statistics or found is None or torch.equal(found, repeated)
        shared: list[Any] = [None] * ranks
        dist.all_gather_object(shared, (first.loss.item(), first.temperature.item()))
        assert shared == shared[:1] * ranks


class Model(nn.Module):
    """Two towers and a learnt logit scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = nn.Linear(DIM, 12), nn.Linear(DIM, 12)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return normalize(self.images(images)), normalize(self.texts(texts)), (-self.log_scale).exp()


def _check_ddp(rank: int, ranks: int) -> None:
    """Parameters have the gradients of one process with the whole batch."""
    batch = Batch.drawn(ranks, False, torch.float32)
    for settings in (BOTH, {}, {"reduction": "none"}):
        for exchange in ("gather", "ring"):
            whole, model = Model(), DistributedDataParallel(Model())
            images, texts, temperature = whole(batch.anchors, batch.keys)
            labels = batch.relation("label", None)
            loss = hpkernels.contrastive(images, texts, positives=labels, temperature=temperature, **settings)
            loss.sum().backward()
            images, texts, temperature = model(batch.anchors[batch.rows(rank)], batch.keys[batch.columns(rank)])
            labels = batch.relation("label", rank)
            options: Any = settings | {"temperature": temperature, "exchange": exchange}
            contrastive(images, texts, positives=labels, **options).sum().backward()
            for parameter, wanted in zip(model.parameters(), whole.parameters(), strict=True):
                assert_close(parameter.grad, wanted.grad, 2e-6)


def _check_compiled(rank: int, ranks: int) -> None:
    """A compiled step calls the loss outside of its graph."""
    batch = Batch.drawn(ranks, True, torch.float32)
    ids = batch.ids[batch.rows(rank), 0]

    def step(codes: Tensor) -> Tensor:
        return 2 * contrastive(normalize(codes + 1), positives=ids)

    found = []
    for function in (step, torch.compile(step, backend="eager")):
        codes = batch.anchors[batch.rows(rank)].clone().requires_grad_()
        found.append((function(codes), *torch.autograd.grad(function(codes), codes)))
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, 1e-6)


def _check_settings(rank: int, ranks: int) -> None:
    """What differs between ranks is named on all of them."""
    anchors = torch.eye(6, 4)
    labels, last = torch.arange(6) // 2, rank == ranks - 1
    others = "rank " + " and ".join(map(str, range(ranks - 1)))
    for given, name, *values in [
        ({"temperature": 0.25 if last else torch.tensor(0.5)}, "temperature", "0.5", "0.25"),
        ({"reduction": "sum" if last else "mean"}, "reduction", "mean", "sum"),
        ({"exchange": "ring" if last else "gather"}, "exchange", "gather", "ring"),
        ({"keys": anchors if last else None}, "keys", "None", "given"),
        ({"anchor_weight": torch.ones(6) if last else None}, "anchor_weight", "None", "given"),
    ]:
        text = raised(contrastive, anchors, **{"positives": labels, "temperature": 0.1} | given)
        want = f"ValueError: distributed.contrastive: `{name}` must be the same on all ranks, got"
        assert text.startswith(f"{want} {values[0]} on {others}, {values[1]} on rank"), text


def _check_failures(rank: int, ranks: int) -> None:
    """A rank that fails has its own error, the others its sentence; and no one waits."""
    batch = Batch.drawn(ranks, False, torch.float32)
    told = "RuntimeError: distributed.contrastive: rank 1 has failed, and so no rank can go on: "
    wrong = {"temperature": 0.1 if rank != 1 else -1.0}
    text = raised(contrastive, batch.anchors[batch.rows(rank)], positives=batch.ids[batch.rows(rank), 0], **wrong)
    sentence = "ValueError: distributed.contrastive: `temperature` must be a finite number above 0, got -1.0"
    assert text == (sentence if rank == 1 else told + sentence)

    lists = PairLists(torch.tensor([0, 1]), torch.tensor([ranks if rank == 1 else ranks - 1]))
    text = raised(contrastive, torch.ones(1, 2), positives=lists)
    sentence = (
        f"ValueError: distributed.contrastive: `positives.indices` must be keys from 0 to {ranks - 1}, got {ranks}"
    )
    assert text == (sentence if rank == 1 else told + sentence)

    def fail(*_: Any) -> Any:
        raise MemoryError("no room for a block")

    sentence = "MemoryError: no room for a block"
    for name, settings in [
        ("statistics", BOTH),
        ("two_pass", BOTH),
        ("one_pass", {}),
        ("two_pass", {"reduction": "none"}),
    ]:
        for exchange in ("gather", "ring") if name != "one_pass" else ("gather",):
            options = Options(False, ("label",), settings=settings)
            with patched(chunked, **({name: fail} if rank == 1 else {})):
                text = raised(compute, contrastive, batch, options, rank, exchange=exchange)
            assert text == (sentence if rank == 1 else told + sentence), (name, exchange, text)
    check_case(batch, Options(False, ("label",)), rank, exchange="ring", ddp=False, backend="auto")


def _check_group(rank: int, ranks: int) -> None:
    """All ranks but the first, in a group of their own."""
    group, batch = dist.new_group(list(range(1, ranks))), Batch.drawn(ranks - 1, False, torch.float64)
    if rank == 0:
        text = raised(contrastive, batch.anchors, positives=batch.ids[:, 0], group=group)
        assert text.startswith("ValueError: hpkernels.distributed: `group` must have this process in it")
        return
    for options in (Options(False, ("label",), settings=BOTH), Options(False, ("mask",))):
        for exchange in ("gather", "ring"):
            check_case(batch, options, rank - 1, exchange=exchange, ddp=True, backend="auto", group=group)


def test_double_backward_is_refused():
    for reduction in ("mean", "none"):
        anchors = torch.eye(4, 3, requires_grad=True)
        loss = contrastive(anchors, positives=torch.tensor([0, 0, 1, 1]), reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), anchors, create_graph=True)
        with pytest.raises(RuntimeError, match="distributed.contrastive: double backward is not supported"):
            gradient.square().sum().backward()


def test_statistics_have_no_gradients():
    anchors = torch.eye(4, 3, requires_grad=True)
    loss, statistics = contrastive(anchors, positives=torch.tensor([0, 0, 1, 1]), return_statistics=True)
    assert loss.requires_grad and not statistics.log_denominator.requires_grad


def test_nothing_asked_for():
    """Without gradients they are not computed."""
    with patched(chunked, two_pass=None, one_pass=None):
        loss = contrastive(torch.eye(4, 3), positives=torch.tensor([0, 0, 1, 1]))
        with torch.no_grad():
            assert torch.equal(
                contrastive(torch.eye(4, 3).requires_grad_(), positives=torch.tensor([0, 0, 1, 1])), loss
            )


def test_autocast():
    anchors, keys = torch.eye(4, 3), torch.eye(5, 3)
    labels = Labels(torch.arange(4), torch.arange(5))
    wanted = contrastive(anchors, keys, positives=labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive(anchors, keys.bfloat16(), positives=labels), wanted)
    assert raised(contrastive, anchors, keys.bfloat16(), positives=labels).startswith(
        "TypeError: distributed.contrastive: `keys`"
    )


def test_errors():
    anchors, labels = torch.eye(4, 3), torch.tensor([0, 0, 1, 1])
    mask = PositiveMask.from_labels(labels)
    for given, text in [
        (
            {"exchange": "tree"},
            "ValueError: distributed.contrastive: `exchange` must be one of 'gather', 'ring', got 'tree'",
        ),
        ({"ddp": 1}, "TypeError: distributed.contrastive: `ddp` must be True or False, got int 1"),
        (
            {"positives": mask},
            "ValueError: distributed.contrastive: `positives` must be a mask of 4 anchors and 4 keys, got",
        ),
        ({"positives": labels[:3]}, "ValueError: distributed.contrastive: `positives.anchor_ids` must be"),
        ({"key_bias": torch.zeros(3)}, "ValueError: distributed.contrastive: `key_bias` must be"),
        ({"anchors": torch.zeros(0, 3)}, "ValueError: distributed.contrastive: `anchors` must not be empty"),
        ({"anchors": torch.full((4, 3), torch.nan)}, "ValueError: distributed.contrastive: `anchors` must be finite"),
        (
            {"anchors": torch.full((4, 3), 1e19)},
            "ValueError: distributed.contrastive: `anchors` and `keys` must have inner",
        ),
        ({"return_statistics": None}, "TypeError: distributed.contrastive: `return_statistics` must be True or False"),
    ]:
        assert raised(contrastive, **({"anchors": anchors, "positives": labels} | given)).startswith(text)


@pytest.mark.parametrize(
    "columns", [slice(0, 70), slice(3, 35), slice(31, 33), slice(32, 70), slice(33, 97), slice(5, 6)]
)
def test_bits_of_columns(columns):
    mask = torch.rand(9, 97, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(mask)
    assert torch.equal(bits_of_columns(bits, columns), pack_bits(mask[:, columns]))
    assert torch.equal(unpack_bits(bits, 97), mask)  # which stays as it is


@pytest.mark.parametrize("inside", [False, True])
def test_merged_statistics(inside):
    """Of nothing and a part the part, and of the parts in either order the same."""
    first, second = torch.rand(2, 5, 4)
    first[0] = torch.tensor([-torch.inf, -torch.inf if inside else 0, 0, 0])
    found = chunked.merged(first, second, inside)
    assert torch.equal(found[0], second[0])
    assert torch.equal(found, chunked.merged(second, first, inside))
    assert_close(found[:, 0].exp(), first[:, 0].exp() + second[:, 0].exp(), 1e-6)
    assert_close(found[:, 1], torch.logaddexp(first[:, 1], second[:, 1]) if inside else first[:, 1] + second[:, 1], 0)


def test_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CALLS", ("both",))
    monkeypatch.setattr(benchmark, "WAYS", ("one process", "ring"))
    assert command.main(["distributed", "--anchors", "64", "--dim", "8", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ms ")[0].rsplit(maxsplit=1)[0].split(maxsplit=1) for line in lines] == [
        ["both", "one process"],
        ["both", "ring"],
    ]
