"""Whose tokenizer stands beside merged weights, and what plan, the receipt and the audit say of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2surgery import LoRA, audit, from_adapters, merge, plan, save
from d2surgery.cli import main

MODULE = "layers.0.proj"
BASE = {
    "tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": []},
    "tokenizer_config.json": {"eos_token": "a"},
}
OWN = {
    "tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<|im_end|>"}]},
    "tokenizer_config.json": {"eos_token": "<|im_end|>"},
}


def files(directory: Path, contents: dict[str, Any]) -> Path:
    for name, content in contents.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    numbers = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({f"{MODULE}.weight": numbers}, tmp_path / "base/model.safetensors")
    return files(tmp_path / "base", BASE | {"config.json": {"model_type": "x"}, "special_tokens_map.json": "{}"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save(from_adapters({MODULE: LoRA(A=torch.randn(2, 4), B=torch.randn(6, 2), scaling=0.1)}), tmp_path / "a")
    return tmp_path / "a"


def tokenizer_of(directory: Path) -> dict[str, Any]:
    names = [*OWN, "special_tokens_map.json", "chat_template.jinja"]
    return {name: (directory / name).read_text() for name in names if (directory / name).exists()}


def test_the_adapters_tokenizer_is_taken_whole_and_that_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    files(adapter, OWN | {"chat_template.jinja": "{{ x }}", "README.md": "card", "token": "secret", "vocab.dat": "?"})
    report = merge(base, adapter, tmp_path / "out")
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(adapter), "special_tokens_map.json belongs to the base's"
    assert not {"README.md", "token", "vocab.dat"} & {path.name for path in (tmp_path / "out").iterdir()}
    (said,) = report.problems
    assert (said.code, said.severity) == ("TOKENIZER_TAKEN", "info")
    assert "chat_template.jinja, tokenizer.json, tokenizer_config.json" in said.message
    assert plan(base, adapter, tmp_path / "x").problems == report.problems
    receipt = json.loads((tmp_path / "out/d2surgery_merge.json").read_text())
    assert receipt["recipe"]["tokenizer"] == "adapter"
    assert [problem["code"] for problem in receipt["problems"]] == ["TOKENIZER_TAKEN"]


def test_the_bases_stays_where_it_is_asked_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    files(adapter, OWN)
    report = merge(base, adapter, tmp_path / "out", tokenizer="base")
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(base)
    assert "left out: tokenizer.json, tokenizer_config.json" in report.problems[0].message


def test_a_chat_template_alone_joins_the_bases_tokenizer(base: Path, adapter: Path, tmp_path: Path) -> None:
    files(adapter, {"chat_template.jinja": "{{ x }}"})
    merge(base, adapter, tmp_path / "out")
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(base) | {"chat_template.jinja": "{{ x }}"}


@pytest.mark.parametrize("options", [{}, {"strength": 0.0}])
def test_nothing_is_said_where_nothing_differs(base: Path, adapter: Path, tmp_path: Path, options: Any) -> None:
    files(adapter, OWN if options else BASE)
    assert merge(base, adapter, tmp_path / "out", **options).problems == ()
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(base)


def test_the_audit_passes_the_adapters_warns_of_the_bases_and_refuses_another(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    files(adapter, OWN | {"chat_template.jinja": "{{ x }}"})
    merge(base, adapter, tmp_path / "own")
    assert audit(base, adapter, tmp_path / "own").reasons == ()
    merge(base, adapter, tmp_path / "base's", tokenizer="base")
    found = audit(base, adapter, tmp_path / "base's")
    assert [(reason.code, reason.severity) for reason in found.reasons] == [("TOKENIZER_CHANGED", "warning")]
    assert "although the adapter brings its own" in found.reasons[0].message
    assert found.verdict == "pass"
    other = {"tokenizer.json": {"model": {"vocab": {"b": 0}}, "added_tokens": []}}
    files(tmp_path / "base's", other)
    assert audit(base, adapter, tmp_path / "base's").verdict == "fail"


def test_the_command_line_says_whose(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(adapter, OWN)
    arguments = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    for verb in ("plan", "merge"):
        assert main([verb, *arguments]) == 0
        assert "tokens   the adapter's: tokenizer.json" in capsys.readouterr().out
