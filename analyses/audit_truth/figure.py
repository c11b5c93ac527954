"""Draws figure.svg from results.json: the share of damaged modules that fail against the size of the damage."""

import json
import sys
from html import escape
from math import log10
from pathlib import Path
from typing import Any

WIDTH, LEFT, TOP, PANEL, GAP, DEEP = 1240, 60, 50, 280, 40, 260
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#7f3c8d", "#80ba5a")
INK, RULE = "#30343a", "#d9dce0"


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "figure.svg").write_text(draw(json.loads((directory / "results.json").read_text())))


def draw(results: dict[str, Any]) -> str:
    runs, every = results["runs"], results["setting"]["modules"]
    dtypes, damages = ([*dict.fromkeys(run[key] for run in runs)] for key in ("dtype", "damage"))
    changes = sorted({run["change"] for run in runs})
    low, high = log10(changes[0]), log10(changes[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + DEEP + 60}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{TOP + DEEP + 60}" fill="white"/>',
    ]
    for number, dtype in enumerate(dtypes):
        left = LEFT + number * (PANEL + GAP)
        parts += [text(left, TOP - 18, dtype), text(left + PANEL / 2 - 60, TOP + DEEP + 42, "relative change")]
        for share in (0, 0.5, 1):
            y = TOP + DEEP * (1 - share)
            parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y}" y2="{y}" stroke="{RULE}"/>')
            parts.append(text(left - 34, y + 4, f"{share:.0%}"))
        for change in changes:
            parts.append(
                text(left + PANEL * (log10(change) - low) / (high - low or 1) - 12, TOP + DEEP + 20, f"{change:g}")
            )
        for damage, colour in zip(damages, COLOURS, strict=False):
            points = [
                (
                    left + PANEL * (log10(run["change"]) - low) / (high - low or 1),
                    TOP + DEEP * (1 - run["seen"] / every),
                )
                for run in runs
                if (run["dtype"], run["damage"]) == (dtype, damage)
            ]
            where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for number, (damage, colour) in enumerate(zip(damages, COLOURS, strict=False)):
        y = TOP + 12 + 22 * number
        x = LEFT + len(dtypes) * (PANEL + GAP) - 10
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(x + 26, y + 4, damage))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="{INK}">{escape(words)}</text>'


if __name__ == "__main__":
    main()
