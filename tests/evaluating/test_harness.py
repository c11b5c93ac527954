"""The lm-eval harness on models of ours: against our own likelihoods. Skipped where the extra is not installed."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.harness import harness_scores
from d2surgery.evaluating.tasks import log_likelihoods
from d2surgery.live.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from speaking import Speaker

Speakers = Callable[[str, str], "Speaker"]
INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: the extra `harness`")

QUESTIONS = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(12)]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of the harness in a YAML file, with its data beside it."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    data = tmp_path / "even.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "even.yaml").write_text(
        f"task: evenness\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    return str(tmp_path / "even.yaml")


@needs_harness
def test_the_harness_chooses_as_our_likelihoods_do(speaker: Speakers, task: str) -> None:
    base = speaker("lora", "F32").base
    model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
    (score,) = harness_scores(model, tokenizer, [task])
    prompts = [tokenizer(q["question"])["input_ids"] for q in QUESTIONS]
    choices = [[tokenizer(f" {c}", add_special_tokens=False)["input_ids"] for c in ("yes", "no")] for _ in QUESTIONS]
    wanted = [max(range(2), key=values.__getitem__) for values in log_likelihoods(model, prompts, choices)]
    assert (score.task, score.by, score.gold) == ("evenness", "acc", (0,) * 12)
    assert [picked == 0 for picked in score.picked] == [
        w == q["answer"] for w, q in zip(wanted, QUESTIONS, strict=True)
    ]


@needs_harness
def test_eval_compares_two_models_by_the_harness(
    speaker: Speakers, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = speaker("lora", "F32")
    capsys.readouterr()
    arguments = ["--base", str(case.base), "--adapter", str(case.adapter), "--merged", str(case.merged)]
    assert main(["eval", *arguments, "--harness", task, "--limit", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["task"]["tasks"]
    assert (one["task"], one["by"], one["gap"]["items"]) == ("evenness", "acc", 6)
    assert found["task"]["gap_pp"] == 0


@needs_harness
def test_unknown_tasks_and_files_are_refused(speaker: Speakers, tmp_path: Path) -> None:
    base = speaker("lora", "F32").base
    model, tokenizer = load_model(base), load_tokenizer(base)
    with pytest.raises(D2SurgeryError, match=r"knows no such task \(got no_such_task\)"):
        harness_scores(model, tokenizer, ["no_such_task"])
    with pytest.raises(D2SurgeryError, match="FILE_MISSING"):
        harness_scores(model, tokenizer, [str(tmp_path / "absent.yaml")])
    (tmp_path / "empty.yaml").write_text("group: x\n")
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA .*names no task"):
        harness_scores(model, tokenizer, [str(tmp_path / "empty.yaml")])


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_extra_it_says_what_to_install(speaker: Speakers, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--base", str(speaker("lora", "F32").base), "--harness", "piqa"]) == 2
    assert "d2surgery[harness]" in capsys.readouterr().err
