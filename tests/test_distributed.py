"""The losses over many devices: several processes over gloo against one that has the whole batch."""

from __future__ import annotations

import functools
import itertools
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from ranks import raised, run_ranks
from torch.nn.functional import normalize

import hpkernels
from hpkernels import backends, distributed
from hpkernels.distributed import _collectives as collectives
from hpkernels.ops.multi_positive_contrastive import registration

OP = "multi_positive_contrastive"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """``of_ranks(ranks)``: what functions return on each of 2 or 3 ranks, which are started once for all tests."""

    @functools.cache
    def run(ranks):
        found = run_ranks(_functions, ranks, tmp_path_factory.mktemp("ranks"), ranks)
        return {name: [of_rank[name] for of_rank in found] for name in found[0]}

    return run


def _functions(rank, ranks):
    found = {"losses": _losses(rank, ranks)}
    if ranks == 3:
        return found | {"collectives": _use_collectives(rank)}
    return found | {"training": _train_and_fail(rank)}


def _use_collectives(rank):
    """On three ranks, of which the second has no rows."""
    found = {}
    count = (2, 0, 3)[rank]
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool):
        own = (10 * rank + torch.arange(count * 4).view(count, 2, 2)).to(dtype)
        found[str(dtype)] = collectives.gathered_rows(own)
    found["vector"] = collectives.gathered_rows(torch.full((count,), rank))
    found["known counts"] = collectives.gathered_rows(torch.full((2, 3), rank).T[:2], counts=(2, 2, 2))
    found["total"] = collectives.total(torch.tensor([1e30, 1.0, -1e30]).roll(rank).view(3, 1))
    found["first"] = collectives.of_first_rank({"seed": 7 + rank})
    found["fingerprint"] = collectives.fingerprint(torch.arange(6).view(2, 3).T)
    collectives.agree("op", same=(1, "a"), D=512)
    found["differs"] = raised(collectives.agree, "op", D=512, temperature=0.5 + (rank == 1))
    found["missing"] = raised(collectives.agree, "op", **({} if rank == 2 else {"seed": 3}))

    def phase():
        with collectives.together("op") as shared:
            shared["D"] = 512
            if rank == 1:
                raise TypeError("op: `z` must be a tensor, got NoneType")

    found["failed"] = raised(phase)
    pair = dist.new_group([0, 2])
    if rank == 1:
        found["outside"] = raised(collectives.ranks_of, pair)
    else:
        found["pair"] = collectives.gathered_rows(torch.tensor([rank]), pair)
    found["after"] = collectives.total(torch.tensor(1), None)
    return found


def test_collectives(of_ranks):
    ranks = of_ranks(3)["collectives"]
    for rank, found in enumerate(ranks):
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool):
            rows, first, counts = found[str(dtype)]
            expected = torch.cat([torch.arange(8).view(2, 2, 2), 20 + torch.arange(12).view(3, 2, 2)]).to(dtype)
            assert torch.equal(rows, expected) and rows.dtype == dtype
            assert (first, counts) == ((0, 2, 2)[rank], (2, 0, 3))
        assert found["vector"].rows.tolist() == [0, 0, 2, 2, 2]
        assert found["known counts"].rows.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]
        # In the order of ranks: (1e30 - 1e30) + 1, (1 + 1e30) - 1e30, (-1e30 + 1) + 1e30.
        assert found["total"].tolist() == [[1.0], [0.0], [0.0]]
        assert found["first"] == {"seed": 7}
        assert found["fingerprint"] == collectives.fingerprint(torch.tensor([[0, 3], [1, 4], [2, 5]]))
        assert found["differs"] == (
            "ValueError: op: `temperature` must be the same on all ranks, got 0.5 on rank 0 and 2, 1.5 on rank 1"
        )
        assert (
            found["missing"]
            == "ValueError: op: `seed` must be the same on all ranks, got 3 on rank 0 and 1, None on rank 2"
        )
        sentence = "TypeError: op: `z` must be a tensor, got NoneType"
        told = f"RuntimeError: op: rank 1 has failed, and so no rank can go on: {sentence}"
        assert found["failed"] == (sentence if rank == 1 else told)
        assert found["after"] == 3
    assert ranks[1]["outside"].startswith("ValueError: hpkernels.distributed: `group` must have this process in it")
    assert [ranks[rank]["pair"].first for rank in (0, 2)] == [0, 1]
    assert ranks[2]["pair"].rows.tolist() == [0, 2]


