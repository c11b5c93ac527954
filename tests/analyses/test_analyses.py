"""Studies run on a tiny example, use public names only, and say in their README what their results say."""

import ast
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import d2surgery

ANALYSES = Path(__file__).resolve().parents[2] / "analyses"
STUDIES = sorted(path.parent for path in ANALYSES.glob("*/study.py"))
of_each_study = pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)


@of_each_study
def test_a_study_uses_public_names_only(study: Path) -> None:
    sources = [path.read_text() for path in study.glob("*.py")]
    inner = [node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    programs = [text for text in inner if isinstance(text, str) and "import" in text and "d2surgery" in text]
    for text in [*sources, *(program for program in programs if is_python(program))]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2surgery"):
                assert node.module == "d2surgery"
                assert {alias.name for alias in node.names} <= set(d2surgery.__all__)
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("d2surgery.") for alias in node.names)


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@of_each_study
def test_a_study_can_be_rerun_and_judged(study: Path) -> None:
    readme = (study / "README.md").read_text()
    for heading in ("Question", "Method", "Result", "Cost", "What would refute it"):
        assert f"\n## {heading}\n" in readme
    for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme):
        assert (study / file).exists()
    results = json.loads((study / "results.json").read_text())
    assert {"question", "machine", "versions", "seed"} <= set(results)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in leaves(results["inputs_sha256"]))
    assert all(math.isfinite(value) for value in leaves(results) if isinstance(value, float))


@of_each_study
def test_a_readme_has_the_table_of_its_results(study: Path) -> None:
    results = json.loads((study / "results.json").read_text())
    assert runpy.run_path(str(study / "study.py"))["table"](results) in (study / "README.md").read_text()


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    if isinstance(value, list):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


# merge_speed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merge_speed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Results, what was printed, and the directory, of one tiny run."""
    directory = tmp_path_factory.mktemp("merge_speed")
    command = [sys.executable, str(ANALYSES / "merge_speed" / "study.py"), "--tiny"]
    options = ["--work", str(directory), "--results", str(directory / "results")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "results" / "results.json").read_text()), done.stdout, directory


@pytest.mark.long
def test_merge_speed_measures_every_run(merge_speed: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, _ = merge_speed
    names = [run["run"] for run in results["runs"] if run["layers"] == results["shape"]["num_hidden_layers"]]
    assert len(names) == len(set(names)) == 8
    assert {run["layers"] for run in results["runs"]} == {1, 2}
    assert all(run["seconds"] >= 0 and run["peak_bytes"] > 0 for run in results["runs"])
    assert all(math.isfinite(one[key]) for one in results["ratios"] for key in ("median", "min", "max"))
    assert all(f"| {name} | " in printed for name in names)
    assert {set(digests) == {f"{d}/model.safetensors" for d in ("base",)} | ADAPTERS for digests in
            results["inputs_sha256"].values()} == {True}  # fmt: skip


ADAPTERS = {f"{kind}/adapter_model.safetensors" for kind in ("lora", "dora", "d2lora", "duallora")}


@pytest.mark.long
def test_merge_speed_compares_with_pefts_merge(merge_speed: tuple[dict[str, Any], str, Path]) -> None:
    results, _, _ = merge_speed
    assert {one["run"] for one in results["agreement_with_peft"]} == {"d2surgery LoRA", "d2surgery DoRA"}
    for one in results["agreement_with_peft"]:
        assert one["elements"] > 0
        assert one["differing"] <= one["elements"] / 1024


@pytest.mark.long
def test_merge_speed_draws_and_leaves_only_its_results(merge_speed: tuple[dict[str, Any], str, Path]) -> None:
    results, _, directory = merge_speed
    figure = (directory / "results" / "figure.svg").read_text()
    assert all(f">{run['run']}<" in figure for run in results["runs"])
    assert sorted(path.name for path in directory.rglob("*")) == ["figure.svg", "results", "results.json"]


def test_merge_speed_says_what_failed(tmp_path: Path) -> None:
    study = runpy.run_path(str(ANALYSES / "merge_speed" / "study.py"))
    (tmp_path / "base").mkdir()
    with pytest.raises(RuntimeError, match=r"(?s)d2surgery LoRA failed:.*FILE_MISSING"):
        study["measure"](tmp_path, "d2surgery LoRA")


# training_cost ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training_cost(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Results, what was printed, and the directory, of one tiny run."""
    directory = tmp_path_factory.mktemp("training_cost")
    command = [sys.executable, str(ANALYSES / "training_cost" / "study.py"), "--tiny", "--results", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "results.json").read_text()), done.stdout, directory


