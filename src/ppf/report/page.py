"""A report's HTML: one file with its style, its script and plotly's bundle in it. Whatever comes from a study is escaped here."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from ppf.errors import ResourceError
from ppf.report.plots import Figure

Pair = tuple[str, str, str]
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The file may run what is in it, and ask nobody for anything."""


def plotly_bundle() -> str:
    """plotly's script, from its Python package.

    Raises:
        ResourceError: The package is not installed.
    """
    if find_spec("plotly") is None:
        raise ResourceError('the package plotly must be installed; it is not; pip install "ppf[report]"')
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def page(title: str, lead: str, sections: Iterable[str], foot: str) -> str:
    """The whole file.

    Args:
        title: Plain text, as are ``lead`` and ``foot``.
        lead: Below the title.
        sections: HTML, made by ``section`` and ``tiles``.
        foot: At the end.
    """
    own = files("ppf.report")
    style, script = (own.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return "\n".join([
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style></head>",
        f'<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>',
        "<noscript><p>The plots need JavaScript, which comes with this file; the tables do not.</p></noscript>",
        "<main>", *sections, "</main>",
        f"<footer>{escape(foot)}</footer>",
        f"<script>{plotly_bundle()}</script>",
        f"<script>{script}</script>",
        "</body></html>\n",
    ])  # fmt: skip


def section(title: str, text: str, cards: Sequence[str], two: bool = False) -> str:
    """A heading, a sentence and cards, two beside each other where there is room."""
    grid = "cards two" if two else "cards"
    return (
        f'<section><h2>{escape(title)}</h2><p class="lead">{escape(text)}</p><div class="{grid}">{"".join(cards)}</div></section>'
    )


def tiles(pairs: Iterable[Pair]) -> str:
    """Figures at a glance: name, value, a word on it."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>" for name, value, more in pairs
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def plot(title: str, caption: str, figure: Figure, kind: str = "") -> str:
    """A card with a plot, its height kept free for it; of a kind as in ``table``."""
    # No text within may end the element that holds it.
    data = json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    frame = f'<div role="img" aria-label="{escape(title)}" style="height:{int(figure["layout"]["height"])}px"></div>'
    source = f'<script type="application/json">{data}</script>'
    return f'<figure class="card {kind}"><h3>{escape(title)}</h3>{frame}{source}<figcaption>{escape(caption)}</figcaption></figure>'


def table(title: str, caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A card with a table, which scrolls by itself; a cell that ends in ``*`` is emphasised.

    Args:
        title: Plain text, as are all others.
        caption: Below.
        header: Names of the columns.
        rows: Cells.
        kind: ``"words"`` for cells that are read rather than compared, ``"wide"`` for a card across the page.
    """

    def cell(value: Any) -> str:
        text = escape(str(value))
        return f"<td><b>{text}</b></td>" if text.endswith("*") else f"<td>{text}</td>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{grid}</div>'
    return f'<figure class="card {kind}"><h3>{escape(title)}</h3>{scroll}<figcaption>{escape(caption)}</figcaption></figure>'


def code(title: str, lines: str, caption: str) -> str:
    """A card with a command."""
    block = f'<pre tabindex="0" aria-label="{escape(title)}">{escape(lines)}</pre>'
    return f'<figure class="card"><h3>{escape(title)}</h3>{block}<figcaption>{escape(caption)}</figcaption></figure>'
