"""What a release consists of agrees with itself: versions, description, workflows."""

from __future__ import annotations

import re
import runpy

import pytest
import yaml

import hpkernels


def test_versions_agree(repository):
    """The package, the citation and the newest part of the changelog, with its date."""
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.+)$", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert str(citation["version"]) == hpkernels.__version__
    assert headings[:2] == ["Unreleased", f"{hpkernels.__version__} - {citation['date-released']}"]


@pytest.fixture
def description(repository, monkeypatch):
    """``description(readme)``: what an index shows of it."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(repository / "setup.py"))["description"]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/a.md#b)", "[a]({repository}/blob/{tag}/docs/a.md#b)"),
        ("![a](docs/a.png)", "![a]({repository}/raw/{tag}/docs/a.png)"),
        ("[![a](a.png)](a.md)", "[![a]({repository}/raw/{tag}/a.png)]({repository}/blob/{tag}/a.md)"),
        (
            '<img src="a.svg"> <a href="a.md">',
            '<img src="{repository}/raw/{tag}/a.svg"> <a href="{repository}/blob/{tag}/a.md">',
        ),
        ("[a](https://a.org/b) [c](#d) [e](mailto:f@g.h)", "[a](https://a.org/b) [c](#d) [e](mailto:f@g.h)"),
    ],
)
def test_links_of_the_description_are_absolute(written, shown, description):
    assert description(written) == shown.format(
        repository="https://github.com/hpkernels/hpkernels", tag=f"v{hpkernels.__version__}"
    )


def test_links_of_the_description_lead_somewhere(repository, description):
    text = description((repository / "README.md").read_text())
    assert not re.search(r'\]\((?!https:|#)|\b(src|srcset|href)="(?!https:|#)', text)
    own = rf"https://github.com/hpkernels/hpkernels/(?:blob|raw)/v{re.escape(hpkernels.__version__)}/([^)\"# ]+)"
    paths = re.findall(own, text)
    assert len(paths) > 10
    assert [path for path in paths if not (repository / path).exists()] == []


def test_one_repository_is_named(repository):
    for name in ("CITATION.cff", "setup.py", "pyproject.toml", ".github/ISSUE_TEMPLATE/config.yml"):
        named = set(re.findall(r"github\.com/([\w-]+/[\w-]+)", (repository / name).read_text()))
        assert named == {"hpkernels/hpkernels"}, name


def test_workflows_call_what_there_is(repository):
    """Each ``make TARGET`` of the workflows and of .ci/run is in the Makefile, and each file named is there."""
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    files = [*(repository / ".github" / "workflows").glob("*.yml"), repository / ".ci" / "run"]
    text = "\n".join(file.read_text() for file in files)
    called = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert len(files) == 5 and {"test", "lint", "test-deep", "wheel", "gpu-check"} <= called
    assert called - targets == set()
    assert all((repository / path).is_file() for path in re.findall(r"python (tests/\S+)", text))


def test_workflows_test_what_the_package_allows(repository):
    """The oldest Python and the oldest PyTorch are those of pyproject.toml."""
    package = (repository / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', package)[1]
    torch = re.search(r'"torch>=([\d.]+)"', package)[1]
    jobs = {
        name: yaml.safe_load((repository / f".github/workflows/{name}.yml").read_text())["jobs"]
        for name in ("ci", "wheels")
    }
    assert jobs["ci"]["test"]["strategy"]["matrix"]["python"][0] == python
    assert jobs["wheels"]["try"]["strategy"]["matrix"] == {
        "python": [python, "3.13"],
        "torch": [f"torch=={torch}.*", "torch"],
    }
