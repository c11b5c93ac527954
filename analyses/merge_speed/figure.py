"""Draws figure.svg from results.json: seconds and peak memory of every run, one dot per round."""

import json
import sys
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, LEFT, PANEL, GAP, ROW, TOP = 1000, 270, 280, 80, 30, 48
COLOURS = {"cp": "#9aa0a6", "PEFT": "#c8553d", "d2surgery": "#2a6f97"}
INK, RULE = "#30343a", "#d9dce0"


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "figure.svg").write_text(draw(json.loads((directory / "results.json").read_text())))


def draw(results: dict[str, Any]) -> str:
    depth = results["shape"]["num_hidden_layers"]
    runs = [run for run in results["runs"] if run["layers"] == depth]
    names = list(dict.fromkeys(run["run"] for run in runs))
    seconds = {name: [run["seconds"] for run in runs if run["run"] == name] for name in names}
    memory = {name: [run["peak_bytes"] / 1e6 for run in runs if run["run"] == name] for name in names}
    height = TOP + ROW * len(names) + 40
    labels = [text(LEFT - 12, TOP + ROW * (i + 0.5), name, anchor="end") for i, name in enumerate(names)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *labels,
        *panel(LEFT, "seconds, whole process", seconds, ".1f"),
        *panel(LEFT + PANEL + GAP, "peak resident memory, MB", memory, ".0f"),
        text(LEFT, height - 14, f"bar: median of {results['rounds']}; dot: one run", size=12),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def panel(left: float, title: str, values: dict[str, list[float]], form: str) -> list[str]:
    """Horizontal bars from zero, with the median written at their end."""
    largest = max(max(each) for each in values.values())
    bottom = TOP + ROW * len(values)
    parts = [
        text(left, TOP - 16, title, weight="bold"),
        f'<line x1="{left}" y1="{TOP - 4}" x2="{left}" y2="{bottom}" stroke="{RULE}"/>',
    ]
    for row, (name, each) in enumerate(values.items()):
        middle, scale = TOP + ROW * (row + 0.5), PANEL / largest
        bar, colour = median(each) * scale, COLOURS[name.split()[0]]
        parts.append(f'<rect x="{left}" y="{middle - 9}" width="{bar:.1f}" height="18" fill="{colour}" opacity="0.8"/>')
        parts += [f'<circle cx="{left + v * scale:.1f}" cy="{middle}" r="2.5" fill="{INK}"/>' for v in each]
        parts.append(text(left + max(each) * scale + 8, middle, format(median(each), form), size=12))
    return parts


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{INK}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


if __name__ == "__main__":
    main()
