"""The reader of SASS: which spills are inside of loops."""

from __future__ import annotations

import pytest

from benchmarks.compiled import sass


def listing(*lines: str) -> str:
    """What ``cuobjdump -sass`` prints of instructions; a line that ends with a colon names the address of the next."""
    places, instructions = {}, []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = f"0x{16 * len(instructions):x}"
        else:
            instructions.append(line)
    words = (" ".join(places.get(word, word) for word in line.split()) for line in instructions)
    return "".join(
        f"        /*{16 * at:04x}*/    {line} ;    /* 0x000000ff04087824 */\n    /* 0x000fe200078e00ff */\n"
        for at, line in enumerate(words)
    )


def spills_of(*lines: str) -> int:
    (found,) = sass.loop_spills("\t\tFunction : a_kernel\n" + listing(*lines)).values()
    return found


LOOP = ("top:", "LDL R1, [R2]", "STL.64 [R2], R4", "LDG.E R1, desc[UR4][R2.64]", "@P0 BRA top")


@pytest.mark.parametrize(
    ("spills", "lines"),
    [
        pytest.param(0, ("STL [R1], R2", "top:", "NOP", "@P0 BRA top", "LDL R1, [R2]", "EXIT"), id="outside"),
        pytest.param(2, ("STL [R1], R2", *LOOP, "LDL R1, [R2]", "EXIT"), id="inside"),
        pytest.param(2, (*LOOP[:-1], "BRA.U UP0, top", "EXIT"), id="uniform condition"),
        pytest.param(2, ("top:", *LOOP[:-1], "BRA top"), id="without a condition"),
        pytest.param(
            3,
            ("top:", "LDL R1, [R2]", "inner:", "@!P1 BRA out", "LDL R3, [R4]", "BRA inner", "out:", "STL [R2], R2",
             "@P0 BRA top", "LDL R1, [R1]", "EXIT"),
            id="nested",
        ),
        pytest.param(0, ("@P0 BRA rare", "back:", "LDL R1, [R2]", "EXIT", "rare:", "FADD R1, R1, R1", "BRA back"),
                     id="a block at the end that branches back"),
        pytest.param(
            2,
            ("top:", "@P1 BRA rare", "back:", "LDL R1, [R2]", "@P0 BRA top", "STL [R1], R2", "EXIT", "rare:",
             "STL [R1], R2", "BRA back"),
            id="a block at the end that is part of a loop",
        ),
        pytest.param(
            2, ("top:", "CALL.REL.NOINC function", "@P0 BRA top", "EXIT", "function:", "LDL R1, [R1]", "STL [R1], R1",
                "RET.REL.NODEC R2 0x0"),
            id="a function called in a loop",
        ),
        pytest.param(
            0, ("CALL.REL.NOINC function", "top:", "FADD R1, R1, R1", "@P0 BRA top", "EXIT", "function:",
                "LDL R1, [R1]", "RET.REL.NODEC R2 0x0"),
            id="a function called outside",
        ),
        pytest.param(0, ("LDL R1, [R1]", "EXIT", "end:", "BRA end", "NOP"), id="the end of every kernel"),
        pytest.param(1, ("LDL R1, [R1]", "BRX R2 -0x90", "EXIT"), id="a table of branches"),
    ],
)  # fmt: skip
def test_spills_in_loops(spills, lines):
    assert spills_of(*lines) == spills


def test_functions_and_architectures_are_told_apart():
    text = "Fatbin elf code:\n================\narch = sm_80\ncode version = [1,8]\n\n\tcode for sm_80\n"
    text += "\t\tFunction : one(int)\n" + listing(*LOOP, "EXIT") + "\t\tFunction : other\n" + listing("EXIT")
    text += "arch = sm_90a\n\t\tFunction : one(int)\n" + listing("LDL R1, [R1]", "EXIT")
    assert sass.loop_spills(text) == {("sm_80", "one(int)"): 2, ("sm_80", "other"): 0, ("sm_90a", "one(int)"): 0}
