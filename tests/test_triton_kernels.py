"""The Triton kernels of all ops: their table of configurations, and what they compile to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import results
from benchmarks.compiled import resources
from benchmarks.compiled.resources import TARGETS, Row
from hpkernels import _native, backends
from hpkernels.launches import Launch, Sizes, kernel_calls, recorded
from hpkernels.ops import _triton

pytest.importorskip("triton")

import triton
import triton.language as tl

from hpkernels.ops.hidden_positives.triton import programs, tile_of_triangle
from hpkernels.ops.local_propagation.triton import _order_statistics

ARCHITECTURES = {"interpreter", *TARGETS}
ROW = Row("a_fwd_kernel", "sm_80", "2", "float16", "BLOCK_N=64 HAS_MASK=True", 4, 3, 128, shared_bytes=4096)


@pytest.fixture
def own_table(monkeypatch, tmp_path):
    """``own_table(text)``: the table with a file of one's own that holds `text`, or without one for None."""

    def table(text):
        file = tmp_path / "own.json"
        if text is not None:
            file.write_text(text)
        monkeypatch.setenv(_triton.TABLE_VARIABLE, str(file))
        return _triton.table.__wrapped__()

    return table


@pytest.fixture
def allow_tf32():
    """``allow_tf32(allowed)``: set what PyTorch allows for products of float32 matrices."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield partial(setattr, torch.backends.cuda.matmul, "allow_tf32")
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("op", backends.registered_ops())
def test_table_of_an_op(op, repository):
    kernels = json.loads((repository / "hpkernels" / "ops" / op / "triton.json").read_text())
    for kernel, by_arch in kernels.items():
        assert by_arch.keys() == ARCHITECTURES, kernel
        (names,) = {tuple(sorted(entry)) for by_size in by_arch.values() for entry in by_size.values()}
        assert {"num_warps", "num_stages"} < set(names), kernel
        for by_size in by_arch.values():
            assert by_size.keys() in ({"any"}, {"2", "4"}), kernel
            assert all(type(value) is int and value > 0 for entry in by_size.values() for value in entry.values())


@pytest.mark.parametrize("dtype", _triton.DTYPES, ids=str)
@pytest.mark.parametrize("op", backends.registered_ops())
def test_every_kernel_is_launched(op, dtype, repository):
    kernels = json.loads((repository / "hpkernels" / "ops" / op / "triton.json").read_text())
    for arch in TARGETS:
        with recorded(arch) as launches:
            for call in kernel_calls(op, dtype, "meta").values():
                call()
        assert set(kernels) <= {launch.name for launch in launches}


def test_own_table_comes_first(own_table):
    kernel, by_arch = next(iter(_triton.table().items()))
    size, entry = next(iter(by_arch["sm_90"].items()))
    changed = entry | {"num_warps": 2 * entry["num_warps"]}
    table = own_table(json.dumps({kernel: {"sm_90": {size: changed}}}))
    assert table[kernel]["sm_90"] == by_arch["sm_90"] | {size: changed}
    assert table[kernel]["sm_80"] == by_arch["sm_80"]
    assert own_table("{}") == _triton.table()


FOUND = "hidden_positives_fwd_kernel"
LOSS = "multi_positive_contrastive"
LOSS_KERNELS = {kernel for kernel in _triton.table() if kernel.startswith(("contrastive_", "sampled_"))}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"must name a JSON file that can be read, got .*own\.json: .*No such file"),
        ("{", r"must name a JSON file that can be read, got .*own\.json: "),
        ("3", r"own\.json must be an object of some of .*hidden_positives_fwd_kernel.*, got 3"),
        ('{"a_kernel": {}}', r"own\.json must be an object of some of .*, got a_kernel"),
        ('{"KERNEL": {"sm_70": {}}}', r"KERNEL must be an object of some of .*sm_80.*, got sm_70"),
        ('{"KERNEL": {"sm_90": {"8": {}}}}', r"KERNEL: sm_90 must be an object of some of .*2.*4, got 8"),
        ('{"KERNEL": {"sm_90": {"2": []}}}', r"KERNEL: sm_90: 2 must be an object of BLOCK_N, .*num_stages, got \[\]"),
        ('{"KERNEL": {"sm_90": {"2": {"BLOCK": 2}}}}', r"2 must be an object of BLOCK_N, .*num_stages, got BLOCK$"),
        ('{"KERNEL": {"sm_90": {"2": ENTRY}}}', r"2: num_warps must be a positive integer, got '4'"),
    ],
)
def test_errors_of_own_tables(text, message, own_table):
    entry = _triton.table()[FOUND]["sm_90"]["2"] | {"num_warps": "4"}
    text = text and text.replace("KERNEL", FOUND).replace("ENTRY", json.dumps(entry))
    with pytest.raises(ValueError, match=rf"^{_triton.TABLE_VARIABLE}.*{message.replace('KERNEL', FOUND)}"):
        own_table(text)


def check_resources(repository, tmp_path, *arguments, **variables):
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache")} | os.environ | {"TRITON_INTERPRET": "0"} | variables
    command = [sys.executable, "-m", "benchmarks", "resources", "--check", *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-10000:]  # below what the compiler printed


@pytest.mark.deep
def test_resources(repository, tmp_path):
    """Every kernel for Hopper in float16: no spills in loops, no more than before, within the limits."""
    check_resources(repository, tmp_path, "--quick")


@pytest.mark.deep
@pytest.mark.repeated
def test_resources_of_all_targets(repository, tmp_path):
    """Every configuration of every kernel for every target."""
    check_resources(repository, tmp_path)


@pytest.mark.packaging
def test_resources_with_the_oldest_triton(repository, tmp_path):
    oldest = "triton==3.6.0"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "oldest", oldest]
    subprocess.run(command, check=True, capture_output=True)
    check_resources(repository, tmp_path, PYTHONPATH=str(tmp_path / "oldest"))


COMPILE = """
import json, sys, triton
from benchmarks.compiled import resources
found = {}
for job in resources.jobs(["float16"], ["contrastive", "multi_positive_contrastive"], ["sm_90"]):
    if job.row.kernel in sys.argv[1:] and job.row.kernel not in found:
        found[job.row.kernel] = triton.compile(job.source, target=job.target, options=job.options).asm["ptx"]
