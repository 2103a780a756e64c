"""The parts of an HTML page that links to nothing: sections, tables and numbers, light or dark, wide or narrow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Cells = tuple[str, ...]

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #5c6570; --page: #fff; --card: #f5f6f8; --line: #dfe3e8;
  --warn: #9a3412; --warn-page: #fff3ec }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa4b0; --page: #14171b; --card: #1e2329;
  --line: #323941; --warn: #ffb38a; --warn-page: #33211a } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
.quiet { color: var(--quiet); margin: .2rem 0 }
.warning { color: var(--warn); background: var(--warn-page); padding: .4rem .8rem; border-radius: 6px;
  overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem; margin: 1.2rem 0 }
.tiles div { background: var(--card); border-radius: 8px; padding: .6rem .8rem }
.tiles strong { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums }
.tiles span { color: var(--quiet); font-size: .85rem; display: block }
.figure, .wide { overflow-x: auto } .figure svg { width: 100%; max-width: 46rem; height: auto; display: block }
.figure.broad svg { min-width: 34rem; max-width: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: normal; color: var(--quiet) } td { overflow-wrap: anywhere }
.grid td, .grid th { border-bottom: 1px solid var(--line); white-space: nowrap }
.grid td:first-child { white-space: normal; min-width: 8rem }
.grid td + td, .grid th + th { text-align: right; padding: .25rem 0 .25rem 1rem }
.samples { display: grid; gap: .8rem } .samples table { width: 100% }
article { background: var(--card); border-radius: 8px; padding: .7rem .9rem }
.prompt { font-weight: 600; margin: 0 0 .3rem; white-space: pre-wrap; overflow-wrap: anywhere }
.samples td { white-space: pre-wrap; width: 100% } .samples th { white-space: nowrap }
ul { padding-left: 1.2rem; margin: .6rem 0 } li { overflow-wrap: anywhere }
details { border-top: 1px solid var(--line); padding: .7rem 0 } details:first-of-type { margin-top: 2.5rem }
summary { cursor: pointer; font-weight: 600 }
pre { background: var(--card); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: 13px }
@media (max-width: 30rem) { body { margin: 1rem auto } .tiles { grid-template-columns: 1fr 1fr }
  th, td { padding-right: .7rem } }
@media print { details > * { display: block } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; parts that are empty are left out."""
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{view}<title>{escape(title)}</title>'
    return "\n".join([f"{head}<style>{STYLE}</style>", *filter(None, parts), "</html>\n"])


def section(title: str, content: str) -> str:
    """A heading and what is under it; nothing without content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def folded(title: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def tiles(found: Sequence[tuple[str, str, str]]) -> str:
    """The numbers that matter: name, number and what it stands beside."""
    cells = (
        f"<div><span>{escape(name)}</span><strong>{escape(number)}</strong><span>{escape(beside)}</span></div>"
        for name, number, beside in found
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if found else ""


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>" if rows else ""


def grid_table(names: Cells, rows: Sequence[Cells]) -> str:
    """Columns of numbers after a column of names."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="grid"><tr>{head}</tr>{body}</table></div>'


def bullets(texts: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(str(text))}</li>" for text in texts) + "</ul>" if texts else ""


def shown(value: Any) -> str:
    """A value of JSON as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(shown, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
