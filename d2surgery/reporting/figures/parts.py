"""Figures: measured records in, a plotly figure and the tidy table it shows out. Nothing here reads or writes files.

Colours are Okabe and Ito's for module types, each with a dash and a marker of its own, and viridis for depth and size.
Names come from strangers' files: every one is escaped before plotly, which reads a little HTML, sees it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import asinh, ceil, erf, exp, floor, log, log10, pi, sqrt
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from d2surgery.measures.drift import Drift
from d2surgery.measures.ranks import Spectrum
from d2surgery.measures.subspace import Intruders
from d2surgery.reporting.tidy import (
    CONVENTIONS,
    QUANTILES,
    SIDES,
    Pair,
    Row,
    address,
    difference_rows,
    drift_rows,
    picked,
    quantiles,
    row,
    spectrum_rows,
    types,
)
from d2surgery.surveying.modules import Difference

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
DEPTH = [[i / 8, colour] for i, colour in enumerate(sample_colorscale("Viridis", [0.12 + 0.095 * i for i in range(9)]))]
NULL = "#888888"
PANEL, GAP, MARGIN = 190, 75, 95  # pixels
LONGEST = 40  # characters of a name that a figure shows
FAN_LAYERS, FAN_POINTS = 32, 48  # a fan of more is no clearer, only heavier
METRICS = {
    "energy_entropy_rank": "energy entropy rank",
    "entropy_rank": "entropy rank",
    "stable_rank": "stable rank",
    "energy_rank_90": "directions for 90 % of the energy",
    "energy_rank_99": "directions for 99 % of the energy",
    "relative_update": "‖delta‖ / ‖W0‖",
    "frobenius_norm": "Frobenius norm",
}


@dataclass(frozen=True)
class Plot:
    """A figure, how to read it, and the table of what it shows (rows with tidy.COLUMNS)."""

    name: str
    title: str
    caption: str
    figure: go.Figure
    rows: list[Row]


# Of a spectrum --------------------------------------------------------------------------------------------------------


def rank_map(
    spectra: Mapping[str, Spectrum],
    nominal: Mapping[str, int | None],
    metric: str = "energy_entropy_rank",
    top: float | None = None,
) -> Plot:
    """How much rank each module uses, layer by type. `top` is the end of the colour scale, to compare figures."""
    rows = [*_shown(spectrum_rows(spectra, nominal), metric, "nominal_rank")]
    known = [_value(r) for r in picked(rows, "nominal_rank")]
    figure = _heat(list(picked(rows, metric)), METRICS[metric], bottom=0, top=top or max(known, default=None))
    mark = f" Nominal rank {_span(known)}: the end of the colour scale." if known else ""
    caption = (
        f"Each cell is a module: how many directions its {_of(spectra)} uses ({METRICS[metric]}: "
        f"{CONVENTIONS[metric]}).{mark}"
    )
    return Plot("rank_map", "Rank used, by layer and module type", caption, figure, rows)


def rank_lines(
    spectra: Mapping[str, Spectrum],
    nominal: Mapping[str, int | None],
    metric: str = "energy_entropy_rank",
    top: float | None = None,
) -> Plot:
    """The same as lines, a dashed line at every nominal rank."""
    rows = [*_shown(spectrum_rows(spectra, nominal), metric, "nominal_rank")]
    marks = sorted({_value(r) for r in picked(rows, "nominal_rank")})
    values = list(picked(rows, metric))
    figure = _lines(values, f"{METRICS[metric]} of the {_of(spectra)}")
    for mark in marks if len(marks) <= 4 else (marks[0], marks[-1]):
        figure.add_hline(y=mark, line={"dash": "dash", "color": NULL}, annotation_text=f"nominal rank {mark:g}")
    figure.update_yaxes(range=[0, 1.12 * max([top or 0, *marks, *map(_value, values)])])
    caption = f"{METRICS[metric].capitalize()}: {CONVENTIONS[metric]}." + (
        " What lies between a line and the dashed one (the nominal rank) is paid for and not used." if marks else ""
    )
    return Plot("rank_lines", "Rank used against depth", caption, figure, rows)


def size_map(spectra: Mapping[str, Spectrum], top: float | None = None) -> Plot:
    """How large the update of each module is."""
    rows = [*_shown(spectrum_rows(spectra, {}), "frobenius_norm")]
    figure = _heat(rows, f"‖{_of(spectra)}‖F", bottom=0, top=top)
    caption = f"{CONVENTIONS['frobenius_norm']} of the {_of(spectra)}, scaling included, in units of the weights."
    return Plot("size_map", "Size, by layer and module type", caption, figure, rows)


def spectrum_fan(spectra: Mapping[str, Spectrum], nominal: Mapping[str, int | None]) -> Plot:
    """σᵢ/σ₁ against i, a panel per module type, a line per layer, coloured by depth."""
    groups = _by_type(spectra)
    kept = {type_: _thinned(modules, FAN_LAYERS) for type_, modules in groups.items()}
    lines = {m: _fan_rows(m, type_, spectra[m]) for type_, modules in kept.items() for m in modules}
    deepest = max([a for m in spectra if (a := address(m).layer) is not None], default=0)
    figure, places = _panels(list(kept), shared_y=True)
    for modules, at in zip(kept.values(), places, strict=True):
        for module in modules:
            figure.add_trace(_fan_line(lines[module], module, deepest), **at)
        for rank in sorted({r for m in modules if (r := nominal.get(m)) is not None})[:3]:
            figure.add_vline(x=rank, line={"dash": "dash", "color": NULL, "width": 1}, **at)
    _depth_bar(figure, deepest)
    rows = [r for line in lines.values() for r in line]
    longest = max([int(r["index"] or 1) for r in rows], default=1)
    figure.update_xaxes(type="log", title_text="index i", tickvals=[2**k for k in range(0, 20, 1 + longest // 300)])
    figure.update_yaxes(**_log_axis(map(_value, rows)))
    figure.update_yaxes(title_text="σᵢ / σ₁", col=1)
    left_out = sum(map(len, groups.values())) - sum(map(len, kept.values()))
    thinned = f" {left_out} layers between those shown are left out." if left_out else ""
    caption = (
        f"Singular values of the {_of(spectra)} relative to the largest, both axes logarithmic; colour is depth, the "
        f"dashed line the nominal rank. A line that falls early uses few of its directions.{thinned}"
    )
    return Plot("spectrum_fan", "Singular values, by module type", caption, figure, rows)


def _fan_rows(module: str, type_: str, record: Spectrum) -> list[Row]:
    sigma = record.singular_values[record.singular_values > 0].tolist()
    return [
        row(
            module=module, layer=address(module).layer, type=type_, metric="relative_singular_value", index=i + 1,
            value=sigma[i] / sigma[0], quality="exact", method=record.method, of=record.of, dtype="float64",
        )
        for i in _log_spaced(len(sigma), FAN_POINTS)
        if sigma[i] / sigma[0] > record.error_bound
    ]  # fmt: skip


def _fan_line(rows: list[Row], module: str, deepest: int) -> go.Scatter:
    layer = address(module).layer
    return go.Scatter(
        x=[r["index"] for r in rows],
        y=[r["value"] for r in rows],
        mode="lines+markers" if len(rows) < 12 else "lines",
        line={"width": 1.3, "color": _depth_colour(layer, deepest)},
        marker={"size": 3},
        showlegend=False,
        customdata=[plain_name(module)] * len(rows),
        hovertemplate="%{customdata}<br>σ%{x} / σ1 = %{y:.3g}<extra></extra>",
    )


# Of the drift ---------------------------------------------------------------------------------------------------------


def relative_update_map(drifts: Mapping[str, Drift], top: float | None = None) -> Plot:
    """How far each module moves, relative to its base."""
    rows = [*_shown(drift_rows(drifts), "relative_update")]
    figure = _heat(rows, METRICS["relative_update"], bottom=0, top=top, percent=True)
    caption = "Frobenius norm of the delta over that of the base weight; the scale ends at the largest."
    return Plot("relative_update_map", "Relative update, by layer and module type", caption, figure, rows)


def drift_by_depth(drifts: Mapping[str, Drift]) -> Plot:
    """Signed drift of the norms, a panel per type: mean, 5 to 95 % of the vectors, and the extremes."""
    rows = [r for r in _shown(drift_rows(drifts), "drift") if r["index"] != "median"]
    groups = _by_type(drifts)
    figure, places = _panels(list(groups), shared_y=True)
    layers = [layer for m in drifts if (layer := address(m).layer) is not None]
    scale = _Signed.over([_value(r) for r in rows])
    for number, (type_, at) in enumerate(zip(groups, places, strict=True)):
        mine = [r for r in rows if r["type"] == type_]
        for trace in _ribbon(mine, scale, OKABE_ITO[number % len(OKABE_ITO)], first=number == 0):
            figure.add_trace(trace, **at)
    figure.add_hline(y=0, line={"color": NULL, "width": 1})
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, any(address(m).layer is None for m in drifts), 5))
    figure.update_yaxes(**scale.axis())
    figure.update_yaxes(title_text="‖w′‖ / ‖w‖ − 1", col=1)
    _legend_above(figure, panels=True)
    caption = (
        f"Signed change of the length of every {_vector(drifts)}; above zero it grew. Line: mean; band: 5 to 95 % of "
        f"the vectors; dots: the smallest and the largest, so that single outlier channels show. {scale.note()}"
    )
    return Plot("drift_by_depth", "Signed norm drift against depth", caption, figure, rows)


def _ribbon(rows: list[Row], scale: "_Signed", colour: str, *, first: bool) -> list[go.Scatter]:
    series = {name: _by_layer(picked(rows, "drift", name)) for name in ("mean", *QUANTILES)}
    x = list(series["mean"])

    def trace(at: list[int], values: list[float], **style: Any) -> go.Scatter:
        return go.Scatter(
            x=at, y=[scale(value) for value in values], customdata=values,
            hovertemplate="layer %{x}: %{customdata:.3~%}<extra></extra>", **{"showlegend": first} | style,
        )  # fmt: skip

    low, high, mean, least, most = ([series[name][at] for at in x] for name in ("5 %", "95 %", "mean", "min", "max"))
    dots = {"size": 4, "color": colour, "symbol": "circle-open"}
    return [
        trace(x, low, mode="lines", line={"width": 0}, showlegend=False, name="5 %"),
        trace(x, high, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=_faded(colour), name="5 to 95 %"),
        trace([*x, *x], [*least, *most], mode="markers", name="smallest, largest", marker=dots),
        trace(x, mean, mode="lines+markers", name="mean", line={"color": colour}, marker={"size": 4}),
    ]


class _Signed(NamedTuple):
    """An axis that is linear within ±unit and logarithmic beyond: most channels and the outliers in one picture."""

    unit: float
    largest: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Signed":
        sizes = sorted(abs(value) for value in values if value)
        if not sizes:
            return cls(1.0, 1.0)
        return cls(10.0 ** floor(log10(sizes[len(sizes) // 2])), sizes[-1])

    def __call__(self, value: float) -> float:
        return asinh(value / self.unit)

    def axis(self) -> dict[str, Any]:
        decades = range(max(ceil(log10(self.largest / self.unit)), 0) + 1)
        ticks = [self.unit * 10**k for k in decades if k or len(decades) < 3]
        ends = [*(-tick for tick in reversed(ticks)), 0.0, *ticks]
        return {
            "tickvals": [self(tick) for tick in ends],
            "ticktext": [f"{100 * tick:+g} %" if tick else "0" for tick in ends],
        }

    def note(self) -> str:
        return f"The scale is linear within ±{100 * self.unit:g} % and logarithmic beyond."


def drift_distribution(drifts: Mapping[str, Drift]) -> Plot:
    """ECDFs of the signed drift per module type, over all vectors of all layers."""
    scale = _Signed.over(
        [value for record in drifts.values() for value in quantiles(record.drift) if value is not None]
    )
    shares = [0.0, 0.001, 0.005, *(i / 100 for i in range(1, 100)), 0.995, 0.999, 1.0]
    rows, figure = [], go.Figure()
    for number, (type_, modules) in enumerate(_by_type(drifts).items()):
        values = quantiles(torch.cat([drifts[m].drift.cpu() for m in modules]), shares)
        rows += [
            row(type=type_, metric="drift", index=f"{share:g}", value=value, quality="exact", of="delta",
                axis=drifts[modules[0]].along, dtype="float32 products, float64 sums", method="structural",
                convention=f"{CONVENTIONS['drift']}; quantile over all vectors of all layers")
            for share, value in zip(shares, values, strict=True)
        ]  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[None if value is None else scale(value) for value in values],
                y=shares,
                mode="lines",
                name=plain_name(type_),
                line=_style(number),
                customdata=values,
                hovertemplate="%{y:.1%} of the vectors are below %{customdata:.3~%}<extra>%{fullData.name}</extra>",
            )
        )
    figure.add_vline(x=0, line={"color": NULL, "width": 1})
    figure.update_xaxes(title_text="‖w′‖ / ‖w‖ − 1", **scale.axis())
    figure.update_yaxes(title_text="share of vectors below", tickformat=".0%")
    _legend_above(figure)
    caption = (
        f"Every {_vector(drifts)} counts once. A steep line at zero: lengths stay; a long end left or right: a few "
        f"channels change much. Each line runs from its smallest to its largest value. {scale.note()}"
    )
    return Plot("drift_distribution", "Norm drift, distribution by module type", caption, sized(figure, 380), rows)


def magnitude_direction(drifts: Mapping[str, Drift]) -> Plot:
    """DoRA's ΔM against ΔD, a point per module, coloured by depth, with what random updates of the same sizes give."""
    rows = [*_shown(drift_rows(drifts), "delta_magnitude", "delta_direction")]
    for each in rows:
        size, direction = random_point(drifts[str(each["module"])])
        each["null"] = size if each["metric"] == "delta_magnitude" else direction
    x, y = list(picked(rows, "delta_direction")), list(picked(rows, "delta_magnitude"))
    names = list(dict.fromkeys(str(r["type"]) for r in x))
    deepest = max([layer for r in x if isinstance(layer := r["layer"], int)], default=0)
    figure = go.Figure(
        go.Scatter(x=[r["null"] for r in x], y=[r["null"] for r in y], mode="markers", name="random, same size",
                   marker={"color": NULL, "symbol": "x-thin-open", "size": 6}, hoverinfo="skip")
    )  # fmt: skip
    for number, name in enumerate(names):
        mine = [i for i, r in enumerate(x) if r["type"] == name]
        colours = [_depth_colour(_layer(x[i]), deepest) for i in mine]
        figure.add_trace(
            go.Scatter(x=[x[i]["value"] for i in mine], y=[y[i]["value"] for i in mine], mode="markers",
                       name=plain_name(name), customdata=[plain_name(str(x[i]["module"])) for i in mine],
                       marker={"color": colours, "symbol": MARKERS[number % len(MARKERS)], "size": 8},
                       hovertemplate="%{customdata}<br>ΔD %{x:.3g}, ΔM %{y:.3g}<extra></extra>")
        )  # fmt: skip
    _depth_bar(figure, deepest)
    figure.update_xaxes(title_text="ΔD: mean of 1 − cos(w′, w)", **_log_axis(map(_value, x)))
    figure.update_yaxes(title_text="ΔM: mean of |‖w′‖ − ‖w‖|, weight units", **_log_axis(map(_value, y)))
    _legend_above(figure)
    caption = (
        "A point per module; grey: what an update of the same size in a random direction would give. Modules that move "
        "more move more in both, so only the distance from the grey says something: above it, lengths change more "
        "than chance."
    )
    return Plot("magnitude_direction", "Change of length against change of direction", caption, sized(figure), rows)


