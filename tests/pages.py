"""What the pages of the documentation hold: programs, commands, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from doctest import ELLIPSIS
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("sybil", reason="sybil is not installed: pip install sybil")

from sybil import Document, Example, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: *(.*?) *-->")

_SYBIL = Sybil([PythonCodeBlockParser(doctest_optionflags=ELLIPSIS)])
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:\S*python3?|torchrun\b.*?) -m (?P<module>[a-z][\w.]*)(?P<arguments>.*)")


class Command(NamedTuple):
    """`python -m module arguments`; `whole` unless a sentence names it, which may leave out what must be given."""

    module: str
    arguments: str
    whole: bool


def name(page: Path) -> str:
    """As it is called in the repository."""
    return str(page.relative_to(ROOT))


def document(page: Path) -> Document:
    """A page with its Python, each block an example; doctests where it has prompts."""
    return _SYBIL.parse(page)


def reason_not_run(example: Example) -> str | None:
    """What the line above a block says of why it does not run; None if it runs."""
    match = NOT_RUN.fullmatch(example.document.text[: example.start].rstrip().rpartition("\n")[2])
    return match and match[1]


def heading(example: Example) -> str:
    """The heading that a block stands under."""
    before = _FENCE.sub("", example.document.text[: example.start])  # comments of programs look like headings
    return re.findall(r"^#+ (.*)$", before, re.MULTILINE)[-1]


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """The language and the text of each fenced block."""
    for match in _FENCE.finditer(page.read_text()):
        yield match["language"], match["text"]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: Path) -> Iterator[Command]:
    """The programs that blocks of commands and sentences call."""
    blocks = (text for language, text in fences(page) if language != "python")
    lines = ((line, True) for text in blocks for line in text.replace("\\\n", " ").splitlines())
    spans = ((span, False) for span in re.findall(r"`([^`\n]+)`", prose(page)))
    for text, whole in (*lines, *spans):
        if match := _COMMAND.search(text):
            arguments = re.sub(r"\s#\s.*|[\[\]]", "", match["arguments"])
            yield Command(match["module"], arguments, whole)
