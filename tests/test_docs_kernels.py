"""The pages on how it works: pictures, tables and the walk-through say what the sources say."""

from __future__ import annotations

import ast
import math
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.compiled import clock_budget, cuda_resources
from benchmarks.compiled.sass_loops import step
from hpkernels import _native, backends
from hpkernels.cost import estimate
from tests import test_layout

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
LAYERS = ElementTree.parse(IMAGES / "architecture-layers.svg").getroot()
BOXES = {box.get("id"): box for box in LAYERS.iter() if box.get("data-files")}
ARROWS = {(arrow.get("data-from"), arrow.get("data-to")): arrow for arrow in LAYERS.iter() if arrow.get("data-from")}


# The picture of the layers.


def sources():
    return {
        file.relative_to(ROOT).as_posix(): file
        for folder in ("hpkernels", "training", "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
    }


def boxes_of(path):
    """The boxes that have a file, or a folder that it is in."""
    patterns = {key: box.get("data-files").split() for key, box in BOXES.items()}
    return [
        key
        for key, own in patterns.items()
        if any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in own)
        or any(path.startswith(pattern + "/") for pattern in own)
    ]


def imported(file, modules):
    """The files that a module imports, wherever in it, with those that it names as strings to be imported later."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("_cuda.register", "_triton.register"):
            backend = ast.unparse(node.func).removeprefix("_").removesuffix(".register")
            names = [f"hpkernels.ops.{node.args[0].value}.{backend}"]
        for name in names:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                yield modules[name]


@pytest.fixture(scope="module")
def imports():
    """Which box imports which, and by which files."""
    found = sources()
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in found}
    edges = {}
    for path, file in found.items():
        for other in imported(file, modules):
            ends = boxes_of(path)[0], boxes_of(other)[0]
            if ends[0] != ends[1]:
                edges.setdefault(ends, set()).add((path, other))
    return edges


def test_every_file_is_in_one_box():
    assert {path: len(boxes_of(path)) for path in sources()} == dict.fromkeys(sources(), 1)


def test_every_box_names_files_that_there_are():
    paths = [path for box in BOXES.values() for path in box.get("data-files").split()]
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_arrows_are_imports(imports):
    drawn = {ends for ends in ARROWS if not ends[1].startswith("library-")}
    assert drawn <= imports.keys()
    for backend, library in (("cpu", "library-cpu"), ("cuda", "library-cuda")):
        assert (backend, library) in ARROWS
        calls = [file.read_text() for file in (ROOT / "hpkernels" / "ops").glob(f"*/{backend}.py")]
        assert any(f"torch.ops.hpkernels_{backend}." in call for call in calls)
        assert f"(hpkernels_{backend}, m)" in (ROOT / "csrc" / f"bindings_{backend}.cpp").read_text()


def test_imports_go_down(imports):
    later = {ends for ends, arrow in ARROWS.items() if arrow.get("class") == "later"}
    assert later == {("choice", "tools")}
    level = {key: int(box.get("data-level")) for key, box in BOXES.items()}
    beside = {"reference", "cpu", "cuda", "triton", "training", "benchmarks", "tests", "modules", "distributed"}
    upwards = {
        ends: files
        for ends, files in imports.items()
        if ends not in later
        and (level[ends[0]] < level[ends[1]] or (level[ends[0]] == level[ends[1]] and not {*ends} <= beside))
    }
    assert upwards == {}


def test_a_backend_knows_no_other(imports):
    compiled = {"cpu", "cuda", "triton"}
    assert {ends for ends in imports if {*ends} <= compiled} == set()
    assert not any(ends[0] == "reference" and ends[1] in compiled for ends in imports)


def test_backends_are_drawn():
    assert set(backends.BACKENDS) <= BOXES.keys()


# The picture of the data's way.


def test_numbers_of_the_way_of_the_data():
    anchors, group, dim, features, pool, images = 50176, 784, 512, 384, 2048, 64

    def cost(op, route, **sizes):
        return estimate(op, N=anchors, device="H100", dtype="float16", **sizes).routes[route]

    ranking = [cost("masked_topk", "product", features_dim=size) for size in (features, dim)]
    discovery = [cost("hidden_positives", "symmetric", features_dim=size) for size in (features, dim)]
    loss = [cost("multi_positive_contrastive", "lists")] * 2
    both, stencil = (cost("local_propagation", name) for name in ("weights and stencil", "stencil (cached weights)"))

    def work(costs):
        flops, milliseconds = sum(each.flops for each in costs), sum(each.milliseconds for each in costs)
        return f"{flops / 1e12:.3g} TFLOP, {milliseconds:.2f} ms"

    def size(numbers, width):
        return f"{numbers * width / 1e6:.1f} MB"

    expected = {
        "f": size(anchors * features, 2),
        "s": size(anchors * dim, 2),
        "pools": size(pool * (features + dim), 2),
        "topk": work(ranking),
        "r": size(anchors, 4),
        "discovery": work(discovery),
        "masks": f"{discovery[0].workspace / 1e6:.0f} MB",
        "R": size(group * anchors / 8, 1),
        "loss": work(loss),
        "rows": size(anchors * 4, 4),
        "grad": size(anchors * dim, 2),
        "qk": size(images * 6 * 785 * 64, 2),
        "weights-op": f"{both.flops / 1e12:.3g} TFLOP, {both.milliseconds - stencil.milliseconds:.2f} ms",
        "weights": size(images * 9 * group, 4),
        "apply": f"{stencil.milliseconds:.2f} ms",
        "z": size(anchors * dim, 2),
    }
    drawn = {}
    for box in ElementTree.parse(IMAGES / "data-way-step.svg").getroot().iter("{http://www.w3.org/2000/svg}g"):
        if box.get("id"):
            drawn[box.get("id")] = " ".join(box.itertext())
    assert drawn.keys() == expected.keys()
    for key, text in expected.items():
        assert re.search(rf"(?<![\d.]){re.escape(text)}", drawn[key]), (key, text, drawn[key])


@pytest.mark.parametrize("picture", ["architecture-layers", "data-way-step"])
def test_pictures_have_a_dark_scheme(picture):
    text = (IMAGES / f"{picture}.svg").read_text()
    light, dark = re.findall(r"svg \{([^}]*)\}", text)
    assert re.findall(r"--[\w-]+", light) == re.findall(r"--[\w-]+", dark)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used == set(re.findall(r"--[\w-]+", light))


# The clock budgets.

LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;
        /*0030*/                   ISETP.NE.AND P0, PT, R2, R3, PT ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/               @P1 BRA 0x80 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/                   FMUL R6, R4, R5 ;
        /*0090*/               @P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
"""
INNER = LOOPS.replace("@P2 BRA 0x10", "@P2 BRA 0x0")


