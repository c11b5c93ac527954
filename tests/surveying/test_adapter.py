"""Adapters as a whole: what is measured of each, and of each two."""

from pathlib import Path

import pytest
from measuring import RANK, write_adapter, write_base

from d2surgery import BaseWeights, D2SurgeryError, load
from d2surgery.surveying.adapter import labels, measure, survey
from d2surgery.surveying.modules import differences, drifts, spectra


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, lora, dora, and `again`, a second LoRA."""
    work = tmp_path_factory.mktemp("survey")
    write_base(work / "base")
    write_adapter(work / "lora")
    write_adapter(work / "dora", "dora")
    write_adapter(work / "again", seed=9)
    return work


def test_a_survey_is_what_the_measures_give_alone(work: Path) -> None:
    paths = [str(work / name) for name in ("lora", "dora", "again")]
    found = survey(paths, base=work / "base")
    assert [m.label for m in found.measured] == ["lora", "dora", "again"]
    assert [m.given for m in found.measured] == paths
    assert found.base == str(work / "base")
    assert list(found.shared) == [(0, 1), (0, 2), (1, 2)]
    base = BaseWeights(work / "base")
    for path, measured in zip(paths, found.measured, strict=True):
        checkpoint = load(path)
        for name, spectrum in spectra(checkpoint, base):
            assert measured.spectra[name].frobenius_norm == spectrum.frobenius_norm
        sizes = {name: record.relative_update for name, record in drifts(checkpoint, base)}
        assert measured.sizes == sizes
        assert measured.nominal == dict.fromkeys(sizes, RANK)
        assert measured.nbytes == checkpoint.layout.path.stat().st_size
        assert measured.intruders == {}
    alone = dict(differences(load(paths[0]), load(paths[2])))
    assert {name: d.cosine for name, d in found.shared[0, 2].items()} == {n: d.cosine for n, d in alone.items()}


def test_without_a_base_sizes_are_norms_and_an_update_is_measured(work: Path) -> None:
    measured = measure(load(work / "dora"))
    assert measured.of == "update"
    assert measured.drifts == {}
    assert measured.sizes == {name: record.rms_entry for name, record in measured.spectra.items()}


def test_progress_is_told_by_label(work: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    paths = [str(work / "lora"), str(work / "again")]
    survey(paths, base=work / "base", progress=lambda label: lambda done, total: told.update({label: (done, total)}))
    assert list(told) == ["spectra of lora", "drift of lora", "spectra of again", "drift of again", "comparing"]
    assert all(done == total for done, total in told.values())


def test_a_file_without_adapters_is_refused(work: Path) -> None:
    with pytest.raises(D2SurgeryError, match="NOT_AN_ADAPTER"):
        survey([str(work / "base")])


def test_what_it_prints_is_short(work: Path) -> None:
    found = survey([str(work / "lora"), str(work / "dora")], base=work / "base")
    count = len(found.measured[0].spectra)
    assert repr(found.measured[0]) == f"Measured('lora': {count} spectra of the delta, drifts)"
    assert repr(found).startswith("Survey(Measured('lora'")
    assert len(repr(found)) < 200 + len(str(work))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a/b/one", "two/"], ["one", "two"]),
        (["x/lora", "y/lora"], ["x/lora", "y/lora"]),
        (["x/lora", "x/lora"], ["x/lora (1)", "x/lora (2)"]),
        (["/"], ["/"]),
        (["org/name@v1"], ["name@v1"]),
    ],
)
def test_labels_are_short_and_differ(given: list[str], expected: list[str]) -> None:
    assert labels(given) == expected