def test_fingerprints_differ():
    values = torch.arange(6.0)
    others = [values.double(), values.view(2, 3), values.flip(0), values + 1e-6, values.half()]
    assert len({collectives.fingerprint(tensor) for tensor in [values, *others]}) == 6


# Of a batch of 6 images of 13 anchors each, which starts no word but the first.
GROUP, IMAGES, DIM = 13, 6, 20
SPLITS = {2: (4, 2), 3: (2, 1, 3)}
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}
SETTINGS = [
    {"seed": 3, "negative_rate": 0.1},
    {"seed": 3, "negative_rate": 0.02, "specific_weight": 0.7, "z_mixed": True},
    {"seed": -3, "negative_rate": 0.0, "specific_weight": 0.7, "variant": "separate", "reweight": False},
    {"seed": 5, "negative_rate": 1.0, "specific_weight": 0.3, "keep_specific_only": True, "base_temperature": None},
    {"negatives": True, "specific_weight": 0.7, "z_mixed": True, "variant": "separate", "symmetric": False},
    {"seed": 7, "negative_rate": 0.3, "symmetric": False, "reweight": False},
    {"negative_rate": 0.1},  # a seed is drawn
]


class Batch:
    """The whole batch, or the images of a rank; features of some anchors are those of others, so that all are close."""

    def __init__(self, dtype, images=slice(0, IMAGES)):
        generator = torch.Generator().manual_seed(0)

        def rows(count, dim):
            return normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64)).to(dtype)

        self.anchors = IMAGES * GROUP
        z, mixed, features, specific = (rows(self.anchors, dim) for dim in (DIM, DIM, 8, 6))
        self.pool, self.specific_pool = rows(20, 8), rows(30, 6)
        features[:GROUP] = -self.pool[0]  # an image without positives
        features[5 * GROUP :] = features[4 * GROUP : 5 * GROUP]
        self.negatives = torch.rand(GROUP, self.anchors, generator=generator) < 0.1
        own = slice(images.start * GROUP, images.stop * GROUP)
        self.z, self.mixed = z[own].clone().requires_grad_(), mixed[own].clone().requires_grad_()
        self.features, self.specific = features[own].clone(), specific[own].clone()

    def loss(self, function, settings, **options):
        """The loss by a function and the gradients of its branches."""
        options |= settings
        if options.pop("z_mixed", False):
            options["z_mixed"] = self.mixed
        if options.get("negatives"):
            options["negatives"] = self.negatives
        options |= {"specific": self.specific, "specific_pool": self.specific_pool, "anchors_per_image": GROUP}
        torch.manual_seed(11)
        loss = function(self.z, self.features, self.pool, **{"temperature": 0.3, **options})
        branches = [self.z, self.mixed] if "z_mixed" in options else [self.z]
        return loss.detach(), torch.autograd.grad(3 * loss, branches)


def images_of(rank, ranks):
    first = sum(SPLITS[ranks][:rank])
    return slice(first, first + SPLITS[ranks][rank])


def _losses(rank, ranks):
    return [
        Batch(dtype, images_of(rank, ranks)).loss(distributed.ghp_contrastive, settings, backend=backend, ddp=ddp)
        for backend, dtype, settings, ddp in _cases()
    ]


BY_BACKEND = {
    "reference": (torch.float32, torch.float64),
    "cpu": (torch.float32, torch.float64),
    "triton": (torch.float32,),
    "cuda": (torch.float32,),
}