json.dump(found, sys.stdout)
"""
WITH_LOGITS = (
    "contrastive_blocks_fwd_kernel", "contrastive_blocks_bwd_kernel", "sampled_rows_fwd_kernel",
    "sampled_rows_bwd_kernel", "sampled_columns_bwd_kernel", "contrastive_rows_fwd_kernel",
    "contrastive_rows_bwd_kernel", "tile_rows_kernel", "tile_columns_kernel", "tile_gradient_kernel",
)  # fmt: skip


def contracted(ptx):
    """How many exponentials are of a difference with a product that is not rounded, or that ptxas need not round."""
    definition = r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(%\w+), ([^;]*);"
    made = {register: (name, given.split(", ")) for name, register, given in re.findall(definition, ptx, re.M)}
    exponents = re.findall(r"ex2\.approx\S*\s+%\w+, (%\w+);", ptx)
    assert exponents
    found = 0
    for register in exponents:
        name, given = made[register]
        while name in ("mul.f32", "mov.b32", "min.NaN.f32"):  # times log2(e), which ends the chain that is looked at
            name, given = made.get(given[0], ("", []))
        found += name.startswith("fma") or any(made.get(operand, ("",))[0] == "mul.f32" for operand in given)
    return found


@pytest.mark.deep
def test_logits_are_rounded_before_anything_is_subtracted(repository, tmp_path):
    """In the kernels of both passes alike: the interpreter rounds everything, a GPU what it is told to."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache")} | os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, *WITH_LOGITS]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-10000:]
    compiled = json.loads(done.stdout)
    assert set(compiled) == set(WITH_LOGITS)
    assert {kernel: contracted(ptx) for kernel, ptx in compiled.items()} == dict.fromkeys(WITH_LOGITS, 0)


@pytest.mark.parametrize(
    ("arch", "dtype", "allowed", "of_the_loss", "compared"),
    [
        ("sm_80", torch.float32, False, "ieee", "ieee"),
        ("sm_90", torch.float32, False, "tf32x3", "tf32x3"),
        ("sm_90", torch.float32, True, "tf32", "tf32x3"),
        ("sm_90", torch.float16, True, "ieee", "ieee"),
        ("sm_100", torch.float32, False, "tf32x3", "ieee"),
        ("gfx942", torch.float32, False, "ieee", "ieee"),
    ],
)
def test_precision_of_products(allow_tf32, arch, dtype, allowed, of_the_loss, compared):
    """TF32 alone is never used where products are compared, and elsewhere where PyTorch's setting allows it."""
    allow_tf32(allowed)
    for op, expected in (
        ("multi_positive_contrastive", of_the_loss),
        ("hidden_positives", compared),
        ("masked_topk", compared),
    ):
        with recorded(arch) as launches:
            for call in kernel_calls(op, dtype, "meta").values():
                call()
        launches = [launch for launch in launches if (launch.name in LOSS_KERNELS) == (op == LOSS)]
        assert {launch.constants["PRECISION"] for launch in launches if "PRECISION" in launch.constants} == {expected}


