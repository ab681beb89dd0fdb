"""What only the instructions show of the kernels with wgmma, and no emulator.

ptxas may make every wgmma wait for the one before, use a register of a product while it is written, give a thread that
loads more registers than it keeps, or move a fence. Nothing says so but wrong numbers, or the time.
"""

from __future__ import annotations

import re

import pytest

from benchmarks.compiled import cuda_resources, sass
from hpkernels import _native

ACCUMULATORS = {"64x64x16": 32, "64x128x16": 64, "64x256x16": 128}  # of a thread, by the shape of a wgmma


def registers(name, operands):
    """The numbers of the registers that an instruction names; addresses may be of two, other operands of several."""
    wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    named = re.findall(r"(?<![A-Z])(\[?)R(\d+)(\.64)?", operands)
    return {int(at) + i for bracket, at, pair in named for i in range((2 if pair else 1) if bracket else wide)}


def touched_in_flight(lines):
    """Instructions that name accumulators between a wgmma and the wait for it, in the order of the listing."""
    in_flight, found = set(), []
    for at, guard, name, rest in lines:
        if name.startswith("HGMMA"):
            first, count = re.match(r"R(\d+)", rest)[1], ACCUMULATORS[name.split(".")[1]]
            in_flight |= set(range(int(first), int(first) + count))
        elif (name == "EXIT" and not guard) or (name == "WARPGROUP.DEPBAR.LE" and rest.split()[-1] == "0x0"):
            in_flight = set()
        elif in_flight & registers(name, rest):
            found.append(f"{at} {name} {rest}")
    return found


def registers_of_loads(lines):
    """The most that the threads which load name after they have given registers back, and what they keep."""
    first = next(i for i, line in enumerate(lines) if line[2].startswith("USETMAXREG.DEALLOC"))
    last = next(i for i, line in enumerate(lines) if i > first and line[2] == "EXIT" and not line[1])
    return max(set().union(*(registers(*line[2:]) for line in lines[first:last]))) + 1, int(lines[first][3], 16)


def unfenced(lines):
    """Arrivals at a barrier after writes to a box that no fence has shown to wgmma, in the order of the listing."""
    writes, found = 0, []
    for at, _, name, _ in lines:
        if name == "FENCE.VIEW.ASYNC.S" or name.startswith("BAR."):
            writes = 0  # what threads wait for at a barrier of their own is no operand
        elif name.startswith(("LDGSTS", "STS")):
            writes += 1
        elif name.startswith("SYNCS.ARRIVE") and writes:
            found.append(at)
    return found


def lines_of(*listed):
    return sass._LINE.findall("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(listed)))


def test_products_in_flight_are_seen():
    products = "HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@P1 EXIT"
    for touching in ("FADD R2, R55, R3", "@P0 LDG.E.64 R23, [R8.64]", "MOV R24, R2"):
        assert len(touched_in_flight(lines_of(*products, touching))) == 1, touching
        assert not touched_in_flight(lines_of(*products, "WARPGROUP.DEPBAR.LE gsb0, 0x0", touching))
    assert not touched_in_flight(lines_of(*products, "FADD R2, R56, R23", "UMOV UR24, UR30"))


def test_registers_of_loads_are_seen():
    before, behind = ("MOV R99, R98", "@!P0 EXIT"), ("EXIT", "MOV R97, R1")
    given = "USETMAXREG.DEALLOC.CTAPOOL 0x18"
    assert registers_of_loads(lines_of(*before, given, "@P0 EXIT", "MOV R24, R2", *behind)) == (25, 24)


def test_writes_without_a_fence_are_seen():
    write, arrival = "STS [R16+UR25+0x30000], R185", "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR24], RZ"
    fence = "FENCE.VIEW.ASYNC.S"
    assert not unfenced(lines_of(write, write, "MEMBAR.ALL.CTA", fence, arrival))
    assert unfenced(lines_of(write, fence, write, arrival)) == ["0030"]
    assert unfenced(lines_of("LDGSTS.E.BYPASS.128 [R23], desc[UR38][R6.64], P1", arrival)) == ["0010"]


def test_instructions_of_wgmma():
    if reason := cuda_resources.reason_to_skip():
        pytest.skip(reason)
    library = _native._file("_C_cuda")
    names = re.findall(r" Function (\S*Sm90\S*):\n", sass.dump(library, "--dump-resource-usage"))
    if not names:
        pytest.skip(f"{library.name} is {_native.architectures(library)}")
    kernels = re.split(r"^\s*Function : ", sass.dump(library, "-sass", "-fun", ",".join(names)), flags=re.MULTILINE)[1:]
    assert len(kernels) == len(names)
    for kernel in kernels:
        name, lines = kernel.split(maxsplit=1)[0], sass._LINE.findall(kernel)
        products, waits = (sum(line[2].startswith(kind) for line in lines) for kind in ("HGMMA", "WARPGROUP.DEPBAR"))
        assert 0 < 2 * waits <= products, f"{name}: {waits} waits for {products} wgmma, are they serialised?"
        assert not touched_in_flight(lines), name
        assert not unfenced(lines), name
        taken, kept = registers_of_loads(lines)
        assert taken <= kept, f"{name}: threads that load take {taken} registers of {kept}"
