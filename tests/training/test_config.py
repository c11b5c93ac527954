"""The config of a training run: files, options, misfits; nothing is listed twice."""

import tomllib
from math import sqrt
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2surgery.training
from d2surgery import KINDS
from d2surgery.cli.train import command
from d2surgery.errors import D2SurgeryError, Problem
from d2surgery.training.config import differences, parse, read_config, settings, to_toml

EXAMPLES = Path(d2surgery.training.__file__).parent / "examples"
LEAST: dict[str, Any] = {"base": "b", "output": "o", "adapter": {"kind": "lora"}, "data": {"train": ["t.json"]}}


def with_(**sections: Any) -> dict[str, Any]:
    return {
        **LEAST,
        **{name: {**LEAST.get(name, {}), **v} if isinstance(v, dict) else v for name, v in sections.items()},
    }


def misfits(document: dict[str, Any]) -> dict[str, Problem]:
    with pytest.raises(D2SurgeryError) as error:
        parse(document, "run.toml")
    assert {(problem.code, problem.file) for problem in error.value.problems} == {("BAD_CONFIG", "run.toml")}
    return {problem.module: problem for problem in error.value.problems}


# Files and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_an_example_of_each_kind_and_it_is_read(kind: str) -> None:
    path = EXAMPLES / f"{kind}.toml"
    config = read_config(path)
    assert config.adapter.kind == kind
    assert parse(tomllib.loads(to_toml(config))) == config


def test_every_setting_is_an_option_of_its_own_and_documented() -> None:
    names = [setting.name for setting in settings()]
    assert len(set(names)) == len(names)
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    assert set(names) <= set(options)
    for setting in settings():
        assert setting.about.help.endswith("."), setting.key
        assert (options[setting.name].help or "").startswith(setting.about.help)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(parse(with_(optimizer={"lr": 0.5, "batch": 3}))))
    config = read_config(path, {"lr": 0.25, "rank": 2, "output": "elsewhere"})
    assert (config.optimizer.lr, config.optimizer.batch, config.adapter.rank) == (0.25, 3, 2)
    assert config.output == "elsewhere"


def test_options_alone_are_a_config() -> None:
    assert read_config(None, {"base": "b", "output": "o", "kind": "lora", "train": ("t.json",)}) == parse(LEAST)


