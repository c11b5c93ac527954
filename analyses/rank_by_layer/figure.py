"""Draws figure.svg from results.json: ranks of update and delta against depth, a line per kind."""

import json
import sys
from html import escape
from math import log
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, PANEL, GAP, DEEP = 1000, 380, 70, 56, 340, 90, 250
COLOURS = {"lora": "#0072B2", "dora": "#D55E00", "duallora": "#009E73", "d2lora": "#CC79A7"}  # Okabe and Ito
DASHES = {"lora": "none", "dora": "8 3", "duallora": "2 3", "d2lora": "8 3 2 3"}
NAMES = {"lora": "LoRA", "dora": "DoRA", "duallora": "Dual LoRA", "d2lora": "D2-LoRA"}
PANELS = {
    "delta_rank": "rank of the delta (σ > 3e-8·σ₁)",
    "delta_energy_entropy_rank": "energy entropy rank of the delta",
}
INK, RULE = "#30343a", "#d9dce0"


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "figure.svg").write_text(draw(json.loads((directory / "results.json").read_text())))


def draw(results: dict[str, Any]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for number, (key, title) in enumerate(PANELS.items()):
        parts += panel(LEFT + number * (PANEL + GAP), key, title, results)
    for number, (kind, name) in enumerate(NAMES.items()):
        y = TOP + 20 + 26 * number
        parts.append(line([(WIDTH - 125, y), (WIDTH - 95, y)], kind))
        parts.append(text(WIDTH - 88, y, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(left: int, key: str, title: str, results: dict[str, Any]) -> list[str]:
    """Means over the modules of a layer; the rank axis is logarithmic, from 1 to full."""
    runs, layers = results["runs"], results["setting"]["layers"]
    full = max(run["full_rank"] for run in runs)

    def at(layer: float, rank: float) -> tuple[float, float]:
        return left + PANEL * layer / max(layers - 1, 1), TOP + DEEP * (1 - log(max(rank, 1)) / log(full))

    parts = [
        text(left, TOP - 24, title, weight="bold"),
        text(left + PANEL / 2, TOP + DEEP + 38, "layer", anchor="middle"),
    ]
    for rank in [*(2**k for k in range(0, 20, 2) if 2**k < full), full]:
        y = at(0, rank)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}" stroke="{RULE}"/>')
        parts.append(text(left - 8, y, f"{rank}", anchor="end"))
    parts += [text(at(n, 1)[0], TOP + DEEP + 16, str(n), anchor="middle") for n in range(layers)]
    for kind in NAMES:
        means = []
        for layer in range(layers):
            mine = [run[key] for run in runs if run["kind"] == kind and run["layer"] == layer]
            means.append(at(layer, sum(mine) / len(mine)))
        parts.append(line(means, kind))
    return parts


def line(points: list[tuple[float, float]], kind: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{COLOURS[kind]}" stroke-width="2.5" stroke-dasharray="{DASHES[kind]}"'
    return f'<polyline points="{joined}" {style}/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-size="13" font-weight="{weight}" fill="{INK}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


if __name__ == "__main__":
    main()
