"""Figures of an audit: layer by type of module, where the merge is right, at what strength, and where bits differ."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from d2surgery.auditing.findings import ModuleAudit, Thresholds
from d2surgery.evaluating.traces import Layer
from d2surgery.measures.table import MEASURES
from d2surgery.reporting.figures.parts import Plot, layer_ticks, layers_across, plain_name, sized
from d2surgery.reporting.tidy import Row, address, row, types

STATES = {  # from right to wrong: colour (Okabe and Ito's), mark, word
    "replayed": ("#0072B2", "", "bit for bit"),
    "rounding": ("#56B4E9", "≈", "within rounding"),
    "uncertain": ("#E69F00", "?", "open"),
    "wrong": ("#D55E00", "✕", "wrong"),
}
CONVENTIONS = {
    "status": "replayed bit for bit by a recipe; rounding: differences within rounding; uncertain; wrong",
    **{name: MEASURES[name].formula for name in ("strength", "mismatched_share")},
}
Modules = Mapping[str, ModuleAudit]


def status_map(modules: Modules) -> Plot:
    """What became of every module. A cell with several modules (experts) shows the worst of them."""
    names = list(STATES)
    levels = {module: names.index(record.status) for module, record in modules.items()}
    figure = _cells(
        modules, levels, worst=max, text=lambda level: STATES[names[int(level)]][1],
        hover={module: _said(record) for module, record in modules.items()},
    )  # fmt: skip
    steps = [[(at + side) / len(names), STATES[name][0]] for at, name in enumerate(names) for side in (0, 1)]
    figure.update_traces(
        colorscale=steps, zmin=-0.5, zmax=len(names) - 0.5,
        colorbar={"tickvals": [*range(len(names))], "ticktext": [STATES[name][2] for name in names], "thickness": 14},
    )  # fmt: skip
    caption = "Each cell is a module. ✕ is wrong, ? could not be decided, ≈ differs within rounding only."
    rows = _rows(modules, "status", lambda record: record.status)
    return Plot("audit_status", "Which modules are merged as they should be", caption, figure, rows)


def strength_map(modules: Modules, thresholds: Thresholds) -> Plot:
    """How much of the delta stands in the merged file, where that is not exactly what it should be."""
    known = {module: record.strength - 1 for module, record in modules.items() if isfinite(record.strength)}
    largest = max([abs(off) for off in known.values()], default=0.0)
    end = max(min(largest, 2.0), thresholds.strength_fail)
    figure = _cells(
        modules, known, worst=lambda offs: max(offs, key=abs), text=lambda off: f"{1 + off:.3g}" if off else "",
        hover={m: f"strength {r.strength:.4f} ± {r.strength_error:.1g}" for m, r in modules.items()},
    )  # fmt: skip
    figure.update_traces(
        colorscale="RdBu", zmin=-end, zmax=end,
        colorbar={"title": {"text": "strength − 1", "side": "right"}, "tickformat": "+.2~g", "thickness": 14},
    )  # fmt: skip
    caption = (
        "1 (white) is the whole delta once; 0 none of it (−1 on the scale), 2 twice (+1), negative the wrong sign. "
        "Numbers stand where it is not exactly 1."
    )
    rows = _rows(modules, "strength", lambda record: record.strength, lambda record: record.strength_error)
    return Plot("audit_strength", "Strength of the delta in the merged checkpoint", caption, figure, rows)


def mismatch_map(modules: Modules) -> Plot:
    """Where bits differ from what the nearest recipe gives."""
    shares = {module: record.mismatched_elements / max(record.elements, 1) for module, record in modules.items()}
    figure = _cells(
        modules, shares, worst=max, text=lambda share: f"{100 * share:.2g}" if share else "",
        hover={m: f"{r.mismatched_elements} of {r.elements} elements" for m, r in modules.items()},
    )  # fmt: skip
    figure.update_traces(
        colorscale="Viridis", zmin=0, zmax=max(shares.values(), default=0) or 1,
        colorbar={"title": {"text": "elements", "side": "right"}, "tickformat": ".2~%", "thickness": 14},
    )  # fmt: skip
    caption = "Share of elements (in %) whose bits are not those of the nearest recipe. How far off they are is below."
    rows = _rows(modules, "mismatched_share", lambda record: shares[record.module])
    return Plot("audit_mismatch", "Elements that differ from the expected bits", caption, figure, rows)


def output_errors(layers: Sequence[Layer]) -> Plot:
    """Outputs of the adapted modules in the order in which they run: the merged model's error, and a right merge's."""
    lines: dict[str, tuple[str, str, list[float | None]]] = {
        "merged": ("#D55E00", "solid", [layer.error for layer in layers]),
        "a right merge": ("#0072B2", "dash", [layer.noise for layer in layers]),
        "what the adapter does": ("#7F7F7F", "dot", [layer.effect for layer in layers]),
    }
    names = [plain_name(layer.module) for layer in layers]
    figure = go.Figure()
    for line, (colour, dash, values) in lines.items():
        figure.add_trace(
            go.Scatter(
                x=list(range(len(layers))), y=[y if y and isfinite(y) else None for y in values], name=line,
                mode="lines", line={"color": colour, "dash": dash, "width": 1.8}, customdata=names,
                hovertemplate="%{customdata}: %{y:.3g}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title_text="modules as they run, by layer", **_layer_starts(layers))
    figure.update_yaxes(title_text="‖y − y_reference‖ / ‖y_reference‖", type="log", exponentformat="power")
    sized(figure, 340)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    caption = (
        "Relative error of each output against base + adapter on the same prompts, computed wide so that weights "
        "alone count. Where the first line leaves the second, something is wrong with that module or one before it."
    )
    rows = [
        row(
            module=layer.module, layer=address(layer.module).layer, metric="output_error", index=line, value=value,
            quality="exact", method="audit", convention="‖y − y_reference‖/‖y_reference‖ on the prompts",
        )
        for line, (_, _, values) in lines.items()
        for layer, value in zip(layers, values, strict=True)
    ]  # fmt: skip
    return Plot("audit_outputs", "Outputs of the adapted modules", caption, figure, rows)


def _layer_starts(layers: Sequence[Layer]) -> dict[str, Any]:
    """A tick where a numbered layer begins, some of them where there are many."""
    starts: dict[int, int] = {}
    for at, layer in enumerate(layers):
        if (number := address(layer.module).layer) is not None:
            starts.setdefault(number, at)
    shown = [number for number in layer_ticks(starts, False)["tickvals"] if number in starts]
    return {"tickvals": [starts[number] for number in shown], "ticktext": [str(number) for number in shown]}


def _said(record: ModuleAudit) -> str:
    return f"{record.code}: {record.message}" if record.code else f"replayed by {record.recipe}"


def _cells(
    modules: Modules,
    values: Mapping[str, float],
    *,
    worst: Callable[[list[float]], float],
    text: Callable[[float], str],
    hover: Mapping[str, str],
) -> go.Figure:
    """Layer by type; where several modules share a cell, `worst` of their values and the words of that one."""
    kinds = types(modules)
    names = list(dict.fromkeys(kinds.values()))
    layers = sorted({_layer(module) for module in modules})
    inside: dict[tuple[str, int], dict[str, float]] = {}
    for module, value in values.items():
        inside.setdefault((kinds[module], _layer(module)), {})[module] = value
    z, marks, said = [], [], []
    for name in names:
        found = [inside.get((name, layer), {}) for layer in layers]
        chosen = [worst(list(cell.values())) if cell else None for cell in found]
        z.append(chosen)
        marks.append(["" if value is None else text(value) for value in chosen])
        said.append([_words(cell, value, hover) for cell, value in zip(found, chosen, strict=True)])
    figure = go.Figure(
        go.Heatmap(
            x=layers, y=[plain_name(name) for name in names], z=z, text=marks, texttemplate="%{text}", customdata=said,
            xgap=1, ygap=1, hoverongaps=False, hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    return layers_across(figure, layers, len(names))


def _words(cell: Mapping[str, float], value: float | None, hover: Mapping[str, str]) -> str:
    module = next((module for module, each in cell.items() if each == value), None)
    return "" if module is None else f"{plain_name(module)}<br>{plain_name(hover[module], 120)}"


def _layer(module: str) -> int:
    layer = address(module).layer
    return -1 if layer is None else layer


def _rows(
    modules: Modules,
    metric: str,
    value: Callable[[ModuleAudit], str | float],
    error: Callable[[ModuleAudit], float | None] = lambda record: None,
) -> list[Row]:
    kinds = types(modules)
    return [
        row(
            module=module, layer=address(module).layer, type=kinds[module], metric=metric, value=value(record),
            standard_error=error(record), quality="exact", method="audit", of="delta",
            convention=CONVENTIONS[metric],
        )
        for module, record in modules.items()
    ]  # fmt: skip
