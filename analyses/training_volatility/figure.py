"""Draws figure.svg from results.json: the loss's deviation in a window against the step, a line per arm."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from lines import Panel, drawn, main


def draw(results: dict[str, Any]) -> str:
    """A point stands at the last step of its window."""
    arms = results["arms"]
    window = results["windows"][len(results["windows"]) // 2]
    panels = []
    for base in dict.fromkeys(one["base"] for one in arms):
        for name in ("rolling", "detrended"):
            lines = {one["arm"]: [(at + window, value) for at, value in enumerate(one[f"curve, {name}"])]
                     for one in arms if one["base"] == base}  # fmt: skip
            panels.append(Panel(f"{base}: {name}, nats in {window} steps", "step", lines))
    return drawn(panels, list(dict.fromkeys(one["arm"] for one in arms)))


if __name__ == "__main__":
    main(draw)
