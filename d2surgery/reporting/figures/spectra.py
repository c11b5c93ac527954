"""Figures of spectra: how much of its rank each module uses, how large it is, and what is new in it."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from d2surgery.measures.ranks import Spectrum
from d2surgery.measures.subspace import Intruders
from d2surgery.measures.table import MEASURES
from d2surgery.reporting.figures.parts import (
    NULL,
    Plot,
    deepest_layer,
    depth_bar,
    depth_line,
    heat_map,
    hover,
    lines_by_layer,
    log_axis,
    panel_grid,
    thinned,
    value_of,
)
from d2surgery.reporting.tidy import CONVENTIONS, Row, address, by_type, log_spaced, picked, row, spectrum_rows, types

FAN_LAYERS, FAN_POINTS = 32, 48  # a fan of more is no clearer, only heavier


def rank_map(
    spectra: Mapping[str, Spectrum],
    nominal: Mapping[str, int | None],
    metric: str = "energy_entropy_rank",
    top: float | None = None,
) -> Plot:
    """How much rank each module uses, layer by type. `top` is the end of the colour scale, to compare figures."""
    rows = [*picked(spectrum_rows(spectra, nominal), metric, "nominal_rank")]
    known = [value_of(r) for r in picked(rows, "nominal_rank")]
    figure = heat_map(list(picked(rows, metric)), MEASURES[metric].word, bottom=0, top=top or max(known, default=None))
    mark = f" Nominal rank {_span(known)}: the end of the colour scale." if known else ""
    caption = (
        f"Each cell is a module: how many directions its {_of(spectra)} uses ({MEASURES[metric].word}: "
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
    rows = [*picked(spectrum_rows(spectra, nominal), metric, "nominal_rank")]
    marks = sorted({value_of(r) for r in picked(rows, "nominal_rank")})
    values = list(picked(rows, metric))
    figure = lines_by_layer(values, f"{MEASURES[metric].word} of the {_of(spectra)}")
    for mark in marks if len(marks) <= 4 else (marks[0], marks[-1]):
        figure.add_hline(y=mark, line={"dash": "dash", "color": NULL}, annotation_text=f"nominal rank {mark:g}")
    figure.update_yaxes(range=[0, 1.12 * max([top or 0, *marks, *map(value_of, values)])])
    caption = f"{_capital(MEASURES[metric].word)}: {CONVENTIONS[metric]}." + (
        " What lies between a line and the dashed one (the nominal rank) is paid for and not used." if marks else ""
    )
    return Plot("rank_lines", "Rank used against depth", caption, figure, rows)


def size_map(spectra: Mapping[str, Spectrum], top: float | None = None) -> Plot:
    """How large the update of each module is, by the entry, so that wide matrices do not look strong."""
    rows = [*picked(spectrum_rows(spectra, {}), "rms_entry")]
    figure = heat_map(rows, f"RMS of the {_of(spectra)}", bottom=0, top=top)
    caption = (
        f"RMS: {CONVENTIONS['rms_entry']} of the {_of(spectra)}, scaling included, in units of the weights. With a "
        "base, its size relative to the weight is shown instead."
    )
    return Plot("size_map", "Size, by layer and module type", caption, figure, rows)


def spectrum_fan(spectra: Mapping[str, Spectrum], nominal: Mapping[str, int | None]) -> Plot:
    """σᵢ/σ₁ against i, a panel per module type, a line per layer, coloured by depth."""
    groups = by_type(spectra)
    kept = {type_: thinned(modules, FAN_LAYERS) for type_, modules in groups.items()}
    lines = {m: _fan_rows(m, type_, spectra[m]) for type_, modules in kept.items() for m in modules}
    deepest = deepest_layer(spectra)
    figure, places = panel_grid(list(kept), shared_y=True)
    for modules, at in zip(kept.values(), places, strict=True):
        for module in modules:
            figure.add_trace(_fan_line(module, lines[module], deepest), **at)
        for rank in sorted({r for m in modules if (r := nominal.get(m)) is not None})[:3]:
            figure.add_vline(x=rank, line={"dash": "dash", "color": NULL, "width": 1}, **at)
    depth_bar(figure, deepest)
    rows = [r for line in lines.values() for r in line]
    longest = max([int(r["index"] or 1) for r in rows], default=1)
    figure.update_xaxes(type="log", title_text="index i", tickvals=[2**k for k in range(0, 20, 1 + longest // 300)])
    figure.update_yaxes(**log_axis(map(value_of, rows)))
    figure.update_yaxes(title_text="σᵢ / σ₁", col=1)
    left_out = sum(map(len, groups.values())) - sum(map(len, kept.values()))
    note = f" {left_out} layers between those shown are left out." if left_out else ""
    caption = (
        f"Singular values of the {_of(spectra)} relative to the largest, both axes logarithmic; colour is depth, the "
        f"dashed line the nominal rank. A line that falls early uses few of its directions.{note}"
    )
    return Plot("spectrum_fan", "Singular values, by module type", caption, figure, rows)


def intruder_profile(intruders: Mapping[str, Intruders]) -> Plot:
    """For each leading singular vector of W', how much it resembles any of W0."""
    groups = by_type(intruders)
    kinds = types(intruders)
    rows = [
        row(module=m, layer=address(m).layer, type=kinds[m], metric="intruder_cosine", index=j, value=value,
            quality="exact", method="exact", of="effective weight", axis="out_features", dtype="float64")
        for m, record in intruders.items()
        for j, value in enumerate(record.cosines.tolist(), 1)
    ]  # fmt: skip
    deepest = deepest_layer(intruders)
    figure, places = panel_grid(list(groups), shared_y=True)
    for (_, modules), at in zip(groups.items(), places, strict=True):
        for module in thinned(modules, FAN_LAYERS):
            figure.add_trace(_profile_line(module, intruders[module], deepest), **at)
    epsilon = next((record.epsilon for record in intruders.values()), 0.5)
    figure.add_hline(y=epsilon, line={"dash": "dash", "color": NULL})
    depth_bar(figure, deepest)
    figure.update_xaxes(title_text="singular vector of W′", dtick=1)
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="largest |cos|", col=1)
    count = sum(record.count for record in intruders.values())
    caption = (
        f"Vectors below the dashed line ({epsilon:g}) resemble none of the base's: intruder dimensions. Here: {count}."
    )
    return Plot("intruder_profile", "Intruder dimensions", caption, figure, rows)


