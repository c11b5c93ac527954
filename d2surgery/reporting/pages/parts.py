"""Parts of a page: the template filled, figures, tables, and a stranger's text made safe.

A page needs no network: style, script and plotly.js (about 5 MB) are inside it, and its content security policy
forbids anything from outside.
"""

import base64
import io
import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from itertools import chain
from math import isfinite
from pathlib import Path

import plotly.io
from plotly.offline import get_plotlyjs

from d2surgery.errors import refuse
from d2surgery.reporting.figures.parts import Plot, plain_name
from d2surgery.reporting.tidy import write_rows

MOST_ROWS = 5000  # of a figure's table inside the page


def whole_page(title: str, parts: Iterable[str]) -> str:
    """The template, its marks replaced in one pass: what is filled in is not searched for marks.

    A part at a time: the page of ten adapters has 20 MB, and each further copy of it as much again.
    """
    titles: list[str] = []
    body = [_unbroken(_anchored(part, titles)) for part in parts]
    if len(titles) > 2:
        _add_contents(body, titles)
    filling = {
        "title": [safe(title)],
        "body": [*chain.from_iterable((part, "\n") for part in body), _footer()],
        "plotly": [get_plotlyjs()],
    }
    template = files("d2surgery").joinpath("report.html").read_text(encoding="utf-8")
    pieces = re.split("<!--(title|body|plotly)-->", template)
    return "".join(chain.from_iterable(filling[p] if at % 2 else [p] for at, p in enumerate(pieces)))


def _anchored(part: str, titles: list[str]) -> str:
    """Every section with an anchor; its title goes to the others."""

    def anchored(found: re.Match[str]) -> str:
        titles.append(found[1])
        return f'<h2 id="section{len(titles)}">{found[1]}</h2>'

    return re.sub(r"<h2>(.*?)</h2>", anchored, part)


def _add_contents(body: list[str], titles: Sequence[str]) -> None:
    """A list of the sections after the first of them."""
    items = "".join(f'<li><a href="#section{at}">{title}</a></li>' for at, title in enumerate(titles, 1))
    contents = _unbroken(f'<nav aria-label="Contents"><ol>{items}</ol></nav>')
    at = next(at for at, part in enumerate(body) if '<h2 id="section2">' in part)
    body[at] = re.sub(r'(?:<figure\b[^>]*>)?<h2 id="section2">', lambda found: contents + found[0], body[at], count=1)


_PROSE = re.compile(r"<(p|li|figcaption)\b[^>]*>.*?</\1>", re.DOTALL)
_IN_NUMBERS = re.compile(r"(?<=\d) (?=(?:%|±|×|MB\b|GB\b|KB\b|s\b))|(?<=±) (?=\d)")


def _unbroken(body: str) -> str:
    """A number and its unit stay on one line."""
    return _PROSE.sub(lambda found: _IN_NUMBERS.sub("\u00a0", found[0]), body)


def _footer() -> str:
    """Who made the page, and when: of SOURCE_DATE_EPOCH where it is set, so that a page can be made again."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    day = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() and len(epoch) < 12 else datetime.now(UTC)
    return f'<footer class="soft">Made by d2surgery {version("d2surgery")} on {day:%Y-%m-%d} (UTC).</footer>'


class Figures:
    """Figures of one page, each with its own id."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, plot: Plot, subtitle: str = "", heading: str = "", *, caption: bool = True) -> str:
        """Without its caption where one caption above serves several figures."""
        self.count += 1
        name = f"figure{self.count}"
        many = any(key.startswith("xaxis") and key != "xaxis" for key in plot.figure.to_dict()["layout"])
        top = f"<{heading}>{safe(plot.title)}</{heading}>" if heading else ""
        top += f"<h4>{safe(subtitle)}</h4>" if subtitle else ""
        data = plot.figure.to_json().replace("<", "\\u003c")
        return (
            f'<figure class="{"panels wide" if many else "single"}">{top}'
            f'<div class="pan"><div class="canvas" id="{name}" role="img" aria-label="{safe(plot.title)}" '
            f'style="height:{plot.figure.layout.height}px"></div></div>'
            f"<figcaption>{safe(plot.caption) if caption else ''} {_download(plot)}</figcaption>"
            f'<script type="application/json" id="{name}-data">{data}</script></figure>'
        )


