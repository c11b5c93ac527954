"""Draws figure.svg from results.json: time and memory of a step, one panel per shape, one dot per round."""

import json
import sys
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, LEFT, PANEL, GAP, ROW, TOP = 1000, 230, 300, 90, 26, 44
COLOURS = {"PEFT": "#c8553d"}
OURS, INK, RULE = "#2a6f97", "#30343a", "#d9dce0"


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "figure.svg").write_text(draw(json.loads((directory / "results.json").read_text())))


def draw(results: dict[str, Any]) -> str:
    names = list(dict.fromkeys(run["run"] for run in results["runs"]))
    block = TOP + ROW * len(names)
    height = block * len(results["shapes"]) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, shape in enumerate(results["shapes"]):
        top = TOP + block * number
        runs = [run for run in results["runs"] if run["shape"] == shape]
        seconds = {name: [1000 * run["seconds"] for run in runs if run["run"] == name] for name in names}
        peaks = {name: [run["memory_bytes"] / 1e6 for run in runs if run["run"] == name] for name in names}
        parts += [text(LEFT - 12, top + ROW * (row + 0.5), name, anchor="end") for row, name in enumerate(names)]
        parts += panel(LEFT, top, f"{shape}: ms a step", seconds)
        parts += panel(LEFT + PANEL + GAP, top, "memory of a step, MB", peaks)
    parts.append(
        text(LEFT, height - 14, f"{results['device']}; bar: median of {results['rounds']}; dot: one run", size=12)
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(left: float, top: float, title: str, values: dict[str, list[float]]) -> list[str]:
    """Horizontal bars from zero, with the median written at their end."""
    scale = PANEL / max(1e-9, *(max(each) for each in values.values()))
    bottom = top + ROW * len(values)
    parts = [
        text(left, top - 14, title, weight="bold"),
        f'<line x1="{left}" y1="{top - 4}" x2="{left}" y2="{bottom}" stroke="{RULE}"/>',
    ]
    for row, (name, each) in enumerate(values.items()):
        middle, colour = top + ROW * (row + 0.5), COLOURS.get(name.split()[0], OURS)
        bar = median(each) * scale
        parts.append(f'<rect x="{left}" y="{middle - 8}" width="{bar:.1f}" height="16" fill="{colour}" opacity="0.8"/>')
        parts += [f'<circle cx="{left + v * scale:.1f}" cy="{middle}" r="2.5" fill="{INK}"/>' for v in each]
        parts.append(text(left + max(each) * scale + 8, middle, f"{median(each):.0f}", size=12))
    return parts


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{INK}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


if __name__ == "__main__":
    main()
