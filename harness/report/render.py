"""A report as a list of blocks, written as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template

from harness.report import wording

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
    "th,td{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th{border-bottom:2px solid #999}td.t,th.t{text-align:left}"
    "img{width:100%;max-width:900px}pre{background:#f6f6f6;padding:.8em;overflow-x:auto;font-size:12px}"
)


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    frame: pd.DataFrame


@dataclass(frozen=True)
class Picture:
    path: Path
    alt: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str


Block = Heading | Paragraph | Bullets | Table | Picture | Code


def to_markdown(blocks: list[Block], folder: Path) -> str:
    """The blocks as Markdown; pictures are linked relative to `folder`."""
    return _MARKDOWN.render(blocks=blocks, folder=folder, word_columns=_word_columns)


def to_html(blocks: list[Block]) -> str:
    """The blocks as one HTML page that loads nothing: pictures are inside it, every text is escaped."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    return _HTML.render(blocks=blocks, title=title, style=_STYLE, word_columns=_word_columns)


def _word_columns(frame: pd.DataFrame) -> list[bool]:
    """Which columns hold words, aligned to the left; columns of numbers are aligned to the right."""
    number = rf"[+{wording.MINUS}-]?[\d,.].*|{wording.DASH}|"
    columns = (frame.iloc[:, at].astype(str) for at in range(frame.shape[1]))
    return [not column.str.fullmatch(number, flags=re.DOTALL).all() for column in columns]


def _no_markup(words: object) -> str:
    """Text whose angle brackets a Markdown viewer does not take for HTML."""
    return str(words).replace("&", "&amp;").replace("<", "&lt;")


def _markdown_cell(words: object) -> str:
    return _no_markup(words).replace("|", "\\|").replace("\n", " ")


def _png_data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _template(text: str, *, escape: bool) -> Template:
    environment = Environment(
        autoescape=escape, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    filters = (_no_markup, _markdown_cell, _png_data)
    environment.filters.update({function.__name__.lstrip("_"): function for function in filters})
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.from_string(text)


_MARKDOWN = _template(
    """\
{% for block in blocks %}
{% set kind = block | kind %}
{% if kind == "Heading" %}
{{ "#" * block.level }} {{ block.text | no_markup }}
{% elif kind == "Paragraph" %}
{{ block.text | no_markup }}
{% elif kind == "Bullets" %}
{% for item in block.items %}
- {{ item | no_markup }}
{% endfor %}
{% elif kind == "Table" %}
| {{ block.frame.columns.tolist() | map("markdown_cell") | join(" | ") }} |
|{% for is_word in word_columns(block.frame) %}{{ ":--|" if is_word else "--:|" }}{% endfor +%}
{% for row in block.frame.itertuples(index=False) %}
| {{ row | map("markdown_cell") | join(" | ") }} |
{% endfor %}
{% elif kind == "Picture" %}
![{{ block.alt | no_markup }}]({{ block.path.relative_to(folder).as_posix() }})
{% elif kind == "Code" %}
```{{ block.language }}
{{ block.text }}
```
{% endif %}
{% if not loop.last %}

{% endif %}
{% endfor %}
""",
    escape=False,
)
_HTML = _template(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{{ style | safe }}</style></head><body>
{% for block in blocks %}
{% set kind = block | kind %}
{% if kind == "Heading" %}
<h{{ block.level }}>{{ block.text }}</h{{ block.level }}>
{% elif kind == "Paragraph" %}
<p>{{ block.text }}</p>
{% elif kind == "Bullets" %}
<ul>{% for item in block.items %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif kind == "Table" %}
{% set words = word_columns(block.frame) %}
<table><thead><tr>
{%- for name in block.frame.columns -%}
<th{% if words[loop.index0] %} class="t"{% endif %}>{{ name }}</th>
{%- endfor -%}
</tr></thead><tbody>
{%- for row in block.frame.itertuples(index=False) -%}
<tr>
{%- for value in row -%}
<td{% if words[loop.index0] %} class="t"{% endif %}>{{ value }}</td>
{%- endfor -%}
</tr>
{%- endfor -%}
</tbody></table>
{% elif kind == "Picture" %}
<p><img alt="{{ block.alt }}" src="data:image/png;base64,{{ block.path | png_data }}"></p>
{% elif kind == "Code" %}
<pre>{{ block.text }}</pre>
{% endif %}
{% endfor %}
</body></html>
""",
    escape=True,
)
