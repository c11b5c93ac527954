"""Draws figure.svg from results.json: what each arm's deltas use and how large they are, layer by layer."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from lines import Panel, drawn, main

SHOWN = {"energy_entropy_rank": "energy entropy rank of the delta", "relative_update": "‖delta‖/‖W0‖"}


def draw(results: dict[str, Any]) -> str:
    arms = {one["arm"]: one["by_layer"] for one in results["arms"]}
    panels = []
    for name, title in SHOWN.items():
        lines = {arm: [(int(layer), by[name]) for layer, by in layers.items()] for arm, layers in arms.items()}
        panels.append(Panel(title, "layer", lines, logarithmic=name.endswith("rank")))
    return drawn(panels, list(arms))


if __name__ == "__main__":
    main(draw)
