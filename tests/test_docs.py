"""The pages of the documentation say what is true: programs run, commands, links, messages and variables exist."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib
import importlib.util
import re
import shlex

import pytest
import torch

import hpkernels
from tests.pages import NOT_RUN, PAGES, ROOT, commands, document, fences, name, prose, reason_not_run
from training.config_file import known_keys, overview

WITH_PROGRAMS = [page for page in PAGES if list(document(page).examples())]
COMMANDS = sorted({command for page in PAGES for command in commands(page)})
# Blocks that cannot run where tests run. Another one is another promise that nobody checks.
MOST_NOT_RUN = 4


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=name)
def test_programs_run(page):
    """Those of a page one after another, in one namespace."""
    torch.manual_seed(0)
    for example in document(page).examples():
        if reason_not_run(example) is None:
            example.evaluate()


def test_programs_that_do_not_run():
    marked = [reason for page in PAGES for reason in NOT_RUN.findall(page.read_text())]
    attached = [reason_not_run(example) for page in WITH_PROGRAMS for example in document(page).examples()]
    assert marked == [reason for reason in attached if reason is not None], "a mark is in the line above a program"
    assert all(len(reason.split()) >= 3 for reason in marked), "a mark says why"
    assert len(marked) <= MOST_NOT_RUN


def test_programs_are_found():
    # A title is a file's name: tests/test_docs_kernels.py builds an op of such blocks.
    languages = {re.sub(r' title="[\w./]+"', "", language) for page in PAGES for language, _ in fences(page)}
    assert languages <= {"", "python", "math", "json", "yaml", "toml"}, "Python is marked python, commands are not"


class Parsed(Exception):
    """A command line has been read, and nothing has been done."""


@pytest.fixture
def parse_only(monkeypatch):
    """Have programs stop when they have read their command line."""

    def stopping(parse):
        def stop(parser, *arguments):
            parsed = parse(parser, *arguments)
            raise Parsed(*(parsed if isinstance(parsed, tuple) else (parsed, [])))

        return stop

    for method in ("parse_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stopping(getattr(argparse.ArgumentParser, method)))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.module} {command.arguments.strip()}")
def test_commands_are_understood(command, parse_only, capsys):
    if command.module.split(".")[0] not in ("benchmarks", "hpkernels", "training"):
        return
    package = importlib.util.find_spec(command.module).submodule_search_locations is not None
    program = importlib.import_module(command.module + ".__main__" * package)
    try:
        program.main(shlex.split(command.arguments))
    except Parsed as parsed:
        options, unknown = parsed.args
    except SystemExit as left:
        told = f"{left.code} {capsys.readouterr().err}"
        assert not left.code or (not command.whole and "arguments are required" in told), told
        return
    assert not unknown
    edits = [edit.partition("=")[0] for edit in getattr(options, "overrides", [])]
    assert set(edits) <= {*known_keys(), "key"}
    for part in str(getattr(options, "config", None) or "").split(","):
        assert not re.fullmatch("[a-z0-9_]+", part) or part in overview()


def test_targets_of_make():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spans = [text for page in PAGES for text in re.findall(r"`make ([a-z-]+)", page.read_text())]
    lines = [text for page in PAGES for _, block in fences(page) for text in re.findall(r"^make ([a-z-]+)", block)]
    assert {*spans, *lines} <= targets


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_on_github(page):
    """The site's own build checks them as well, but of the pages in docs/ alone."""
    targets = re.findall(r"""\]\(([^)\s]+)|\b(?:src|srcset|href)="([^"\s]+)""", prose(page))
    for target in ("".join(pair) for pair in targets):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], target


def test_public_names_are_on_a_page():
    told = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    documented = {name.removeprefix("hpkernels.") for name in told}
    modules = {"__version__", "compat", "distributed", "nn"}
    ops = {page.stem for page in PAGES}  # each has a page, with its docstring
    assert (
        set(hpkernels.__all__) - modules - ops - {"apply_local_propagation", "local_propagation_weights"} <= documented
    )
    assert {f"nn.{name}" for name in hpkernels.nn.__all__} <= documented
    assert {f"distributed.{name}.{name}" for name in hpkernels.distributed.__all__} <= documented


# Names of variables, those of other projects that are read here among them.
_VARIABLE = (
    r"(?:HPKERNELS|OMP|XDG|TRITON|TORCH|PYTORCH|CMAKE)_[A-Z0-9_]+"
    r"|CXX|CUDACXX|CUDA_HOME|MAX_JOBS|(?:LOCAL_)?(?:RANK|WORLD_SIZE)"
)


