"""Modules are shown in natural order: layer 2 before layer 10, in every document and table."""

import json
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
from measuring import write_adapter, write_base

from d2surgery import BaseWeights, audit, load, merge
from d2surgery.cli import main
from d2surgery.reporting import audit_files
from d2surgery.surveying.modules import differences, drifts, spectra
from d2surgery.surveying.order import in_order, natural

LAYERS = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("order")
    write_base(work / "base", LAYERS)
    write_adapter(work / "one", "lora", LAYERS)
    write_adapter(work / "other", "lora", LAYERS, seed=3)
    merge(work / "base", work / "one", work / "merged")
    return work


def layers(names: list[str]) -> list[int]:
    return [int(name.split(".")[2]) for name in names]


def test_numbers_count_as_numbers() -> None:
    names = ["h.10.a", "h.2.b", "h.2.a", "h", "", "x2", "x10", "2.a", "a"]
    assert sorted(names, key=natural) == ["", "2.a", "a", "h", "h.2.a", "h.2.b", "h.10.a", "x2", "x10"]
    assert list(in_order({"l.11": 1, "l.3": 2})) == ["l.3", "l.11"]


def test_within_a_layer_modules_stay_as_they_came() -> None:
    names = ["l.10.q", "l.10.k", "l.2.q", "l.2.k", "head", "encoder.1.a"]
    assert list(in_order(dict.fromkeys(names))) == ["l.2.q", "l.2.k", "l.10.q", "l.10.k", "head", "encoder.1.a"]


def test_surveys_yield_layer_2_before_layer_10(work: Path) -> None:
    one, other, base = load(work / "one"), load(work / "other"), BaseWeights(work / "base")
    for walk in (spectra(one), drifts(one, base), differences(one, other)):
        found = layers([name for name, _ in walk])
        assert found == sorted(found)
        assert set(found) == set(range(LAYERS))


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "one"], ["spectrum", "one"], ["drift", "one", "--base", "base"], ["diff", "one", "other"],
        ["plan", "--base", "base", "--adapter", "one", "--out", "out"],
        ["audit", "--base", "base", "--adapter", "one", "--merged", "merged"],
    ],
)  # fmt: skip
def test_documents_have_layer_2_before_layer_10(
    words: list[str], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    modules = document["pairs"][0]["modules"] if "pairs" in document else document["modules"]
    found = layers([module["module"] for module in modules])
    assert found == sorted(found)
    assert len(found) == 2 * LAYERS
    assert main([*words, "--per-layer"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  model.layers.")]
    found = layers([line.split()[0] for line in lines])
    assert found == sorted(found)
    assert len(found) == 2 * LAYERS


def test_junit_has_layer_2_before_layer_10(work: Path) -> None:
    cases = fromstring(audit_files.junit(audit(work / "base", work / "one", work / "merged"))).iter("testcase")
    found = layers([str(case.get("name")) for case in cases if case.get("classname") == "modules"])
    assert found == sorted(found)
    assert len(found) == 2 * LAYERS
