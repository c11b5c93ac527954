"""The audit of merges: right ones pass and are replayed, wrong ones fail with the reason."""

from pathlib import Path

import pytest

from d2surgery import KINDS, BaseWeights, audit, merge, save
from d2surgery.cli import demo


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "base").mkdir()
    demo._make_base(folder / "base")
    for kind in KINDS:
        save(demo._trained(kind, BaseWeights(folder / "base")), folder / kind)
    return folder


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_own_merge_is_replayed_and_passes(inputs: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    merge(inputs / "base", inputs / kind, tmp_path / "merged", dtype=dtype)
    found = audit(inputs / "base", inputs / kind, tmp_path / "merged")
    assert (found.verdict, found.reasons, found.recipe) == ("pass", (), "d2surgery")
    assert {module.status for module in found.modules.values()} == {"replayed"}
    assert found.coverage == {
        "total": 38, "adapted": 28, "unchanged": 10, "replaced": 0, "tied": 0, "resized": 0, "changed": 0,
        "missing": 0, "extra": 0,
    }  # fmt: skip
