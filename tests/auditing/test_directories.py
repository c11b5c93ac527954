"""A merged directory means what transformers loads: the audit passes where that is right, and nowhere else.

Every second mutation on one architecture, by turns; all on all in long tests.
"""

from collections import Counter
from pathlib import Path

import pytest
from mutations.directories import ARCHITECTURES, Mutation, Right, is_right, mutations

from d2surgery.auditing import audit
from d2surgery.errors import D2SurgeryError

ALL = mutations()
SHORT = {(mutation.id, ARCHITECTURES[i % len(ARCHITECTURES)]) for i, mutation in enumerate(ALL[::4])}
TURNS = [
    pytest.param(
        mutation, name, id=f"{mutation.id}-{name}", marks=() if (mutation.id, name) in SHORT else pytest.mark.long
    )
    for mutation in ALL
    for name in ARCHITECTURES
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:transformers")


@pytest.fixture(scope="session")
def rights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Right]:
    return {name: Right(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


def verdict_on(right: Right, directory: Path) -> tuple[str, str]:
    try:
        found = audit(right.built.base, right.built.adapter, directory)
    except D2SurgeryError as error:
        return "refused", str(error)
    return found.verdict, "; ".join(map(str, found.reasons))


@pytest.mark.parametrize(("mutation", "name"), TURNS)
def test_the_audit_passes_where_transformers_loads_the_right_model(
    rights: dict[str, Right], tmp_path: Path, mutation: Mutation, name: str
) -> None:
    right = rights[name]
    out = right.copy(tmp_path / "merged")
    mutation.change(right, out)
    if mutation.name.startswith("PEFT"):  # it rounds as it does
        is_so, why = not right.built.case.peft_merges_wrongly, "PEFT's merge is wrong here"
    else:
        is_so, why = is_right(right, out)
    verdict, said = verdict_on(right, out)
    if mutation.open and is_so:
        return
    assert (verdict == "pass") == is_so, f"{verdict}, and transformers: {why or 'right'}. {said}"


def test_there_are_enough_and_each_has_its_own_name() -> None:
    assert len(ALL) >= 150
    assert [name for name, count in Counter(mutation.id for mutation in ALL).items() if count > 1] == []