def random_point(of: Drift) -> tuple[float, float]:
    """The expected (ΔM, ΔD) of independent Gaussian entries of the module's relative size.

    Per vector ‖u‖ = ‖delta‖F/√vectors and <w,u>/‖w‖ ~ N(0, ‖u‖²/length): to first order in ‖u‖/‖w‖ the length changes
    by a normal number of mean ‖u‖²/2‖w‖, whose absolute value folds it.
    """
    norms = [norm for norm in of.base_norms.tolist() if norm > 0]
    if not norms:
        return 0.0, 0.0
    size = of.frobenius_norm / sqrt(len(of.base_norms))
    sd = size / sqrt(of.length)
    magnitude = sum(_folded(size**2 * (1 - 1 / of.length) / (2 * norm), sd) for norm in norms)
    return magnitude / len(norms), sum(1 - 1 / sqrt(1 + (size / norm) ** 2) for norm in norms) / len(norms)


def _folded(mean: float, sd: float) -> float:
    """E|x| for x ~ N(mean, sd²)."""
    if sd == 0:
        return abs(mean)
    z = mean / sd
    return sd * sqrt(2 / pi) * exp(-z * z / 2) + mean * erf(z / sqrt(2))


def intruder_profile(intruders: Mapping[str, Intruders]) -> Plot:
    """For each leading singular vector of W', how much it resembles any of W0."""
    groups = _by_type(intruders)
    kinds = types(intruders)
    rows = [
        row(module=m, layer=address(m).layer, type=kinds[m], metric="intruder_cosine", index=j, value=value,
            quality="exact", method="exact", of="effective weight", axis="out_features", dtype="float64")
        for m, record in intruders.items()
        for j, value in enumerate(record.cosines.tolist(), 1)
    ]  # fmt: skip
    deepest = max([a for m in intruders if (a := address(m).layer) is not None], default=0)
    figure, places = _panels(list(groups), shared_y=True)
    for (_, modules), at in zip(groups.items(), places, strict=True):
        for module in _thinned(modules, FAN_LAYERS):
            figure.add_trace(_profile_line(module, intruders[module], deepest), **at)
    epsilon = next((record.epsilon for record in intruders.values()), 0.5)
    figure.add_hline(y=epsilon, line={"dash": "dash", "color": NULL})
    _depth_bar(figure, deepest)
    figure.update_xaxes(title_text="singular vector of W′", dtick=1)
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="largest |cos|", col=1)
    count = sum(record.count for record in intruders.values())
    caption = (
        f"Vectors below the dashed line ({epsilon:g}) resemble none of the base's: intruder dimensions. Here: {count}."
    )
    return Plot("intruder_profile", "Intruder dimensions", caption, figure, rows)


