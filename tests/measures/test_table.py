"""The table of measures: one name for one number, in every verb, and explained."""

import json
from pathlib import Path

import pytest
from measuring import write_adapter, write_base

from d2surgery.cli import main
from d2surgery.measures.ranks import NUMBERS
from d2surgery.measures.table import MEASURES, find
from d2surgery.reporting.tidy import COLUMNS, CONVENTIONS


def test_a_word_stands_for_one_number_and_a_number_has_one_word() -> None:
    words = [measure.word for measure in MEASURES.values()]
    assert len(words) == len(set(words))
    assert all(measure.formula and measure.says.endswith(".") for measure in MEASURES.values())
    assert set(NUMBERS) <= set(MEASURES)
    assert set(CONVENTIONS) == set(MEASURES)


@pytest.mark.parametrize("name", MEASURES)
def test_explain_knows_every_measure_by_name_and_by_word(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in (name, name.upper().replace("_", "-"), MEASURES[name].word):
        assert find(spelling) == name
        assert main(["explain", spelling]) == 0
        said = capsys.readouterr().out
        assert said.startswith(name)
        assert MEASURES[name].formula in said
        assert MEASURES[name].says in said
    assert main(["explain", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measure"] == name


@pytest.mark.parametrize("name", ["ΔM", "ΔD", "gain", "survival", "strength", "replay", "used", "rank used", "k90"])
def test_what_people_look_up_is_there(name: str) -> None:
    assert find(name) in MEASURES


def test_a_mistyped_measure_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "entropi_rank"]) == 2
    assert "entropy_rank" in capsys.readouterr().err


def test_every_verb_calls_the_same_number_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect, spectrum and the report's table: one value under one word."""
    adapter = str(write_adapter(tmp_path / "adapter", layers=1))
    assert main(["spectrum", adapter, "--json"]) == 0
    (module, *_) = json.loads(capsys.readouterr().out)["modules"]
    shown = f"{module['energy_entropy_rank']:.4g}"
    assert main(["inspect", adapter, "--numbers", "--per-layer"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"rank used {shown}" in text
    assert "entropy rank" not in text
    assert main(["inspect", adapter, "--numbers", "--json"]) == 0
    told = {m["module"]: m for m in json.loads(capsys.readouterr().out)["modules"]}[module["module"]]
    assert told["energy_entropy_rank"] == pytest.approx(module["energy_entropy_rank"])
    assert told["entropy_rank"] == pytest.approx(module["entropy_rank"])
    assert main(["spectrum", adapter]) == 0
    assert "rank used" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", adapter, "--out", str(page), "--quiet"]) == 0
    assert "rank used" in (html := page.read_text(encoding="utf-8"))
    assert "<button>entropy rank" not in html
    assert "energy entropy rank" not in html


def test_sizes_without_a_base_can_be_compared_between_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two modules whose entries are equally large: the wider is not called the stronger."""
    import torch

    from d2surgery import LoRA, from_adapters, save
    from d2surgery.surveying.adapter import survey

    generator = torch.Generator().manual_seed(0)

    def lora(out: int, in_: int, size: float) -> LoRA:
        A, B = torch.randn(4, in_, generator=generator), torch.randn(out, 4, generator=generator)
        return LoRA(A=A, B=B * size, scaling=1.0)

    save(from_adapters({"model.layers.0.wide": lora(200, 300, 1.0), "model.layers.0.small": lora(10, 12, 1.5)}),
         tmp_path / "a")  # fmt: skip
    (measured,) = survey([str(tmp_path / "a")]).measured
    wide, small = measured.spectra["model.layers.0.wide"], measured.spectra["model.layers.0.small"]
    assert wide.frobenius_norm > 5 * small.frobenius_norm
    assert wide.rms_entry == pytest.approx(wide.frobenius_norm / (200 * 300) ** 0.5)
    assert max(measured.sizes, key=lambda name: measured.sizes[name]) == "model.layers.0.small"
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(page), "--quiet"]) == 0
    html = page.read_text(encoding="utf-8")
    assert "Strongest: <code>model.layers.0.small</code>" in html
    assert main(["spectrum", str(tmp_path / "a"), "--csv", str(tmp_path / "t.csv"), "--json"]) == 0
    modules = {m["module"]: m for m in json.loads(capsys.readouterr().out)["modules"]}
    assert modules["model.layers.0.wide"]["rms_entry"] == wide.rms_entry
    assert modules["model.layers.0.wide"]["shape"] == [200, 300]
    assert "rms_entry" in (tmp_path / "t.csv").read_text()
    assert "adapter" in COLUMNS


def test_with_a_base_sizes_stay_relative_to_it(tmp_path: Path) -> None:
    from d2surgery.surveying.adapter import survey

    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a")
    (measured,) = survey([str(adapter)], base=tmp_path / "base").measured
    assert measured.sizes == {name: record.relative_update for name, record in measured.drifts.items()}
