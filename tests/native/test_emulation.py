"""The emulator of CUDA, on which other tests rely: it finds mistakes of kernels, and multiplies as tensor cores do."""

from __future__ import annotations

import ctypes

import pytest
import torch

GROUP = torch.arange(32) // 4  # of a lane, and its place there, as the manual of PTX counts
PLACE = torch.arange(32) % 4


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_barriers_are_needed(run, threads):
    def rotated(*barriers):
        values = torch.arange(float(threads))
        assert run("rotate", values, threads, 9, *barriers) == ""
        return values

    expected = torch.arange(float(threads)).roll(-9)
    assert torch.equal(rotated(True, True), expected)
    assert not torch.equal(rotated(False, True), expected)
    assert not torch.equal(rotated(True, False), expected)
    assert rotated(False, False).isnan().any()


def test_shared_memory_starts_as_nan(run):
    found = torch.zeros(3)
    assert run("leave", found, 3) == ""
    assert found.isnan().all()


@pytest.mark.parametrize(("left", "arrived"), [(0, 8), (1, 4), (2, 0)])
@pytest.mark.parametrize("valid", [16, 4, 0])
def test_copies_are_there_when_waited_for(run, left, arrived, valid):
    source, target = torch.arange(1.0, 9.0), torch.zeros(8)
    assert run("copy", source, target, valid, 0, left, True) == ""
    kept = source.where(torch.arange(8) % 4 * 4 < valid, 0)
    assert torch.equal(target[:arrived], kept[:arrived])
    assert target[arrived:].isnan().all()


def test_mistakes_of_copies(run):
    source, target = torch.zeros(12), torch.zeros(8)
    assert "a thread ends before its copies do" in run("copy", source, target, 16, 0, 1, False)
    assert "the target of an asynchronous copy is not aligned" in run("copy", source, target, 16, 8, 0, True)
    assert "the source of an asynchronous copy is not aligned" in run("copy", source[1:], target, 16, 0, 0, True)


DEADLOCK = "deadlock: the threads wait for one another"


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (0, ""),
        (1, DEADLOCK),
        (2, "lanes of a warp come to different instructions"),
        (3, DEADLOCK),
        (4, "an instruction of a part of a warp"),
        (5, "lanes of a warp come to different barriers"),
    ],
    ids=["together", "ends", "votes", "waits", "partial", "barriers"],
)
def test_lanes_that_diverge(run, way, said):
    assert run("diverge", way).removeprefix("hpkernels, emulated CUDA: ") == said


@pytest.mark.parametrize(
    ("barriers", "said"),
    [((15, 15), ""), ((1, 2), DEADLOCK), ((0, 16), "there is no such barrier")],
    ids=["same", "different", "none"],
)
def test_barriers_that_nobody_can_leave(run, barriers, said):
    assert run("named", *barriers).removeprefix("hpkernels, emulated CUDA: ") == said


@pytest.mark.parametrize("ending", [0, 1])
def test_threads_that_have_ended_are_not_waited_for(run, ending):
    sums = torch.zeros(32)
    assert run("some_exit", ending, sums) == ""
    assert torch.equal(sums, torch.full((32,), 32.0))


def test_launches_beyond_the_limits(run):
    assert run("nothing", 0, 32, 0) == ""
    for threads in (0, 33, 1056):
        assert "whole warps and at most 1024 threads" in run("nothing", 1, threads, 0)


@pytest.mark.parametrize(("hopper", "kibibytes"), [("0", 99), ("1", 227)])
def test_shared_memory_of_the_smallest_gpus_and_of_hopper(run, hopper, kibibytes, monkeypatch):
    monkeypatch.setenv("HPKERNELS_SM90", hopper)
    most = kibibytes * 1024
    assert run("nothing", 2, 1024, most) == ""
    assert f"too much shared memory: {most + 1} bytes of {most}" in run("nothing", 1, 32, most + 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(run, transposed, generator):
    """Registers of ldmatrix: lane 8 q + r names row r of matrix q, and gets two neighbours of a row, or of a column."""
    rows = torch.randperm(256, generator=generator).short()
    places = torch.randperm(32, generator=generator).int()
    found = torch.zeros(32, 4, 2, dtype=torch.int16)
    assert run("load", rows, places, transposed, found) == ""
    matrices = rows.view(32, 8)[places].view(4, 8, 8)
    for half in range(2):
        at = (2 * PLACE + half, GROUP) if transposed else (GROUP, 2 * PLACE + half)
        assert torch.equal(found[:, :, half], matrices[:, at[0], at[1]].T)


def positions(dtype):
    """Rows and columns of the elements that a lane holds of a, b and the sums, (32, elements) each.

    From the manual of PTX: matrix fragments of mma.m16n8k16 for .f16 and .bf16, of mma.m16n8k8 for .tf32.
    """
    group, place = GROUP[:, None], PLACE[:, None]
    i = torch.arange(4)
    sums = (group + 8 * (i >= 2), 2 * place + i % 2)
    if dtype == torch.float32:
        a = (group + 8 * (i % 2), place + 4 * (i >= 2))
        return a, (place + 4 * i[:2], group.expand(32, 2)), sums
    b = (2 * place + i % 2 + 8 * (i >= 2), group.expand(32, 4))
    i = torch.arange(8)
    a = (group + 8 * (i % 4 >= 2), 2 * place + i % 2 + 8 * (i >= 4))
    return a, b, sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_mma(exercises, dtype, generator):
    depth = 32 // dtype.itemsize
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, depth), (depth, 8)))
    sums = torch.randn(16, 8, generator=generator)
    of_a, of_b, of_sums = positions(dtype)
    held = [values[at].contiguous() for values, at in ((a, of_a), (b, of_b), (sums, of_sums))]
    multiply = getattr(exercises, f"multiply_{str(dtype).removeprefix('torch.')}")
    multiply(*(ctypes.c_void_p(values.data_ptr()) for values in held))
    found = torch.full((16, 8), torch.nan)
    found[of_sums] = held[2]
    if dtype == torch.float32:  # TF32 has 10 of the 23 bits of a fraction
        a, b = ((values.view(torch.int32) >> 13 << 13).view(torch.float32) for values in (a, b))
    torch.testing.assert_close(found.double(), sums.double() + a.double() @ b.double(), rtol=1e-6, atol=1e-6)
