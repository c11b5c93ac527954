"""The sweep over architectures: a few of them now, and what its committed results must say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STUDY = Path(__file__).resolve().parents[2] / "analyses" / "architectures"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STUDY / "results.json").read_text())
    return found


def cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for run in results["runs"] for cell in run.get("cells", {}).values()]


def test_nothing_is_wrong_and_what_is_refused_has_a_reason(results: dict[str, Any]) -> None:
    tried = [cell for cell in cells(results) if cell["outcome"] != "no adapter"]
    refused = [cell for cell in tried if cell["outcome"] == "refused"]
    assert not [cell for cell in tried if cell["outcome"] == "wrong"]
    assert len(refused) <= 0.03 * len(tried)
    assert all(cell["reason"] for cell in refused)


def test_it_covers_the_architectures_that_there_are(results: dict[str, Any]) -> None:
    assert len([run for run in results["runs"] if "cells" in run]) >= 140


def test_a_right_cell_is_evidence(results: dict[str, Any]) -> None:
    """Within rounding of PEFT's, by the weights or by an output that the adapter moved."""
    for cell in cells(results):
        if cell["outcome"] == "right":
            assert max(cell["outputs"], cell.get("weights", 0)) <= results["right"]
            assert cell["moved"] > 1e3 * cell["outputs"] or "weights" in cell


def test_a_few_architectures_now(tmp_path: Path) -> None:
    command = [sys.executable, str(STUDY / "study.py"), "--tiny", "--results", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["runs"]) >= 4
    assert {cell["outcome"] for cell in cells(found)} == {"right"}