def variables_read():
    """The variables that programs, libraries and builds ask for or set, by how each language does it."""
    found = set()
    for text in map(text_of, nodes(python_sources())):
        found |= set(re.findall(rf"^({_VARIABLE})$", text))
    for pattern, asked in {
        "cmake/*.cmake": r"\$ENV\{(\w+)\}",
        "CMakeLists.txt": r"\$ENV\{(\w+)\}",
        "csrc/**/*.*": r'getenv\("(\w+)"\)',
        "Makefile": rf"(?:export |\$\$|^\t)({_VARIABLE})\b",
        ".ci/run": rf"export ({_VARIABLE})",
    }.items():
        for file in ROOT.glob(pattern):
            found |= set(re.findall(asked, file.read_text(), re.MULTILINE))
    return found


def python_sources():
    folders = ("hpkernels", "training", "benchmarks", "build_backend", "tests")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return [ROOT / "setup.py", *(file for file in files if file.name != "test_docs.py")]


def test_environment_variables():
    rows = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    told = [variable for row in rows for variable in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(variables_read())


def text_of(node):
    """A text of a program, what it fills in as `…`; "" for what is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else "…" for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def cmake_texts(before=""):
    """The texts of CMake's files that come after `before`."""
    for file in (ROOT / "CMakeLists.txt", *ROOT.glob("cmake/*.cmake")):
        yield from re.findall(before + r'"([^"\n]*)"', re.sub(r"\$(ENV)?\{\w+\}", "…", file.read_text()))


def nodes(files):
    for file in files:
        yield from ast.walk(ast.parse(file.read_text()))


def refusals():
    """Each reason why something is not built or does not run."""
    for node in nodes([ROOT / "setup.py", *(ROOT / "hpkernels").rglob("*.py")]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            refused = node.func.id == "CannotBuild" or (
                node.func.id == "Availability" and ast.unparse(node.args[0]) == "False"
            )
            yield text_of(node.args[-1]) if refused else ""
    yield from cmake_texts("FATAL_ERROR ")


def is_said(message, text):
    return re.search(".*".join(map(re.escape, message.split("…"))), text) is not None


def test_messages():
    """Those on the page are in the sources, and the reasons in the sources are on the page."""
    page = (ROOT / "docs" / "install.md").read_text().split("\n## Troubleshooting\n")[1]
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 40
    sources = "\n".join([*map(text_of, nodes(python_sources())), *cmake_texts()])
    assert not [message for message in messages if not is_said(message, sources)]
    assert not [reason for reason in refusals() if reason and not any(is_said(message, reason) for message in messages)]


def measured(device, op, call, provider, anchors):
    """Time and memory in the committed results, as a page writes them."""
    with (ROOT / "benchmarks" / "results" / device / f"{op}.csv").open() as file:
        of = [call, provider, anchors]
        (row,) = (row for row in csv.DictReader(file) if [row["call"], row["provider"], row["anchors"]] == of)
    ms, mib = float(row["median_ms"]), float(row["peak_mib"])
    return (
        f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s",
        f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB",
    )


def test_numbers_of_the_home_page():
    supcon = ("intel-xeon-2-threads", "contrastive", "own")
    published = ("amd-epyc-2-threads", "ghp_contrastive", "forward+backward")
    expected = [
        *(measured(*supcon, name, "8192") for name in ("cpu", "compiled", "torch-dense", "pytorch-metric-learning")),
        *(measured(*published, name, "12544") for name in ("cpu", "published")),
    ]
    page = (ROOT / "docs" / "index.md").read_text()
    assert re.findall(r"^\| .* \| ([\d.]+ m?s) \| ([\d.]+ .iB) \|$", page, re.MULTILINE) == expected
    small = [measured(*supcon, name, "1024")[0].removesuffix(" ms") for name in ("torch-dense", "cpu")]
    assert "At 1024 anchors plain PyTorch takes {} ms, and hpkernels {}.".format(*small) in page
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r" ([\d.]+ m?s), ([\d.]+ .iB) \|", readme) == [expected[0], expected[2], *expected[4:]]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_lists_and_tables_on_the_site(page):
    """A list or a table right below a paragraph is one on GitHub, and a part of the paragraph on the site."""
    before = ""
    for line in prose(page).splitlines():
        item = re.match(r"( *)(?:[-*]|1\.) ", line)
        if item:
            assert not before or re.match(r" *(?:[-*]|\d+\.) |  ", before), line
            assert len(item[1]) % 4 == 0, f"lists in lists are four spaces further in: {line}"
        assert not line.startswith("|") or not before or before.startswith("|"), line
        before = "" if line.startswith("<!--") else line.rstrip()
