"""Does D2-LoRA train more steadily? Reads the losses of four_kinds' cells and trains nothing.

python analyses/training_volatility/study.py --cells DIR     the folder of cells, or a results.json of four_kinds
python analyses/training_volatility/study.py --tiny
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from cells import Cell, cells_in, lacking, of_fresh_seeds, options_of, said_of_lacking, tiny_cells
from four_kinds.study import ARMS, CONTROL, SEED, TINY_ARMS, interval
from studying import machine, sha256, versions, write

HERE = Path(__file__).resolve().parent
QUESTION = "Does D2-LoRA train more steadily than LoRA?"
LORA, D2 = "LoRA r16", ("D2-LoRA 8+8", "D2-LoRA 16+16")
WINDOWS, SHOWN, SEEDS = (4, 8, 16), 8, 4
CLAIMED = 0.64  # 36 % less (arXiv:2602.14728)
Losses = Sequence[float]


def main() -> None:
    parser = options_of(QUESTION)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            options.cells = tiny_cells(Path(scratch), TINY_ARMS, 2)[1]
        if not options.cells:
            parser.error("--cells or --tiny")
        results = study(options.cells, (3,) if options.tiny else WINDOWS)
    to = options.results or HERE
    write(results, to)
    subprocess.run([sys.executable, str(HERE / "figure.py"), str(to)], check=True)
    print(table(results))


def study(path: Path, windows: Sequence[int]) -> dict[str, Any]:
    """The whole of results.json."""
    read = [path] if path.is_file() else sorted(path.glob("*/record.json"))
    cells = of_fresh_seeds(json.loads(path.read_text())["cells"] if path.is_file() else cells_in(path))
    bases = sorted({cell["base"] for cell in cells})
    return {
        "question": QUESTION,
        "machine": machine(),
        "versions": versions(),
        "seed": SEED,
        "inputs_sha256": {f"{file.parent.name}/{file.name}": sha256(file) for file in read},
        "windows": list(windows),
        "lacking": lacking(cells, SEEDS),
        "arms": [one for base in bases for arm in ARMS if (one := judged(cells, base, arm, windows))],
    }


# How uneven losses are ------------------------------------------------------------------------------------------------


def in_windows(losses: Losses, size: int, measure: Callable[[Any], float]) -> list[float]:
    return [measure(np.array(losses[at : at + size])) for at in range(len(losses) - size + 1)]


def deviation(losses: Any) -> float:
    """The standard deviation, about the mean."""
    return float(np.std(losses, ddof=1))


def off_the_line(losses: Any) -> float:
    """The standard deviation about the straight line of least squares: what falls evenly does not count."""
    return float(np.sqrt(np.square(residuals(losses)).sum() / max(len(losses) - 2, 1)))


def residuals(losses: Any) -> Any:
    steps = np.arange(len(losses))
    return losses - np.polyval(np.polyfit(steps, losses, 1), steps)


def of_its_mean(losses: Any) -> float:
    """The standard deviation over the mean: a low loss is no merit."""
    return deviation(losses) / float(np.mean(losses))


def late(losses: Losses, size: int = 2) -> Losses:
    """The second half of the steps, and a window at least."""
    return losses[-max(len(losses) // 2, size) :]


DEFINITIONS: dict[str, Callable[[Losses, int], float]] = {
    "rolling": lambda losses, size: mean(in_windows(late(losses, size), size, deviation)),
    "detrended": lambda losses, size: mean(in_windows(late(losses, size), size, off_the_line)),
    "of its mean": lambda losses, size: mean(in_windows(late(losses, size), size, of_its_mean)),
    "at the end": lambda losses, size: deviation(np.array(losses[-size:])),
}


# Arms -----------------------------------------------------------------------------------------------------------------


def judged(cells: Sequence[Cell], base: str, arm: str, windows: Sequence[int]) -> dict[str, Any] | None:
    """An arm's volatility over that of LoRA and of the control, seed by seed: the same rows in the same order."""
    by_arm = {name: {cell["seed"]: cell for cell in cells if (cell["base"], cell["arm"]) == (base, name)}
              for name in (arm, LORA, CONTROL)}  # fmt: skip
    mine = by_arm[arm]
    if not mine:
        return None
    shown = windows[len(windows) // 2]
    said: dict[str, Any] = {"base": base, "arm": arm, "lr": next(iter(mine.values()))["lr"], "seeds": sorted(mine)}
    for over in (LORA, CONTROL):
        pairs = [(mine[seed]["losses"], by_arm[over][seed]["losses"]) for seed in sorted(mine.keys() & by_arm[over])]
        said[f"/ {over}"] = {
            f"{name}, {size}": ratio([measure(a, size) / measure(b, size) for a, b in pairs])
            for name, measure in DEFINITIONS.items() for size in windows
        }  # fmt: skip
        if over == LORA:
            said["shared"] = mean(map(shared, *zip(*pairs, strict=True))) if pairs else None
    for name, measure in (("rolling", deviation), ("detrended", off_the_line)):
        curves = [in_windows(cell["losses"], shown, measure) for cell in mine.values()]
        said[f"curve, {name}"] = [round(float(value), 5) for value in np.mean(curves, 0)]
    return said


def shared(losses: Losses, others: Losses) -> float:
    """Of the second half's variance about its line, the share (r²) that the other run has at the same steps."""
    return float(np.corrcoef(residuals(late(losses)), residuals(late(others)))[0, 1] ** 2)


def ratio(values: list[float]) -> dict[str, float] | None:
    """Mean, Student's interval and power over seeds; of one seed the number alone."""
    if len(values) < 2:
        return {"mean": values[0]} if values else None
    return interval(values)


# What is said ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The README's tables."""
    arms = results["arms"]
    if not arms:
        return "**Not run.** No number stands here yet."
    windows = results["windows"]
    shown = windows[len(windows) // 2]
    heads = ["base", "arm", "learning rate", "seeds", *(f"{name} / LoRA r16" for name in DEFINITIONS),
             "rolling / doubled alpha", "variance shared with LoRA r16"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in arms:
        ratios = [said(one[f"/ {LORA}"][f"{name}, {shown}"]) for name in DEFINITIONS]
        control = said(one[f"/ {CONTROL}"][f"rolling, {shown}"])
        common = "" if one["shared"] is None else f"{one['shared']:.3f}"
        about = [one["base"], one["arm"], f"{one['lr']:g}", str(len(one["seeds"]))]
        lines.append(f"| {' | '.join([*about, *ratios, control, common])} |")
    lines += ["", "| base | arm | window | " + " | ".join(f"{name} / LoRA r16" for name in DEFINITIONS) + " |",
              "|---|---|---" + "|---" * len(DEFINITIONS) + "|"]  # fmt: skip
    for one in (one for one in arms if one["arm"] in D2):
        for size in windows:
            ratios = [said(one[f"/ {LORA}"][f"{name}, {size}"]) for name in DEFINITIONS]
            lines.append(f"| {' | '.join([one['base'], one['arm'], str(size), *ratios])} |")
    known = [found for one in arms if one["arm"] in D2 if (found := one[f"/ {LORA}"][f"rolling, {shown}"])]
    power = max((found["found"] for found in known if "found" in found), default=None)
    if power is not None:
        size = f"A rolling ratio of D2-LoRA's that is {power:.2f} off 1"
        lines += ["", f"{size} would be found with 80 % power; claimed is {1 - CLAIMED:.2f}."]
    return "\n".join(lines + said_of_lacking(results["lacking"]))


def said(one: dict[str, float] | None) -> str:
    if one is None:
        return ""
    return f"{one['mean']:.3f}" + (f" ({one['low']:.3f} to {one['high']:.3f})" if "low" in one else "")


if __name__ == "__main__":
    main()