@pytest.fixture
def three_products(monkeypatch):
    """Ranking and discovery by three products of TF32, in the interpreter or on the GPU."""
    monkeypatch.setattr(_triton, "comparable_precision", lambda like: "tf32x3")
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_three_products_of_tf32_are_as_exact_as_float32(three_products):
    topk = backends.implementation("masked_topk", "triton")
    query, pool = (torch.randn(count, 100, generator=torch.Generator().manual_seed(count)) for count in (35, 50))
    exact = query.double() @ pool.double().T
    values, indices = topk.forward(query.to(three_products), pool.to(three_products), len(pool))
    errors = values.cpu().double() - exact.gather(1, indices.cpu())
    assert errors.abs().max() < 2**-22 * (query.abs() @ pool.abs().T).max()


def test_three_products_of_tf32_do_not_depend_on_which_is_left(three_products):
    topk = backends.implementation("masked_topk", "triton")
    one, other = (torch.randn(64, 100, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def products(query, pool):
        values, indices = topk.forward(query.to(three_products), pool.to(three_products), len(pool))
        return torch.empty_like(values).scatter_(1, indices, values).cpu()

    assert torch.equal(products(one, other), products(other, one).T)


def test_three_products_of_tf32_of_what_is_not_finite(three_products):
    topk = backends.implementation("masked_topk", "triton")
    query = torch.tensor([[torch.inf, 1.3], [-torch.inf, 1.3], [torch.nan, 1.3], [0.7, 1.3]])
    (plus,), (minus,), (nan,), (finite,) = topk.forward(
        query.to(three_products), torch.tensor([[1.3, 0.7]]).to(three_products), 1
    )[0].tolist()
    assert plus == torch.inf and minus == -torch.inf and nan != nan and finite == pytest.approx(1.82)


@triton.jit
def tiles_kernel(found, tiles, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    program = tl.arange(0, PROGRAMS)
    row, column = tile_of_triangle(program, tiles, GROUP)
    tl.store(found + program, row)
    tl.store(found + PROGRAMS + program, column)


@pytest.mark.parametrize("group", [1, 2, 4, 16])
def test_discovery_visits_each_tile_of_the_triangle_once(group):
    """And those that run at a time are near one another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tiles in [*range(1, 2 * group + 2), 3 * group, 4 * group + 1]:
        count = programs(tiles, group)
        found = torch.empty((2, triton.next_power_of_2(count)), dtype=torch.int32, device=device)
        tiles_kernel[1,](found, tiles, GROUP=group, PROGRAMS=found.shape[1])
        places = found[:, :count].cpu()
        visited = places[:, (places[0] <= places[1]) & (places[1] < tiles)]
        assert (visited >= 0).all()
        assert torch.unique(visited, dim=1).shape[1] == visited.shape[1] == tiles * (tiles + 1) // 2
        squares = places.unfold(1, group * group, group * group)
        assert (squares.amax(dim=2) - squares.amin(dim=2) < group).all()


@triton.jit
def order_statistics_kernel(keys, found, count, first, second, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    own = tl.load(keys + rows[:, None] * count + columns, mask=columns < count, other=0x7FFFFFFF)
    one, other = _order_statistics(own, count, first, second)
    tl.store(found + rows, one)
    tl.store(found + ROWS + rows, other)


def test_order_statistics_of_any_keys():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, least, most = 21, -(2**31), 2**31 - 1
    keys = torch.randint(least, most, (8, count), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    keys[1] = keys[1] % 5 - 2
    keys[2], keys[3], keys[4] = 0, least, most
    keys[5, ::2], keys[5, 1::2] = least, most
    keys[6] = torch.arange(count) - 10
    keys[7, :20] = most
    found = torch.empty((2, 8), dtype=torch.int32, device=device)
    for rank in range(count):
        ranks = rank, count - 1 - rank
        order_statistics_kernel[1,](keys.to(device), found, count, *ranks, ROWS=8, COLUMNS=32)
        assert torch.equal(found.cpu(), keys.sort(dim=1).values[:, ranks].T)


@pytest.mark.parametrize(
    "row, complaint",
    [
        (ROW, None),
        (replace(ROW, registers=100, shared_bytes=2048), None),
        (replace(ROW, constants="BLOCK_N=128", registers=255, shared_bytes=99 * 1024), None),
        (replace(ROW, constants="BLOCK_N=128", spill_bytes=1024), None),
        (replace(ROW, constants="BLOCK_N=128", spill_bytes=1032), "must take at most 1024 bytes of spills, takes 1032"),
        (replace(ROW, spill_bytes=8), "must take at most 0 bytes of spills, takes 8"),
        (replace(ROW, loop_spills=2), "spills in loops: 2 instructions load or store memory"),
        (replace(ROW, target="gfx942", shared_bytes=65537), "must take at most 65536 bytes of shared memory"),
        (replace(ROW, target="sm_100", shared_bytes=227 * 1024 + 1), "must take at most 232448 bytes of shared memory"),
        (replace(ROW, registers=129), "must take at most 128 registers, takes 129"),
        (replace(ROW, shared_bytes=4100), "must take at most 4096 bytes of shared memory, takes 4100"),
    ],
)
def test_complaints(row, complaint):
    found = resources.complaints([row], [ROW])
    assert len(found) == (complaint is not None)
    if complaint:
        assert complaint in found[0] and found[0].startswith(str(row))


def test_configurations_that_nothing_launches():
    table = {"a_fwd_kernel": {target: {"2": {}} for target in TARGETS}}
    rows = [replace(ROW, target=target) for target in TARGETS]
    assert resources.unused(rows, table) == []
    table["a_fwd_kernel"]["sm_90"]["4"] = {}
    table["a_bwd_kernel"] = {target: {"any": {}} for target in TARGETS}
    expected = [("a_fwd_kernel", "sm_90", "4"), *(("a_bwd_kernel", target, "any") for target in TARGETS)]
    assert resources.unused(rows, table) == [
        f"no call launches {kernel} as it is configured for {target}, element size {size}"
        for kernel, target, size in expected
    ]


def test_usage_of_a_cubin():
    text = " Function a_kernel:\n  REG:168 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:412 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert resources.usage_of_cuobjdump(text) == {"registers": 168, "spill_bytes": 24}


@pytest.mark.parametrize("scratch, spilled, spill_bytes", [(0, 0, 0), (16, 2, 16), (0, 2, 8)])
def test_usage_of_an_assembly(scratch, spilled, spill_bytes):
    usage = {"private_segment_fixed_size": scratch, "sgpr_count": 32, "sgpr_spill_count": 1, "vgpr_count": 96}
    text = "".join(f"    .{name}: {value}\n" for name, value in (usage | {"vgpr_spill_count": spilled}).items())
    expected = {"registers": 96, "spill_bytes": spill_bytes, "loop_spills": spill_bytes // 4, "scalar_spills": 1}
    assert resources.usage_of_amdgcn(text) == expected


def test_rows_are_kept_and_tabulated(tmp_path):
    file = resources.committed(tmp_path)
    assert resources.read(file) == []
    rows = [ROW, replace(ROW, constants="BLOCK_N=32", registers=130, shared_bytes=512), replace(ROW, target="gfx942")]
    resources.write(file, rows)
    kept = resources.read(file)
    assert [replace(row, triton="", commit="", date="") for row in kept] == rows
    assert results.read_folder(file.parent) == []  # nothing that was measured
    file.write_text(file.read_text().replace("loop_spills,", "").replace(",0,0,0,", ",0,0,"))  # as it was before
    assert resources.read(file) == kept
    assert {row.triton for row in kept} == {triton.__version__} and all(row.commit and row.date for row in kept)

    page = tmp_path / "page.md"
    page.write_text(f"before\n{resources.BEGIN}\nold\n{resources.END}\nafter\n")
    resources.write_tables(page, tmp_path)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert f"### Triton {triton.__version__}" in lines
    assert "| kernel | sm_80 | sm_90 | sm_100 | gfx942 |" in lines
    assert "| `a_fwd_kernel` | 130, 4 KiB |  |  | 128, 4 KiB |" in lines


def test_committed_tables_are_in_the_documentation(repository):
    page = (repository / "docs" / "triton.md").read_text()
    for file in sorted((repository / "benchmarks" / "results").glob("triton-*/resources.csv")):
        rows = resources.read(file)
        assert not resources.complaints(rows, [])
        assert "\n".join(resources.table_of(rows)) in page


def test_interpreted_kernels_are_not_compiled(monkeypatch, capsys):
    from benchmarks.__main__ import main

    monkeypatch.setattr(_triton, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        main(["resources"])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "capability", "hip", "reason"),
    [
        (0, None, None, "PyTorch sees no GPU"),
        (2, (7, 5), None, "the Triton kernels need compute capability 8.0, cuda:1 has 7.5"),
        (2, (8, 0), None, None),
        (2, None, "7.0", None),
    ],
)
def test_gpus_that_are_supported(monkeypatch, gpus, capability, hip, reason):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_native, "_capability", {0: (9, 0), 1: capability}.get)
    ok, said = _triton.supports(torch.device("cuda", 1), torch.float16)
    assert ok == (reason is None)
    assert reason is None or said.startswith(reason)


@pytest.mark.parametrize(
    ("version", "capability", "ok"),
    [
        ("3.6.0", (10, 0), False),
        ("3.7.1", (10, 3), False),
        ("3.8.0", (10, 0), True),
        ("3.10.0+git1234", (10, 3), True),
        ("3.6.0", (9, 0), True),
        ("3.6.0", (12, 0), True),
    ],
)
def test_data_centre_blackwell_needs_a_newer_triton(monkeypatch, version, capability, ok):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_native, "_capability", {0: capability}.get)
    monkeypatch.setattr(triton, "__version__", version)
    found, said = _triton.supports(torch.device("cuda", 0), torch.float16)
    assert found == ok
    assert ok or f"the Triton kernels need Triton 3.8, this is {version}" in said


@pytest.mark.parametrize("capturing", [True, False])
def test_a_launch_that_fails_while_a_graph_is_captured_says_what_to_do(capturing, monkeypatch):
    def fail(*arguments, **constants):
        raise ValueError("operation not permitted when stream is capturing")

    kernel = {(2,): fail}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    expected = (RuntimeError, "some_kernel is not loaded yet.*call the op once before, forward and backward")
    if not capturing:
        expected = (ValueError, "^operation not permitted")

    class Kernel(dict):
        __name__ = "some_kernel"

    with pytest.raises(expected[0], match=expected[1]):
        _triton.launch(Kernel(kernel), (2,), torch.empty(1))


class Kernel:
    """Collects the launches that are made of it."""

    __name__ = "hidden_positives_fwd_kernel"

    def __init__(self):
        self.made = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.made.append((grid, *arguments, constants))


def test_recording_makes_no_launch():
    kernel, like = Kernel(), torch.empty((), dtype=torch.float16, device="meta")

    def call():
        _triton.launch(kernel, (2,), like, **_triton.configuration(kernel, like))

    with recorded("sm_90") as launches:
        assert _triton.architecture(like.device) == "sm_90"
        call()
    assert not kernel.made
    (launch,) = launches
    configuration = _triton.table()["hidden_positives_fwd_kernel"]["sm_90"]["2"]
    assert launch == Launch(kernel, (2,), (like,), configuration, "2")
    launch.make()
    with recorded("sm_90", run=True) as launches:
        call()
    assert launches == [launch]
    assert kernel.made == 2 * [((2,), like, configuration)]


def test_recording_is_of_one_thread():
    """What other threads launch meanwhile is launched."""
    kernel, like = Kernel(), torch.empty((), dtype=torch.float16)
    thread = threading.Thread(target=_triton.launch, args=(kernel, (2,), like))
    with recorded() as launches:
        thread.start()
        thread.join()
    assert not launches and len(kernel.made) == 1


@pytest.mark.parametrize("op", ["hidden_positives", "masked_topk", "multi_positive_contrastive"])
def test_rows_of_any_length_are_padded(op):
    """To multiples of 16 elements, of which Triton loads 16 bytes at a time; else it takes them one by one."""
    sizes = Sizes(images=4, grid=(4, 4), dim=90, feature_dim=72, pool_size=32)
    with recorded("sm_90") as launches:
        for call in kernel_calls(op, torch.float16, "meta", sizes).values():
            call()
    # Gradients are written as they are asked for: blocks of all pairs write `sums`, of `width` features, rows `out`.
    written = {"contrastive_blocks_bwd_kernel": ("sums", "width"), "contrastive_rows_bwd_kernel": ("out", "width")}
    read = [
        argument
        for launch in launches
        for name, argument in zip(launch.kernel.arg_names, launch.arguments, strict=False)
        if name not in written.get(launch.name, ())
    ]
    vectors = [a for a in read if isinstance(a, torch.Tensor) and a.dim() == 2 and a.dtype == torch.float16]
    rows = {a.shape[1] for a in vectors}
    assert rows and rows <= {80, 96}
    assert not {90, 72} & {a for a in read if isinstance(a, int)}


def run_compiling(repository, tmp_path, program):
    """Run a program where kernels are compiled and not interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-10000:]


BATCHES = """
from benchmarks.compiled.resources import jobs
from hpkernels.launches import Sizes

def variants(images, grid):
    ops = ["hidden_positives", "masked_topk", "multi_positive_contrastive"]
    found = jobs(["float16"], ops, ["sm_90"], Sizes(images=images, grid=grid))
    return {(job.row.kernel, job.source.hash(), str(job.options)) for job in found}

assert len(variants(64, (28, 28))) > 30
assert variants(5, (28, 28)) == variants(64, (28, 28))
assert variants(5, (14, 14)) == variants(64, (14, 14))
"""


def test_other_numbers_of_images_compile_nothing_new(repository, tmp_path):
    """Whether N is a multiple of 16 or not."""
    run_compiling(repository, tmp_path, BATCHES)


CHECKED = """
import torch

from benchmarks.compiled.resources import _job
from hpkernels.examination import Sizes, problem, results
from hpkernels.launches import recorded

def variants(dtype, sizes):
    with recorded("sm_90") as launches:
        for _ in results("triton", "triton", problem(dtype, sizes, torch.device("meta")), sizes):
            pass
    found = [(launch.name, _job(launch, "sm_90", str(dtype))) for launch in launches]
    return {(name, job.source.hash(), str(job.options)) for name, job in found}

paper = Sizes(images=64, grid=(28, 28), pool_size=2048, attention=(64, 28, 28, 6, 64))
for dtype in (torch.float16, torch.float32):
    assert len(variants(dtype, paper)) > 30
    assert variants(dtype, paper) == variants(dtype, Sizes())
"""


def test_the_self_check_compiles_what_calls_of_the_papers_sizes_run(repository, tmp_path):
    """The very binaries: so what was checked is what runs, and nothing is compiled twice."""
    run_compiling(repository, tmp_path, CHECKED)


INSTRUCTIONS = """
import re

import triton

from benchmarks.compiled.resources import jobs

for target in ("sm_80", "sm_90", "sm_100"):
    for dtype in ("float16", "float32"):
        used = []
        for op, kernel in (("hidden_positives", "hidden_positives_fwd"), ("masked_topk", "masked_topk_top1_fwd")):
            job = next(job for job in jobs([dtype], [op], [target]) if job.row.kernel == f"{kernel}_kernel")
            ptx = triton.compile(job.source, target=job.target, options=job.options).asm["ptx"]
            found = re.findall(r"(?:wgmma\\.mma_async|mma\\.sync|tcgen05\\.mma)\\S*", ptx)
            kinds = sorted({re.sub(r"m\\d+n\\d+", "", instruction) for instruction in found})
            if dtype == "float32":  # discovery packs its bits in float16
                kinds = [kind for kind in kinds if "f16" not in kind]
            used.append(kinds or ["fma"] * ("fma.rn" in ptx))
        assert used[0] == used[1] and len(used[0]) == 1, (target, dtype, used)
"""


@pytest.mark.deep
def test_ranking_and_discovery_multiply_by_the_same_instructions(repository, tmp_path):
    """In tiles of different sizes; they sum as many features at a time in the same order."""
    run_compiling(repository, tmp_path, INSTRUCTIONS)


COMPILE_AHEAD = """
from contextlib import nullcontext

import torch
import triton
from triton.backends.compiler import GPUTarget

from hpkernels.launches import compile_ahead, kernel_calls, recorded

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compiled(launch):
    return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)

triton.runtime.driver.set_active(Driver())
torch.cuda.device = lambda device: nullcontext()
with recorded("sm_90") as launches:
    for call in kernel_calls("hidden_positives", torch.float16, "meta").values():
        call()
compile_ahead(launches, torch.device("cuda", 0))
kernels = [compiled(launch) for launch in launches]
launches[0].kernel.compile = None
assert kernels == [compiled(launch) for launch in launches]
assert all("wgmma" in kernel.asm["ptx"] for kernel in kernels)

launches[0].constants["BLOCK_N"] = 64
try:
    compile_ahead(launches, torch.device("cuda", 0))
except TypeError:
    pass
else:
    raise SystemExit("what does not compile was not said")
"""


def test_compile_ahead(repository, tmp_path):
    """What a launch needs is compiled before, and found again."""
    run_compiling(repository, tmp_path, COMPILE_AHEAD)