def _profile_line(module: str, record: Intruders, deepest: int) -> go.Scatter:
    return go.Scatter(
        x=list(range(1, len(record.cosines) + 1)),
        y=record.cosines.tolist(),
        mode="lines+markers",
        marker={"size": 3},
        line={"width": 1.3, "color": _depth_colour(address(module).layer, deepest)},
        showlegend=False,
        customdata=[plain_name(module)] * len(record.cosines),
        hovertemplate="%{customdata}<br>vector %{x}: %{y:.3f}<extra></extra>",
    )


# Of several adapters --------------------------------------------------------------------------------------------------


def similarity_matrix(names: Sequence[str], pairs: Mapping[tuple[int, int], Pair]) -> Plot:
    """Cosines of the updates and φ of their subspaces, adapter by adapter, with what chance gives."""
    panels = {
        "cosine": ("cosine of the updates", "cosine", "cosine_null", "Cividis", -1),
        "in_features": ("shared input directions φ", "in_features", "in_null", "Viridis", 0),
        "out_features": ("shared output directions φ", "out_features", "out_null", "Viridis", 0),
    }
    figure = make_subplots(1, 3, subplot_titles=[title for title, *_ in panels.values()], horizontal_spacing=0.04)
    rows: list[Row] = []
    labels = [plain_name(name) for name in _distinct(names)]
    for column, (side, (_, value, null, _scale, bottom)) in enumerate(panels.items(), 1):
        table = [[_entry(pairs, i, j, value) for j in range(len(names))] for i in range(len(names))]
        nulls = [[_entry(pairs, i, j, null) for j in range(len(names))] for i in range(len(names))]
        figure.add_trace(_matrix(labels, table, nulls, bottom, side), 1, column)
        rows += [
            row(adapter=f"{names[i]} and {names[j]}", quality="exact", method="structural", of="update",
                metric="cosine" if side == "cosine" else "subspace_similarity", value=table[i][j], null=nulls[i][j],
                axis=None if side == "cosine" else side, dtype="float64")
            for i, j in pairs
        ]  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(showticklabels=False, col=2).update_yaxes(showticklabels=False, col=3)
    figure.update_xaxes(showgrid=False, tickangle=-30)
    caption = (
        "Cosine: 1 is the same update, 0 none in common, −1 the opposite; over all modules together. φ: share of one's "
        "directions that the other uses too, mean over modules. Under each: what unrelated adapters would give."
    )
    return Plot("similarity_matrix", "Similarity of the adapters", caption, sized(figure, 250 + 45 * len(names)), rows)