def _compare(found, expected, dtype, ranks, ddp):
    loss, gradients = expected
    for of_rank in found:
        assert torch.equal(of_rank[0], found[0][0])  # the same bits on all ranks
        torch.testing.assert_close(of_rank[0], loss, rtol=EXACT[dtype], atol=0)
    for branch, gradient in enumerate(gradients):
        of_ranks = torch.cat([of_rank[1][branch] for of_rank in found]) / (ranks if ddp else 1)
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(of_ranks / scale, gradient / scale, rtol=0, atol=EXACT[dtype])


def _cases():
    """By each backend that can run here; those that are simulated take long."""
    for backend, dtypes in BY_BACKEND.items():
        if backends.availability(OP, backend, "cpu").ok:
            settings = SETTINGS if backend in ("reference", "cpu") else SETTINGS[1:5:3]
            for dtype, (number, of_case) in itertools.product(dtypes, enumerate(settings)):
                yield backend, dtype, of_case, number % 2 == 0


@pytest.mark.parametrize("ranks", SPLITS)
def test_one_loss_of_many_devices(ranks, of_ranks):
    """Loss and gradients of ranks with different numbers of images are those of one process."""
    found = of_ranks(ranks)["losses"]
    for number, (backend, dtype, of_case, ddp) in enumerate(_cases()):
        expected = Batch(dtype).loss(hpkernels.ghp_contrastive, of_case, backend=backend)
        assert expected[0] > 0.1
        _compare([of_rank[number] for of_rank in found], expected, dtype, ranks, ddp)


