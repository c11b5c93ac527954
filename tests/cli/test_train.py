"""`d2surgery train` as a user meets it."""

import base64
import csv
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from trained import config_of, write_base, write_items

from d2surgery.cli import main
from d2surgery.training.config import read_config, to_toml

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    write_base(made / "base")
    write_items(made / "items.json")
    (made / "run.toml").write_text(to_toml(config_of(made, "d2lora")))
    return made


def run(*arguments: Any) -> int:
    return main(["train", *map(str, arguments)])


def test_it_says_what_will_be_trained_and_what_came_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "first"
    assert run(folder / "run.toml", "--output", out, "--kind", "dora", "--lr-ratio", "B=2", "--targets", "q_proj") == 0
    text = capsys.readouterr().out
    base = folder / "base"
    lines = text.splitlines()
    assert lines[0] == f"training dora on 2 modules of {base}: rank 4, scaling 2.0"
    assert lines[1] == "  targets     model.layers.*.self_attn: q_proj"
    assert lines[3] == "  items       32, and 8 held out"
    assert lines[4].startswith("  steps       8 of 4 rows, ")
    assert any(line.startswith("OK  held-out loss 5.") for line in lines)
    assert f"  d2surgery merge --base {base} --adapter {out} --out {out}-merged" in lines
    resolved = read_config(out / "train.toml")
    assert (resolved.adapter.kind, resolved.adapter.targets, resolved.optimizer.lr_ratio) == (
        "dora",
        ("q_proj",),
        {"B": 2},
    )
    assert run(out / "train.toml", "--resume", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_it_says_what_a_scaling_weighs_where_that_is_not_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of alpha has LoRA's weight: Ŵ ≈ W0 + 2ΔW."""
    for at, (options, said) in enumerate({
        ("--alpha", "2"): "rank 2 + 2, scaling 1.0, which weighs as 2.0 of LoRA",
        ("--form", "update"): "rank 2 + 2, scaling 2.0",
        ("--kind", "lora"): "rank 4, scaling 2.0",
    }.items()):  # fmt: skip
        assert run(folder / "run.toml", "--output", folder / f"weighs-{at}", "--steps", 1, *options) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(f": {said}")


def test_its_json_is_one_document_and_the_adapter_goes_on_to_other_verbs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "second"
    assert run(folder / "run.toml", "--output", out, "--json", "--max-length", "16") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["last_eval_loss"] < document["first_eval_loss"]
    assert document["kind"] == "d2lora"
    assert [problem["code"] for problem in document["problems"]] == ["ITEMS_TOO_LONG"]
    assert main(["inspect", str(out), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert (inspected["base_model"], inspected["problems"]) == (str(folder / "base"), [])
    assert main(["merge", "--base", str(folder / "base"), "--adapter", str(out), "--out", str(folder / "merged")]) == 0


def test_its_curves_are_those_of_the_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = folder / "drawn", folder / "run.html"
    assert run(folder / "run.toml", "--output", out, "--plot", page) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert _drawn(page) == sorted(
        (name, line["step"], line[name])
        for line in log
        for name in ("loss", "eval_loss", "lr", "grad_norm")
        if name in line
    )
    assert main(["report", str(out), "--out", str(folder / "report.html"), "--quiet"]) == 0
    assert "How drawn was trained" in (folder / "report.html").read_text()
    assert set(_drawn(page)) <= set(_drawn(folder / "report.html"))


def _drawn(page: Path) -> list[tuple[str, int, float]]:
    """The numbers of a page's CSV files that a log has."""
    texts = [
        base64.b64decode(data).decode() for data in re.findall(r"data:text/csv;base64,([\w+/=]+)", page.read_text())
    ]
    rows = [row for text in texts for row in csv.DictReader(io.StringIO(text)) if row["method"] == "logged"]
    kept = [row for row in rows if row["metric"] != "tokens_per_second"]
    return sorted((row["metric"], int(row["index"]), float(row["value"])) for row in kept)


def test_a_sweep_draws_each_of_its_runs(folder: Path) -> None:
    page = folder / "sweep.html"
    assert (
        run(folder / "run.toml", "--output", folder / "several", "--lrs", "1e-3,1e-2", "--plot", page, "--quiet") == 0
    )
    assert {"lr0.001-seed0", "lr0.01-seed0"} <= set(re.findall(r"lr[\d.]+-seed0", page.read_text()))


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--rank", "0", "--lr", "-1"], ["BAD_CONFIG", "adapter.rank", "optimizer.lr"]),
    (["--lr-ratio", "B"], ["USAGE", "B=16"]),
    (["--kind", "loha"], ["USAGE", "duallora"]),
    (["--targets", "nothing"], ["TARGETS_UNMATCHED", "q_proj"]),
    (["--plot", "curves.txt"], ["USAGE", ".html", "curves.txt"]),
    (["--plot", "nowhere/curves.html"], ["FILE_MISSING", "nowhere"]),
])  # fmt: skip
def test_what_cannot_be_done_is_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert run(folder / "run.toml", "--output", folder / "none", *arguments) == 2
    captured = capsys.readouterr()
    assert all(part in captured.err for part in parts)
    assert run(folder / "run.toml", "--output", folder / "none", *arguments, "--json") == 2
    assert json.loads(capsys.readouterr().out)["problems"]


def test_without_anything_it_says_everything_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    text = capsys.readouterr().err
    for key in ("base", "output", "adapter.kind", "data.train"):
        assert f"BAD_CONFIG {key}: not given" in text


def test_ctrl_c_is_130_and_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import d2surgery.training.trainer as trainer

    whole = trainer.Metrics.on_step_end

    def interrupted(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, args, state, *rest, **more)

    out = folder / "third"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Metrics, "on_step_end", interrupted)
        assert run(folder / "run.toml", "--output", out) == 130
    assert "stopped after step 3; --resume goes on from there" in capsys.readouterr().err
    assert run(folder / "run.toml", "--output", out) == 2
    assert "OUTPUT_EXISTS" in capsys.readouterr().err
    assert run(folder / "run.toml", "--output", out, "--resume") == 0
    assert "resumed     after step 3" in capsys.readouterr().out
