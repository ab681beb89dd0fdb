"""The losses over many devices: several processes over gloo against one that has the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import raised, run_ranks
from torch.nn.functional import normalize

import hpkernels
from hpkernels import backends, distributed
from hpkernels.distributed import _collectives as collectives

OP = "multi_positive_contrastive"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


def _use_collectives(rank):
    """Called on each of three ranks, of which the second has no rows."""
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


def test_collectives(tmp_path):
    ranks = run_ranks(_use_collectives, 3, tmp_path)
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


def _losses(rank, ranks, cases):
    return [
        Batch(dtype, images_of(rank, ranks)).loss(distributed.ghp_contrastive, settings, backend=backend, ddp=ddp)
        for backend, dtype, settings, ddp in cases
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


def _can_run(backend):
    found = backends.availability(OP, backend, "cpu")
    return pytest.param(backend, marks=pytest.mark.skipif(not found.ok, reason=found.reason))


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("backend", [_can_run(backend) for backend in BY_BACKEND])
def test_one_loss_of_many_devices(backend, ranks, tmp_path):
    """Loss and gradients of ranks with different numbers of images are those of one process."""
    settings = SETTINGS if backend in ("reference", "cpu") else SETTINGS[1:5:3]
    cases = [
        (backend, dtype, of_case, number % 2 == 0)
        for dtype in BY_BACKEND[backend]
        for number, of_case in enumerate(settings)
    ]
    found = run_ranks(_losses, ranks, tmp_path, ranks, cases)
    for number, (_, dtype, of_case, ddp) in enumerate(cases):
        expected = Batch(dtype).loss(hpkernels.ghp_contrastive, of_case, backend=backend)
        assert expected[0] > 0.1
        _compare([of_rank[number] for of_rank in found], expected, dtype, ranks, ddp)
