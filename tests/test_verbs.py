"""The verbs as Python functions: results with short reprs, rows, frames, figures; errors that are ours."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring import write_adapter, write_base

import d2surgery
from d2surgery import D2SurgeryError
from d2surgery.cli import VERBS, main
from d2surgery.files.dtypes import dtype_name

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("verbs")
    write_base(work / "base")
    write_adapter(work / "lora")
    write_adapter(work / "other", seed=4)
    return work


def test_every_verb_that_needs_no_terminal_is_a_function() -> None:
    for verb in set(VERBS) - {"demo", "explain", "eval", "completion", "push"}:
        assert callable(getattr(d2surgery, verb)), verb


def test_inspecting_needs_no_torch_and_the_package_imports_nothing(work: Path) -> None:
    code = (
        "import sys, d2surgery; before = len(sys.modules); found = d2surgery.inspect(sys.argv[1]);"
        "print(found, len(found.rows()), *{'torch', 'numpy', 'plotly', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(work / "lora")], capture_output=True, text=True, check=True)
    assert done.stdout == "Inspection(LoRA on 6 modules, peft, 0 problems) 6\n"


def test_results_are_mappings_with_short_reprs_rows_and_figures(work: Path) -> None:
    spectra = d2surgery.spectrum(work / "lora")
    assert spectra[Q].rms_entry > 0
    assert repr(spectra).startswith("Spectra(LoRA 'lora', 6 modules: rank used ")
    moved = d2surgery.drift(work / "lora", work / "base")
    assert repr(moved).startswith("Drifts(LoRA 'lora', 6 modules: moves the base by ")
    compared = d2surgery.diff(work / "lora", work / "other")
    assert repr(compared).startswith("Comparison('lora' and 'other': Likeness(6 modules, cosine ")
    audited = d2surgery.merge(work / "base", work / "lora", work / "merged") and d2surgery.audit(
        work / "base", work / "lora", work / "merged"
    )
    inspected = d2surgery.inspect(work / "lora", numbers=True)
    for result, figures in ((spectra, 4), (moved, 4), (compared, 3), (inspected, 0), (audited, 0)):
        rows = result.rows()
        assert len(rows) == 6
        assert {tuple(row) for row in rows} == {tuple(rows[0])}
        assert "model.layers.2.mlp.down_proj" in (html := result._repr_html_())
        assert "<table>" in html
        assert len(repr(result)) < 150
        if figures:
            drawn = result.figures()
            assert len(drawn) == figures
            assert all("lora" in plot.adapter and plot.figure.data for plot in drawn.values())


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pip install 'd2surgery[frames]'")
def test_a_frame_has_the_rows(work: Path) -> None:
    found = d2surgery.spectrum(work / "lora")
    frame = found.to_frame()
    assert list(frame["module"]) == list(found)
    assert frame["stable_rank"].tolist() == [record.stable_rank for record in found.values()]


def test_without_pandas_a_frame_is_one_clear_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(D2SurgeryError, match="NO_PANDAS"):
        d2surgery.inspect(work / "lora").to_frame()


def test_a_report_is_a_value_and_a_file(work: Path, tmp_path: Path) -> None:
    page = d2surgery.report(work / "lora", base=work / "base", out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    assert repr(page).startswith("Report(1 adapters, ")
    assert page._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(D2SurgeryError, match="OUTPUT_EXISTS"):
        d2surgery.report(work / "lora", out=tmp_path / "page.html")
    with pytest.raises(D2SurgeryError, match="FILE_MISSING"):
        page.save(tmp_path / "no" / "page.html")


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "BF16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_have_the_names_people_use(spelling: object, work: Path, tmp_path: Path) -> None:
    assert dtype_name(spelling) == "BF16"
    if spelling is torch.bfloat16:
        d2surgery.merge(work / "base", work / "lora", tmp_path / "merged", dtype=torch.bfloat16)
        assert {t.dtype for t in d2surgery.BaseWeights(tmp_path / "merged").values()} == {torch.bfloat16}


def test_the_command_line_takes_them_too(work: Path, tmp_path: Path) -> None:
    paths = ["--base", str(work / "base"), "--adapter", str(work / "lora"), "--out", str(tmp_path / "out")]
    assert main(["merge", *paths, "--dtype", "bfloat16", "--quiet"]) == 0
    assert main(["plan", *paths[:4], "--out", str(tmp_path / "x"), "--dtype", "int3"]) == 2


@pytest.mark.parametrize("wrong", ["int8", "q4", torch.int8, 16])
def test_other_dtypes_are_refused_by_name(wrong: object, work: Path, tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match="bf16"):
        d2surgery.merge(work / "base", work / "lora", tmp_path / "merged", dtype=wrong)
    assert not (tmp_path / "merged").exists()


def test_a_name_that_is_not_there_is_our_error_with_the_nearest(work: Path) -> None:
    checkpoint, base = d2surgery.load(work / "lora"), d2surgery.BaseWeights(work / "base")
    for mapping, name in ((checkpoint, Q[:-1]), (base, f"{Q}.weigh"), (d2surgery.spectrum(work / "lora"), Q[:-1])):
        with pytest.raises(D2SurgeryError, match=f"UNKNOWN_NAME.*{Q}"):
            mapping[name]
        with pytest.raises(KeyError):
            mapping[name]
        assert mapping.get(name) is None
        assert name not in mapping


@pytest.mark.parametrize(
    "call",
    [
        lambda work: d2surgery.inspect(work / "none"),
        lambda work: d2surgery.spectrum(work / "none"),
        lambda work: d2surgery.spectrum(work / "base"),
        lambda work: d2surgery.drift(work / "lora", work / "none"),
        lambda work: d2surgery.diff(work / "lora"),
        lambda work: d2surgery.report(),
        lambda work: d2surgery.report(work / "lora", merged=work / "base"),
    ],
)
def test_what_cannot_be_done_is_a_d2surgery_error(call: object, work: Path) -> None:
    with pytest.raises(D2SurgeryError):
        call(work)  # type: ignore[operator]


def test_the_tour_names_what_there_is() -> None:
    import re

    named = set(re.findall(r"d2surgery\.([A-Za-z_]+)\(", d2surgery.__doc__ or ""))
    assert named <= set(d2surgery.__all__)
    assert {"inspect", "merge", "audit", "report", "diff", "load"} <= named
