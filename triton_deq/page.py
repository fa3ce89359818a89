"""Results as sections that the terminal and one self-contained HTML page both show."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """Text cells under column names, shown `where`: on the "page", in the "terminal", or on "both"."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    where: str = "both"


@dataclass(frozen=True)
class Plot:
    """A PNG file in the output folder and what it shows."""

    file: str
    caption: str


@dataclass
class Section:
    """A part of the page: paragraphs, then tables, then plots."""

    title: str
    paragraphs: list[str]
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


SENTENCE = 40
"""A cell of more letters than this holds words, which may be broken into lines."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 14px; margin: 0.5rem 0 1.5rem;
  font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0 }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.said { text-align: left; white-space: normal }
th { background: #f5f5f5 } .scroll { overflow-x: auto }
figure { margin: 1rem 0 2rem } img { max-width: 100% } figcaption, .quiet { color: #555; font-size: 14px }
"""


def render(
    folder: Path,
    heading: str,
    verdict: str,
    sections: list[Section],
    environment: dict[str, Any],
    seed: int,
    rows: str = "rows.json",
) -> str:
    """The page, with the plots of `folder` inside it; `rows` is the file beside it that has all figures."""
    facts = _facts(environment, seed, rows)
    body = [f"<h1>{html.escape(heading)}</h1>", f"<p>{html.escape(verdict)}</p>", facts]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
        body += [_table(table) for table in section.tables if table.where != "terminal"]
        body += [_figure(folder, plot) for plot in section.plots]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(heading)}</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def _facts(environment: dict[str, Any], seed: int, rows: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = environment["commit"] or "none"
    machine = f"{environment['device']}, {environment['threads']} thread(s)"
    facts = f"{machine} · {versions} · commit {commit} · seed {seed}"
    return f'<p class="quiet">{html.escape(facts)}<br>Every figure is a row in {rows}, beside this page.</p>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f'<div class="scroll"><table>{caption}\n<tr>{head}</tr>\n{rows}</table></div>'


def _cell(text: str) -> str:
    kind = ' class="said"' if len(text) > SENTENCE else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _figure(folder: Path, plot: Plot) -> str:
    image = base64.b64encode((folder / plot.file).read_bytes()).decode()
    caption = html.escape(plot.caption)
    source = f"data:image/png;base64,{image}"
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
