"""The figure of a training run: its losses, gradients, learning rate and speed, step by step."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from d2surgery.measures.table import MEASURES
from d2surgery.reporting.figures.parts import OKABE_ITO, Plot, legend_above, panel_grid, thinned, value_of
from d2surgery.reporting.tidy import CONVENTIONS, Row, row

MOST = 2000  # lines that are drawn
_PANELS = (("loss", "eval_loss"), ("grad_norm",), ("lr",), ("tokens_per_second",))


def run_curves(lines: Sequence[Mapping[str, Any]], run: str = "") -> Plot:
    """Of the lines of metrics.jsonl, as many as a figure shows; what is no number in them is not drawn."""
    shown = thinned(lines, MOST)
    rows = [
        row(adapter=run, metric=metric, index=step, value=value, quality="exact", method="logged")
        for step, metric, value in _numbers(shown)
    ]
    figure, places = panel_grid(["loss", *(MEASURES[panel[0]].word for panel in _PANELS[1:])])
    for panel, at in zip(_PANELS, places, strict=True):
        for metric in panel:
            figure.add_trace(_line(metric, [each for each in rows if each["metric"] == metric]), **at)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(exponentformat="power")
    legend_above(figure, panels=True)
    meant = "; ".join(f"{MEASURES[name].word}: {CONVENTIONS[name]}" for panel in _PANELS for name in panel)
    left = f" {len(shown)} of {len(lines)} lines of the log are drawn." if len(shown) < len(lines) else ""
    return Plot("run_curves", "How it was trained", f"{meant}.{left}", figure, rows, run)


def _line(metric: str, rows: Sequence[Row]) -> go.Scatter:
    word, first = MEASURES[metric].word, metric == "loss"
    return go.Scatter(
        x=[each["index"] for each in rows], y=[value_of(each) for each in rows], name=word,
        mode="lines" if first else "lines+markers", showlegend=metric in _PANELS[0], marker={"size": 4},
        line={"color": OKABE_ITO[0 if metric != "eval_loss" else 1], "width": 1.6},
        hovertemplate=f"{word}, step %{{x}}: %{{y:.4g}}<extra></extra>",
    )  # fmt: skip


def _numbers(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """Step, metric, value."""
    for line in lines:
        for metric in ("loss", "eval_loss", "lr", "grad_norm"):
            if _is_number(line.get(metric)):
                yield line["step"], metric, float(line[metric])
    timed = [line for line in lines if _is_number(line.get("tokens")) and _is_number(line.get("seconds"))]
    for before, line in pairwise([{"tokens": 0, "seconds": 0.0}, *timed]):
        seconds = line["seconds"] - before["seconds"]
        if seconds > 0:  # a run that was resumed counts them anew
            yield line["step"], "tokens_per_second", (line["tokens"] - before["tokens"]) / seconds


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