# Lines ----------------------------------------------------------------------------------------------------------------


def _fan_rows(module: str, type_: str, record: Spectrum) -> list[Row]:
    sigma = record.singular_values[record.singular_values > 0].tolist()
    return [
        row(
            module=module, layer=address(module).layer, type=type_, metric="relative_singular_value", index=i + 1,
            value=sigma[i] / sigma[0], quality="exact", method=record.method, of=record.of, dtype="float64",
        )
        for i in log_spaced(len(sigma), FAN_POINTS)
        if sigma[i] / sigma[0] > record.error_bound
    ]  # fmt: skip


def _fan_line(module: str, rows: list[Row], deepest: int) -> go.Scatter:
    x, y = [r["index"] for r in rows], [r["value"] for r in rows]
    mode = "lines+markers" if len(rows) < 12 else "lines"
    return depth_line(module, deepest, x=x, y=y, mode=mode, hovertemplate=hover("σ%{x} / σ1 = %{y:.3g}"))


def _profile_line(module: str, record: Intruders, deepest: int) -> go.Scatter:
    y = record.cosines.tolist()
    x = list(range(1, len(y) + 1))
    return depth_line(module, deepest, x=x, y=y, mode="lines+markers", hovertemplate=hover("vector %{x}: %{y:.3f}"))


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _of(spectra: Mapping[str, Spectrum]) -> str:
    return " or ".join(sorted({record.of for record in spectra.values()})) or "update"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
