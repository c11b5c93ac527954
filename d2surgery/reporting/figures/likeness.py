"""Figures of several adapters together: how alike they are, beside what unrelated ones would give."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from d2surgery.measures.likeness import SIDES, Difference, Likeness
from d2surgery.reporting.figures.parts import (
    NULL,
    Plot,
    layer_ticks,
    legend_above,
    lines_by_layer,
    panel_grid,
    plain_name,
    sized,
)
from d2surgery.reporting.tidy import Row, address, difference_rows, picked, row

MOST_PAIRS = 6
"""Pairs that are drawn module by module; the matrix has all."""


def similarity_matrix(names: Sequence[str], pairs: Mapping[tuple[int, int], Likeness]) -> Plot:
    """Cosines of the updates and φ of their subspaces, adapter by adapter, with what chance gives."""
    panels = {
        "cosine": ("cosine of the updates", "cosine", "cosine_null", -1),
        "in_features": ("shared input directions φ", "in_features", "in_null", 0),
        "out_features": ("shared output directions φ", "out_features", "out_null", 0),
    }
    figure = make_subplots(1, 3, subplot_titles=[title for title, *_ in panels.values()], horizontal_spacing=0.04)
    rows: list[Row] = []
    labels = [plain_name(name) for name in _distinct(names)]
    for column, (side, (_, value, null, bottom)) in enumerate(panels.items(), 1):
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
    return Plot("similarity_matrix", "Similarity of the adapters", caption, sized(figure, 250 + 45 * len(names)), rows,
                _listed(names))  # fmt: skip


def similarity_by_depth(differences: Mapping[str, Difference], names: Sequence[str] = ("", "")) -> Plot:
    """Cosine of two adapters' updates, module by module, between what chance gives."""
    title = " and ".join(filter(None, names))
    rows = [*picked(difference_rows(differences, title), "cosine")]
    figure = lines_by_layer(list(picked(rows, "cosine")), "cosine of the updates")
    widest = max([2 * d.cosine.null_sd for d in differences.values()], default=0)
    figure.add_hrect(y0=-widest, y1=widest, fillcolor=NULL, opacity=0.25, line_width=0, annotation_text="chance")
    caption = f"Grey: what unrelated updates give, two standard deviations (±{widest:.2g})."
    return Plot("similarity_by_depth", "Similarity of two adapters against depth", caption, figure, rows, title)


def subspaces_by_depth(differences: Mapping[str, Difference], names: Sequence[str] = ("", "")) -> Plot:
    """φ(r, r) of the input sides and of the output sides, module by module, with their nulls."""
    title = " and ".join(filter(None, names))
    rows = [*picked(difference_rows(differences, title), "subspace_similarity")]
    figure, places = panel_grid(["input side", "output side"], shared_y=True)
    for side, at in zip(SIDES, places, strict=True):
        mine = [r for r in rows if r["axis"] == side]
        for trace in lines_by_layer(mine, "").data:
            figure.add_trace(trace.update(showlegend=side == "in_features"), **at)
        nulls = sorted({float(r["null"] or 0) for r in mine})
        for null in {nulls[0], nulls[-1]} if nulls else ():
            figure.add_hline(y=null, line={"dash": "dash", "color": NULL}, **at)
    layers = [layer for m in differences if (layer := address(m).layer) is not None]
    figure.update_xaxes(title_text="layer", **layer_ticks(layers, any(address(m).layer is None for m in differences)))
    figure.update_yaxes(range=[0, 1.05])
    figure.update_yaxes(title_text="φ(r, r)", col=1)
    legend_above(figure, panels=True)
    caption = (
        "Share of the directions of one update that lie in the other's; dashed: what random subspaces give. High on "
        "the input side alone means a shared start of A more than a shared function."
    )
    return Plot("subspaces_by_depth", "Shared directions against depth", caption, figure, rows, title)


def _entry(pairs: Mapping[tuple[int, int], Likeness], i: int, j: int, field: str) -> float | None:
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


def _listed(names: Sequence[str]) -> str:
    """All of a few, else the first two and how many more."""
    return " and ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _distinct(names: Sequence[str]) -> list[str]:
    """Equal names (of equal directories) get a number: plotly would make one category of them."""
    return [name if list(names).count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]
