"""Self-contained HTML pages in one style: no script, nothing from the network, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from splitward.disk import write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
:root { --strong: #2a6fb0; --good: #2c7a3f; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --strong: #7db8ef; --good: #6fce85; --bad: #ff8a7e; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child { text-align: left; } tbody th { font-weight: normal; white-space: nowrap; }
.wide { overflow-x: auto; } .wide + .wide { margin-top: 1.2rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; }
.facts dt { font-weight: 600; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .8rem; margin: 1.2rem 0;
  padding: 0; list-style: none; }
.tiles li { background: var(--soft); border-radius: .6rem; padding: .7rem 1rem; }
.tiles b { display: block; font-size: 1.4rem; color: var(--strong); }
img { max-width: 100%; background: white; border-radius: .4rem; }
code { overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; opacity: .75; font-size: .85rem; }
"""


def text(value: object) -> str:
    """`value` as text of a page."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text whose first column names the rows."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Figures that stand out: name and value."""
    return '<ul class="tiles">' + "".join(f"<li>{text(k)}<b>{text(v)}</b></li>" for k, v in values) + "</ul>"


def facts(values: Sequence[tuple[str, str]]) -> str:
    """Names with a text each, however long."""
    body = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values)
    return f'<dl class="facts">{body}</dl>'


def items(values: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{text(value)}</li>" for value in values) + "</ul>"


def picture(png: bytes, alt: str, kind: str = "") -> str:
    """A PNG within the page; `kind` is its class."""
    encoded = base64.b64encode(png).decode("ascii")
    attribute = f' class="{kind}"' if kind else ""
    return f'<img{attribute} alt="{text(alt)}" src="data:image/png;base64,{encoded}">'


def write_page(path: Path, title: str, parts: Sequence[str], style: str = "") -> None:
    """Write the page, as a whole or not at all."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}{style}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    write_whole(path, page.encode(), 0o644)
