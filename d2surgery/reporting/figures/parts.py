"""Figures: measured records in, a plotly figure and the tidy table it shows out. Nothing here reads or writes files.

Colours are Okabe and Ito's for module types, each with a dash and a marker of its own, and viridis for depth and size.
Names come from strangers' files: every one is escaped before plotly, which reads a little HTML, sees it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import ceil, floor, log10
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from d2surgery.reporting.tidy import (
    Row,
    address,
)

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
DEPTH = [[i / 8, colour] for i, colour in enumerate(sample_colorscale("Viridis", [0.12 + 0.095 * i for i in range(9)]))]
NULL = "#888888"
PANEL, GAP, MARGIN = 190, 75, 95  # pixels
LONGEST = 40  # characters of a name that a figure shows
Key = TypeVar("Key")


@dataclass(frozen=True, repr=False)
class Plot:
    """A figure, how to read it, and the table of what it shows (rows with tidy.COLUMNS)."""

    name: str
    title: str
    caption: str
    figure: go.Figure
    rows: list[Row]
    adapter: str = ""
    """Whose numbers they are."""

    def _repr_html_(self) -> str:
        """As a notebook shows it: the figure, its adapter and how to read it."""
        whose = f" ({escape(self.adapter)})" if self.adapter else ""
        drawn = self.figure.to_html(full_html=False, include_plotlyjs="require")
        return f"<h4>{escape(self.title)}{whose}</h4>{drawn}<p>{escape(self.caption)}</p>"

    def __repr__(self) -> str:
        return f"Plot({self.name!r}: {self.title}, {len(self.rows)} numbers)"


def named(plot: Plot, adapter: str) -> Plot:
    """The figure with its adapter's name, which every row of its table has too."""
    rows: list[Row] = [each | {"adapter": each["adapter"] or adapter} for each in plot.rows]
    return replace(plot, adapter=adapter, rows=rows)


# Parts of figures -----------------------------------------------------------------------------------------------------


def heat_map(
    rows: list[Row], title: str, *, bottom: float | None, top: float | None, percent: bool = False
) -> go.Figure:
    """Layer by type, the mean of a cell's modules; cells without a module stay blank, on grey."""
    names = list(dict.fromkeys(str(r["type"]) for r in rows))
    layers = sorted({layer_of(r) for r in rows})
    cells = _means(rows, lambda r: (str(r["type"]), layer_of(r)))
    z = [[cells.get((name, layer)) for layer in layers] for name in names]
    largest = max([value_of(r) for r in rows], default=1.0)
    style = ".2~%" if percent else ".3~g"
    figure = go.Figure(
        go.Heatmap(
            x=layers, y=[plain_name(name) for name in names], z=z, colorscale="Viridis", zmin=bottom,
            zmax=max(top or 0, largest) or 1, xgap=1, ygap=1, hoverongaps=False,
            colorbar={"title": {"text": title, "side": "right"}, "tickformat": style, "thickness": 14},
            hovertemplate=f"%{{y}}, layer %{{x}}: %{{z:{style}}}<extra></extra>",
        )
    )  # fmt: skip
    return layers_across(figure, layers, len(names))


def layers_across(figure: go.Figure, layers: Sequence[int], types: int) -> go.Figure:
    """The axes of a map: layers from left to right, types of module from top to bottom."""
    figure.update_xaxes(title_text="layer", showgrid=False, **layer_ticks(layers, -1 in layers))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return sized(figure, MARGIN + 28 * max(types, 4))


def lines_by_layer(rows: list[Row], title: str) -> go.Figure:
    """A line per type over layers; the mean where a layer has several modules of a type."""
    figure = go.Figure()
    for number, name in enumerate(dict.fromkeys(str(r["type"]) for r in rows)):
        series = by_layer(r for r in rows if r["type"] == name)
        marker = {"symbol": MARKERS[number % len(MARKERS)], "size": 5 if len(series) < 60 else 3}
        figure.add_trace(
            go.Scatter(x=list(series), y=list(series.values()), mode="lines+markers", name=plain_name(name),
                       line=line_style(number), marker=marker,
                       hovertemplate="%{fullData.name}, layer %{x}: %{y:.3g}<extra></extra>")
        )  # fmt: skip
    layers = sorted({layer_of(r) for r in rows})
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, -1 in layers))
    figure.update_yaxes(title_text=title)
    legend_above(figure)
    return sized(figure, 360)


