"""Figures of the drift: how far each module moves the length and the direction of the base's vectors."""

from collections.abc import Mapping, Sequence
from math import asinh, ceil, floor, log10
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch

from d2surgery.measures.drift import Drift, expected_point
from d2surgery.reporting.figures.parts import (
    MARKERS,
    NULL,
    OKABE_ITO,
    Plot,
    by_layer,
    deepest_layer,
    depth_bar,
    depth_colour,
    faded,
    heat_map,
    layer_of,
    layer_ticks,
    legend_above,
    line_style,
    log_axis,
    panel_grid,
    plain_name,
    sized,
    value_of,
)
from d2surgery.reporting.tidy import CONVENTIONS, QUANTILES, Row, address, by_type, drift_rows, picked, quantiles, row


def relative_update_map(drifts: Mapping[str, Drift], top: float | None = None) -> Plot:
    """How far each module moves, relative to its base."""
    rows = [*picked(drift_rows(drifts), "relative_update")]
    figure = heat_map(rows, "‖delta‖ / ‖W0‖", bottom=0, top=top, percent=True)
    caption = "Frobenius norm of the delta over that of the base weight; the scale ends at the largest."
    return Plot("relative_update_map", "Relative update, by layer and module type", caption, figure, rows)


def drift_by_depth(drifts: Mapping[str, Drift]) -> Plot:
    """Signed drift of the norms, a panel per type: mean, 5 to 95 % of the vectors, and the extremes."""
    rows = [r for r in picked(drift_rows(drifts), "drift") if r["index"] != "median"]
    groups = by_type(drifts)
    figure, places = panel_grid(list(groups), shared_y=True)
    layers = [layer for m in drifts if (layer := address(m).layer) is not None]
    scale = _Signed.over([value_of(r) for r in rows])
    for number, (type_, at) in enumerate(zip(groups, places, strict=True)):
        mine = [r for r in rows if r["type"] == type_]
        for trace in _ribbon(mine, scale, OKABE_ITO[number % len(OKABE_ITO)], first=number == 0):
            figure.add_trace(trace, **at)
    figure.add_hline(y=0, line={"color": NULL, "width": 1})
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, any(address(m).layer is None for m in drifts), 5))
    figure.update_yaxes(**scale.axis())
    figure.update_yaxes(title_text="‖w′‖ / ‖w‖ − 1", col=1)
    legend_above(figure, panels=True)
    caption = (
        f"Signed change of the length of every {_vector(drifts)}; above zero it grew. Line: mean; band: 5 to 95 % of "
        f"the vectors; dots: the smallest and the largest, so that single outlier channels show. {scale.note()}"
    )
    return Plot("drift_by_depth", "Signed norm drift against depth", caption, figure, rows)


def drift_distribution(drifts: Mapping[str, Drift]) -> Plot:
    """ECDFs of the signed drift per module type, over all vectors of all layers."""
    scale = _Signed.over(
        [value for record in drifts.values() for value in quantiles(record.drift) if value is not None]
    )
    shares = [0.0, 0.001, 0.005, *(i / 100 for i in range(1, 100)), 0.995, 0.999, 1.0]
    rows, figure = [], go.Figure()
    for number, (type_, modules) in enumerate(by_type(drifts).items()):
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
                line=line_style(number),
                customdata=values,
                hovertemplate="%{y:.1%} of the vectors are below %{customdata:.3~%}<extra>%{fullData.name}</extra>",
            )
        )
    figure.add_vline(x=0, line={"color": NULL, "width": 1})
    figure.update_xaxes(title_text="‖w′‖ / ‖w‖ − 1", **scale.axis())
    figure.update_yaxes(title_text="share of vectors below", tickformat=".0%")
    legend_above(figure)
    caption = (
        f"Every {_vector(drifts)} counts once. A steep line at zero: lengths stay; a long end left or right: a few "
        f"channels change much. Each line runs from its smallest to its largest value. {scale.note()}"
    )
    return Plot("drift_distribution", "Norm drift, distribution by module type", caption, sized(figure, 380), rows)


def magnitude_direction(drifts: Mapping[str, Drift]) -> Plot:
    """DoRA's ΔM against ΔD, a point per module, coloured by depth, with what random updates of the same sizes give."""
    rows = [*picked(drift_rows(drifts), "delta_magnitude", "delta_direction")]
    for each in rows:
        size, direction = expected_point(drifts[str(each["module"])])
        each["null"] = size if each["metric"] == "delta_magnitude" else direction
    x, y = list(picked(rows, "delta_direction")), list(picked(rows, "delta_magnitude"))
    names = list(dict.fromkeys(str(r["type"]) for r in x))
    deepest = deepest_layer(str(r["module"]) for r in x)
    figure = go.Figure(
        go.Scatter(x=[r["null"] for r in x], y=[r["null"] for r in y], mode="markers", name="random, same size",
                   marker={"color": NULL, "symbol": "x-thin-open", "size": 6}, hoverinfo="skip")
    )  # fmt: skip
    for number, name in enumerate(names):
        mine = [i for i, r in enumerate(x) if r["type"] == name]
        colours = [depth_colour(layer_of(x[i]), deepest) for i in mine]
        figure.add_trace(
            go.Scatter(x=[x[i]["value"] for i in mine], y=[y[i]["value"] for i in mine], mode="markers",
                       name=plain_name(name), customdata=[plain_name(str(x[i]["module"])) for i in mine],
                       marker={"color": colours, "symbol": MARKERS[number % len(MARKERS)], "size": 8},
                       hovertemplate="%{customdata}<br>ΔD %{x:.3g}, ΔM %{y:.3g}<extra></extra>")
        )  # fmt: skip
    depth_bar(figure, deepest)
    figure.update_xaxes(title_text="ΔD: mean of 1 − cos(w′, w)", **log_axis(map(value_of, x)))
    figure.update_yaxes(title_text="ΔM: mean of |‖w′‖ − ‖w‖|, weight units", **log_axis(map(value_of, y)))
    legend_above(figure)
    caption = (
        "A point per module; grey: what an update of the same size in a random direction would give. Modules that move "
        "more move more in both, so only the distance from the grey says something: above it, lengths change more "
        "than chance."
    )
    return Plot("magnitude_direction", "Change of length against change of direction", caption, sized(figure), rows)


def _ribbon(rows: list[Row], scale: "_Signed", colour: str, *, first: bool) -> list[go.Scatter]:
    series = {name: by_layer(picked(rows, "drift", index=name)) for name in ("mean", *QUANTILES)}
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
        trace(x, high, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=faded(colour), name="5 to 95 %"),
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


def _vector(drifts: Mapping[str, Drift]) -> str:
    axes = {record.along for record in drifts.values()}
    rows = {"out_features": "row (output feature)", "in_features": "column (input feature)"}
    return " or ".join(rows[axis] for axis in sorted(axes)) or "vector"
