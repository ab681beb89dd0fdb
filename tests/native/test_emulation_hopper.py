"""The emulator of what sm_90a has of its own: it does what the manual of PTX says, and names mistakes."""

from __future__ import annotations

import ctypes

import pytest
import torch

PREFIX = "hpkernels, emulated CUDA: "
INIT, FENCE, ARRIVE, EXPECT, WAIT, OVERWRITE, LOAD = range(7)
RIGHT, NO_FENCE, NO_BEGIN, NO_COMMIT, NO_WAIT, OTHER_WARP, OTHER_LANE, OVERWRITTEN, TOUCHED = range(9)


@pytest.fixture
def steps(run):
    """``steps([(step, value), ...], ...)``: what is said, and `count` numbers of the box."""

    def steps(taken, rows=None, box_rows=8, row=0, element=0, count=0):
        rows = torch.zeros(8, 64, dtype=torch.int16) if rows is None else rows
        found = torch.zeros(count, dtype=torch.int16)
        shape = torch.tensor([*rows.shape, 2 * rows.stride(0), box_rows])
        taken = torch.tensor(taken, dtype=torch.int32).reshape(-1, 2)
        return run("steps", taken, len(taken), rows, shape, row, element, found, 2 * count).removeprefix(PREFIX), found

    return steps


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ([(INIT, 1), (WAIT, 1), (ARRIVE, 0), (WAIT, 0), (ARRIVE, 0), (WAIT, 1)], ""),
        ([(INIT, 2), (ARRIVE, 0), (ARRIVE, 0), (WAIT, 0)], ""),
        ([(INIT, 2), (ARRIVE, 0), (WAIT, 0)], "deadlock: * 1 threads at barrier 0 (1 of 2 arrivals and 0 bytes *"),
        ([(INIT, 1), (EXPECT, 1024), (WAIT, 0)], "deadlock: * (0 of 1 arrivals and 1024 bytes to come, phase 0)"),
        ([(INIT, 1), (ARRIVE, 0), (WAIT, 1)], "deadlock: *"),
        ([(INIT, 1), (EXPECT, 1024), (ARRIVE, 0)], "more arrivals than a phase has: *"),
        ([(INIT, 1), (EXPECT, 2**20)], "more bytes than a barrier counts: *"),
        ([(WAIT, 0)], "a barrier is used before it is initialised"),
        ([(INIT, 0)], "a barrier must expect 1 to 2^20 - 1 arrivals"),
        ([(INIT, 1), (INIT, 1)], "a barrier is initialised twice"),
        ([(INIT, 1), (OVERWRITE, 0), (ARRIVE, 0)], "a barrier has been written over"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1024), (LOAD, 0), (WAIT, 0)], ""),
        ([(INIT, 1), (EXPECT, 1024), (LOAD, 0)], "TMA uses a barrier without a fence after its initialisation"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1024), (LOAD, 0)], "a block ends before its copies by TMA do"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1008), (LOAD, 0), (WAIT, 0)], "more bytes came than were expected: *"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1040), (LOAD, 0), (WAIT, 0)], "deadlock: * 16 bytes to come, phase 0)"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1024), (LOAD, 64)], "the target of TMA is not aligned"),
        ([(INIT, 1), (FENCE, 0), (EXPECT, 1024), (LOAD, 62 * 1024 + 128)], "TMA writes beyond shared memory"),
    ],
)
def test_barriers_and_what_they_wait_for(steps, taken, said):
    found, _ = steps(taken)
    beginning, star, end = said.partition("*")
    if not star:
        assert found == said
    for part in said.split("*"):
        assert part.strip() in found
    assert found.startswith(beginning)


@pytest.mark.parametrize(("row", "element"), [(0, 0), (3, 64), (-2, 40), (90, 128)])
def test_boxes(steps, row, element, generator):
    """Chunk c of row r lies at chunk c xor r % 8; zeros are beyond the matrix, and NaN until the box has come."""
    rows = torch.randint(1, 1000, (99, 160), generator=generator).short()[:, :144]
    padded = torch.zeros(400, 400, dtype=torch.int16)
    padded[100:199, 100:244] = rows
    box = padded[100 + row :, 100 + element :][:16, :64]
    place = torch.arange(8) ^ torch.arange(16)[:, None] % 8
    swizzled = box.reshape(16, 8, 8).gather(1, place[:, :, None].expand(16, 8, 8))
    start = [(INIT, 1), (FENCE, 0), (EXPECT, 2048), (LOAD, 0)]
    said, found = steps([*start, (WAIT, 0)], rows, 16, row, element, 1024)
    assert said == ""
    assert torch.equal(found, swizzled.flatten())
    said, found = steps(start, rows, 16, row, element, 1024)
    assert (found == -1).all()


def test_maps_that_tma_refuses(steps):
    rows = torch.zeros(16, 64, dtype=torch.int16)
    for wrong in (rows[:, 4:], rows[::2, :40].as_strided((8, 40), (60, 1)), rows[:0]):
        assert steps([], wrong)[0] == "no tensor map"
    assert steps([], rows, box_rows=257)[0] == "no tensor map"
    assert steps([], rows[:, 8:], box_rows=256)[0] == ""


