"""The command line's manners: completion in a real shell, guesses, job files, what stands in the way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from measuring import write_adapter, write_base

from d2surgery import D2SurgeryError, load
from d2surgery.cli import VERBS, main
from d2surgery.cli.completion import INSTALL
from d2surgery.files.locate import hub_id_of, locate, locate_base


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("line")
    write_base(work / "base")
    write_adapter(work / "lora")
    return work


# Completion -----------------------------------------------------------------------------------------------------------


def words_for(line: str, cwd: Path) -> set[str]:
    """What a real bash, with our script, offers for a line; its last word is being typed."""
    words = line.split(" ")
    script = f"""
d2surgery() {{ {sys.executable} -m d2surgery "$@"; }}
source <(d2surgery completion bash)
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
_d2surgery_completion d2surgery
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    fake = cwd / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "d2surgery").write_text(f'#!/bin/sh\nexec {sys.executable} -m d2surgery "$@"\n')
    (fake / "d2surgery").chmod(0o755)
    environment = os.environ | {"PATH": f"{fake}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_options_and_choices(tmp_path: Path) -> None:
    assert words_for("d2surgery sp", tmp_path) == {"spectrum"}
    assert {"--base", "--budget"} & words_for("d2surgery merge --ba", tmp_path) == {"--base"}
    assert words_for("d2surgery merge --dtype b", tmp_path) == {"bf16"}


@pytest.mark.parametrize("shell", INSTALL)
def test_every_shell_has_its_script_and_its_line(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_D2SURGERY_COMPLETE" in capsys.readouterr().out
    assert main(["completion"]) == 0
    assert INSTALL[shell] in capsys.readouterr().out
    if path := shutil.which(shell):
        main(["completion", shell])
        subprocess.run([path, "-n"], input=capsys.readouterr().out, text=True, check=True)


def test_completing_a_verb_imports_no_torch() -> None:
    code = "import sys; from d2surgery.cli import main; main(); print('torch' in sys.modules, file=sys.stderr)"
    asked = {"_D2SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": "d2surgery ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stderr == "False\n"
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == set(VERBS)


# Guesses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["mrege"], "merge"),
        (["spectra", "x"], "spectrum"),
        (["compare", "a", "b"], "diff"),
        (["fuse"], "merge"),
        (["xyzzy"], "d2surgery --help"),
        (["merge", "--lora", "x"], "--adapter"),
        (["merge", "--model", "x"], "--base"),
        (["merge", "--output-dir", "x"], "--out"),
        (["merge", "--Torch_Dtype", "x"], "--dtype"),
        (["merge", "--stregth", "2"], "--strength"),
        (["train", "--learning-rate", "1"], "--lr"),
        (["resize", "a", "--output-dir", "b"], "OUT without a name before it"),
        (["inspect", "--adapter", "a"], "ADAPTER without a name before it"),
        (["inspect", "x", "--verbose"], "--per-layer"),
        (["report", "x", "--overwrite"], "--force"),
        (["merge", "--xyzzy"], "d2surgery merge --help"),
    ],
)
def test_what_was_mistyped_is_guessed(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "USAGE" in error
    assert f"wanted {wanted}" in error
    assert main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"][0]["wanted"].startswith(wanted.split(" ")[0])


# Job files ------------------------------------------------------------------------------------------------------------


def job(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_job_file_gives_the_options_and_the_line_wins(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"base = {str(work / 'base')!r}\nadapter = {str(work / 'lora')!r}\nout = {str(tmp_path / 'one')!r}\n"
    path = job(tmp_path, f"{text}dtype = 'bf16'\nstrength = 0.5\nshard_size = '1GB'\nquiet = true\njson = false\n")
    assert main(["merge", path]) == 0
    assert capsys.readouterr().out == ""
    recipe = json.loads((tmp_path / "one" / "d2surgery_merge.json").read_text())
    assert "0.5" in json.dumps(recipe)
    assert main(["merge", path, "--out", str(tmp_path / "two"), "--dtype", "fp32"]) == 0
    assert (tmp_path / "two" / "model.safetensors").stat().st_size > (
        tmp_path / "one" / "model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize(
    ("said", "hashed"),
    [("verify = false", False), ("no-verify = true", False), ("no_verify = false", True), ("verify = true", True)],
)
def test_a_switch_of_two_sides_has_both_in_a_job_file(work: Path, tmp_path: Path, said: str, hashed: bool) -> None:
    text = f"base = {str(work / 'base')!r}\nadapter = {str(work / 'lora')!r}\nout = {str(tmp_path / 'one')!r}\n"
    assert main(["merge", job(tmp_path, f"{text}{said}\nquiet = true\n")]) == 0
    receipt = json.loads((tmp_path / "one/d2surgery_merge.json").read_text())
    assert bool(receipt["outputs"]["tensors"]) is hashed


def test_a_job_file_gives_arguments_too(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_adapter(tmp_path / "other", seed=3)
    path = job(tmp_path, f"adapters = [{str(work / 'lora')!r}, {str(other)!r}]\nexact-signs = true\njson = true\n")
    assert main(["diff", path]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["second"] == str(other)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("bse = 'x'", "BAD_CONFIG", "wanted base"),
        ("quiet = 'yes'", "BAD_CONFIG", "true or false"),
        ("base = ['a', 'b']", "BAD_CONFIG", "one value"),
        ("base = true", "BAD_CONFIG", "a text or a number"),
        ("[base]\nx = 1", "BAD_CONFIG", "a text or a number"),
        ("base = ", "BAD_CONFIG", "TOML"),
        ("dtype = 'int3'", "USAGE", "int3"),
    ],
)
def test_a_job_file_that_is_wrong_is_refused(
    text: str, code: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", job(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert code in error
    assert said in error


def test_a_job_file_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "no.toml")]) == 2
    assert "FILE_MISSING" in capsys.readouterr().err


# What stands in the way -----------------------------------------------------------------------------------------------


def test_plan_needs_no_output(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--base", str(work / "base"), "--adapter", str(work / "lora")]) == 0
    assert "6 modules" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["convert", "{lora}", "{out}", "--to", "kohya"], ["resize", "{lora}", "{out}", "--rank", "2"],
     ["scale", "{lora}", "2", "--out", "{out}"]],
)  # fmt: skip
def test_an_output_folder_with_something_in_it_is_refused(
    words: list[str], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    given = [word.format(lora=work / "lora", out=tmp_path / "out") for word in words]
    assert main(given) == 2
    assert "OUTPUT_EXISTS" in (error := capsys.readouterr().err)
    assert "notes.txt" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_missing_folder_is_named_with_the_command_that_makes_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spectrum", str(work / "lora"), "--plot", str(tmp_path / "a b" / "p.html")]) == 2
    assert f"mkdir -p '{tmp_path / 'a b'}'" in capsys.readouterr().err


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("hf://org/name@refs/pr/3", "org/name@refs/pr/3"),
        ("hf:/org/name", "org/name"),
        ("hf://models/org/name", "org/name"),
        ("./org/name", None),
        ("org", None),
        ("org/name.safetensors", None),
    ],
)
def test_what_is_a_hub_id(given: str, expected: str | None) -> None:
    assert hub_id_of(given) == expected
    assert hub_id_of(Path(given)) == expected or given.startswith("./")


