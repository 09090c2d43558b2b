"""The notebooks as HTML pages that are read without Jupyter and without a network.

nbconvert makes each page's body; around it stands a page of ours with a title and links to the
pages before and after. A front page lists the notebooks. All pages share one stylesheet beside
them; there are no scripts, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

from asymconv import tables
from asymconv.record import Record, write_atomically

FRONT = "index.html"
STYLE = "style.css"
FIGURE = "ladder.svg"

# a figure is part of the page, so that its text can be read and searched
_BODY = """{%- extends 'basic/index.html.j2' -%}
{%- block data_svg scoped -%}
{%- set svg = output.data["image/svg+xml"] -%}
<div class="output_svg">{{ svg[svg.index("<svg"):] }}</div>
{%- endblock data_svg -%}
"""

_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="stylesheet" href="{{ style }}">
</head>
<body>
{% macro links() -%}
<nav>
<span>
{% if before %}<a rel="prev" href="{{ before.file }}">← {{ before.short }}</a>{% endif %}
</span>
<span>{% if front %}<a href="{{ front }}">contents</a>{% endif %}</span>
<span>
{% if after %}<a rel="next" href="{{ after.file }}">{{ after.short }} →</a>{% endif %}
</span>
</nav>
{%- endmacro %}
{{ links() }}
<main>
{{ body | safe }}
</main>
{{ links() }}
</body>
</html>
"""

_FRONT_BODY = """<h1>{{ title }}</h1>
{{ about | safe }}
<p><img src="{{ figure }}" alt="Each kernel's time, logarithmic; the table has the numbers."></p>
<ol class="contents">
{% for page in pages -%}
<li><a href="{{ page.file }}">{{ page.title }}</a>{{ page.about | safe }}</li>
{% endfor -%}
</ol>
<h2>The ladder</h2>
{{ table | safe }}
<p>Measured {{ date }}, revision {{ revision }}.</p>
"""

_STYLE = """
body { font: 17px/1.55 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 56rem; margin: 0 auto; padding: 0 1rem 3rem; }
h1 { font-size: 1.8rem; line-height: 1.25; }
h2 { margin-top: 2.2em; }
a { color: #1965b0; }
a.anchor-link { visibility: hidden; text-decoration: none; padding-left: 0.3em; }
:hover > a.anchor-link { visibility: visible; }
nav { display: flex; justify-content: space-between; gap: 1.5rem; padding: 0.8rem 0;
  font-size: 0.9rem; }
nav span { flex: 1 1 0; }
nav span:nth-child(2) { flex: 0 0 auto; }
nav span:last-child { text-align: right; }
code, pre { font: 0.85rem/1.45 "DejaVu Sans Mono", ui-monospace, monospace; }
pre { overflow-x: auto; margin: 0; }
.highlight { background: #f6f6f4; }
.input_area pre, .output_markdown pre, .text_cell_render pre { padding: 0.6rem 0.8rem; }
.output_area pre { padding: 0.2rem 0.8rem; }
.cell { margin: 1em 0; }
.output_subarea { margin: 0.6em 0; }
.output_markdown .highlight { max-height: 40rem; overflow-y: auto; border: 1px solid #dcdcdc; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #dcdcdc; vertical-align: top; }
td[style*="right"] { white-space: nowrap; }
td code { white-space: pre-wrap; overflow-wrap: anywhere; }
svg, img { max-width: 100%; height: auto; }
.contents { list-style: none; padding: 0; }
.contents > li > a { font-weight: bold; }
.contents p { margin: 0.2em 0 1em; }
"""


@dataclass(frozen=True)
class _Page:
    """A notebook: its page's file, its title as plain text, its first paragraph as HTML."""

    path: Path
    file: str
    title: str
    about: str

    @property
    def short(self) -> str:
        """The title up to its colon, for links."""
        return self.title.split(":")[0]


def _plain(markdown: str) -> str:
    return re.sub(r"[`*]", "", markdown).strip()


def _describe(path: Path) -> _Page:
    """Title and first paragraph of a notebook. Raises ValueError if it does not begin with them."""
    first = nbformat.read(path, as_version=4).cells[0]
    head, *paragraphs = re.split(r"\n\s*\n", first.source.strip())
    if first.cell_type != "markdown" or not head.startswith("# ") or not paragraphs:
        raise ValueError(f"{path.name} does not begin with a title and a paragraph")
    return _Page(path, f"{path.stem}.html", _plain(head[2:]), markdown2html(paragraphs[0]))


def _about(readme: Path) -> tuple[str, str]:
    """The README's title and its first paragraph as HTML."""
    title, paragraph = re.split(r"\n\s*\n", readme.read_text().strip())[:2]
    return _plain(title.removeprefix("# ")), markdown2html(paragraph)


def write(
    notebooks: Sequence[Path], folder: Path, record: Record, figure: Path, readme: Path
) -> list[Path]:
    """Write a page for each notebook, and the front page.

    Args:
        notebooks: executed, in order.
        folder: for the pages, the stylesheet and the figure.
        record: the ladder's, for the front page's table.
        figure: the ladder's figure, an SVG file.
        readme: whose title and first paragraph stand on the front page.

    Returns:
        The pages' paths, the front page first.

    Raises:
        ValueError: a notebook does not begin with a title and a paragraph.
    """
    environment = jinja2.Environment(autoescape=True)
    shell = environment.from_string(_SHELL)
    exporter = HTMLExporter(template_name="basic", raw_template=_BODY, exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    pages = [_describe(path) for path in notebooks]
    folder.mkdir(parents=True, exist_ok=True)
    highlighting = HtmlFormatter(style="default").get_style_defs(".highlight")
    write_atomically(folder / STYLE, f"{_STYLE.lstrip()}{highlighting}\n")
    shutil.copyfile(figure, folder / FIGURE)

    title, about = _about(readme)
    front = environment.from_string(_FRONT_BODY).render(
        title=title,
        about=about,
        figure=FIGURE,
        pages=pages,
        table=markdown2html(tables.ladder_markdown(record)),
        date=record.made["date"],
        revision=record.made["revision"],
    )
    text = shell.render(title=title, style=STYLE, body=front, after=pages[0] if pages else None)
    write_atomically(folder / FRONT, text)
    for index, page in enumerate(pages):
        body, _ = exporter.from_notebook_node(nbformat.read(page.path, as_version=4))
        before = pages[index - 1] if index else None
        after = pages[index + 1] if index + 1 < len(pages) else None
        links = {"before": before, "front": FRONT, "after": after}
        text = shell.render(title=page.title, style=STYLE, body=body, **links)
        write_atomically(folder / page.file, text)
    return [folder / FRONT, *(folder / page.file for page in pages)]