def _entry(pairs: Mapping[tuple[int, int], Pair], i: int, j: int, field: str) -> float | None:
    if i == j:
        return None
    value: float = getattr(pairs[min(i, j), max(i, j)], field)
    return value if value == value else None


def _matrix(
    labels: list[str], table: list[list[float | None]], nulls: list[list[float | None]], bottom: int, side: str
) -> go.Heatmap:
    sign = "±" if side == "cosine" else "chance "
    text = [
        ["same" if i == j else _cell(v, n, sign) for j, (v, n) in enumerate(zip(line, under, strict=True))]
        for i, (line, under) in enumerate(zip(table, nulls, strict=True))
    ]
    scale = "Cividis" if side == "cosine" else "Viridis"
    return go.Heatmap(
        x=labels, y=labels, z=table, text=text, texttemplate="%{text}", zmin=bottom, zmax=1, colorscale=scale,
        showscale=False, hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>", xgap=2, ygap=2, hoverongaps=False,
    )  # fmt: skip


def _cell(value: float | None, null: float | None, sign: str) -> str:
    if value is None:
        return "–"
    return f"<b>{value:z.3f}</b><br>{sign}{null:.2g}" if null is not None else f"<b>{value:z.3f}</b>"


def similarity_by_depth(differences: Mapping[str, Difference], names: Sequence[str] = ("", "")) -> Plot:
    """Cosine of two adapters' updates, module by module, between what chance gives."""
    title = " and ".join(filter(None, names))
    rows = [*_shown(difference_rows(differences, title), "cosine")]
    figure = _lines(list(picked(rows, "cosine")), "cosine of the updates")
    widest = max([2 * d.cosine.null_sd for d in differences.values()], default=0)
    figure.add_hrect(y0=-widest, y1=widest, fillcolor=NULL, opacity=0.25, line_width=0, annotation_text="chance")
    caption = f"Grey: what unrelated updates give, two standard deviations (±{widest:.2g})."
    return Plot("similarity_by_depth", "Similarity of two adapters against depth", caption, figure, rows)


