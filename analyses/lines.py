"""Figures of studies that draw a line per arm of four_kinds: panels side by side, as SVG."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import log
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, LEFT, TOP, PANEL, GAP, DEEP = 1120, 60, 50, 380, 60, 260
COLOURS = ("#0072B2", "#56B4E9", "#000000", "#D55E00", "#CC79A7", "#E69F00", "#009E73")  # Okabe and Ito
INK, RULE = "#30343a", "#d9dce0"
Point = tuple[float, float]


class Panel(NamedTuple):
    title: str
    across: str
    """What stands on the horizontal axis."""
    lines: Mapping[str, Sequence[Point]]
    logarithmic: bool = False
    """From 1 up; else from 0."""


def main(draw: Callable[[dict[str, Any]], str]) -> None:
    """figure.svg in the directory that the command line names, of its results.json; none of no arms."""
    directory = Path(sys.argv[1])
    results = json.loads((directory / "results.json").read_text())
    if results["arms"]:
        (directory / "figure.svg").write_text(draw(results))


def drawn(panels: Sequence[Panel], arms: Sequence[str]) -> str:
    """Two panels in a row, each arm in its own colour."""
    block = TOP + DEEP + 50
    height = block * ((len(panels) + 1) // 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    colours = dict(zip(arms, COLOURS, strict=False))
    for at, panel in enumerate(panels):
        parts += _panel(LEFT + at % 2 * (PANEL + GAP), TOP + at // 2 * block, panel, colours)
    for at, (arm, colour) in enumerate(colours.items()):
        x, y = LEFT + 2 * (PANEL + GAP) - 40, TOP + 10 + 24 * at
        parts += [_line([(x, y), (x + 22, y)], colour), _text(x + 28, y, arm)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, top: float, panel: Panel, colours: Mapping[str, str]) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    highest = max([y for _, y in points] + [1 + panel.logarithmic if panel.logarithmic else 1e-12])

    def at(x: float, y: float) -> Point:
        share = log(max(y, 1)) / log(highest) if panel.logarithmic else y / highest
        return left + PANEL * (x - first) / (last - first or 1), top + DEEP * (1 - share)

    parts = [_text(left, top - 22, panel.title), _text(left + PANEL / 2, top + DEEP + 18, panel.across, "middle")]
    parts += [_text(at(x, 1)[0], top + DEEP + 18, f"{x:g}", "middle") for x in (first, last)]
    for y in (1, highest**0.5, highest) if panel.logarithmic else (0, highest / 2, highest):
        height = at(first, y)[1]
        parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{height:.1f}" y2="{height:.1f}" stroke="{RULE}"/>')
        parts.append(_text(left - 6, height, f"{y:.2g}", "end"))
    return parts + [_line([at(*point) for point in line], colours[arm]) for arm, line in panel.lines.items()]


def _line(points: Sequence[Point], colour: str) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    style = f'font-size="12" fill="{INK}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
