"""A run for every learning rate and seed: cells that stand by themselves, so that a sweep goes on where it was stopped.

out/lr0.0002-seed0/    a run's output, as `train` writes it
out/sweep.json         a record per finished cell, and per learning rate the mean over its seeds
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2surgery.errors import refuse
from d2surgery.files.whole import write_whole
from d2surgery.training import loop
from d2surgery.training.disk import read_json
from d2surgery.training.loop import check_same
from d2surgery.training.planning import world
from d2surgery.training.settings import TrainConfig

SUMMARY = "sweep.json"
Losses = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What the seeds of one learning rate gave. The interval is Student's; None of one seed."""

    lr: float
    seeds: int
    mean_loss: float
    ci: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Losses are the last on held-out items (of `best`, the lowest), else on the last logged steps."""

    out: str
    cells: tuple[dict[str, Any], ...]  # lr, seed, loss, steps, seconds_per_step, out
    rates: tuple[Rate, ...]
    best_lr: float


def cells(config: TrainConfig, lrs: Sequence[float], seeds: Sequence[int]) -> list[TrainConfig]:
    """The runs of a sweep, seed by seed."""
    return [
        replace(
            config,
            output=str(Path(config.output) / f"lr{lr:g}-seed{seed}"),
            optimizer=replace(config.optimizer, lr=lr),
            run=replace(config.run, seed=seed),
        )
        for seed in dict.fromkeys(seeds)
        for lr in dict.fromkeys(lrs)
    ]


def sweep(
    config: TrainConfig,
    lrs: Sequence[float],
    seeds: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Train every cell that has no record yet, one after another; a cell that was stopped goes on from its checkpoint.

    progress(done, total) counts cells. Raises what `train` raises, RESUME_MISMATCH for cells that began otherwise.
    """
    if world() > 1:
        raise refuse("USAGE", "a sweep is of one process", wanted="a sweep for each device, with seeds of its own")
    out = Path(config.output)
    runs = cells(config, lrs, seeds)
    for done, cell in enumerate(runs):
        progress(done, len(runs))
        stored = read_json(out / SUMMARY).get("cells", [])
        if any(record["out"] == Path(cell.output).name for record in stored):
            check_same(Path(cell.output), cell)
            continue
        report = loop.train(cell, resume=True)
        losses = [report.best_loss, report.last_eval_loss, report.last_loss]
        record = {
            "lr": cell.optimizer.lr, "seed": cell.run.seed, "loss": next(loss for loss in losses if loss is not None),
            "steps": report.steps, "seconds_per_step": report.seconds_per_step, "out": Path(cell.output).name,
        }  # fmt: skip
        write_whole(out / SUMMARY, json.dumps({"cells": [*stored, record]}, indent=2))
    progress(len(runs), len(runs))
    asked = {Path(cell.output).name for cell in runs}
    found = summary(config.output, [r for r in read_json(out / SUMMARY)["cells"] if r["out"] in asked])
    write_whole(out / SUMMARY, json.dumps({**read_json(out / SUMMARY), **_said(found)}, indent=2))
    return found


def summary(out: str, records: Sequence[dict[str, Any]]) -> Sweep:
    """Of finished cells: the learning rate with the lowest mean loss."""
    by_lr: dict[float, list[float]] = {}
    for record in records:
        by_lr.setdefault(record["lr"], []).append(record["loss"])
    rates = tuple(
        Rate(lr=lr, seeds=len(losses), mean_loss=float(np.mean(losses)), ci=interval(losses))
        for lr, losses in sorted(by_lr.items())
    )
    best = min(rates, key=lambda rate: rate.mean_loss)
    return Sweep(out=out, cells=tuple(records), rates=rates, best_lr=best.lr)


def interval(values: Losses, level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of a mean."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _said(found: Sweep) -> dict[str, Any]:
    return {"rates": [asdict(rate) for rate in found.rates], "best_lr": found.best_lr}
