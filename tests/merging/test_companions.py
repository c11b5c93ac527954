"""Whose tokenizer stands beside merged weights, and what plan, the receipt and the audit say of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2surgery import LoRA, audit, from_adapters, merge, plan, save
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError

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
    assert not {"token", "vocab.dat"} & {path.name for path in (tmp_path / "out").iterdir()}
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


@pytest.mark.parametrize(
    "brought",
    [
        {"tokenizer.json": {"added_tokens": [{"id": 1}, {"id": 5, "content": "<new>"}], "model": {}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"1": {}, "5": {"content": "<new>"}}}},
        {"added_tokens.json": {"<new>": 5}},
    ],
)
@pytest.mark.parametrize("rows", [5, 6])
def test_ids_without_rows_are_told(
    base: Path, adapter: Path, tmp_path: Path, brought: dict[str, Any], rows: int
) -> None:
    files(base, {"config.json": {"model_type": "x", "vocab_size": rows}})
    files(adapter, brought)
    told = [problem for problem in plan(base, adapter, tmp_path / "x").problems if problem.severity == "warning"]
    assert merge(base, adapter, tmp_path / "out").problems[1:] == tuple(told)
    assert [(p.code, p.wanted, p.got) for p in told] == [("TOKENS_WITHOUT_ROWS", "ids below 5", "ids up to 5")] * (
        rows == 5
    )
    assert merge(base, adapter, tmp_path / "own", tokenizer="base").problems[1:] == ()


@pytest.mark.parametrize(
    "broken", ['{"added_tokens": [{"id": ', '{"added_tokens": "x"}', "[" * 100_000, "\ud800", '""']
)
def test_a_broken_tokenizer_has_no_ids_to_tell_of(base: Path, adapter: Path, tmp_path: Path, broken: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (adapter / name).write_bytes(broken.encode(errors="surrogatepass"))
    files(base, {"config.json": {"model_type": "x", "vocab_size": 1}})
    assert [problem.code for problem in plan(base, adapter, tmp_path / "x").problems] == ["TOKENIZER_TAKEN"]


def test_the_command_line_says_whose(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(adapter, OWN)
    arguments = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    for verb in ("plan", "merge"):
        assert main([verb, *arguments]) == 0
        assert "tokens   the adapter's: tokenizer.json" in capsys.readouterr().out


# What lies about -------------------------------------------------------------------------------------------------

STRAY = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md", "d2surgery_merge.json",
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt",
    "trainer_state.json", "training_args.bin", "training_args.json", "trainer_log.jsonl", "all_results.json",
    "train_results.json", "eval_results.json", "train.toml", "metrics.jsonl", "inputs.json", "zero_to_fp32.py",
    "pytorch_model.bin", "model.ckpt", "events.out.tfevents.1.host", "consolidated.00.pth", "tf_model.h5",
)  # fmt: skip


def scatter(directory: Path) -> None:
    """What is not of a model, and directories."""
    for name in STRAY:
        if not (directory / name).exists():
            (directory / name).write_text("{}")
    for name in ("checkpoint-500", "runs", "onnx"):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")


def test_what_lies_about_in_the_bases_directory_is_left_and_that_is_said(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers applies an adapter that lies beside weights."""
    files(base, {"generation_config.json": {}, "LICENSE": "do", "modeling_x.py": "pass", "vocab.tiktoken": "a"})
    merge(base, adapter, tmp_path / "before")
    scatter(base)
    report = merge(base, adapter, tmp_path / "out")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "before").iterdir()
    )
    assert set(report.left) == {*STRAY, "checkpoint-500", "runs", "onnx"}
    assert set(report.copied) == {*BASE, "config.json", "special_tokens_map.json", "generation_config.json", "LICENSE",
                                  "modeling_x.py", "vocab.tiktoken"}  # fmt: skip
    planned = plan(base, adapter, tmp_path / "out2")
    assert (planned.copied, planned.left) == (report.copied, report.left)
    assert main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "beside   LICENSE, config.json" in said
    assert "left     README.md, adapter_config.json" in said


def test_what_lies_about_beside_the_adapter_never_reaches_the_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "before")
    kept = (adapter / "adapter_config.json").read_text()
    scatter(adapter)
    assert (adapter / "adapter_config.json").read_text() == kept
    (adapter / "adapter_model.bin").unlink()
    merge(base, adapter, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != "d2surgery_merge.json"} == {
        p.name: p.read_bytes() for p in (tmp_path / "before").iterdir() if p.name != "d2surgery_merge.json"
    }


def test_the_bases_tokenizer_that_another_takes_the_place_of_is_said_to_be_left(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    files(adapter, OWN)
    report = merge(base, adapter, tmp_path / "out")
    assert report.left == ("special_tokens_map.json",)


def test_what_is_too_large_to_stand_beside_weights_is_left(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2surgery.merging.companions._LARGEST", 1000)
    (base / "data.json").write_text("0" * 1001)
    assert merge(base, adapter, tmp_path / "out").left == ("data.json",)


# Where the output may be, and who may read it --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_an_output_in_the_directory_of_an_input_is_published_right(
    base: Path, adapter: Path, tmp_path: Path, where: str
) -> None:
    merge(base, adapter, tmp_path / "out")
    within = {"base": base, "adapter": adapter}[where]
    merge(base, adapter, within / "merged")
    assert {p.name: p.read_bytes() for p in (within / "merged").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }
    assert audit(base, adapter, within / "merged").verdict == "pass"
    for resume in (False, True):
        with pytest.raises(D2SurgeryError, match="OUTPUT_EXISTS"):
            merge(base, adapter, within, resume=resume)


@pytest.mark.parametrize(("private", "mode"), [("base", 0o600), ("adapter", 0o600), ("neither", 0o644)])
def test_a_private_base_or_adapter_gives_a_private_output(
    base: Path, adapter: Path, tmp_path: Path, private: str, mode: int
) -> None:
    before = os.umask(0o022)
    try:
        for path in (base, adapter):
            path.chmod(0o755)
            for file in path.iterdir():
                file.chmod(0o644)
        if private != "neither":
            directory = {"base": base, "adapter": adapter}[private]
            next(directory.glob("*.safetensors")).chmod(0o600)
            directory.chmod(0o700)
        merge(base, adapter, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_a_second_merge_to_the_same_output_is_refused_before_any_work(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way it asks; the first ends as if alone."""
    merge(base, adapter, tmp_path / "whole")
    told: list[str] = []

    def second(done: int, total: int) -> None:
        if not told:
            with monkeypatch.context() as patch:
                patch.setattr("d2surgery.merging.prepared.prepare", lambda *given: pytest.fail("it has begun"))
                for resume in (False, True):
                    with pytest.raises(D2SurgeryError, match=rf"OUTPUT_IN_USE .*process {os.getpid()} on ") as error:
                        merge(base, adapter, tmp_path / "out", resume=resume)
                    told.append(str(error.value))

    merge(base, adapter, tmp_path / "out", progress=second)
    assert len(told) == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
