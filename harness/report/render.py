"""A report as a list of blocks, written as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

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
    parts = []
    for block in blocks:
        match block:
            case Heading(level, words):
                parts.append(f"{'#' * level} {_no_markup(words)}")
            case Paragraph(words):
                parts.append(_no_markup(words))
            case Bullets(items):
                parts.append("\n".join(f"- {_no_markup(item)}" for item in items))
            case Table(frame):
                parts.append(_markdown_table(frame))
            case Picture(path, alt):
                parts.append(f"![{_no_markup(alt)}]({path.relative_to(folder).as_posix()})")
            case Code(words, language):
                parts.append(f"```{language}\n{words}\n```")
    return "\n\n".join(parts) + "\n"


def _no_markup(words: str) -> str:
    """Text whose angle brackets a Markdown viewer does not take for HTML."""
    return words.replace("&", "&amp;").replace("<", "&lt;")


def _markdown_table(frame: pd.DataFrame) -> str:
    def line(cells: list[str]) -> str:
        plain = [_no_markup(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        return f"| {' | '.join(plain)} |"

    words = _word_columns(frame)
    rule = [":--" if is_words else "--:" for is_words in words]
    body = [line([str(value) for value in row]) for row in frame.itertuples(index=False)]
    return "\n".join([line([str(name) for name in frame.columns]), "|" + "|".join(rule) + "|", *body])


def _word_columns(frame: pd.DataFrame) -> list[bool]:
    """Which columns are words, set to the left; numbers go to the right."""
    number = re.compile(rf"[+{wording.MINUS}-]?[\d,.]|{wording.DASH}$")
    return [not all(number.match(str(v)) or v == "" for v in frame.iloc[:, i]) for i in range(frame.shape[1])]


def to_html(blocks: list[Block]) -> str:
    """The blocks as one HTML page that loads nothing: pictures are inside it, every text is escaped."""
    parts = []
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    for block in blocks:
        match block:
            case Heading(level, words):
                parts.append(f"<h{level}>{html.escape(words)}</h{level}>")
            case Paragraph(words):
                parts.append(f"<p>{html.escape(words)}</p>")
            case Bullets(items):
                parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
            case Table(frame):
                parts.append(_html_table(frame))
            case Picture(path, alt):
                data = base64.b64encode(path.read_bytes()).decode()
                parts.append(f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>')
            case Code(words, _):
                parts.append(f"<pre>{html.escape(words)}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html_table(frame: pd.DataFrame) -> str:
    kinds = [' class="t"' if is_words else "" for is_words in _word_columns(frame)]

    def line(tag: str, cells: list[Any]) -> str:
        inner = "".join(f"<{tag}{k}>{html.escape(str(c))}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{inner}</tr>"

    body = "".join(line("td", list(row)) for row in frame.itertuples(index=False))
    return f"<table><thead>{line('th', list(frame.columns))}</thead><tbody>{body}</tbody></table>"
