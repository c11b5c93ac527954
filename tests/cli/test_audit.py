"""`d2surgery audit` on the command line: what is said first, in how many columns, by which options, with which code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from d2surgery import BaseWeights, D2SurgeryError, from_adapters, load, merge, save
from d2surgery.cli import example, main

BROKEN = "model.layers.2.self_attn.q_proj"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/, right/ and broken/, which lacks the delta of one module."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "base").mkdir()
    example._make_base(folder / "base")
    save(example._trained("lora", BaseWeights(folder / "base")), folder / "adapter")
    merge(folder / "base", folder / "adapter", folder / "right")
    shutil.copytree(folder / "right", folder / "broken")
    tensors = load_file(folder / "right" / "model.safetensors")
    tensors[f"{BROKEN}.weight"] = BaseWeights(folder / "base")[f"{BROKEN}.weight"]
    save_file(tensors, folder / "broken" / "model.safetensors", {"format": "pt"})
    return folder


def arguments(inputs: Path, merged: str, *options: str) -> list[str]:
    given = ["--base", inputs / "base", "--adapter", inputs / "adapter", "--merged", inputs / merged]
    return ["audit", *map(str, given), *options]


@pytest.mark.parametrize(("merged", "code", "word"), [("right", 0, "PASS"), ("broken", 1, "FAIL")])
def test_the_verdict_comes_first_and_decides_the_exit_code(
    inputs: Path, merged: str, code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(inputs, merged)) == code
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(word)
    assert any(line.startswith("38 tensors: ") for line in rest)
    assert "not checked: outputs and logits" in rest
    assert main(arguments(inputs, merged, "--quiet")) == code
    assert capsys.readouterr().out == f"{word}\n"


def test_a_module_left_out_is_named(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(inputs, "broken"))
    said = capsys.readouterr().out
    assert f"error DELTA_NOT_APPLIED {BROKEN}" in said
    assert "PARTIAL_MERGE" in said


def test_per_layer_lists_every_module(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(inputs, "right", "--per-layer"))
    assert sum("replayed" in line for line in capsys.readouterr().out.splitlines()) == 28


def test_in_a_narrow_terminal_the_table_folds(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    main(arguments(inputs, "right", "--per-layer"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert rows
    assert max(map(len, rows)) <= 60


@pytest.mark.parametrize(("merged", "code"), [("right", 0), ("broken", 1)])
def test_a_receipt_is_verified_without_base_and_adapter(
    inputs: Path, merged: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--merged", str(inputs / merged), "--receipt", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["receipt"]["checked"] == ["merged"]
    assert found["receipt"]["mismatched"] == ([] if code == 0 else [f"{BROKEN}.weight"])
    assert found["not_checked"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--level", "weights,vibes"], "the levels are weights, outputs, logits, task"),
        (["--level", "task"], "--level task and --tasks belong together"),
        (["--strength-pass", "0.1", "--strength-fail", "0.01"], "0 <= --strength-pass <= --strength-fail"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    inputs: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(inputs, "right", *options)) == 2
    assert part in capsys.readouterr().err


def test_without_a_receipt_base_and_adapter_are_needed(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--merged", str(inputs / "right")]) == 2
    assert "audit needs --base" in capsys.readouterr().err


def test_an_adapter_given_as_merged_is_no_pass(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(inputs, "adapter")) != 0
    assert "Traceback" not in capsys.readouterr().err


# What is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "one"])
@pytest.mark.parametrize("option", ["--strength", "--strength-pass", "--strength-fail"])
def test_no_option_takes_what_is_no_finite_number(
    inputs: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(inputs, "right", option, value)) == 2
    assert "is not a finite number" in capsys.readouterr().err


def test_merge_takes_no_infinite_strength(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "merge",
        "--base",
        str(inputs / "base"),
        "--adapter",
        str(inputs / "adapter"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*given, "--strength", "nan"]) == 2
    assert main([*given, "--max-memory", f"{'9' * 400}GB"]) == 2
    assert "not a finite number" in capsys.readouterr().err
    with pytest.raises(D2SurgeryError, match="STRENGTH"):
        merge(inputs / "base", inputs / "adapter", tmp_path / "o", strength=float("inf"))
    assert not (tmp_path / "o").exists()


def test_of_several_adapters_the_one_that_was_merged_is_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = load(inputs / "adapter")
    save(from_adapters({module: replace(a, scaling=1.1 * a.scaling) for module, a in twin.items()}), tmp_path / "twin")
    shutil.copytree(inputs / "right", tmp_path / "right")
    (tmp_path / "right" / "d2surgery_merge.json").unlink()
    given = ["audit", "--base", str(inputs / "base"), "--merged", str(tmp_path / "right"), "--json"]
    twins = ["--adapter", str(tmp_path / "twin"), "--adapter", str(inputs / "adapter")]
    assert main([*given, *twins]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == str(inputs / "adapter")
    assert [reason["code"] for reason in found["reasons"]] == ["NEAREST_ADAPTER"]
    assert main([*given, *twins[:2], *twins[:2]]) == 1
    assert main([*given, "--adapter", "absent", *twins[2:]]) == 0
    assert main([*given, "--adapter", "absent", "--adapter", "gone"]) == 2
    assert main([*given, *twins, "--receipt"]) == 2


def test_a_reports_audit_is_printed_and_decides_the_exit_code(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "report",
        str(inputs / "adapter"),
        "--base",
        str(inputs / "base"),
        "--out",
        str(tmp_path / "page.html"),
        "--force",
    ]
    for merged, code, word in (("right", 0, "PASS"), ("broken", 1, "FAIL")):
        assert main([*given, "--merged", str(inputs / merged)]) == code
        said = capsys.readouterr().out
        assert any(line.startswith(word) for line in said.splitlines())
        assert ("DELTA_NOT_APPLIED" in said) == (code == 1)
        assert main([*given, "--merged", str(inputs / merged), "--json"]) == code
        assert json.loads(capsys.readouterr().out)["verdict"] == word.lower()
    assert main([*given, "--quiet"]) == 0
