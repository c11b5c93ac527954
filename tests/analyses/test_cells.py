"""The studies that read four_kinds' cells: by hand where a number can be, and on cells of a random model."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ANALYSES = Path(__file__).resolve().parents[2] / "analyses"
LORA, CONTROL, D2 = "LoRA r16", "LoRA r16, alpha doubled", "D2-LoRA 8+8"


def study(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ANALYSES / name / "study.py"))


def run_tiny(name: str, results: Path) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(ANALYSES / name / "study.py"), "--tiny", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((results / "results.json").read_text()), done.stdout


def cell(folder: Path, arm: str, seed: int, **more: Any) -> None:
    made = {"arm": arm, "seed": seed, "base": "model", "lr": 1e-3, "loss": 1.0} | more
    (folder / f"{arm} {seed} {made['lr']}").mkdir(parents=True)
    (folder / f"{arm} {seed} {made['lr']}" / "record.json").write_text(json.dumps(made))


def test_a_cell_of_a_fresh_seed_comes_before_those_that_chose_the_rate(tmp_path: Path) -> None:
    cell(tmp_path, LORA, 100, loss=0.1)
    cell(tmp_path, LORA, 1)
    cell(tmp_path, LORA, 0)
    cell(tmp_path, D2, 100, loss=0.9, lr=1e-2)
    cell(tmp_path, D2, 100, loss=0.5, lr=2e-2)
    cell(tmp_path, "DoRA r16", 0, base="another")
    functions = study("merge_fidelity")
    cells = functions["some_of_each"](functions["cells_in"](tmp_path), "model", 1)
    assert [(one["arm"], one["seed"], one["lr"]) for one in cells] == [(LORA, 0, 1e-3), (D2, 100, 2e-2)]
    missing = functions["lacking"](cells, 2)
    assert f"{LORA} (seed 1)" in missing
    assert f"{D2} (seed 0, 1)" in missing


# training_volatility ----------------------------------------------------------------------------------------------


@pytest.fixture
def losses(tmp_path: Path) -> dict[tuple[str, int], Any]:
    """A fall that all share, and noise of which D2-LoRA has half; written as cells, with one that is not judged."""
    numbers, found = np.random.default_rng(0), {}
    for seed in range(3):
        noise = numbers.normal(size=48)
        fall = 4 - 0.04 * np.arange(48)
        for arm, size in ((LORA, 0.2), (CONTROL, 0.3), (D2, 0.1)):
            found[arm, seed] = fall + size * noise
            cell(tmp_path, arm, seed, losses=found[arm, seed].tolist())
    cell(tmp_path, LORA, 100, losses=[0.0] * 48)
    return found


def rolling(losses: Any, window: int) -> float:
    late = losses[24:]
    return float(np.mean([late[at : at + window].std(ddof=1) for at in range(25 - window)]))


def test_volatility_is_a_ratio_of_rolling_deviations(tmp_path: Path, losses: dict[tuple[str, int], Any]) -> None:
    results = study("training_volatility")["study"](tmp_path, (4, 8, 16))
    arms = {one["arm"]: one for one in results["arms"]}
    assert arms.keys() == {LORA, CONTROL, D2}
    assert arms[D2]["seeds"] == [0, 1, 2]
    for window in (4, 8, 16):
        ratios = [rolling(losses[D2, seed], window) / rolling(losses[LORA, seed], window) for seed in range(3)]
        said = arms[D2][f"/ {LORA}"][f"rolling, {window}"]
        half = 4.30265273 * np.std(ratios, ddof=1) / math.sqrt(3)  # Student's t of two degrees of freedom
        assert said["mean"] == pytest.approx(np.mean(ratios))
        assert said["high"] == pytest.approx(np.mean(ratios) + half)
        assert arms[D2][f"/ {LORA}"][f"detrended, {window}"]["mean"] == pytest.approx(0.5), "a fall does not count"
        assert arms[D2][f"/ {CONTROL}"][f"detrended, {window}"]["mean"] == pytest.approx(1 / 3)
    assert np.mean(ratios) > 0.52, "the fall counts"
    assert arms[D2]["shared"] == pytest.approx(1), "it is the same noise"
    ends = [losses[arm, 0][-8:].std(ddof=1) for arm in (D2, LORA)]
    one = study("training_volatility")["DEFINITIONS"]["at the end"]
    assert one(losses[D2, 0], 8) / one(losses[LORA, 0], 8) == pytest.approx(ends[0] / ends[1])


def test_volatility_reads_the_results_of_four_kinds_too(tmp_path: Path, losses: dict[tuple[str, int], Any]) -> None:
    of_folder = study("training_volatility")["study"](tmp_path, (4, 8, 16))
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")]
    (tmp_path / "results.json").write_text(json.dumps({"cells": cells}))
    of_file = study("training_volatility")["study"](tmp_path / "results.json", (4, 8, 16))
    assert of_file["arms"] == of_folder["arms"]


def test_volatility_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    for arm, size in ((LORA, 1.0), (D2, 2.0)):
        cell(tmp_path, arm, 0, losses=[3 + size * (-1) ** step for step in range(48)])
    results = study("training_volatility")["study"](tmp_path, (4, 8, 16))
    one = next(one for one in results["arms"] if one["arm"] == D2)
    assert one[f"/ {LORA}"]["rolling, 4"] == {"mean": pytest.approx(2)}
    assert one[f"/ {CONTROL}"]["rolling, 4"] is None
    assert "Not trained yet: " in study("training_volatility")["table"](results)


@pytest.mark.long
def test_volatility_draws_a_line_per_arm(tmp_path: Path) -> None:
    results, printed = run_tiny("training_volatility", tmp_path)
    assert [one["arm"] for one in results["arms"]] == [LORA, CONTROL, D2]
    assert (tmp_path / "figure.svg").read_text().count("<polyline") == 2 * 3 + 3
    assert f"| {D2} |" in printed


# merge_fidelity ---------------------------------------------------------------------------------------------------


def answer(likelihoods: list[float], gold: int, task: str = "easy") -> dict[str, Any]:
    return {"task": task, "gold": gold, "picked": int(np.argmax(likelihoods)), "log_likelihoods": likelihoods}


def test_flips_are_counted_and_expected_from_margins() -> None:
    before = [answer([-1.0, -2.0, -9.0], 0), answer([-3.0, -3.1, -9.0], 0), answer([-5.0, -4.0, -9.0], 1, "open")]
    after = [answer([-1.2, -2.0, -9.0], 0), answer([-3.0, -2.9, -9.0], 0), answer([-5.0, -4.2, -9.0], 1, "open")]
    said = study("merge_fidelity")["against"](before, after)
    assert (said["flips"], said["right_before"], said["right_after"], said["items"]) == (1, 3, 2, 3)
    assert said["gaps_pp"] == {"easy": -50.0, "open": 0.0}
    margins, changes = np.array([1.0, 0.1, 1.0]), np.array([-0.2, -0.2, -0.2])
    size = math.sqrt(np.mean(changes**2))
    expected = sum(math.erfc(margin / size / math.sqrt(2)) / 2 for margin in margins)
    assert said["margin_change"] == pytest.approx(size)
    assert said["flips_expected"] == pytest.approx(expected)


def test_the_same_answers_expect_no_flip() -> None:
    same = [answer([-1.0, -2.0], 1)]
    said = study("merge_fidelity")["against"](same, same)
    assert (said["flips"], said["flips_expected"]) == (0, 0.0)


@pytest.mark.long
def test_merge_fidelity_finds_a_right_merge_as_right_as_rounding(tmp_path: Path) -> None:
    results, printed = run_tiny("merge_fidelity", tmp_path)
    assert [row["arm"] for row in results["rows"]] == [LORA, D2]
    for row in results["rows"]:
        assert row["fp32"]["lost"] < 1e-6 < row["bf16"]["lost"] < 0.1
        for dtype in ("fp32", "bf16"):
            logits = row[dtype]["logits"]
            assert logits["kl_mean"] == pytest.approx(logits["rounding_floor"], rel=0.1, abs=1e-15)
            assert row[dtype]["answers"]["items"] == 8
        assert all(ratio > 0 for ratios in row["speed"].values() for ratio in ratios)
    assert "flips of 16 answers" in printed


# norms_and_directions ---------------------------------------------------------------------------------------------


def test_the_projection_takes_the_gradient_along_the_columns_once() -> None:
    """dL/dΔW = G + c·(G − ŵŵᵀG) column by column, c = ‖w0‖/‖w0 + Δw‖."""
    numbers = np.random.default_rng(0)
    W, U, G = (numbers.normal(size=(5, 3)) * size for size in (1.0, 0.3, 1.0))
    moved = W + U
    norms = np.linalg.norm(moved, axis=0)
    along = ((G * moved).sum(0) / norms) * moved / norms
    wanted = G + np.linalg.norm(W, axis=0) / norms * (G - along)
    functions = study("norms_and_directions")
    got = functions["through_projection"](*map(torch.from_numpy, (G, W, U)))
    assert got.numpy() == pytest.approx(wanted)
    shares = functions["along_and_whole"](torch.from_numpy(G), torch.from_numpy(moved))
    assert shares == pytest.approx([np.square(along).sum(), np.square(G).sum()])


@pytest.mark.long
def test_norms_and_directions_measures_every_arm(tmp_path: Path) -> None:
    results, printed = run_tiny("norms_and_directions", tmp_path)
    arms = {one["arm"]: one for one in results["arms"]}
    assert set(arms[LORA]["column_norms"]) == {"W′"}
    of_forms = arms[D2]["column_norms"]
    assert of_forms["W*"]["largest"] < 1e-12 < of_forms["Ŵ = W* + ΔW"]["size"]
    assert arms[LORA]["full_rank"] == 16 / 64
    assert arms[D2]["full_rank"] == 1
    assert arms[D2]["radial"]["update"] < arms[D2]["radial"]["weight"]
    assert set(arms[LORA]["radial"]) == {"weight", "chance"}
    assert arms[LORA]["radial"]["chance"] == pytest.approx(1 / 64)
    assert "Not trained yet: LoRA r32 (seed 0)" in printed
    assert (tmp_path / "figure.svg").read_text().count("<polyline") == 2 * 5 + 5