def test_training_cost_measures_every_run_at_equal_parameters(training_cost: tuple[dict[str, Any], str, Path]) -> None:
    results, printed, directory = training_cost
    runs = {run["run"]: run for run in results["runs"]}
    assert len(runs) == len(results["runs"]) == 9
    assert all(f"| {name} | " in printed for name in runs)
    assert all(run["seconds"] >= 0 and run["memory_bytes"] > 0 for run in runs.values())
    for name, run in runs.items():
        magnitudes = runs["DoRA"]["trainable"] - runs["LoRA"]["trainable"]
        assert run["trainable"] == runs["LoRA"]["trainable"] + ("DoRA" in name) * magnitudes
    same = {name for name in runs if "logits" not in name and name != "Dual LoRA"}
    assert all(runs[name]["loss"] == pytest.approx(runs["LoRA"]["loss"], rel=1e-4) for name in same)
    assert abs(runs["LoRA"]["loss"]) > 1e-6, "a loss that the adapters can move"
    assert "target" in printed
    assert all(f">{name}<" in (directory / "figure.svg").read_text() for name in runs)


def test_training_cost_sees_the_most_that_is_held(training_cost: tuple[dict[str, Any], str, Path]) -> None:
    """In bytes; the logits of all positions are at least the 64 × 49152 float32 that they are."""
    held = {run["run"]: run["memory_bytes"] for run in training_cost[0]["runs"]}
    assert held["PEFT DoRA"] > held["DoRA"]
    assert held["DoRA"] > held["LoRA"]
    assert held["LoRA, logits of all"] > 64 * 49152 * 4 > held["LoRA, logits of answers"]


def test_training_cost_begins_each_round_with_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    study = runpy.run_path(str(ANALYSES / "training_cost" / "study.py"))
    orders: list[list[str]] = []

    def measured(sizes: Any, names: list[str], device: str, eager: bool) -> dict[str, Any]:
        orders.append(names)
        return {name: {"seconds": 1.0, "memory_bytes": 1, "base_sha256": "", "device": ""} for name in names}

    monkeypatch.setitem(study["study"].__globals__, "in_its_own_process", measured)
    study["study"](study["TINY"], "cpu", 3)
    assert len({names[0] for names in orders}) == 3
    assert all(sorted(names) == sorted(study["RUNS"]) for names in orders)


# four_kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_four_kinds_chooses_rates_and_pairs_seeds(tmp_path: Path) -> None:
    results = run_tiny("four_kinds", tmp_path)
    arms = {one["arm"]: one for one in results["arms"]}
    tried = results["learning_rates_tried"]
    for name, arm in arms.items():
        mine = [cell for cell in tried if cell["arm"] == name]
        assert arm["lr"] == min(mine, key=lambda cell: cell["loss"])["lr"]
        assert {cell["seed"] for cell in mine} == {100}
    cells = {(cell["arm"], cell["seed"]): cell for cell in results["cells"]}
    assert {seed for _, seed in cells} == {0, 1}
    d2, lora = ([cells[arm, seed]["loss"] for seed in (0, 1)] for arm in ("D2-LoRA 8+8", "LoRA r16"))
    differences = [a - b for a, b in zip(d2, lora, strict=True)]
    said = arms["D2-LoRA 8+8"]["loss − LoRA r16"]
    half = 12.706204736 * abs(differences[0] - differences[1]) / 2  # Student's t of one degree of freedom
    assert said["mean"] == pytest.approx(sum(differences) / 2)
    assert (said["low"], said["high"]) == pytest.approx((said["mean"] - half, said["mean"] + half), rel=1e-6)
    assert arms["D2-LoRA 8+8"]["parameters"] == arms["LoRA r16"]["parameters"]