class Head(torch.nn.Module):
    """The projection of a training step, and the loss of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.code = torch.nn.Linear(8, DIM)

    def forward(self, features):
        return normalize(self.code(features).tanh())


def _step(batch, model, function):
    """The gradients of the parameters after one step."""
    options = {"anchors_per_image": GROUP, "negative_rate": 0.1, "seed": 3, "temperature": 0.3}
    # The codes of both branches by one forward pass, as DistributedDataParallel wants it.
    z, mixed = model(torch.cat((batch.features, batch.features.flip(1)))).chunk(2)
    function(z, batch.features, batch.pool, z_mixed=mixed, **options).backward()
    return [parameter.grad for parameter in model.parameters()]


def _train_and_fail(rank):
    """What two ranks get in training, and of calls in which one of them is wrong."""
    batch, found = Batch(torch.float32, images_of(rank, 2)), {}
    model = torch.nn.parallel.DistributedDataParallel(Head())
    found["parameters"] = _step(batch, model, distributed.ghp_contrastive)
    settings = {"specific_weight": 0.5, "negative_rate": 0.1, "seed": 3}

    def fails(by_rank_1=None, **by_both):
        changed = (by_both, by_rank_1 or {})[rank if by_rank_1 else 0]
        arguments = {"z": batch.z, "features": batch.features, "pool": batch.pool, "anchors_per_image": GROUP}
        arguments |= {"specific": batch.specific, "specific_pool": batch.specific_pool} | settings | changed
        return raised(distributed.ghp_contrastive, **arguments)

    bad = batch.z.detach().clone()
    bad[3, 2] = torch.nan
    found["not finite"] = fails({"z": bad})
    found["features of another rank"] = fails({"features": batch.features[:-1]})
    found["requires a gradient"] = fails({"features": batch.features.clone().requires_grad_()})
    found["ddp"] = fails({"ddp": 1})
    found["temperature"] = fails({"temperature": 0.5})
    found["dtype"] = fails({"z": batch.z.detach().double()})
    found["dim"] = fails({"z": batch.z[:, :7]})
    found["pool"] = fails({"pool": batch.pool.roll(1, 0)})
    found["z_mixed"] = fails({"z_mixed": batch.z})
    found["seed"] = fails({"seed": None})
    found["weight"] = fails({"specific_weight": 0.25})
    found["unused"] = fails({"specific_weight": 0.0}, specific_weight=torch.tensor(0.0))
    found["negatives"] = fails({"negatives": batch.negatives})
    found["columns"] = fails(negatives=batch.negatives[:, 1:])
    for place in ("multi_positive_contrastive", "contrastive_pairs"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(registration, place, Mock(side_effect=MemoryError(place)))
            found[place] = fails()

    def twice():
        loss = distributed.ghp_contrastive(batch.z, batch.features, batch.pool, anchors_per_image=GROUP, seed=3)
        (gradient,) = torch.autograd.grad(loss, batch.z, create_graph=True)
        gradient.sum().backward()

    found["twice"] = raised(twice)
    weight = torch.tensor(0.5)
    found["after"] = batch.loss(distributed.ghp_contrastive, settings | {"specific_weight": weight}, backend="cpu")
    with torch.no_grad():
        found["no gradient"] = distributed.ghp_contrastive(
            batch.z, batch.features, batch.pool, anchors_per_image=GROUP, temperature=0.3, seed=3
        )
    alone = [dist.new_group([member]) for member in range(2)][rank]
    found["alone"] = batch.loss(distributed.ghp_contrastive, settings, group=alone, ddp=True)
    found["one process"] = batch.loss(hpkernels.ghp_contrastive, settings)
    return found


def test_training_and_failures(of_ranks):
    ranks = of_ranks(2)["training"]
    whole = Batch(torch.float32)
    expected = _step(whole, Head(), hpkernels.ghp_contrastive)
    for found in ranks:
        # DistributedDataParallel leaves the same on all ranks: that of one process.
        torch.testing.assert_close(found["parameters"], expected, rtol=1e-5, atol=1e-6 * expected[0].abs().max().item())

    begins = "distributed.ghp_contrastive: "
    for name, sentence in {
        "not finite": "ValueError: {}`z` must be finite, got nan in row 3",
        "features of another rank": "ValueError: {}`features` must be of shape (26, D), got ",
        "requires a gradient": "ValueError: {}`features` must not require a gradient",
        "ddp": "TypeError: {}`ddp` must be True or False, got int 1",
        "multi_positive_contrastive": "MemoryError: multi_positive_contrastive",
        "contrastive_pairs": "MemoryError: contrastive_pairs",
    }.items():
        sentence = sentence.format(begins)
        assert ranks[1][name].startswith(sentence), name
        told = f"RuntimeError: {begins}rank 1 has failed, and so no rank can go on: {sentence}"
        assert ranks[0][name].startswith(told), name
    for name, what in {
        "temperature": "`temperature` must be the same on all ranks, got 0.6 on rank 0, 0.5 on rank 1",
        "dtype": "`dtype of z` must be the same on all ranks, got torch.float32 on rank 0, torch.float64 on rank 1",
        "dim": f"`D of z` must be the same on all ranks, got {DIM} on rank 0, 7 on rank 1",
        "pool": "`pool` must be the same on all ranks, got float32 (20, 8) ",
        "z_mixed": "`z_mixed` must be the same on all ranks, got None on rank 0, a tensor on rank 1",
        "seed": "`seed` must be the same on all ranks, got 3 on rank 0, None on rank 1",
        "weight": "`specific_weight` must be the same on all ranks, got 0.5 on rank 0, 0.25 on rank 1",
        "unused": "`specific` must be the same on all ranks, got used on rank 0, not used on rank 1",
        "negatives": "`negatives` must be the same on all ranks, got None on rank 0, bool (13, 78) ",
        "columns": "`negatives` must be of shape (13, 78), got bool of shape (13, 77)",
    }.items():
        for found in ranks:
            assert found[name].startswith(f"ValueError: {begins}{what}"), name
    for found in ranks:
        assert "double backward is not supported" in found["twice"]
        assert torch.equal(found["alone"][0], found["one process"][0])
        assert torch.equal(found["alone"][1][0], found["one process"][1][0])

    settings = {"specific_weight": 0.5, "negative_rate": 0.1, "seed": 3}
    expected = whole.loss(hpkernels.ghp_contrastive, settings, backend="cpu")
    _compare([found["after"] for found in ranks], expected, torch.float32, 2, ddp=True)
    alone = hpkernels.ghp_contrastive(
        whole.z, whole.features, whole.pool, anchors_per_image=GROUP, temperature=0.3, seed=3
    )
    for found in ranks:
        torch.testing.assert_close(found["no gradient"], alone.detach(), rtol=1e-6, atol=0)
