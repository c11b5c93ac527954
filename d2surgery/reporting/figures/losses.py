"""Figures of what surgery lost: the error of every module, and the least error at each rank."""

from collections.abc import Mapping

from d2surgery.reporting.figures.parts import (
    NULL,
    Plot,
    deepest_layer,
    depth_bar,
    depth_line,
    heat_map,
    hover,
    log_axis,
    panel_grid,
    thinned,
    value_of,
)
from d2surgery.reporting.tidy import CONVENTIONS, by_type, loss_rows, picked
from d2surgery.surgery.certificate import Loss

LAYERS, POINTS = 32, 48  # a fan of more is no clearer, only heavier


def error_map(losses: Mapping[str, Loss]) -> Plot:
    """The relative error of each module, layer by type."""
    rows = [*picked(loss_rows(losses, 2), "relative_error")]
    figure = heat_map(rows, "relative error", bottom=0, top=None, percent=True)
    caption = f"Each cell is a module: {CONVENTIONS['relative_error']}, measured on what is stored."
    return Plot("error_map", "What was lost, by layer and module type", caption, figure, rows)


def error_curves(losses: Mapping[str, Loss]) -> Plot:
    """The least error at each rank, a panel per module type, a line per layer; a dashed line at the ranks kept."""
    known = {module: loss for module, loss in losses.items() if len(loss.curve) > 1}
    kept = {type_: thinned(modules, LAYERS) for type_, modules in by_type(known).items()}
    deepest = deepest_layer(known)
    rows = [*picked(loss_rows({m: known[m] for each in kept.values() for m in each}, POINTS), "least_error")]
    figure, places = panel_grid(list(kept) or ["nothing was truncated"], shared_y=True)
    for modules, at in zip(kept.values(), places, strict=False):
        for module in modules:
            line = [r for r in rows if r["module"] == module and value_of(r) > 0]
            x, y = [r["index"] for r in line], [r["value"] for r in line]
            text = hover("rank %{x}: %{y:.3%}")
            figure.add_trace(depth_line(module, deepest, x=x, y=y, mode="lines+markers", hovertemplate=text), **at)
        for rank in sorted({known[module].rank for module in modules})[:3]:
            figure.add_vline(x=rank, line={"dash": "dash", "color": NULL, "width": 1}, **at)
    depth_bar(figure, deepest)
    figure.update_xaxes(title_text="rank")
    figure.update_yaxes(**log_axis([value_of(r) for r in rows if value_of(r) > 0]))
    figure.update_yaxes(title_text="relative error", col=1)
    caption = (
        f"{CONVENTIONS['least_error']}; colour is depth, a dashed line a rank that was kept. Modules whose result is "
        "no truncation have no such curve."
    )
    return Plot("error_curves", "Error against rank, by module type", caption, figure, rows)
