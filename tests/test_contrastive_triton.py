"""What the Triton epilogue of `contrastive` has of its own: tiles and parts, half precision, lists, great logits."""

from __future__ import annotations

import pytest
import torch

from hpkernels import backends
from hpkernels.launches import recorded
from hpkernels.ops._bits import pack_bits
from hpkernels.ops.contrastive import chunked, reference
from hpkernels.ops.contrastive.problem import Problem, Tile
from hpkernels.ops.contrastive.relations import Relation
from hpkernels.testing import assert_rows_close, available_cases, row_errors

CASES = [case for case in available_cases("contrastive", [torch.float32]) if case.backend == "triton"]
pytestmark = pytest.mark.skipif(not CASES, reason="the Triton kernels cannot run here")
DEVICE = CASES[0].device if CASES else "cpu"
ALL = chunked.Needs(True, True, True, True)
NONE = Relation()


@pytest.fixture
def kernels():
    return backends.implementation("contrastive", "triton")


@pytest.fixture(autouse=True)
def blocks_of_32_rows(monkeypatch):
    """In the interpreter, of two columns of tiles or three, whose statistics come in two parts."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES_ON_CPU", 1)
    monkeypatch.setattr(chunked, "CHUNK_BYTES_ON_GPU", 1)


def relation(forms, anchors, keys, seed):
    """The union of pairs of some forms; lists name some pairs twice."""
    random, parts = torch.Generator().manual_seed(seed), {}
    if "labels" in forms:
        low, high = torch.tensor([-3, 0, 1, 2**40, 2**40 + 1]), torch.tensor([-1, 0, 1, 2**40, 2**33 + 1])
        for name, count, values in (("anchor_ids", anchors, low), ("key_ids", keys, high)):
            parts[name] = values[torch.randint(5, (count, 2), generator=random)]
    if "mask" in forms:
        parts["bits"] = pack_bits(torch.rand((anchors, keys), generator=random) < 0.2)
        if keys % 32:  # bits beyond the last key mean nothing
            parts["bits"][:, -1] |= -1 << (keys % 32)
    if {"lists", "weights"} & set(forms):
        lengths = torch.randint(6, (anchors,), generator=random)
        parts["offsets"] = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        parts["indices"] = torch.randint(keys, (int(lengths.sum()),), generator=random)
        if "weights" in forms:  # of multiples of 1/4, some of them 0
            parts["weights"] = torch.randint(8, (int(lengths.sum()),), generator=random).float() / 4
    return Relation(**{name: value.to(DEVICE) for name, value in parts.items()})


def problem_of(
    positives=("labels",),
    excluded=(),
    *,
    own=False,
    triangle=False,
    inside=False,
    decoupled=False,
    exclude_positives=True,
    bias=False,
    sizes=(40, 75),
    dtype=torch.float32,
    temperature=0.2,
):
    anchors, keys = (sizes[1], sizes[1]) if own else sizes
    random = torch.Generator().manual_seed(0)
    rows, others = (torch.randn((count, 8), generator=random) / 3 for count in (anchors, keys))
    return Problem(
        rows.to(DEVICE, dtype),
        None if own else others.to(DEVICE, dtype),
        relation(positives, anchors, keys, 1),
        relation(excluded, anchors, keys, 2),
        torch.randn(keys, generator=random).to(DEVICE) if bias else None,
        torch.tensor(1 / temperature, device=DEVICE),
        0 if own else -1,
        triangle,
        inside,
        decoupled,
        exclude_positives,
    )


def exact(problem):
    """The problem in float64."""

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    parts = [Relation(*map(double, part)) if isinstance(part, Relation) else double(part) for part in problem]
    return Problem(*parts)


def outcome(kernels, problem, both=False, coefficient=1.0):
    """Statistics, and gradients of the sum of the losses times a coefficient; in one pass where that is possible."""
    problem = problem._replace(anchors=kernels.vectors(problem.anchors))
    if problem.keys is not None:
        problem = problem._replace(keys=kernels.vectors(problem.keys))
    if both or problem.triangle:
        statistics = chunked.statistics(kernels, problem, both)
        numbers = [
            None if each is None else chunked.numbers_of(each, torch.full_like(each[:, 0], coefficient), problem.inside)
            for each in statistics
        ]
        gradients = chunked.two_pass(kernels, problem, *numbers, ALL)
    else:
        rows = chunked.empty_statistics(problem, len(problem.anchors))
        weight = torch.full_like(rows[:, 0], coefficient)
        rows, gradients = chunked.one_pass(kernels, problem, weight, ALL)
        statistics = (rows, None)
    found = dict(zip(("rows", "columns"), statistics, strict=True)) | gradients._asdict()
    return {name: value for name, value in found.items() if value is not None}


def check(kernels, problem, both=False, factor=3.0):
    wanted, plain = outcome(reference, exact(problem), both), outcome(reference, problem, both)
    found = outcome(kernels, problem, both)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if name in ("rows", "columns"):
            for column, (of, of_64, of_plain) in enumerate(zip(value.T, wanted[name].T, plain[name].T, strict=True)):
                assert torch.isfinite(of).equal(torch.isfinite(of_64)), (name, column)
                assert_rows_close(of.nan_to_num(0, 0, 0), of_64.nan_to_num(0, 0, 0), of_plain.nan_to_num(0, 0, 0))
        else:
            assert_rows_close(value, wanted[name], plain[name], factor=factor)


OPTIONS = [
    {},
    {"positives": ("mask",), "own": True, "inside": True},
    {"positives": ("labels", "mask"), "own": True, "triangle": True, "decoupled": True},
    {"positives": ("labels",), "excluded": ("mask",), "own": True, "triangle": True, "inside": True},
    {"positives": ("lists",), "excluded": ("labels",), "bias": True, "both": True, "decoupled": True},
    {"positives": ("mask", "lists"), "excluded": ("lists",), "both": True, "inside": True, "exclude_positives": False},
    {"positives": ("weights",), "excluded": ("labels", "mask", "lists"), "bias": True, "exclude_positives": False},
    {"positives": ("labels", "mask", "weights"), "own": True, "both": True, "inside": True, "decoupled": True},
]


def name_of(options):
    return ", ".join(name if value is True else "+".join(value) for name, value in options.items() if value) or "plain"


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_every_option_in_several_blocks(kernels, options):
    options = dict(options)
    both = options.pop("both", False)
    check(kernels, problem_of(**options), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coefficient", [1.0, 1e-7])
def test_half_precision(kernels, dtype, coefficient):
    """g is rounded to the dtype of the vectors, but not below its smallest numbers: small coefficients lose nothing."""
    problem = problem_of(("weights",), ("mask",), dtype=dtype, sizes=(34, 40))
    wanted = outcome(reference, exact(problem), True, coefficient)
    found = outcome(kernels, problem, True, coefficient)
    assert found.keys() == wanted.keys()
    for name in ("anchors", "keys"):
        assert found[name].dtype == torch.float32
        largest = wanted[name].norm(dim=1).max()
        assert largest > 0 and row_errors(found[name], wanted[name]).max() < 2 * torch.finfo(dtype).eps * largest
    for name in ("rows", "columns"):
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_are_read_and_not_rewritten(kernels, dtype):
    """But that g of float32 takes their place, so that it needs no memory of its own."""
    problem = problem_of(dtype=dtype, sizes=(20, 33))
    tile = Tile(slice(0, 20), slice(0, 33))
    products = problem.anchors.float() @ problem.all_keys.float().T
    before = products.clone()
    pairs = kernels.pairs(products, tile, problem, kernels.prepare(problem))
    rows = chunked.empty_statistics(problem, 20)
    kernels.statistics(products, tile, problem, pairs, rows, None)
    assert torch.equal(products, before)
    g = kernels.gradient(
        products, tile, problem, pairs, chunked.numbers_of(rows, torch.ones_like(rows[:, 0]), False), None
    )
    assert g.dtype == dtype and (g is products) == (dtype == torch.float32)
    assert dtype == torch.float32 or torch.equal(products, before)


def test_the_same_bits_twice(kernels):
    problem = problem_of(("labels", "weights"), ("lists",), sizes=(34, 40))
    first, second = outcome(kernels, problem, True), outcome(kernels, problem, True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lists_that_name_what_is_not_there(kernels):
    """Keys out of range are no pairs, entries beyond the last are not read, the greatest of duplicates counts."""
    offsets = torch.tensor([0, 4, 4, 6, 9])
    indices = torch.tensor([0, -1, 40, 2**40, 39, 39, 1, 1])
    weights = torch.tensor([1.0, 5.0, 5.0, 5.0, 0.5, 2.0, 3.0, 1.0])
    lists = Relation(offsets=offsets.to(DEVICE), indices=indices.to(DEVICE))
    for of, mass in ((lists, [1, 0, 1, 1]), (lists._replace(weights=weights.to(DEVICE)), [1, 0, 2, 3])):
        problem = problem_of(sizes=(4, 40))._replace(positives=of)
        rows, columns = chunked.statistics(kernels, problem, True)
        assert rows[:, 2].tolist() == mass and rows[:, 3].tolist() == [1, 0, 1, 1]
        assert columns[[0, 1, 39], 2].tolist() == [mass[0], mass[3], mass[2]] and columns[:, 3].sum() == 3


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("inside", [False, True])
def test_long_rows(kernels, inside):
    """Logits of hundreds: of an anchor without positives, and of pairs that take no part, exp(l) is infinite."""
    problem = problem_of(("labels",), ("mask",), own=True, inside=inside, sizes=(0, 40), temperature=1 / 400)
    lonely = problem.positives.anchor_ids.clone()
    lonely[::3] = -1
    problem = problem._replace(positives=problem.positives._replace(anchor_ids=lonely))
    found, wanted = outcome(kernels, problem), outcome(reference, exact(problem))
    assert wanted["rows"][:, 0].max() > 100 and (wanted["rows"][::3, 2] == 0).all()
    for name in ("rows", "anchors", "temperature"):
        assert torch.isfinite(found[name][found["rows"][:, 2] > 0] if name == "rows" else found[name]).all()
    largest = wanted["anchors"].norm(dim=1).max()
    assert row_errors(found["anchors"], wanted["anchors"]).max() < 1e-4 * largest


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_products_that_are_not_finite(kernels, value):
    """Show in the statistics of their row, and of no other."""
    problem = problem_of(("labels",), sizes=(20, 33))
    products = problem.anchors @ problem.all_keys.T
    products[3, 5] = value
    tile = Tile(slice(0, 20), slice(0, 33))
    rows = chunked.empty_statistics(problem, 20)
    kernels.statistics(
        products, tile, problem, kernels.pairs(products, tile, problem, kernels.prepare(problem)), rows, None
    )
    finite = torch.isfinite(rows).all(dim=1)
    assert not torch.isfinite(rows[3, 0]) and finite.sum() == 19 and not finite[3]


def test_launches_of_a_block(kernels, monkeypatch):
    """Two for the statistics of each direction and one for g; lists take one more for each relation."""
    monkeypatch.undo()
    problem = problem_of(("lists",), ("labels",), sizes=(64, 64))
    meta = Problem(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in problem))
    of_meta = [Relation(*(v if v is None else v.to("meta") for v in part)) for part in (meta.positives, meta.excluded)]
    meta = meta._replace(positives=of_meta[0], excluded=of_meta[1])
    with recorded("sm_90") as launches:
        outcome(kernels, meta)
    names = ["tile_list_kernel", "tile_rows_kernel", "tile_parts_kernel", "tile_gradient_kernel"]
    assert [launch.name for launch in launches] == names
    with recorded("sm_90") as launches:
        outcome(kernels, meta, True)
    forward = [*names[:3], "tile_columns_kernel", "tile_parts_kernel"]
    assert [launch.name for launch in launches] == [*forward, names[0], names[3]]