@pytest.mark.parametrize("given", ["hf://org", "hf://org/../name", "hf://a/b/c"])
def test_what_says_hf_and_is_no_id_is_refused(given: str) -> None:
    with pytest.raises(D2SurgeryError, match="no hub id"):
        locate(given)


def test_a_pin_is_the_revision_that_is_downloaded(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(work / ("base" if "*.json" in allow_patterns else "lora"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load("hf://org/name@abc123")) == 6
    assert locate_base("hf://org/model") == work / "base"
    assert asked == [("org/name", "abc123"), ("org/model", None)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RepositoryNotFoundError", "there is no model org/nmae, or it is private"),
        ("GatedRepoError", "org/nmae is gated"),
        ("RevisionNotFoundError", "no branch, tag or commit 'v9'"),
        ("LocalEntryNotFoundError", "not in the cache"),
        ("OSError", "its own words"),
    ],
)
def test_a_hub_typo_is_explained_whole(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise type(name, (OSError,), {})("its own words\nand more of them")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert main(["inspect", "org/nmae@v9"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "HUB_UNREACHABLE" in error
    assert "wanted org/name" in error  # the local folder that was meant


# Weight ---------------------------------------------------------------------------------------------------------------


def heavy_after(code: str, *arguments: str, cwd: Path) -> list[str]:
    """The heavy packages that a fresh interpreter has imported when it has run this."""
    script = (
        f"import json, os, sys; from d2surgery.cli import main\n{code}\n"
        "print(*sorted({'torch', 'numpy', 'scipy', 'transformers', 'plotly', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_help_and_completion_of_every_verb_import_nothing_heavy(tmp_path: Path) -> None:
    code = """
for verb in sys.argv[1:]:
    assert main([verb, "--help"]) == 0
    os.environ |= {"_D2SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": f"d2surgery {verb} --", "COMP_CWORD": "2"}
    assert main([]) == 0
    del os.environ["_D2SURGERY_COMPLETE"]
"""
    assert heavy_after(code, *VERBS, cwd=tmp_path) == []


REFUSED = {
    "resize {lora} {lora} --rank 1": "OUTPUT_EXISTS",
    "resize {lora} new": "USAGE",
    "resize {lora} new --energy 2": "USAGE",
    "resize {lora} new --above-base 0.1": "USAGE",
    "resize nothing new --rank 1": "FILE_MISSING",
    "resize {lora} new --rank 1 --csv nowhere/x.csv": "FILE_MISSING",
    "convert {lora} {lora} --kind dora": "OUTPUT_EXISTS",
    "convert {lora} new": "USAGE",
    "convert {lora} new --kind lora --calibration words": "USAGE",
    "convert nothing new --kind lora": "FILE_MISSING",
    "extract --base {base} --tuned {base} --out {lora}": "OUTPUT_EXISTS",
    "extract --base {base} --tuned {empty} --out new": "BAD_BASE",
    "combine {lora} {lora} --out {lora}": "OUTPUT_EXISTS",
    "combine {lora} nothing --out new": "FILE_MISSING",
    "combine {lora} {lora} --out new --method ties --density 2": "USAGE",
    "scale {lora} 2 --out {lora}": "OUTPUT_EXISTS",
    "scale {lora} 2 --out new --layers x": "USAGE",
    "spectrum nothing": "FILE_MISSING",
    "spectrum {lora} --scale 2": "USAGE",
    "drift {lora} --base {empty}": "BAD_BASE",
    "diff {lora}": "USAGE",
    "diff {lora} nothing": "FILE_MISSING",
    "report {lora} --out {page}": "OUTPUT_EXISTS",
    "report nothing --out new.html": "FILE_MISSING",
    "audit --merged {base}": "USAGE",
    "audit --base {base} --adapter {lora} --merged {empty}": "BAD_MERGED",
    "audit --base {base} --adapter nothing --merged {base}": "FILE_MISSING",
    "audit --receipt --merged {base}": "NO_RECEIPT",
    "plan --base {base} --adapter nothing": "FILE_MISSING",
    "eval --base {base}": "USAGE",
    "eval --base {base} --tasks nothing": "FILE_MISSING",
    "eval --base {base} --tasks {questions} --adapter nothing": "FILE_MISSING",
    "train --base {base}": "BAD_CONFIG",
    "resize {lora} new --xyzzy": "USAGE",
}


def test_what_needs_no_numbers_is_refused_before_anything_heavy_is_imported(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").touch()
    (tmp_path / "questions.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    places = {"base": work / "base", "lora": work / "lora", "empty": tmp_path / "empty"}
    places |= {"page": tmp_path / "page.html", "questions": tmp_path / "questions.jsonl"}
    lines = json.dumps([([word.format_map(places) for word in line.split()], code) for line, code in REFUSED.items()])
    code = """
import io
from contextlib import redirect_stdout
for words, code in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as said:
        assert main([*words, "--json"]) == 2, words
    assert [problem["code"] for problem in json.loads(said.getvalue())["problems"]][0] == code, (words, said.getvalue())
    assert "torch" not in sys.modules, words
"""
    assert heavy_after(code, lines, cwd=tmp_path) == []
    assert not (tmp_path / "new").exists()


def test_a_receipt_is_verified_without_torch(work: Path, tmp_path: Path) -> None:
    base, lora, merged = (str(path) for path in (work / "base", work / "lora", tmp_path / "merged"))
    assert main(["merge", "--base", base, "--adapter", lora, "--out", merged, "--quiet"]) == 0
    words = ["audit", "--receipt", "--merged", merged, "--base", base, "--adapter", lora]
    assert heavy_after("assert main(sys.argv[1:]) == 0", *words, cwd=tmp_path) == []