def swizzled(matrix, transposed):
    """The bytes of a matrix (rows, 64 elements) as an operand, by the canonical layouts of the manual of PTX.

    K-major: eight rows of 128 bytes each, then the next eight. MN-major: the elements are such rows, and 64 rows of the
    matrix lie in one; the next 64 are another block. Bits 4 to 6 of an address are changed by bits 7 to 9.
    """
    lines = torch.cat([part.T for part in matrix.split(64)]) if transposed else matrix
    lines = lines.contiguous().view(torch.uint8).view(-1, 8, 16)
    place = torch.arange(8) ^ torch.arange(len(lines))[:, None] % 8
    return lines.gather(1, place[:, :, None].expand_as(lines)).flatten()


def descriptor(start, leading=0, stride=1024):
    return ctypes.c_uint64((1024 + start) // 16 | leading // 16 << 16 | stride // 16 << 32 | 1 << 62)


@pytest.fixture
def product(run, generator):
    """``product(...)``: what is said, the sums found and those expected, of 16 of 64 elements of each row."""

    def product(columns=64, transposed=False, dtype=torch.float16, accumulate=True, step=0, way=RIGHT, of_left=False):
        left = torch.randn(64, 64, generator=generator).to(dtype)
        right = torch.randn(columns, 64, generator=generator).to(dtype)
        before = torch.randn(64, columns, generator=generator)
        memory = torch.cat([swizzled(left, of_left), swizzled(right, transposed)])
        # The manual's fragment of the sums: a warp has 16 rows, and a lane two numbers of each second 8 of them.
        thread, i = torch.arange(128)[:, None], torch.arange(columns // 2)
        at = (thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2)
        sums = torch.zeros(128, 128)
        sums[:, : columns // 2] = before[at]
        # 16 elements are 32 bytes of a row, or 16 rows of 128 bytes.
        of_right = descriptor(8192 + (2048 if transposed else 32) * step, 8192 if transposed else 0)
        options = (columns, of_left, transposed, dtype == torch.bfloat16, accumulate, way)
        said = run("wgmma", memory, len(memory), descriptor((2048 if of_left else 32) * step), of_right, *options, sums)
        found = torch.zeros(64, columns)
        found[at] = sums[:, : columns // 2]
        elements = slice(16 * step, 16 * step + 16)
        expected = before.double() * accumulate + left[:, elements].double() @ right[:, elements].double().T
        return said.removeprefix(PREFIX), found.double(), expected

    return product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "transposed"), [(8, False), (128, False), (64, True), (256, True)])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("of_left", [True, False])
def test_products(product, columns, transposed, dtype, accumulate, of_left):
    for step in (0, 3):
        said, found, expected = product(columns, transposed, dtype, accumulate, step, of_left=of_left)
        assert said == ""
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (NO_BEGIN, "wgmma without wgmma.fence between it and other uses of its registers"),
        (NO_COMMIT, "a warp ends before its products by wgmma do"),
        (NO_WAIT, "a warp ends before its products by wgmma do"),
        (OTHER_WARP, "warps of a group come to different instructions"),
        (OTHER_LANE, "lanes of a warp differ in a wgmma"),
        (TOUCHED, "accumulators are written while wgmma adds to them"),
    ],
)
def test_mistakes_of_products(product, way, said):
    found, sums, _ = product(way=way)
    assert found == said
    if way == NO_WAIT:
        assert sums.isnan().all()


def test_products_read_late_and_through_another_proxy(product, monkeypatch):
    assert product(way=NO_FENCE)[1].isnan().all()
    late = set()
    for seed in range(16):
        monkeypatch.setenv("HPKERNELS_EMULATION_SEED", str(seed))
        said, found, expected = product(way=OVERWRITTEN)
        assert said == ""
        late.add(not torch.allclose(found, expected, atol=1e-3))
    assert late == {True, False}


def test_descriptors_that_are_not_emulated(run):
    sums, memory = torch.zeros(128, 128), torch.zeros(16384, dtype=torch.uint8)
    right = descriptor(0)
    mistakes = {0: "without the 128-byte swizzle", 1 << 62 | 1 << 49: "with a base offset", 1 << 62: "beyond"}
    for wrong, said in mistakes.items():
        left = ctypes.c_uint64(wrong)
        assert said in run("wgmma", memory, 16384, left, right, 8, *[False] * 4, RIGHT, sums)
    for columns in (0, 12, 264):
        assert "no wgmma" in run("wgmma", memory, 16384, right, right, columns, *[False] * 4, RIGHT, sums)


@pytest.mark.parametrize(
    ("given", "taken", "said"),
    [
        (24, 240, ""),
        (32, 240, "deadlock: the threads wait for one another"),
        (24, 236, "registers must be 24, 32, ... or 256"),
        (24, 160, "registers are taken that are there, or given that are not"),
        (176, 240, "registers are taken that are there, or given that are not"),
    ],
)
def test_registers(run, given, taken, said):
    """384 threads start with 168 registers each, so that 504 are there for one thread of each group."""
    assert run("registers", given, taken).removeprefix(PREFIX) == said