def subspaces_by_depth(differences: Mapping[str, Difference], names: Sequence[str] = ("", "")) -> Plot:
    """φ(r, r) of the input sides and of the output sides, module by module, with their nulls."""
    title = " and ".join(filter(None, names))
    rows = [*_shown(difference_rows(differences, title), "subspace_similarity")]
    figure, places = _panels(["input side", "output side"], shared_y=True)
    for side, at in zip(SIDES, places, strict=True):
        mine = [r for r in rows if r["axis"] == side]
        for trace in _lines(mine, "").data:
            figure.add_trace(trace.update(showlegend=side == "in_features"), **at)
        nulls = sorted({float(r["null"] or 0) for r in mine})
        for null in {nulls[0], nulls[-1]} if nulls else ():
            figure.add_hline(y=null, line={"dash": "dash", "color": NULL}, **at)
    layers = [layer for m in differences if (layer := address(m).layer) is not None]
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, any(address(m).layer is None for m in differences)))
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="φ(r, r)", col=1)
    _legend_above(figure, panels=True)
    caption = (
        "Share of the directions of one update that lie in the other's; dashed: what random subspaces give. High on "
        "the input side alone means a shared start of A more than a shared function."
    )
    return Plot("subspaces_by_depth", "Shared directions against depth", caption, figure, rows)