def _download(plot: Plot) -> str:
    if len(plot.rows) > MOST_ROWS:
        return f"({len(plot.rows)} numbers: --csv writes them.)"
    text = io.StringIO()
    write_rows(plot.rows, text)
    data = base64.b64encode(text.getvalue().encode(errors="backslashreplace")).decode()
    return f'<a class="csv" download="{_file_name(plot)}" href="data:text/csv;base64,{data}">Numbers as CSV</a>'


def _file_name(plot: Plot) -> str:
    """`rank_map-my-adapter.csv`: what is saved from one page for several adapters must not have one name."""
    whose = re.sub(r"[^A-Za-z0-9.]+", "-", plot.adapter).strip("-.")[:80]
    return f"{plot.name}{f'-{whose}' if whose else ''}.csv"


def figures_page(shown: Sequence[Plot], title: str) -> str:
    """A page of figures alone, each with the name of its adapter."""
    figures = Figures()
    drawn = (figures.add(plot, plot.adapter, heading="h2") for plot in shown)
    return whole_page(title, [f"<h1>{safe(title)}</h1>", *drawn])


def write_images(shown: Sequence[Plot], paths: Sequence[Path]) -> None:
    """PNG, SVG or PDF, by the ending; under the title the adapter's name. Raises NO_IMAGES where kaleido or its browser
    is missing or fails."""
    pictures = []
    for plot in shown:
        picture = plot.figure.to_dict()
        top = {"t": (90 if plot.figure.layout.legend.orientation else 70) + 20 * bool(plot.adapter)}
        under = f"<br><span style='font-size:13px'>{plain_name(plot.adapter, 120)}</span>" if plot.adapter else ""
        picture["layout"]["title"] = {
            "text": plot.title + under,
            "x": 0.02,
            "y": 0.98,
            "yanchor": "top",
            "font": {"size": 17},
        }
        picture["layout"]["margin"] = {**picture["layout"]["margin"], **top}
        picture["layout"]["height"] += 40 + 20 * bool(plot.adapter)
        pictures.append(picture)
    try:
        plotly.io.write_images(pictures, list(paths), width=1100, scale=1.5, validate=False)
    except Exception as error:  # kaleido and the browser it starts fail in many ways, and all mean this
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise refuse("NO_IMAGES", reason, file=str(paths[0])) from error


# Tables ---------------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, words: int, sortable: bool = False) -> str:
    """`words` columns are text; the others are numbers."""
    inside = [f"<button>{safe(head)}</button>" if sortable else safe(head) for head in heads]
    top = "".join(f'<th scope="col"{_TEXT * (at < words)}>{head}</th>' for at, head in enumerate(inside))
    body = "".join(f"<tr>{''.join(line)}</tr>\n" for line in lines)
    kind = 'class="scroll tall"' if sortable else 'class="scroll"'
    return (
        f'<div {kind} tabindex="0" role="region" aria-label="table"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


_TEXT = ' class="text"'


def text_cell(text: str, hint: str = "") -> str:
    """Long names break after a dot, not inside a word, nor inside a number."""
    shown = re.sub(r"(?<!\d)\.|\.(?!\d)", ".<wbr>", safe(text))
    return f'<td class="text"{f" title={chr(34)}{safe(hint)}{chr(34)}" if hint else ""}>{shown}</td>'


def number_cell(value: float | int | None, *, percent: bool = False) -> str:
    if value is None or not isfinite(value):
        return "<td>–</td>"
    shown = f"{100 * value:.3g} %" if percent else f"{value:.3g}" if isinstance(value, float) else str(value)
    return f'<td data-v="{value!r}">{shown}</td>'


# Text -----------------------------------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """For HTML, in text and in attributes; control characters spelled out."""
    plain = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return escape(plain)


def joined(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def monospace(module: str) -> str:
    return f"<code>{safe(module)}</code>"


def counted(amount: int, noun: str) -> str:
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"
