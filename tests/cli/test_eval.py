"""`eval` on the command line: documented fields, one model and two, narrow terminals, bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from d2surgery.checkpoint import load
from d2surgery.cli import main
from d2surgery.evaluating.items import read_task
from d2surgery.evaluating.tasks import score
from d2surgery.live.loading import load_tokenizer, unmerged

if TYPE_CHECKING:
    from speaking import Speaker

Speakers = Callable[[str, str], "Speaker"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("questions")
    even = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(30)]
    large = [
        {"question": f"Which is larger, {n} or 3?", "choices": [str(n), "3"], "answer": int(n < 3)} for n in (1, 5, 7)
    ]
    (folder / "even.json").write_text(json.dumps(even))
    (folder / "large.jsonl").write_text("\n".join(map(json.dumps, large)))
    return [str(folder / "even.json"), str(folder / "large.jsonl")]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert loaded["schema_version"] == 1
    return loaded


def test_one_model_gets_accuracies_with_intervals(
    speaker: Speakers, questions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    case = speaker("lora", "F32")
    arguments = [
        "--base",
        str(case.base),
        "--adapter",
        str(case.adapter),
        "--tasks",
        *questions,
        "--by",
        "generation,likelihood",
    ]
    assert main(["eval", *arguments, "--template", "plain", "--json"]) == 0
    found = document(capsys)
    assert found["adapter"] == str(case.adapter)
    assert found["merged"] is None
    assert "task" not in found
    tasks = found["models"]["unmerged"]["tasks"]
    assert [(t["task"], t["by"], t["items"]) for t in tasks] == [
        ("even", "likelihood", 30), ("even", "generation", 30), ("large", "likelihood", 3), ("large", "generation", 3),
    ]  # fmt: skip
    model = unmerged(case.base, load(case.adapter), dtype=torch.float32)
    wanted = score(model, load_tokenizer(case.base), read_task(questions[0]), template="plain")["likelihood"]
    assert tasks[0]["accuracy"] == wanted.accuracy
    assert tasks[0]["ci"] == list(wanted.interval)
    assert tasks[0]["chance"] == 0.5
    mean = found["models"]["unmerged"]["mean"]["likelihood"]
    assert mean["accuracy"] == pytest.approx((tasks[0]["accuracy"] + tasks[2]["accuracy"]) / 2)
    assert mean["ci"][0] <= mean["accuracy"] <= mean["ci"][1]


def test_two_models_get_their_gap(
    speaker: Speakers, questions: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case = speaker("lora", "F32")
    arguments = ["--base", str(case.base), "--adapter", str(case.adapter), "--merged", str(case.merged)]
    items = tmp_path / "items.jsonl"
    assert main(["eval", *arguments, "--tasks", questions[0], "--limit", "10", "--items", str(items), "--json"]) == 0
    found = document(capsys)
    assert list(found["models"]) == ["unmerged", "merged"]
    assert {"gap_pp", "ci_pp", "worst_gap_pp", "mcnemar_p", "equivalent", "tasks"} <= found["task"].keys()
    assert found["task"]["gap_pp"] == 0
    assert [problem["code"] for problem in found["problems"]] == ["TASK_GAP"]
    lines = list(map(json.loads, items.read_text().splitlines()))
    assert [line["model"] for line in lines] == ["unmerged"] * 10 + ["merged"] * 10
    assert all(len(line["log_likelihoods"]) == 2 for line in lines)
    right = sum(line["picked"] == line["gold"] for line in lines[:10]) / 10
    assert right == found["models"]["unmerged"]["tasks"][0]["accuracy"]


def test_a_base_alone_and_a_merged_one_alone(
    speaker: Speakers, questions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    case = speaker("lora", "F32")
    for extra, name in ([], "base"), (["--merged", str(case.merged)], "merged"):
        assert main(["eval", "--base", str(case.base), *extra, "--tasks", questions[1], "--json"]) == 0
        assert list(document(capsys)["models"]) == [name]


@pytest.mark.parametrize("columns", ["20", "60", "120"])
def test_text_fits_the_terminal(
    speaker: Speakers,
    questions: list[str],
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = speaker("lora", "F32")
    monkeypatch.setenv("COLUMNS", columns)
    arguments = ["--base", str(case.base), "--adapter", str(case.adapter), "--merged", str(case.merged)]
    assert main(["eval", *arguments, "--tasks", questions[1]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("unmerged:")
    assert "refuted" in out
    if columns == "120":
        assert max(map(len, out.splitlines())) <= 120


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "import sys; from d2surgery.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def test_json_prints_one_document_and_nothing_else(speaker: Speakers, questions: list[str]) -> None:
    case = speaker("lora", "F32")
    done = run("eval", "--base", str(case.base), "--tasks", questions[1], "--by", "generation", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    json.loads(done.stdout)


def failing(speaker: Speakers, questions: list[str], tmp_path: Path) -> list[tuple[list[str], str]]:
    """(arguments, code)"""
    case = speaker("lora", "F32")
    base, adapter = str(case.base), str(case.adapter)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": 1}\n{"question": "2", "answer": "a"}\n')
    free = tmp_path / "free.jsonl"
    free.write_text('{"question": "2", "answer": "a"}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((case.base / name).read_bytes())
    return [
        (["--base", base], "USAGE"),
        (["--base", base, "--tasks", questions[0], "--by", "guessing"], "USAGE"),
        (["--base", base, "--tasks", questions[0], "--limit", "0"], "USAGE"),
        (["--base", base, "--tasks", questions[0], "--device", "nowhere"], "USAGE"),
        (["--base", base, "--tasks", questions[0], "--template", "chat"], "USAGE"),
        (["--base", base, "--tasks", str(bad)], "BAD_DATA"),
        (["--base", base, "--tasks", str(free)], "BAD_DATA"),
        (["--base", base, "--tasks", str(tmp_path / "absent")], "FILE_MISSING"),
        (["--base", base, "--tasks", questions[0], "--items", str(bad)], "OUTPUT_EXISTS"),
        (["--base", str(tmp_path / "absent"), "--tasks", questions[0]], "BAD_BASE"),
        (["--base", adapter, "--tasks", questions[0]], "NOT_RUNNABLE"),
        (["--base", str(bare), "--tasks", questions[0]], "NOT_RUNNABLE"),
        (["--base", base, "--adapter", str(bad), "--tasks", questions[0]], "NOT_AN_ADAPTER"),
        (["--base", base, "--merged", adapter, "--tasks", questions[0]], "NOT_RUNNABLE"),
    ]


def test_bad_input_ends_with_2_and_a_code(
    speaker: Speakers, questions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in failing(speaker, questions, tmp_path):
        assert main(["eval", *arguments, "--json"]) == 2, arguments
        found = document(capsys)
        assert found["problems"][0]["code"] == code, (arguments, found)


def test_free_answers_have_perplexity_and_words_in_common(
    speaker: Speakers, questions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = speaker("lora", "F32")
    said = ["--base", str(case.base), "--adapter", str(case.adapter), "--template", "plain", "--free", questions[0]]
    assert main(["eval", *said, "--limit", "4", "--items", str(tmp_path / "items.jsonl"), "--json"]) == 0
    found = document(capsys)["models"]["unmerged"]["even.json"]
    assert found["items"] == 4
    for name in ("exact", "f1", "rouge_l", "nats"):
        low, high = found[f"{name}_ci"]
        assert low <= found[name] <= high
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [0, 1, 2, 3]
    assert main(["eval", *said, "--limit", "4"]) == 0
    assert "ROUGE-L" in capsys.readouterr().out
    assert main(["eval", *said, "--tasks", questions[1]]) == 2
    assert "--free is a question of its own" in capsys.readouterr().err


def test_tasks_of_labels_have_matthews_correlation_and_f1(
    speaker: Speakers, questions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    case = speaker("lora", "F32")
    assert main(["eval", "--base", str(case.base), "--tasks", *questions, "--template", "plain", "--json"]) == 0
    even, large = document(capsys)["models"]["base"]["tasks"]
    assert {"matthews", "macro_f1"} <= set(even)
    assert "matthews" not in large