texts = st.text(min_size=1).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@given(base=texts, files=st.lists(texts, min_size=1), lr=st.floats(1e-300, 1e9), slots=st.sampled_from(["A", "B"]))
def test_what_is_written_reads_as_the_same_config(base: str, files: list[str], lr: float, slots: str) -> None:
    document = with_(base=base, data={"train": files}, optimizer={"lr": lr, "lr_ratio": {slots: lr}})
    config = parse(document)
    assert parse(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(("kind", "matched", "group_rank", "alpha", "rslora", "scaling"), [
    ("lora", True, 8, 16.0, False, 2.0),
    ("lora", True, 8, 16.0, True, 16 / sqrt(8)),
    ("dora", False, 8, 4.0, False, 0.5),
    ("duallora", True, 4, 16.0, False, 4.0),
    ("duallora", False, 8, 16.0, False, 2.0),
    ("d2lora", True, 4, None, False, 2.0),
    ("d2lora", False, 8, 16.0, False, 2.0),
])  # fmt: skip
def test_rank_and_alpha_give_the_scaling(
    kind: str, matched: bool, group_rank: int, alpha: float | None, rslora: bool, scaling: float
) -> None:
    adapter = {"kind": kind, "rank": 8, "matched": matched, "rslora": rslora} | ({"alpha": alpha} if alpha else {})
    config = parse(with_(adapter=adapter))
    assert config.group_rank == group_rank
    assert config.scaling == pytest.approx(scaling)


def test_what_changes_nothing_that_is_learnt_is_no_difference() -> None:
    one = parse(LEAST)
    assert differences(one, parse(with_(output="x", run={"keep": 9, "save_every": 3, "report_to": ["wandb"]}))) == {}
    assert differences(one, parse(with_(optimizer={"lr": 1.0}, data={"train": ["u.json"]}))) == {
        "optimizer.lr": (2e-4, 1.0),
        "data.train": (("t.json",), ("u.json",)),
    }


# Misfits ---------------------------------------------------------------------------------------------------------


def test_all_misfits_are_said_at_once_with_their_keys() -> None:
    found = misfits({
        "bsae": "b", "output": 3, "optim": {"lr": 1}, "data": {"train": []},
        "adapter": {"kind": "lorra", "rnk": 8, "batch": 4, "dropout": 1.0}, "optimizer": {"steps": 1.5, "lr": -1},
    })  # fmt: skip
    assert {key: (p.message, p.wanted) for key, p in found.items()} == {
        "base": ("not given", "a text"),
        "bsae": ("no such key", "base"),
        "output": ("of another type", "a text"),
        "optim": ("no such section", "[optimizer]"),
        "data.train": ("empty", "a list of texts"),
        "adapter.kind": ("no such choice", "lora or dora or duallora or d2lora"),
        "adapter.rnk": ("no such key", "adapter.rank or adapter.kind"),
        "adapter.batch": ("no such key", "optimizer.batch"),
        "adapter.dropout": ("out of range", "a number, 0 or more, less than 1"),
        "optimizer.steps": ("not a whole number", "a whole number, more than 0"),
        "optimizer.lr": ("out of range", "a number, more than 0"),
    }
    assert found["adapter.kind"].got == "'lorra'"


@pytest.mark.parametrize(("sections", "key", "message", "wanted"), [
    ({"adapter": 3}, "adapter", "not a section", "[adapter]"),
    ({"adapter": {"tau": 0.5}}, "adapter.tau", "lora has no such option", "none"),
    ({"adapter": {"kind": "duallora", "form": "update"}}, "adapter.form", "no such option", "sigma, ste"),
    ({"adapter": {"kind": "dora", "along": "in_features"}}, "adapter.along", "per output feature", "out_features"),
    ({"adapter": {"kind": "d2lora", "rslora": True}}, "adapter.rslora", "no such scaling", "alpha alone"),
    ({"adapter": {"kind": "d2lora", "rank": 7}}, "adapter.rank", "share the rank", "an even rank"),
    ({"adapter": {"scaling_warmup": 5}}, "adapter.scaling_warmup", "only Dual LoRA", "optimizer.warmup"),
    ({"optimizer": {"lr_ratio": {"C": 2.0}}}, "optimizer.lr_ratio.C", "no such slot", "A or B"),
    ({"optimizer": {"lr_ratio": {"B": -1}}}, "optimizer.lr_ratio", "out of range", "numbers by name"),
    ({"optimizer": {"lr": True}}, "optimizer.lr", "not a number", "a number"),
    ({"optimizer": {"lr": float("nan")}}, "optimizer.lr", "not a number", "a number"),
    ({"run": {"compile": 1}}, "run.compile", "of another type", "true or false"),
    ({"data": {"train": "x.json", "held_out": [1]}}, "data.held_out", "not a list of texts", "a list of texts"),
    ({"base": ""}, "base", "empty", "a text"),
])  # fmt: skip
def test_a_misfit_says_what_is_wanted(sections: dict[str, Any], key: str, message: str, wanted: str) -> None:
    document = with_(**sections)
    found = misfits(document)
    assert message in found[key].message
    assert wanted in found[key].wanted


def test_a_warm_up_longer_than_the_run_is_a_contradiction() -> None:
    document = with_(adapter={"kind": "duallora", "scaling_warmup": 11}, optimizer={"steps": 10})
    assert misfits(document)["adapter.scaling_warmup"].wanted == "at most 10"


@pytest.mark.parametrize(("content", "code"), [
    (None, "FILE_MISSING"), (b"base = ", "BAD_CONFIG: not TOML"), (b"base = '\xff'", "not TOML"),
])  # fmt: skip
def test_a_file_that_is_no_toml_is_said(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(D2SurgeryError) as error:
        read_config(path)
    assert code.split(": ")[-1] in str(error.value)
    assert error.value.problems[0].file == str(path)