# Parts of figures -----------------------------------------------------------------------------------------------------


def _heat(rows: list[Row], title: str, *, bottom: float | None, top: float | None, percent: bool = False) -> go.Figure:
    """Layer by type, the mean of a cell's modules; cells without a module stay blank, on grey."""
    names = list(dict.fromkeys(str(r["type"]) for r in rows))
    layers = sorted({_layer(r) for r in rows})
    cells: dict[tuple[str, int], list[float]] = {}
    for r in rows:
        cells.setdefault((str(r["type"]), _layer(r)), []).append(_value(r))
    z = [[_mean(cells.get((name, layer), [])) for layer in layers] for name in names]
    largest = max([_value(r) for r in rows], default=1.0)
    style = ".2~%" if percent else ".3~g"
    figure = go.Figure(
        go.Heatmap(
            x=layers, y=[plain_name(name) for name in names], z=z, colorscale="Viridis", zmin=bottom,
            zmax=max(top or 0, largest) or 1, xgap=1, ygap=1, hoverongaps=False,
            colorbar={"title": {"text": title, "side": "right"}, "tickformat": style, "thickness": 14},
            hovertemplate=f"%{{y}}, layer %{{x}}: %{{z:{style}}}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="layer", showgrid=False, **layer_ticks(layers, -1 in layers))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return sized(figure, MARGIN + 28 * max(len(names), 4))


def _lines(rows: list[Row], title: str) -> go.Figure:
    """A line per type over layers; the mean where a layer has several modules of a type."""
    figure = go.Figure()
    for number, name in enumerate(dict.fromkeys(str(r["type"]) for r in rows)):
        series = _by_layer(r for r in rows if r["type"] == name)
        marker = {"symbol": MARKERS[number % len(MARKERS)], "size": 5 if len(series) < 60 else 3}
        figure.add_trace(
            go.Scatter(x=list(series), y=list(series.values()), mode="lines+markers", name=plain_name(name),
                       line=_style(number), marker=marker,
                       hovertemplate="%{fullData.name}, layer %{x}: %{y:.3g}<extra></extra>")
        )  # fmt: skip
    layers = sorted({_layer(r) for r in rows})
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, -1 in layers))
    figure.update_yaxes(title_text=title)
    _legend_above(figure)
    return sized(figure, 360)


