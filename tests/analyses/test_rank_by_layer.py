"""The study rank_by_layer: runs on a tiny example, and what its results say about the four kinds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STUDY = Path(__file__).resolve().parents[2] / "analyses" / "rank_by_layer"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Results, what was printed, and the directory."""
    directory = tmp_path_factory.mktemp("rank_by_layer")
    command = [sys.executable, str(STUDY / "study.py"), "--tiny", "--results", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "results.json").read_text()), done.stdout, directory


def bounds_hold(results: dict[str, Any]) -> None:
    ranks = results["setting"]["ranks"]
    for run in results["runs"]:
        if run["kind"] == "duallora":
            assert run["update_rank"] is None
        else:
            assert 0 < run["update_rank"] <= ranks[run["kind"]] * (2 if run["kind"] == "d2lora" else 1)
        if run["kind"] == "lora":
            assert run["delta_rank"] == run["update_rank"]
        assert 1 <= run["delta_energy_entropy_rank"] <= run["delta_entropy_rank"] <= run["full_rank"]


@pytest.mark.long
def test_it_measures_every_kind_in_every_layer(tiny: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, _ = tiny
    runs = [(run["layer"], run["module"], run["kind"]) for run in results["runs"]]
    assert len(runs) == len(set(runs)) == 2 * 2 * 4
    assert all(f"| {name} |" in printed for name in ("LoRA", "DoRA", "Dual LoRA", "D2-LoRA"))
    bounds_hold(results)


def test_it_draws_and_leaves_only_its_results(tiny: tuple[dict[str, Any], str, Path]) -> None:
    *_, directory = tiny
    assert sorted(file.name for file in directory.iterdir()) == ["figure.svg", "results.json"]
    assert (directory / "figure.svg").read_text().count("<polyline") == 2 * 4 + 4


def test_the_committed_results_say_what_the_readme_says() -> None:
    results = json.loads((STUDY / "results.json").read_text())
    bounds_hold(results)
    for kind in ("dora", "duallora", "d2lora"):  # dense
        shares = [run["delta_rank"] / run["full_rank"] for run in results["runs"] if run["kind"] == kind]
        assert min(shares) > 0.95
    assert all(one["ratio"] >= 100 and one["largest_difference"] < 1e-5 for one in results["speed"])
