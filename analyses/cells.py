"""The cells that four_kinds has trained, for the studies that read them; and cells that are made in seconds."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from four_kinds.study import ARMS, BUDGETS, CHOOSING, SETS, run_cell, tiny_base, tiny_data, write_data

Cell = dict[str, Any]


def options_of(question: str) -> argparse.ArgumentParser:
    """What every study of the cells takes."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--cells", type=Path, help="four_kinds' cells: the folder of its budget within its --work")
    parser.add_argument("--results", type=Path, help="where results.json goes; beside the study")
    parser.add_argument("--tiny", action="store_true", help="cells of a random model; the numbers mean nothing")
    return parser


def cells_in(cells: Path) -> list[Cell]:
    """What every finished cell has recorded, and its `folder`."""
    return [json.loads(path.read_text()) | {"folder": str(path.parent)} for path in sorted(cells.glob("*/record.json"))]


def of_fresh_seeds(cells: Sequence[Cell]) -> list[Cell]:
    """Without those by which the learning rates were chosen."""
    return [cell for cell in cells if cell["seed"] != CHOOSING]


def some_of_each(cells: Sequence[Cell], base: str, seeds: int) -> list[Cell]:
    """Of each arm the cells of so many fresh seeds; without one, the best that a learning rate was chosen by."""
    chosen = []
    for arm in ARMS:
        mine = [cell for cell in cells if (cell["arm"], cell["base"]) == (arm, base)]
        fresh = sorted(of_fresh_seeds(mine), key=lambda cell: cell["seed"])[:seeds]
        chosen += fresh or sorted(mine, key=lambda cell: cell["loss"])[:1]
    return chosen


def lacking(cells: Sequence[Cell], seeds: int) -> list[str]:
    """Which cells of fresh seeds are not there."""
    there = {(cell["arm"], cell["seed"]) for cell in cells}
    missing = {arm: [str(seed) for seed in range(seeds) if (arm, seed) not in there] for arm in ARMS}
    return [f"{arm} (seed {', '.join(mine)})" for arm, mine in missing.items() if mine]


def said_of_lacking(missing: Sequence[str]) -> list[str]:
    """A line below a table, where something is missing."""
    return ["", f"Not trained yet: {'; '.join(missing)}."] if missing else []


def tiny_cells(work: Path, arms: Sequence[str], seeds: int) -> tuple[Path, Path]:
    """A random base, and the folder of its cells of a few steps each."""
    base = tiny_base(work)
    files = write_data(tiny_data(work), work, SETS["small"], BUDGETS["tiny"]["held_out"])
    common = {"base": str(base), "files": files, "budget": "tiny", "device": "cpu", "work": str(work), "lr": 1e-2}
    for arm in arms:
        for seed in range(seeds):
            run_cell(common | {"arm": arm, "seed": seed})
    return base, work / "tiny"