def panel_grid(titles: list[str], *, shared_y: bool = False) -> tuple[go.Figure, list[dict[str, int]]]:
    """A grid of panels, at most four in a row, and where each is."""
    columns = max(min(len(titles), 4), 1)
    lines = max(ceil(len(titles) / columns), 1)
    inner = (PANEL + GAP) * lines - GAP
    figure = make_subplots(
        lines,
        columns,
        subplot_titles=[plain_name(title) for title in titles],
        horizontal_spacing=0.05,
        vertical_spacing=GAP / inner,
        shared_yaxes="all" if shared_y else False,
    )
    places = [{"row": number // columns + 1, "col": number % columns + 1} for number in range(len(titles))]
    return sized(figure, MARGIN + inner), places


def sized(figure: go.Figure, height: int = 420) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 20, "t": 40, "b": 55},
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#222222"},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(gridcolor="#e4e4e4", zeroline=False, automargin=True, linecolor="#999999", ticks="outside")
    figure.update_yaxes(gridcolor="#e4e4e4", zeroline=False, automargin=True, linecolor="#999999")
    figure.update_annotations(font_size=12)
    return figure


def legend_above(figure: go.Figure, *, panels: bool = False) -> None:
    """Above the panels' titles, where there are some."""
    top = 1 + 30 / (figure.layout.height or 420) if panels else 1.02
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": top, "yanchor": "bottom", "x": 0})
    if panels:
        figure.update_layout(margin={"t": 75}, height=(figure.layout.height or 420) + 35)


def depth_bar(figure: go.Figure, deepest: int) -> None:
    """A colour bar for lines coloured by depth."""
    if deepest:
        bar = {"title": {"text": "layer", "side": "right"}, "thickness": 14} | layer_ticks([deepest], False)
        marker = {"color": [0], "cmin": 0, "cmax": deepest, "colorscale": DEPTH, "showscale": True, "colorbar": bar}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False))


def depth_line(module: str, deepest: int, *, x: Sequence[Any], **shown: Any) -> go.Scatter:
    """A thin line coloured by depth, which says the module's name."""
    line = {"width": 1.3, "color": depth_colour(address(module).layer, deepest)}
    named = [plain_name(module)] * len(x)
    return go.Scatter(x=x, line=line, marker={"size": 3}, showlegend=False, customdata=named, **shown)


def hover(text: str) -> str:
    return f"%{{customdata}}<br>{text}<extra></extra>"


def depth_colour(layer: int | None, deepest: int) -> str:
    if layer is None or layer < 0:
        return NULL
    colour: str = sample_colorscale(DEPTH, [layer / deepest if deepest else 0.0])[0]
    return colour


def layer_ticks(layers: Iterable[int], some_outside: bool, most: int = 13) -> dict[str, Any]:
    """Whole numbers, about `most` at most; −1 stands for modules outside the numbered layers."""
    inside = [layer for layer in layers if layer >= 0]
    step = _step(max(inside, default=0), most)
    ticks = list(range(0, max(inside, default=0) + 1, step)) if inside else []
    shown = [-1, *ticks] if some_outside else ticks
    return {"tickvals": shown, "ticktext": ["none" if tick < 0 else str(tick) for tick in shown]}


def _step(deepest: int, most: int) -> int:
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 10**9) if deepest / step <= most)


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone; linear where a value is not positive."""
    known = sorted(values)
    if not known or known[0] <= 0:
        return {"exponentformat": "power"}
    first, last = floor(log10(known[0])), ceil(log10(known[-1]))
    narrow = known[-1] < 5 * known[0]
    digits: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if narrow else (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def line_style(number: int) -> dict[str, Any]:
    return {"color": OKABE_ITO[number % len(OKABE_ITO)], "dash": DASHES[number % len(DASHES)], "width": 1.8}


def faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def plain_name(name: str, longest: int = LONGEST) -> str:
    """A stranger's name as plotly may show it: no markup, no control characters, no template, of bounded length."""
    plain = name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
    if len(plain) > longest:
        plain = f"{plain[: longest // 3]}…{plain[-longest * 2 // 3 :]}"
    return escape(plain, quote=False).replace("%{", "%\u200b{")


def value_of(of: Row) -> float:
    """Of a row that has one."""
    value = of["value"]
    assert isinstance(value, int | float)
    return float(value)


def layer_of(of: Row) -> int:
    """−1 outside the numbered layers."""
    layer = of["layer"]
    return layer if isinstance(layer, int) else -1


def by_layer(rows: Iterable[Row]) -> dict[int, float]:
    """Layer -> the mean of its values, in the order of the layers."""
    return dict(sorted(_means(rows, layer_of).items()))


def _means(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, float]:
    cells: dict[Key, list[float]] = {}
    for r in rows:
        cells.setdefault(key(r), []).append(value_of(r))
    return {at: sum(values) / len(values) for at, values in cells.items()}


def deepest_layer(modules: Iterable[str]) -> int:
    """0 where no module stands in a numbered layer."""
    return max([layer for module in modules if (layer := address(module).layer) is not None], default=0)


def thinned(every: Sequence[Key], most: int) -> list[Key]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(every) <= most:
        return list(every)
    return [every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)]
