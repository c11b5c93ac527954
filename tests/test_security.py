"""What strangers' files cannot do: run code, ask for leave to, move the cursor, be a formula, lead out of a folder."""

import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import LORA, PAIR, WriteAdapter

import d2surgery
from d2surgery.cli import main, output
from d2surgery.errors import D2SurgeryError
from d2surgery.files.locate import locate, locate_base
from d2surgery.files.whole import write_whole

PACKAGE = Path(d2surgery.__file__).parent
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\u202eevil\x9b31m"


# Code ----------------------------------------------------------------------------------------------------------------


def calls(name: str) -> list[tuple[str, ast.Call]]:
    return [
        (str(path.relative_to(PACKAGE)), node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]


@pytest.mark.parametrize("name", ["from_pretrained", "from_config"])
def test_no_model_and_no_tokenizer_is_loaded_without_saying_that_its_code_is_not_run(name: str) -> None:
    for file, call in calls(name):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "GenerationConfig":
            continue  # numbers alone: transformers has no code for it to run
        said = [keyword for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        spread = [keyword for keyword in call.keywords if keyword.arg is None]
        text = (PACKAGE / file).read_text()
        assert said or (spread and re.search(r"[\"']trust_remote_code[\"']: False", text)), f"{file}:{call.lineno}"
        assert all(isinstance(keyword.value, ast.Constant) and keyword.value.value is False for keyword in said)


@pytest.mark.parametrize("name", ["load", "loads"])
def test_nothing_is_unpickled(name: str) -> None:
    """But the state of a run's own optimizer, by torch's reader of plain values, as transformers does it."""
    for file, call in calls(name):
        if file == "training/trainer.py" and "weights_only=True" in ast.unparse(call):
            continue
        assert isinstance(call.func, ast.Attribute)
        owner = call.func.value
        assert not (isinstance(owner, ast.Name) and owner.id in ("torch", "pickle", "np", "numpy", "joblib")), file


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Mine: ...\n"
    )
    code = "import sys; from d2surgery.live.loading import load_tokenizer; load_tokenizer(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input="y\n" * 9, capture_output=True, text=True, check=False
    )
    assert "D2SurgeryError" in done.stderr
    assert "NOT_RUNNABLE" in done.stderr
    assert "Do you wish" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


# The terminal --------------------------------------------------------------------------------------------------------


def test_a_line_is_one_line_without_escapes_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit(f"{output.style('OK', 'green')} × {HOSTILE}")
    said = capsys.readouterr().out
    assert said == "OK × " + r"\x1b]0;owned\x07\x1b[2J\r\n\u202eevil\x9b31m" + "\n"


def test_only_our_own_colours_are_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("click.echo", lambda text, **_: said.append(text))
    output.emit(f"{output.style('OK' + HOSTILE, 'green')}\x1b[31mred")
    assert re.findall(r"\x1b\[[\d;]*m", said[0]) == ["\x1b[32m", "\x1b[0m"]
    assert said[0].count("\x1b") == 2


@pytest.mark.parametrize("field", ["base_model_name_or_path", "task_type", "peft_version", "peft_type", "unknown",
                                   "init_lora_weights", "target_modules", "bias"])  # fmt: skip
def test_no_field_of_a_config_reaches_the_terminal_raw(
    adapter: WriteAdapter, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    shapes = {key.replace("q.", f"{HOSTILE}."): shape for key, shape in PAIR.items()}
    main(["inspect", str(adapter(shapes, LORA | {field: HOSTILE, HOSTILE: HOSTILE})), "--per-layer"])
    said = capsys.readouterr()
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(said.out + said.err)


def test_a_path_does_not_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / HOSTILE)]) == 2
    assert main(["inspect", "--no-such-\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_the_word_to_the_developer_does_not_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError(HOSTILE)

    monkeypatch.setattr("d2surgery.cli.inspect.open_layout", broken)
    assert main(["inspect", "x", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "\x1b" not in said


# Spreadsheets --------------------------------------------------------------------------------------------------------

CELLS = ["=1+1", "+1", "-1", "@sum", "\t=1", "\r=1", "\n=1", "'=1", "''=1", "＝1", "q_proj", "'quoted'", "", "a=b"]


@pytest.mark.parametrize("cell", CELLS)
def test_no_text_is_a_formula_and_every_text_comes_back(cell: str) -> None:
    from d2surgery.reporting.tidy import write_rows

    file = io.StringIO(newline="")
    write_rows([{"module": cell, "value": -1.5, "index": -3}], file)
    (row,) = csv.DictReader(io.StringIO(file.getvalue(), newline=""))
    assert (row["value"], row["index"]) == ("-1.5", "-3"), "numbers stay numbers"
    assert row["module"][:1] not in ("=", "+", "-", "@", "\t", "\r", "\n", "＝")
    back = row["module"][1:] if re.match("'+[=+\\-@\t\r\n＝]", row["module"]) else row["module"]
    assert back == cell


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["org/na..me", "org/name@..", "org/name@../../x", "org/name@a/../../b", "org/name@/etc/x", "or..g/name",
             "org/name@-x", "org/..", "org/name\n"]
)  # fmt: skip
def test_no_hub_id_leads_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would raise
    with pytest.raises(D2SurgeryError) as error:
        locate(name)
    assert error.value.problems[0].code == "FILE_MISSING"
    assert locate_base(name) == Path(name)


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "page.html"
    victim.write_text("mine")
    (tmp_path / f".page.html.{os.getpid()}.partial").symlink_to(victim)
    write_whole(target, "text")
    assert (victim.read_text(), target.read_text(), target.is_symlink()) == ("mine", "text", False)
