"""The HTML of the report: one page that needs no other file, no network and no script.

Functions take plain text and escape it; arguments called `html` are already HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from PIL import Image

from training.figures import data_uri


def page(title: str, header_html: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page of (heading, HTML) sections, with links to them on top."""
    numbered = list(enumerate(sections, start=1))
    links = "".join(f'<a href="#s{number}">{escape(heading)}</a>' for number, (heading, _) in numbered)
    body = "".join(
        f'<section id="s{number}"><h2>{escape(heading)}</h2>{html}</section>\n' for number, (heading, html) in numbered
    )
    return _PAGE.substitute(title=escape(title), header=header_html, links=links, body=body)


def figure(image: Image.Image, alt: str, caption: str = "", *, pixelated: bool = False, below_html: str = "") -> str:
    """An image with a description for those who do not see it, then `below_html` and a caption."""
    shape = f'width="{image.width}" height="{image.height}"' + (' class="pixelated"' if pixelated else "")
    caption_html = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{data_uri(image)}" alt="{escape(alt)}" {shape}>{below_html}{caption_html}</figure>'


def paragraph(text: str) -> str:
    """A paragraph of running text."""
    return f"<p>{escape(text)}</p>"


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def legend(entries: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Names beside their (red, green, blue) colours."""
    items = "".join(
        f'<li><span style="background:rgb({red},{green},{blue})"></span>{escape(name)}</li>'
        for name, (red, green, blue) in entries
    )
    return f'<ul class="legend">{items}</ul>'


def percent(value: float | None) -> str:
    """A figure in percent to one decimal; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def percent_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None]]], caption: str) -> str:
    """Rows of percentages, each with a bar behind it."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_percent_cell, values))}</tr>' for name, values in rows
    )
    return (
        f'<table class="percent"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _percent_cell(value: float | None) -> str:
    filled = 0.0 if value is None or math.isnan(value) else value
    return f'<td style="--filled:{filled:.1f}%">{percent(value)}</td>'


def shaded_table(cells: Sequence[Sequence[float | None]], caption: str) -> str:
    """A small grid of numbers >= 0, the larger the darker; None is a dash."""
    peak = max((value for line in cells for value in line if value), default=1)
    rows = "".join(f"<tr>{''.join(_shaded_cell(value, peak) for value in line)}</tr>" for line in cells)
    return f'<table class="window"><caption>{escape(caption)}</caption>{rows}</table>'


def _shaded_cell(value: float | None, peak: float) -> str:
    text, shade = ("–", 0) if value is None else (f"{value:.3g}", 0.5 * value / peak)
    return f'<td style="background:rgba(47,85,212,{shade:.2f})">{text}</td>'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1b2130; --soft: #5a6478; --line: #e3e7ef; --accent: #2f55d4; --wash: #f6f7fb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, nav, main { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1 { margin: 0 0 8px; font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 1.3rem; letter-spacing: -0.01em; }
h3 { margin: 24px 0 8px; font-size: 1rem; }
p { margin: 0 0 16px; max-width: 76ch; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; padding-top: 8px; padding-bottom: 24px; font-size: 0.9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-bottom: 24px; padding: 28px; background: #fff; border: 1px solid var(--line); border-radius: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 16px; margin-bottom: 24px; }
.cards div { padding: 16px 20px; background: var(--wash); border-radius: 10px; }
.cards b { display: block; font-size: 2rem; line-height: 1.25; letter-spacing: -0.02em; }
.cards div:last-child b { color: var(--accent); }
.cards span { color: var(--soft); font-size: 0.9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 8px; text-align: left; color: var(--soft); font-size: 0.9rem; }
th { padding: 7px 12px 7px 0; text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-size: 0.85rem; }
.percent { width: 100%; }
.percent tr { border-bottom: 1px solid var(--line); }
.percent thead th:not(:first-child) { width: 24%; padding-left: 8px; }
.percent td { padding: 7px 8px; background: linear-gradient(90deg, #d8e2ff var(--filled), transparent 0) no-repeat; }
.percent td { background-size: 100% 68%; background-position: 0 50%; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
.pixelated { image-rendering: pixelated; }
figcaption { padding-top: 6px; color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 20px 28px; }
.curves h3 { margin: 0 0 4px; }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-bottom: 20px; align-items: start; }
.row.three { grid-template-columns: repeat(3, 1fr); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 20px; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 7px; font-size: 0.9rem; }
.legend span { width: 15px; height: 15px; border-radius: 4px; }
.scale { height: 8px; margin-top: 8px; border-radius: 4px; }
.window { width: 100%; border-spacing: 4px; border-collapse: separate; }
.window td { width: 33%; height: 64px; border-radius: 6px; text-align: center; }
pre { margin: 0; padding: 18px 20px; overflow-x: auto; background: var(--wash); border-radius: 10px; }
pre { font: 0.85rem/1.5 ui-monospace, monospace; }
@media (max-width: 700px) { .row, .row.three { grid-template-columns: repeat(2, 1fr); } section { padding: 18px; } }
@media print { body { background: #fff; } nav { display: none; } section { border: 0; break-inside: avoid-page; } }
</style>
</head>
<body>
<header>$header</header>
<nav aria-label="Sections">$links</nav>
<main>
$body</main>
</body>
</html>
""")
