"""What GitHub and the documentation site do differently with the same Markdown, bridged while the site is built."""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # of the repository, shown on the site
PICTURES = (".svg", ".png", ".jpg")

_log = logging.getLogger("mkdocs.hooks")
_TARGET = re.compile(r"""(\]\(|\b(?:src|srcset|href)=")([^)"\s#]+)""")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

# Words with a hyphen, of code in a sentence or a table: blocks have <span></span> before.
_CODE = re.compile(r"(?<=(?<!</span>)<code>)[^<]+(?=</code>)")
_HYPHENATED = re.compile(r"(?<!\S)(?=\S*-)\S{2,32}(?!\S)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the pictures that pages take from there."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text())))
    for page in list(files.documentation_pages()):
        for target in (_outside(match[2], page.src_uri) for match in _TARGET.finditer(page.content_string)):
            if target and target.endswith(PICTURES) and (ROOT / target).is_file() and target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files outside docs/ lead to the site's own copy, or to the repository."""

    def replaced(match: re.Match[str]) -> str:
        target = _outside(match[2], page.file.src_uri)
        if target is None:
            return match[0]
        target = PAGES.get(target, target)
        if target in files.src_uris:
            return match[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri))
        if not (ROOT / target).exists():
            _log.warning("%s: a link to %s, which does not exist", page.file.src_uri, match[2])
        return f"{match[1]}{config.repo_url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"

    return _TARGET.sub(replaced, markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers draw without a script, and keep `--dtype` and its like in one line."""

    def drawn(match: re.Match[str]) -> str:
        formula = html.unescape(match[3]).replace("{aligned}", "{align*}")  # the name that the converter knows
        try:
            mathml = convert(formula, display="inline" if match[2] == "(" else "block")
        except Exception as error:
            _log.warning("%s: %s: no formula: %s", page.file.src_uri, type(error).__name__, formula)
            return match[0]
        if "\\" in mathml:  # it leaves commands that it does not know
            _log.warning("%s: a command that the converter to MathML does not know: %s", page.file.src_uri, formula)
        return mathml

    def whole(match: re.Match[str]) -> str:
        return _HYPHENATED.sub(r'<span class="whole">\g<0></span>', match[0])

    return _CODE.sub(whole, _FORMULA.sub(drawn, content))


def _outside(target: str, page: str) -> str | None:
    """The path in the repository that `target` names from `page`; None for what is in docs/, or elsewhere."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = PurePosixPath(posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target)))
    return None if path.parts[0] == "docs" else str(path)


def _moved(markdown: str) -> str:
    """A page of the root, as a page of docs/: its relative links are those of a file one folder down."""

    def replaced(match: re.Match[str]) -> str:
        return match[0] if "://" in match[2] else match[1] + posixpath.relpath(match[2], "docs")

    return _TARGET.sub(replaced, markdown)