def _panels(titles: list[str], *, shared_y: bool = False) -> tuple[go.Figure, list[dict[str, int]]]:
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


def _legend_above(figure: go.Figure, *, panels: bool = False) -> None:
    """Above the panels' titles, where there are some."""
    top = 1 + 30 / (figure.layout.height or 420) if panels else 1.02
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": top, "yanchor": "bottom", "x": 0})
    if panels:
        figure.update_layout(margin={"t": 75}, height=(figure.layout.height or 420) + 35)


def _depth_bar(figure: go.Figure, deepest: int) -> None:
    """A colour bar for lines coloured by depth."""
    if deepest:
        bar = {"title": {"text": "layer", "side": "right"}, "thickness": 14} | layer_ticks([deepest], False)
        marker = {"color": [0], "cmin": 0, "cmax": deepest, "colorscale": DEPTH, "showscale": True, "colorbar": bar}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False))


def _depth_colour(layer: int | None, deepest: int) -> str:
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


def _log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone; linear where a value is not positive."""
    known = sorted(values)
    if not known or known[0] <= 0:
        return {"exponentformat": "power"}
    first, last = floor(log10(known[0])), ceil(log10(known[-1]))
    narrow = known[-1] < 5 * known[0]
    digits: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if narrow else (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _style(number: int) -> dict[str, Any]:
    return {"color": OKABE_ITO[number % len(OKABE_ITO)], "dash": DASHES[number % len(DASHES)], "width": 1.8}


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def plain_name(name: str, longest: int = LONGEST) -> str:
    """A stranger's name as plotly may show it: no markup, no control characters, no template, of bounded length."""
    plain = name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
    if len(plain) > longest:
        plain = f"{plain[: longest // 3]}…{plain[-longest * 2 // 3 :]}"
    return escape(plain, quote=False).replace("%{", "%\u200b{")


def _distinct(names: Sequence[str]) -> list[str]:
    """Equal names (of equal directories) get a number: plotly would make one category of them."""
    return [name if list(names).count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]


def _shown(rows: Iterable[Row], *metrics: str) -> Iterable[Row]:
    return (r for r in rows if r["metric"] in metrics and r["value"] is not None)


def _value(of: Row) -> float:
    value = of["value"]
    assert isinstance(value, int | float)
    return float(value)


def _layer(of: Row) -> int:
    layer = of["layer"]
    return layer if isinstance(layer, int) else -1


def _by_layer(rows: Iterable[Row]) -> dict[int, float]:
    cells: dict[int, list[float]] = {}
    for r in rows:
        cells.setdefault(_layer(r), []).append(_value(r))
    return {layer: sum(cells[layer]) / len(cells[layer]) for layer in sorted(cells)}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _by_type(modules: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for module, type_ in types(modules).items():
        groups.setdefault(type_, []).append(module)
    return groups


def _thinned(modules: Sequence[str], most: int) -> list[str]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(modules) <= most:
        return list(modules)
    return [modules[round(i * (len(modules) - 1) / (most - 1))] for i in range(most)]


def _log_spaced(count: int, most: int) -> list[int]:
    """At most about so many indices below count, dense at the start."""
    if count <= most:
        return list(range(count))
    return sorted({round(exp(i * log(count) / (most - 1))) - 1 for i in range(most)})


def _of(spectra: Mapping[str, Spectrum]) -> str:
    return " or ".join(sorted({record.of for record in spectra.values()})) or "update"


def _vector(drifts: Mapping[str, Drift]) -> str:
    axes = {record.along for record in drifts.values()}
    rows = {"out_features": "row (output feature)", "in_features": "column (input feature)"}
    return " or ".join(rows[axis] for axis in sorted(axes)) or "vector"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