def test_a_loop_is_counted():
    """One that starts where another does is one with it: all of it is met once."""
    counted = step(LOOPS, "HGMMA", (1,))
    assert counted.most.total() == 9 and counted.fewest.total() == 4


def test_a_nest_of_loops_is_counted():
    counted = step(INNER, "HGMMA", (1, 8))
    assert counted.most == {"MOV": 1, "IADD3": 8, "HGMMA": 8, "ISETP": 8, "BRA": 8 + 2, "FADD": 2, "FMUL": 1}
    assert counted.fewest == {"MOV": 1, "IADD3": 8, "HGMMA": 8, "ISETP": 8, "BRA": 8 + 2, "FMUL": 1}


def test_budgets_on_the_page():
    """Those of the library as it is built, up to a few instructions that another compiler makes."""
    if reason := cuda_resources.reason_to_skip():
        pytest.skip(reason)
    library = _native._file("_C_cuda")
    if newer := cuda_resources.newer_sources(library):
        pytest.skip(f"{library.name} is older than {', '.join(newer[:3])}")
    page = (ROOT / "docs" / "kernels.md").read_text()
    for budget in clock_budget.budgets(library):
        begin, end = clock_budget.marks(budget.kernel.key)
        told = page[page.index(begin) + len(begin) : page.index(end)].strip()
        expected = "\n".join(clock_budget.table_of(budget))
        numbers = [float(number.replace(" ", "")) for number in re.findall(r"\d[\d .]*\d|\d", told)]
        wanted = [float(number.replace(" ", "")) for number in re.findall(r"\d[\d .]*\d|\d", expected)]
        assert re.sub(r"[\d .]+", "", told) == re.sub(r"[\d .]+", "", expected), "benchmarks clock-budget --write"
        assert all(math.isclose(*pair, rel_tol=0.05) for pair in zip(numbers, wanted, strict=True)), budget.kernel.key


# The walk-through.


def test_the_op_of_the_walk_through(tmp_path):
    """Its files, put into a copy of the checkout, pass the tests that the page promises."""
    page = (ROOT / "docs" / "adding_an_op.md").read_text()
    files = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))
    command = re.search(r"^```\npytest (.*)\n```$", page, re.MULTILINE)[1].split()
    assert len(files) == 5
    for folder in ("hpkernels", "tests/ops", "docs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "images")
        )
    for file in ("pyproject.toml", "tests/conftest.py", "tests/test_layout.py"):
        shutil.copy(ROOT / file, tmp_path / file)

    added = files.pop("hpkernels/__init__.py")
    names = tmp_path / "hpkernels" / "__init__.py"
    names.write_text(
        names.read_text()
        .replace("\n__all__", f"{added}\n__all__")
        .replace('    "use_backend"', '    "squared_norms",\n    "use_backend"')
    )
    headings = "".join(f"\n## {section}\n" for section in test_layout.PAGE)
    example = "```python\nhpkernels.squared_norms(rows)\n```"
    text = f"# squared_norms\n\n{example}\n{headings}\n::: hpkernels.squared_norms\n"
    (tmp_path / "docs" / "squared_norms.md").write_text(text)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    doctest = "hpkernels/ops/squared_norms/__init__.py"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command, doctest]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "passed" in done.stdout
