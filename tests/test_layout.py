"""A reader finds everything of one op by its name: these tests keep it so."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Literal, get_origin

import pytest

import hpkernels
from hpkernels import backends

COMPOSED = {"ghp_contrastive"}  # made of other ops: it registers none of its own
CONTRACT = [
    "test_matches_reference",
    "test_golden",
    "test_gradients",
    "test_gradcheck",
    "test_opcheck",
    "test_layouts",
    "test_compile",
    "test_cuda_graph",
    "test_deterministic",
    "test_edge_cases",
    "test_errors",
    "test_inputs_untouched",
    "test_autocast",
]
PAGE = ["Formula", "Contract", "Numerics", "Memory and time", "Limits", "Backends"]
OPS = sorted([*backends.registered_ops(), *COMPOSED])
each_op = pytest.mark.parametrize("op", OPS)


def test_every_folder_is_an_op(repository):
    folders = (path for path in (repository / "hpkernels" / "ops").iterdir() if path.is_dir())
    assert sorted(path.name for path in folders if path.name != "__pycache__") == OPS


@each_op
def test_folder_of_an_op(op, repository):
    folder = repository / "hpkernels" / "ops" / op
    required = {"__init__.py", "reference.py"} | (set() if op in COMPOSED else {"registration.py"})
    assert required <= {path.name for path in folder.iterdir()}
    for path in folder.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring that says what it is"
    # A backend's module, where there is one, is registered; a registered backend has its module.
    if op not in COMPOSED:
        modules = {backend for backend in backends.BACKENDS if (folder / f"{backend}.py").exists()}
        registered = {backend for name, backend in backends._modules if name == op}
        assert modules == registered
        for backend in registered:
            assert backends.implementation(op, backend).__name__ == f"hpkernels.ops.{op}.{backend}"
    function = getattr(hpkernels, op)
    assert function.__module__ == f"hpkernels.ops.{op}"


@each_op
def test_tests_of_an_op(op, repository):
    path = repository / "tests" / "ops" / f"test_{op}.py"
    tree = ast.parse(path.read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert tests[: len(CONTRACT)] == CONTRACT
    assert len(set(tests)) == len(tests)


def test_no_tests_without_an_op(repository):
    assert sorted(path.stem for path in (repository / "tests" / "ops").glob("test_*.py")) == [
        f"test_{op}" for op in OPS
    ]


@each_op
def test_page_of_an_op(op, repository):
    path = repository / "docs" / f"{op}.md"
    assert path.exists(), f"docs/{op}.md is missing"
    page = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    title, *sections = re.findall(r"^##? (.*)$", page, re.MULTILINE)
    assert title == op and sections == PAGE
    assert "```python" in path.read_text().split("\n## ")[0], f"docs/{op}.md must begin with an example"
    assert f"\n::: hpkernels.{op}\n" in page, f"docs/{op}.md must show the docstring"


@pytest.mark.parametrize("name", hpkernels.__all__)
def test_public_names(name):
    value = getattr(hpkernels, name)
    if not isinstance(value, str) and get_origin(value) is not Literal:  # which have no docstring of their own
        assert inspect.getdoc(value)
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and (callable(member) or isinstance(member, property | classmethod)):
                assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute} has no docstring"


def test_public_names_are_sorted_and_complete():
    assert list(hpkernels.__all__) == sorted(hpkernels.__all__)
    functions = {
        name
        for name, value in vars(hpkernels).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert functions <= set(hpkernels.__all__)


@pytest.mark.parametrize(
    "module", ["compat", "distributed", "nn", "testing", "ops.hidden_positives", "ops.local_propagation"]
)
def test_public_names_of_modules(module):
    module = importlib.import_module(f"hpkernels.{module}")
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name))


@pytest.mark.parametrize("name", [name for name in hpkernels.__all__ if inspect.isfunction(getattr(hpkernels, name))])
def test_docstring_of_a_public_function(name):
    """What it takes, gives and raises, each argument by name, with an example that runs as a doctest."""
    function = getattr(hpkernels, name)
    text = inspect.getdoc(function)
    assert "Examples:\n    >>> " in text
    if name == "use_backend":  # a context manager with one argument, which its summary explains
        assert "`backend`" in text
        return
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name} does not say {section}"
    documented = text[text.index("Args:") : text.index("Returns:")]
    for argument in inspect.signature(function).parameters:
        assert argument in documented, f"{name} does not document {argument}"


# The sections of a file of kernels: those that it has, each once, in this order.
SECTIONS = [
    "Types",
    "Shared memory",
    "Barriers",
    "Registers",
    "Scheduler",
    "Producer",
    "Consumer",
    "Epilogue",
    "Kernel",
    "Launch",
]
REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted(path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
CUDA_FILES = [path for path in SOURCES if re.search(r"^HPK_KERNEL\(", path.read_text(), re.MULTILINE)]
ENGINES = [path for path in SOURCES if re.search(r"^struct \w+Sm[89]0 {", path.read_text(), re.MULTILINE)]
TRITON_FILES = [p for p in sorted(REPOSITORY.glob("hpkernels/ops/*/triton*.py")) if "_kernel(\n" in p.read_text()]


def _named(paths):
    return [str(path.relative_to(REPOSITORY)) for path in paths]


@pytest.mark.parametrize("path", SOURCES, ids=_named(SOURCES))
def test_source_says_first_what_it_holds(path):
    assert path.read_text().startswith("// ")


@pytest.mark.parametrize("path", [*CUDA_FILES, *ENGINES], ids=_named([*CUDA_FILES, *ENGINES]))
def test_sections_of_a_cuda_file(path):
    found = re.findall(rf"^ *// ({'|'.join(SECTIONS)})$", path.read_text(), re.MULTILINE)
    assert found == [section for section in SECTIONS if section in found]
    required = {"Types", "Shared memory", "Producer", "Consumer"} if path in ENGINES else {"Kernel", "Launch"}
    assert required - set(found) <= ({"Launch"} if path.suffix == ".cuh" else set())


@pytest.mark.parametrize("path", CUDA_FILES, ids=_named(CUDA_FILES))
def test_cuda_kernel_opens_with_its_formula_and_memory(path):
    kernels = re.findall(r"((?:^//.*\n)*)(?:^template .*\n)?^HPK_KERNEL\(.*\)\n(\w+)", path.read_text(), re.MULTILINE)
    assert kernels
    for comment, kernel in kernels:
        assert "=" in comment and re.search(r"\bbytes\b", comment, re.IGNORECASE), f"{kernel}: {comment}"


@pytest.mark.parametrize("path", TRITON_FILES, ids=_named(TRITON_FILES))
def test_triton_kernel_opens_with_its_formula_and_memory(path):
    """And kernels come after the functions that they call, before those that launch them."""
    kinds = []
    for node in _functions(ast.parse(path.read_text()).body):
        compiled = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        kernel = compiled and node.name.endswith("_kernel")
        kinds.append(1 if kernel else 0 if compiled else 2)
        if kernel:
            says = ast.get_docstring(node) or ""
            assert "=" in says and re.search(r"\bbytes\b", says, re.IGNORECASE), f"{node.name}: {says}"
    assert kinds == sorted(kinds)


def _functions(body):
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.If):
            yield from _functions(node.body)
