"""Pieces of a page that is one file: text, tables and figures as HTML, and what draws the figures without a network.

What comes from outside (names, errors, commands) goes through :func:`escape`; figures travel as JSON in which no tag can
begin. plotly's script is packed into the page, a third of its size, and unpacked by the browser.
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from dfkt.errors import ConfigError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GENERATOR = "dfkt report"
"""What a page names as its maker: only such a file is ever replaced."""
MISSING = "A report needs plotly, which is not installed. Install it with: pip install 'dfkt[report]'"
SYMBOLS = {"star": "★", "diamond": "◆"}
"""Of a legend's entries, beside dots and lines."""
LONG_CELL = 36
"""Characters of a table's cell from which on it may be folded."""
_NUMBER = re.compile(r"[-+<]?\d")
_MARK = re.compile(rf'<meta name="generator" content="{re.escape(GENERATOR)}[ "]')
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; max-width: 70rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .5rem 0; max-width: 52rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid #d55e00; padding: .2rem 0 .2rem .8rem; }
.note { color: #555; font-size: .9rem; }
.fault { border-left: 4px solid #b00020; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top;
  white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { font-size: .9rem; color: #333; margin-bottom: .3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem; }
.arcs { width: 100%; max-width: 24rem; height: auto; display: block; }
.key { font-size: .8rem; margin: .2rem 0; }
.key span { margin-right: 1rem; white-space: nowrap; }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; font-size: .8rem; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
progress { width: 100%; max-width: 30rem; height: 1.1rem; accent-color: #d55e00; }
nav a { margin-right: 1rem; }
"""
_SCRIPT = """
const drawn = box => {
  if (box.dataset.drawn) return;
  box.dataset.drawn = "yes";
  const figure = JSON.parse(box.previousElementSibling.textContent);
  Plotly.newPlot(box, figure.data, figure.layout, { responsive: true, displayModeBar: false });
};
const draw = within => {
  for (const box of within.querySelectorAll(".chart")) {
    if (!box.parentElement.closest("details:not([open])")) drawn(box);
  }
};
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("packed").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  draw(document);
  for (const box of document.querySelectorAll("details")) box.addEventListener("toggle", () => box.open && draw(box));
  document.body.dataset.ready = "yes";
})();
"""


def escape(text: object) -> str:
    """Return a text in which nothing is HTML.

    Example:
        >>> escape('<b> & "')
        '&lt;b&gt; &amp; &quot;'
    """
    return html.escape(str(text), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """Return a text as a paragraph, perhaps of a class."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def notes(lines: Iterable[str]) -> str:
    """Return what is said beside a table, a paragraph each."""
    return "".join(paragraph(line, "note") for line in lines if line)


def section(title: str, *parts: str, level: int = 3, name: str = "") -> str:
    """Return a titled part; nothing where it holds nothing."""
    body = "".join(parts)
    anchor = f' id="{escape(name)}"' if name else ""
    return f"<section{anchor}><h{level}>{escape(title)}</h{level}>{body}</section>" if body else ""


def folded(title: str, *parts: str, opened: bool = False) -> str:
    """Return a part that is opened by a click; its figures are drawn then."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def grid(parts: Iterable[str]) -> str:
    """Return parts side by side, as many as there is room for."""
    body = "".join(parts)
    return f'<div class="grid">{body}</div>' if body else ""


def table(frame: pd.DataFrame) -> str:
    """Return a frame of texts as a table in a box of its own, which scrolls where the page is narrow."""
    head = "".join(f"<th>{escape(name)}</th>" for name in frame.columns)
    rows = ("".join(map(_cell, row)) for row in frame.astype(object).fillna("").to_numpy().tolist())
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def drawing(svg: str, caption: str) -> str:
    """Return an SVG with its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def plot(figure: Figure, caption: str, *, least: int = 0) -> str:
    """Return a plotly figure with its caption, as high as its layout says and as wide as there is room.

    Args:
        figure: What is drawn.
        caption: Says what is seen.
        least: Pixels of width below which it scrolls in a box of its own.
    """
    key = _key(figure)
    data = figure.update_layout(showlegend=False).to_json()  # in which plotly escapes what could begin a tag
    height = int(figure.layout.height or 320)
    style = f"height:{height}px" + (f";min-width:{least}px" if least else "")
    box = f'<script type="application/json">{data}</script><div class="chart" style="{style}"></div>'
    return f'<figure><figcaption>{escape(caption)}</figcaption>{key}<div class="scroll">{box}</div></figure>'


def page(title: str, body: str, version: str) -> str:
    """Return the whole page.

    Raises:
        ConfigError: If plotly is missing, which draws the figures.
    """
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{GENERATOR} {escape(version)}">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            body,
            "<noscript><p>Figures are drawn by JavaScript, which is off here; the tables hold their numbers.</p></noscript>",
            f'<script type="text/plain" id="packed">{_packed()}</script><script>{_SCRIPT}</script></body></html>',
        ]
    )


def is_ours(text: str) -> bool:
    """Whether a file's beginning is that of a page which :func:`page` made.

    Example:
        >>> is_ours('<html><head><meta name="generator" content="dfkt report 0.1.0">'), is_ours("<html>")
        (True, False)
    """
    return _MARK.search(text) is not None


def check_plotly() -> None:
    """Refuse to go on without plotly.

    Raises:
        ConfigError: If it is missing.
    """
    try:
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise ConfigError(MISSING) from error


@functools.cache
def _packed() -> str:
    """Return plotly's script, compressed, as text."""
    check_plotly()
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _key(figure: Figure) -> str:
    """Return a figure's legend as text, which is folded where plotly's own would lie over the plot."""
    entries = {}
    for trace in figure.data:
        if trace.name and trace.showlegend is not False:
            known = trace.to_plotly_json()
            line, marker = known.get("line", {}), known.get("marker", {})
            lines = "lines" in known.get("mode", "")
            symbol = SYMBOLS.get(marker.get("symbol"), "●") if not lines else "━━" if "dash" not in line else "╍╍"
            paint = line.get("color", marker.get("color", "inherit")) if lines else marker.get("color", "inherit")
            entries[trace.name] = f'<span><i style="color:{escape(paint)}">{symbol}</i> {escape(trace.name)}</span>'
    return f'<div class="key">{" ".join(entries.values())}</div>' if entries else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _cell(value: object) -> str:
    text = str(value)
    folds = len(text) > LONG_CELL and not _NUMBER.match(text)
    return f"<td{_class('long' if folds else '')}>{escape(text)}</td>"
