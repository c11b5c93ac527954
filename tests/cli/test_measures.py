"""`spectrum`, `drift`, `diff`, `report` on the command line: documented fields, files, widths, what is missing."""

import base64
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measuring import write_adapter, write_base
from safetensors.torch import load_file

from d2surgery.cli import main, measured
from d2surgery.files.base import BaseWeights
from d2surgery.reporting.tidy import COLUMNS

SPECTRUM = {
    "module", "kind", "method", "singular_values", "numerical_rank", "entropy_rank", "energy_entropy_rank",
    "stable_rank", "participation_ratio", "energy_rank_90", "energy_rank_95", "energy_rank_99", "frobenius_norm",
    "spectral_norm", "error_bound", "of",
}  # fmt: skip
DRIFT = {"module", "along", "norm_ratio", "delta_magnitude", "delta_direction", "cosine", "relative_update"}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("cli")
    write_base(work / "base")
    for kind in ("lora", "dora", "duallora", "d2lora"):
        write_adapter(work / kind, kind)
    write_adapter(work / "again", seed=4)
    write_adapter(work / "other", layers=1, names=["x.0.a", "x.0.b"])
    return work


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    loaded: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert loaded["schema_version"] == 1
    return loaded


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "import sys; from d2surgery.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "duallora", "d2lora"])
@pytest.mark.parametrize("with_base", [False, True])
def test_spectrum_json_has_the_documented_fields(
    work: Path, kind: str, with_base: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", str(work / "base")] if with_base else []
    assert main(["spectrum", str(work / kind), "--json", *options]) == 0
    modules = document(capsys)["modules"]
    assert len(modules) == 6
    assert all(set(module) >= SPECTRUM and module["kind"] == kind for module in modules)
    needs_base = kind in ("dora", "d2lora") and not with_base
    assert {module["of"] for module in modules} == {"update" if needs_base else "delta"}


def test_spectrum_json_is_the_dense_svd(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", str(work / "lora"), "--json"]) == 0
    found = {module["module"]: module for module in document(capsys)["modules"]}
    tensors = load_file(work / "lora" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{Q}.lora_{half}.weight"].double().numpy() for half in "AB")
    sigma = np.linalg.svd(2.0 * B @ A, compute_uv=False)[:4]
    assert found[Q]["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-12)
    p = sigma / sigma.sum()
    assert found[Q]["entropy_rank"] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    assert (found[Q]["numerical_rank"], found[Q]["rank"], found[Q]["method"]) == (4, 4, "structural")


def test_head_tail_numbers_come_with_standard_errors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["spectrum", str(work / "dora"), "--base", str(work / "base"), "--json", "--method", "head-tail"]
    assert main(arguments) == 0
    module = document(capsys)["modules"][0]
    assert module["method"] in ("head-tail", "exact")  # too small for a head and a tail
    assert set(module) >= {"standard_errors", "quality"}


@pytest.mark.parametrize("kind", ["lora", "dora", "duallora", "d2lora"])
def test_drift_json_has_the_documented_fields(work: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(work / kind), "--base", str(work / "base"), "--json"]) == 0
    modules = document(capsys)["modules"]
    assert len(modules) == 6
    for module in modules:
        assert set(module) >= DRIFT
        assert set(module["norm_ratio"]) == {"mean", "std", "min", "max"}
        assert set(module["cosine"]) == {"mean", "min"}
    assert {m["along"] for m in modules} == {"in_features" if kind == "d2lora" else "out_features"}


@pytest.mark.parametrize(("along", "dim"), [("out_features", 1), ("in_features", 0)])
def test_drift_json_is_the_formula(work: Path, along: str, dim: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", str(work / "lora"), "--base", str(work / "base"), "--json", "--along", along]) == 0
    found = {module["module"]: module for module in document(capsys)["modules"]}[Q]
    W = load_file(work / "base" / "model.safetensors")[f"{Q}.weight"].double()
    tensors = load_file(work / "lora" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{Q}.lora_{half}.weight"].double() for half in "AB")
    ratio = (W + 2 * B @ A).norm(dim=dim) / W.norm(dim=dim)
    assert found["along"] == along
    assert found["norm_ratio"]["min"] == pytest.approx(float(ratio.min()), abs=1e-7)
    assert found["norm_ratio"]["mean"] == pytest.approx(float(ratio.mean()), abs=1e-7)
    assert found["relative_update"] == pytest.approx(float((2 * B @ A).norm() / W.norm()), rel=1e-6)
    cosine = torch.cosine_similarity(W + 2 * B @ A, W, dim=dim)
    assert found["delta_direction"] == pytest.approx(float((1 - cosine).mean()), rel=1e-5)


def test_diff_json_compares_every_pair(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(work / name) for name in ("lora", "again", "dora")]
    assert main(["diff", *names, "--json"]) == 0
    pairs = document(capsys)["pairs"]
    assert [(pair["first"], pair["second"]) for pair in pairs] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2])
    ]  # fmt: skip
    for module in pairs[0]["modules"]:
        assert -1 <= module["cosine"] <= 1
        assert 0 <= module["sign_agreement"] <= 1
        for side in ("in_features", "out_features"):
            assert module[side].keys() == {"similarity", "null", "principal_angles"}
            assert len(module[side]["principal_angles"]) == 4


def test_diff_of_dual_lora_has_null_and_not_nan(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(work / "duallora"), str(work / "lora"), "--json"]) == 0
    (pair,) = document(capsys)["pairs"]
    assert pair["whole"]["in_features"] is None
    assert all(module["in_features"] is None and module["cosine"] is not None for module in pair["modules"])


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["spectrum", "drift", "diff"])
def test_csv_is_a_tidy_table(work: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"spectrum": [], "drift": ["--base", str(work / "base")], "diff": [str(work / "again")]}[verb]
    assert main([verb, str(work / "lora"), *extra, "--csv", str(tmp_path / "t.csv"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["module"] for row in rows} == {f"model.layers.{i}.{t}" for i in range(3)
                                               for t in ("self_attn.q_proj", "mlp.down_proj")}  # fmt: skip
    assert all(row["convention"] and row["quality"] for row in rows)
    keys = [(row["module"], row["metric"], row["index"], row["axis"]) for row in rows]
    assert len(keys) == len(set(keys)), "one number a row"
    [float(row["value"]) for row in rows]


@pytest.mark.parametrize("verb", ["spectrum", "drift", "diff"])
def test_plot_writes_a_page(work: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"spectrum": [], "drift": ["--base", str(work / "base")], "diff": [str(work / "again")]}[verb]
    assert main([verb, str(work / "lora"), *extra, "--plot", str(tmp_path / "p.html")]) == 0
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    drawn = html.count('class="canvas"')
    assert drawn >= 3
    assert html.count(f"<h4>lora{' and again' if verb == 'diff' else ''}</h4>") == drawn
    tables = re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', html)
    assert len(tables) == drawn
    for name, data in tables:
        rows = list(csv.DictReader(base64.b64decode(data).decode().splitlines()))
        assert all("lora" in row["adapter"] for row in rows)
        assert "lora" in name
    assert f"wrote {tmp_path / 'p.html'}" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="pip install 'd2surgery[images]'")
def test_plot_writes_images(work: Path, tmp_path: Path) -> None:
    done = run("spectrum", str(work / "lora"), "--plot", str(tmp_path / "p.svg"))
    if done.returncode == 2 and "NO_IMAGES" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr
    names = {"p.svg", "p-rank_lines.svg", "p-spectrum_fan.svg", "p-size_map.svg"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert all(b"<svg" in (tmp_path / name).read_bytes()[:200] for name in names)
    assert "Rank used, by layer and module type" in (tmp_path / "p.svg").read_text()


def test_an_image_names_its_adapter(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a browser: what is given to kaleido, for each of the kinds of file."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "kaleido" else found(name))
    titles: list[str] = []

    def write(pictures: list[dict[str, Any]], paths: list[Path], **_: object) -> None:
        titles.extend(picture["layout"]["title"]["text"] for picture in pictures)
        for path in paths:
            path.write_bytes(b"")

    monkeypatch.setattr("plotly.io.write_images", write)
    for ending in ("png", "svg", "pdf"):
        assert main(["spectrum", str(work / "lora"), "--plot", str(tmp_path / f"p.{ending}"), "--quiet"]) == 0
    pair = [str(work / "lora"), str(work / "again")]
    assert main(["diff", *pair, "--plot", str(tmp_path / "q.png"), "--quiet"]) == 0
    assert all("lora" in title for title in titles)
    assert len(titles) == 3 * 4 + 3
    assert any("lora and again" in title for title in titles)


def test_images_without_kaleido_are_refused_before_any_work(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kaleido" else found(name))
    monkeypatch.setattr("d2surgery.surveying.modules.spectra", lambda *a, **k: pytest.fail("it worked first"))
    assert main(["spectrum", str(work / "lora"), "--plot", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert "NO_IMAGES" in error
    assert "d2surgery[images]" in error
    assert list(tmp_path.iterdir()) == []


def test_images_without_a_browser_are_one_clear_error(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.\nmore")

    monkeypatch.setattr("plotly.io.write_images", fails)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "kaleido" else found(name))
    assert main(["spectrum", str(work / "lora"), "--plot", str(tmp_path / "p.png"), "--quiet"]) == 2
    assert "NO_IMAGES" in (error := capsys.readouterr().err)
    assert "requires Google Chrome" in error


def test_report_writes_one_page_and_nothing_else(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    arguments = ["report", str(work / "lora"), str(work / "again"), "--base", str(work / "base"), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    told = document(capsys)
    assert (told["out"], told["bytes"]) == (str(out), out.stat().st_size)
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]
    before = out.read_bytes()
    assert main(arguments) == 2
    assert "OUTPUT_EXISTS" in (error := capsys.readouterr().err)
    assert "--force" in error
    assert out.read_bytes() == before
    assert main([*arguments, "--force"]) == 0
    assert "2 adapters in one page" in capsys.readouterr().out


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["spectrum", "drift", "diff"])
def test_tables_fit_a_narrow_terminal(work: Path, verb: str) -> None:
    extra = {"spectrum": [], "drift": ["--base", "base"], "diff": ["again"]}[verb]
    command = [sys.executable, "-c", "import sys; from d2surgery.cli import main; sys.exit(main())"]
    environment = {**os.environ, "COLUMNS": "60"}
    done = subprocess.run(
        [*command, verb, "lora", *extra], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "q_proj ×3" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("verb", ["spectrum", "drift", "diff"])
def test_per_layer_names_every_module(work: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"spectrum": [], "drift": ["--base", str(work / "base")], "diff": [str(work / "again")]}[verb]
    assert main([verb, str(work / "lora"), *extra, "--per-layer"]) == 0
    text = capsys.readouterr().out
    assert all(f"model.layers.{i}.mlp.down_proj" in text for i in range(3))


def test_the_text_says_the_verdict_first_and_the_coverage(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", str(work / "d2lora")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("D2-LoRA on 6 modules: the update uses ")
    assert "6 modules measured: 6 structural" in text
    assert main(["drift", str(work / "dora"), "--base", str(work / "base")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("DoRA on 6 modules: moves the base by ")
    assert "random updates of the same sizes give" in text
    assert "0 of length zero" in text
    assert main(["diff", str(work / "lora"), str(work / "again")]) == 0
    assert "unrelated: cosine" in " ".join(capsys.readouterr().out.split())


def test_names_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "a", layers=1, names=["layers.0.\x1b[31m", "layers.0.q\rb"])
    for verb in (["spectrum"], ["diff", str(tmp_path / "a")]):
        for option in ([], ["--per-layer"]):
            assert main([*verb, str(tmp_path / "a"), *option]) == 0
            out = capsys.readouterr().out
            assert "\x1b" not in out
            assert "\r" not in out


# What cannot be done --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["drift", "{work}/lora"], "USAGE"),
        (["drift", "{work}/lora", "--base", "{work}/nothing"], "BAD_BASE"),
        (["drift", "{work}/other", "--base", "{work}/base"], "NO_SUCH_MODULE"),
        (["spectrum", "{work}/nothing"], "FILE_MISSING"),
        (["spectrum", "{work}/dora", "--of", "delta"], "USAGE"),
        (["spectrum", "{work}/duallora", "--of", "update"], "USAGE"),
        (["spectrum", "{work}/lora", "--plot", "{work}/x.jpg"], "USAGE"),
        (["spectrum", "{work}/lora", "--plot", "{work}/nowhere/x.html"], "FILE_MISSING"),
        (["spectrum", "{work}/lora", "--csv", "{work}/nowhere/x.csv"], "FILE_MISSING"),
        (["diff", "{work}/lora"], "USAGE"),
        (["diff", "{work}/lora", "{work}/other"], "USAGE"),
        (["report", "{work}/lora"], "USAGE"),
        (["report", "{work}/other", "--base", "{work}/base", "--out", "{work}/x.html"], "NO_SUCH_MODULE"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_a_code(
    work: Path, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(work.iterdir())
    words = [argument.format(work=work) for argument in arguments]
    assert main([*words, "--json"]) == 2
    assert {problem["code"] for problem in document(capsys)["problems"]} == {code}
    assert main(words) == 2
    assert code in capsys.readouterr().err
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        "spectrum {work}/lora --plot {file}.html",
        "drift {work}/lora --base {work}/base --plot {file}.svg",
        "diff {work}/lora {work}/again --csv {file}.csv",
        "convert {work}/lora {work}/out --kind dora --base {work}/base --csv {file}.csv",
        "resize {work}/lora {work}/out --rank 1 --plot {file}.html",
        "extract --base {work}/base --tuned {work}/base --out {work}/out --csv {file}.csv",
        "combine {work}/lora {work}/again --out {work}/out --plot {file}.html",
        "scale {work}/lora 2 --out {work}/out --csv {file}.csv",
        "report {work}/lora --out {file}.html",
        "audit --base {work}/base --adapter {work}/lora --merged {work}/base --html {file}.html",
        "audit --base {work}/base --adapter {work}/lora --merged {work}/base --junit {file}.xml",
        "audit --base {work}/base --adapter {work}/lora --merged {work}/base --sarif {file}.sarif",
        "eval --base {work}/base --tasks {questions} --items {file}.jsonl",
    ],
)
def test_a_file_in_a_folder_that_is_not_there_is_refused_before_any_work(
    work: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rule for every file that a verb writes. What it would have read is not opened."""
    missing, questions = tmp_path / "not here", tmp_path / "questions.jsonl"
    questions.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    monkeypatch.setattr(BaseWeights, "__init__", lambda *_: pytest.fail("the base was opened"))
    monkeypatch.setattr(measured, "open_layout", lambda *_, **__: pytest.fail("the adapter was opened"))
    arguments = [part.format(work=work, file=missing / "x", questions=questions) for part in words.split(" ")]
    assert main([*arguments, "--json"]) == 2
    (problem,) = document(capsys)["problems"]
    assert (problem["code"], problem["file"]) == ("FILE_MISSING", str(missing))
    assert problem["wanted"] == f"mkdir -p '{missing}'"
    assert not missing.exists()


# Weight ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["spectrum", "drift", "diff"])
def test_measuring_imports_neither_transformers_nor_plotly_nor_peft(work: Path, verb: str, tmp_path: Path) -> None:
    extra = {"spectrum": [], "drift": ["--base", str(work / "base")], "diff": [str(work / "again")]}[verb]
    code = (
        "import sys; from d2surgery.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'transformers', 'plotly', 'peft'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    arguments = [verb, str(work / "lora"), *extra, "--csv", str(tmp_path / "t.csv")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