def test_four_kinds_asks_questions_and_keeps_items_apart(tmp_path: Path) -> None:
    study = runpy.run_path(str(ANALYSES / "four_kinds" / "study.py"))
    files = study["write_data"](study["tiny_data"](tmp_path), tmp_path / "work", study["SETS"]["small"], 4)
    parts = {name: json.loads(Path(file).read_text()) for name, file in files.items()}
    assert parts["train"][1] == {"question": "openbookqa train 1?", "answer": "blue"}
    asked = {name: {item["question"] for item in items} for name, items in parts.items()}
    assert len(asked["choosing"]) == len(asked["held_out"]) == 4
    assert not asked["choosing"] & asked["held_out"] | (asked["choosing"] | asked["held_out"]) & asked["train"]


def test_the_ablations_of_four_kinds_are_configs(tmp_path: Path) -> None:
    from d2surgery import read_config

    study = runpy.run_path(str(ANALYSES / "four_kinds" / "study.py"))
    common = {"base": "b", "output": str(tmp_path), "train": ["t"]}
    arms = {name: read_config(None, common | arm) for name, arm in (study["ARMS"] | study["ABLATIONS"]).items()}
    assert arms["D2-LoRA 8+8, minus detached"].adapter.detach_minus
    assert 2 * arms["D2-LoRA 8+8, alpha halved"].scaling == arms["LoRA r16"].scaling


# audit_truth -----------------------------------------------------------------------------------------------------


def committed(study: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ANALYSES / study / "results.json").read_text())
    return found


def test_audit_truth_saw_no_right_merge_fail() -> None:
    assert {run["failed"] for run in committed("audit_truth")["right_merges"]} == {0}


@pytest.mark.long
def test_audit_truth_runs_and_no_right_merge_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(ANALYSES / "audit_truth" / "study.py"), "--tiny", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tiny = json.loads((tmp_path / "results.json").read_text())
    assert "| a row scaled | " in done.stdout
    assert "a column scaled" in (tmp_path / "figure.svg").read_text()
    assert {run["failed"] for run in tiny["right_merges"]} == {0}


# surgery_speed and conversions -----------------------------------------------------------------------------------


def run_tiny(study: str, results: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ANALYSES / study / "study.py"), "--tiny", "--results", str(results), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((results / "results.json").read_text())
    return found


committed_or_tiny = pytest.mark.parametrize("tiny", [False, pytest.param(True, marks=pytest.mark.long)])


@committed_or_tiny
def test_surgery_speed_errs_as_the_dense_svd_does(tmp_path: Path, tiny: bool) -> None:
    found = run_tiny("surgery_speed", tmp_path, "--rounds", "1") if tiny else committed("surgery_speed")
    errors = {run["run"]: run["error"] for run in found["runs"]}
    dense = errors["resize, small: dense SVD as kohya's"]
    assert errors["resize, small: d2surgery"] == pytest.approx(dense, rel=1e-6)
    assert all(run["peak_bytes"] > 0 for run in found["runs"])


@committed_or_tiny
def test_conversions_lose_what_they_say(tmp_path: Path, tiny: bool) -> None:
    found = run_tiny("conversions", tmp_path) if tiny else committed("conversions")
    rows = {(row["from"], row["to"]): row for row in found["rows"]}
    ours, theirs = rows["dora", "LoRA of the same rank"], rows["dora", "LoRA of the same rank, PEFT's convert_to_lora"]
    assert ours["weights"] < theirs["weights"]
    assert rows["d2lora", "DoRA of twice the rank, on its axis"]["weights"] < 1e-4


# report_speed ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_report_speed_measures_every_run(tmp_path: Path) -> None:
    tiny = run_tiny("report_speed", tmp_path, "--rounds", "1")
    assert {run["run"] for run in tiny["runs"]} == {
        "diff, 2 adapters", "diff, 3 adapters", "diff, one layer", "diff --exact-signs, one layer"
    }  # fmt: skip
    assert all(run["peak_bytes"] > 0 and run["cpu_seconds"] > 0 for run in tiny["runs"])


def test_report_speed_found_that_half_the_time_is_left_at_most() -> None:
    found = committed("report_speed")
    assert all(run["peak_bytes"] > 0 and run["cpu_seconds"] > 0 for run in found["runs"])
    assert {one["run"]: one["min"] for one in found["ratios"]}["diff as it was before, one layer"] > 2
