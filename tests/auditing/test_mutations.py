"""What the audit says of merges that are right, and of merges that are wrong: no false pass, no false alarm.

Every case of `mutations` is a test; most are long ones: `pytest -m ''`, a quarter of an hour on two cores.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from longer import one_in
from mutations import DTYPES, KINDS, Case, World, cases, part

from d2surgery.auditing import audit, blocks, replay, strays
from d2surgery.auditing.findings import Audit
from d2surgery.errors import D2SurgeryError, Problem
from d2surgery.merging import tiles

ALL = cases()
SHORT = {case.id for case in part(ALL)}
NAMED = ("axis", "magnitude", "branch", "projection", "direction", "heads", "transposed", "twice")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case.id in SHORT else pytest.mark.long, id=case.id) for case in ALL]
)
def test_the_verdict_and_the_reason(world: World, tmp_path: Path, case: Case) -> None:
    setting = case.build(world, tmp_path / "merged")
    if case.verdict == "refused":
        with pytest.raises(D2SurgeryError) as error:
            audit(setting.base, setting.adapter, tmp_path / "merged")
        assert {problem.code for problem in error.value.problems} & set(case.codes)
        return
    found = audit(setting.base, setting.adapter, tmp_path / "merged")
    assert complaint(case, found) == ""


@pytest.mark.parametrize(
    "case", one_in(2, (case for case in ALL if case.group in NAMED and case.dtype == "F32")), ids=lambda case: case.id
)
def test_a_part_of_a_weight_names_the_cause(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Of large weights a block is looked at: rows, or columns where the kind normalises these."""
    monkeypatch.setattr(blocks, "_ENTRIES", 1 << 11)
    monkeypatch.setattr(blocks, "_HEAD", 16)
    setting = case.build(world, tmp_path / "merged")
    assert complaint(case, audit(setting.base, setting.adapter, tmp_path / "merged")) == ""


@pytest.mark.parametrize(
    "case",
    one_in(60, (case for case in ALL if case.group == "shape")),
    ids=lambda case: case.id,
)
def test_tiles_in_which_nothing_differs_are_left_out_and_the_answer_is_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    setting = case.build(world, tmp_path / "merged")
    monkeypatch.setattr(tiles, "TILE_ENTRIES", 1 << 9)  # four rows: weights here would be one tile
    found = []
    for every in (1, strays.EVERY):
        monkeypatch.setattr(replay, "EVERY", every)
        found.append(audit(setting.base, setting.adapter, tmp_path / "merged"))
    assert complaint(case, found[1]) == ""
    assert found[1].modules == found[0].modules


def complaint(case: Case, found: Audit) -> str:
    """What is wrong with an answer, in words; nothing when it is right."""
    said = "; ".join(map(str, found.reasons)) or "nothing"
    if found.verdict not in {"not pass": ("fail", "inconclusive")}.get(case.verdict, (case.verdict,)):
        return f"verdict {found.verdict} instead of {case.verdict}: {said}"
    return _wrong_codes(case, found.reasons) or (_not_exact(found) if case.exact else "")


def _wrong_codes(case: Case, reasons: Sequence[Problem]) -> str:
    said = "; ".join(map(str, reasons)) or "nothing"
    right = [reason for reason in reasons if reason.code in case.codes]
    if case.codes and not right:
        return f"none of {', '.join(case.codes)}: {said}"
    strange = {reason.code for reason in reasons if reason.severity == "error"} - {*case.codes, *case.also}
    if strange:
        return f"wrong codes {', '.join(sorted(strange))}: {said}"
    if case.where and not any(case.where in f"{reason.module} {reason.message}" for reason in right):
        return f"no reason names {case.where}: {said}"
    if case.says and not any(case.says in str(reason) for reason in right):
        return f"no reason says {case.says}: {said}"
    return ""


def _not_exact(found: Audit) -> str:
    off = {name: module.mismatched_elements for name, module in found.modules.items() if module.mismatched_elements}
    return f"no recipe replays it: {off}" if off else ""


def test_there_are_enough_cases_and_each_has_its_own_name() -> None:
    assert len(SHORT) >= 150
    assert len([case for case in ALL if case.verdict != "pass"]) >= 1200
    assert len([case for case in ALL if case.group == "healthy"]) >= 1500
    assert [name for name, count in Counter(case.id for case in ALL).items() if count > 1] == []


def test_the_part_that_runs_has_every_failure_and_fails_every_kind_in_every_dtype() -> None:
    some = part(ALL)
    wrong = [{(case.group, case.name) for case in of if case.verdict != "pass"} for of in (some, ALL)]
    assert {group for group, _ in wrong[1] - wrong[0]} == {"shape of all"}
    failing = {(case.kind, case.dtype) for case in some if case.verdict == "fail" and case.group != "tensors"}
    assert failing == {(kind, dtype) for kind in KINDS for dtype in DTYPES}
