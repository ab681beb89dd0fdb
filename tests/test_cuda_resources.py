"""Registers and stack of the CUDA kernels: of the library as it is built, and how they are read and kept."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.compiled import cuda_resources
from benchmarks.compiled.cuda_resources import Row
from hpkernels import _native

LISTED = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function void hpk::(anonymous namespace)::rows_bwd_kernel<hpk::GradientSm80<__nv_bfloat16, 512>, true>(hpk::Rows, int):
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function hpk::(anonymous namespace)::bits_kernel(unsigned int const*, long):
  REG:31 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function void hpk::rows_bwd_kernel<hpk::StripSm90<__half> >(hpk::StripSm90<__half>::Operands):
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1048 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ROWS = [
    Row("bits_kernel", "", "", "sm_80", 31, 0, 0, 2048),
    Row("rows_bwd_kernel", "bfloat16", "GradientSm80<bfloat16, 512>, true", "sm_80", 255, 16, 8, 0),
    Row("rows_bwd_kernel", "float16", "StripSm90<half>", "sm_90a", 168, 0, 0, 1024),
]


@pytest.fixture
def library():
    if reason := cuda_resources.reason_to_skip():
        pytest.skip(reason)
    return _native._file("_C_cuda")


def test_no_kernel_spills(library):
    """And none takes more registers than what is committed for the same compiler."""
    rows = cuda_resources.rows_of(library)
    assert rows and {row.kernel.endswith("_kernel") for row in rows} == {True}
    assert cuda_resources.complaints(rows, cuda_resources.read(cuda_resources.file_of(rows))) == []


def test_command(library, capsys):
    main(["resources", "--cuda", "--check"])
    assert f"compiled for {_native.architectures(library)}" in capsys.readouterr().out


def test_reading():
    assert cuda_resources.parse(LISTED) == ROWS
    assert cuda_resources.parse("") == []
    spills = {("sm_90a", "void hpk::rows_bwd_kernel<hpk::StripSm90<__half> >(hpk::StripSm90<__half>::Operands)"): 3}
    assert cuda_resources.parse(LISTED, spills) == [*ROWS[:2], replace(ROWS[2], loop_spills=3)]


def test_what_is_kept_in_memory_is_refused_in_loops_and_if_it_is_much():
    assert cuda_resources.complaints([*ROWS, replace(ROWS[0], stack_bytes=1000, local_bytes=24)]) == []
    assert cuda_resources.complaints([replace(ROWS[2], loop_spills=2), replace(ROWS[0], local_bytes=1032)]) == [
        "rows_bwd_kernel<StripSm90<half>>, sm_90a loads or stores local memory in loops: 2 instructions",
        "bits_kernel<>, sm_80 has 0 bytes of stack and 1032 bytes of local memory, must have at most 1024",
    ]


def test_more_registers_are_refused():
    kernel = replace(ROWS[2], compiler="nvcc 13.0.88")
    more = replace(kernel, registers=172)
    assert cuda_resources.complaints([more], [kernel]) == [
        "rows_bwd_kernel<StripSm90<half>>, sm_90a must take at most 168 registers, takes 172"
    ]
    for fine in (kernel, replace(kernel, registers=160), replace(more, compiler="nvcc 13.1.80")):
        assert cuda_resources.complaints([fine], [kernel]) == []


def test_files_and_tables(tmp_path, monkeypatch):
    rows = [replace(row, compiler="nvcc 13.0.88") for row in ROWS]
    file = cuda_resources.file_of(rows, tmp_path)
    assert file == tmp_path / "cuda-13.0" / "resources.csv"
    assert cuda_resources.read(file) == []
    monkeypatch.setattr(results, "commit", lambda: "abc")
    cuda_resources.write(file, rows)
    kept = cuda_resources.read(file)
    assert [replace(row, commit="", date="") for row in kept] == rows
    assert {row.commit for row in kept} == {"abc"} and all(row.date for row in kept)
    assert results.read_folder(file.parent) == []  # no times
    page = tmp_path / "page.md"
    page.write_text(f"before\n{cuda_resources.BEGIN}\nold\n{cuda_resources.END}\nafter\n")
    cuda_resources.write_tables(page, tmp_path)
    assert page.read_text().splitlines() == [
        "before",
        cuda_resources.BEGIN,
        "### nvcc 13.0.88",
        "",
        f"3 compiled variants; commit abc, {kept[0].date[:10]}.",
        "",
        "| kernel | sm_80 | sm_90a |",
        "|---|---|---|",
        "| `bits_kernel` | 31 |  |",
        "| `rows_bwd_kernel` | 255, 24 bytes in memory |  |",
        "| `rows_bwd_kernel`, wgmma |  | 168 |",
        cuda_resources.END,
        "after",
    ]


def test_page_has_the_committed_tables(repository):
    """And nothing that spills is committed."""
    page = (repository / "docs" / "cuda.md").read_text()
    own = page[page.index(cuda_resources.BEGIN) : page.index(cuda_resources.END)]
    files = sorted((repository / "benchmarks" / "results").glob("cuda-*/resources.csv"))
    assert own.count("###") == len(files)
    for rows in map(cuda_resources.read, files):
        assert "\n".join(cuda_resources.table_of(rows)) in own
        assert cuda_resources.complaints(rows) == []


def test_a_library_older_than_its_sources(tmp_path):
    library, sources = tmp_path / "_C_cuda.so", tmp_path / "csrc"
    (sources / "emulation").mkdir(parents=True)
    files = {"kernel.cu": 99, "kernel.cuh": 101, "notes.md": 101, "emulation/cuda.h": 101}
    for name, time in (files | {"../_C_cuda.so": 100}).items():
        (sources / name).touch()
        os.utime(sources / name, (time, time))
    assert cuda_resources.newer_sources(library, sources) == ["kernel.cuh"]
