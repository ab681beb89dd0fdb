"""The losses over many devices: several processes over gloo against one that has the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import raised, run_ranks

from hpkernels.distributed import _collectives as collectives

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
