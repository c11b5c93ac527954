"""Merging what PEFT trained: every architecture and option, against PEFT and against the formula by hand.

The oracle of outputs is PEFT's unmerged float32 forward: its own merge is wrong for tied weights (where it adds to
both sides) and for ensure_weight_tying (twice), which is shown here. The oracle of weights is
`models.effective_weights` in float64; where PEFT's merge is right, it too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longer import one_in
from models import CASES, Built, f64, round_to, spacing, state

from d2surgery.merging import merge

NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARE = {"BF16": 1 / 1024, "F16": 2 / 1024}  # of elements that may be the neighbour of the right number
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", one_in(2, CASES))
def test_the_merged_model_answers_as_the_unmerged_one(built: Callable[[str], Built], name: str) -> None:
    case = built(name)
    answer, unmerged = case.in_float64(case.load(case.merged)), case.in_float64(case.with_peft())
    assert relative(answer, unmerged) < 1e-5
    without = case.in_float64(case.load(case.base))
    if name != "t5":  # with `shared` alone adapted, still q and wo change the answer
        assert relative(without, unmerged) > 1e-4, "the adapter does nothing: this test would see nothing"


@pytest.mark.parametrize("name", one_in(2, CASES))
def test_float32_weights_are_the_formula_to_two_units_in_the_last_place(
    built: Callable[[str], Built], name: str
) -> None:
    case = built(name)
    got = state(case.load(case.merged))
    want = case.expected(case.base)
    assert got.keys() == want.keys()
    for key, values in want.items():
        assert (np.abs(f64(got[key]) - values) <= 2 * spacing(values, "F32")).all(), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.peft_merges_wrongly])
def test_float32_weights_are_those_of_pefts_merge(built: Callable[[str], Built], name: str) -> None:
    case = built(name)
    got, want = state(case.load(case.merged)), state(case.with_peft().merge_and_unload())
    for key, values in want.items():
        assert float((got[key] - values).abs().max()) <= 1e-6 * float(values.abs().max()), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.peft_merges_wrongly])
def test_pefts_own_merge_of_tied_weights_is_wrong(built: Callable[[str], Built], name: str) -> None:
    case = built(name)
    model = case.with_peft().merge_and_unload()
    assert relative(case.forward(model), case.unmerged) > 1e-2


@pytest.mark.parametrize("dtype", one_in(2, ["BF16", "F16"]))
@pytest.mark.parametrize("name", one_in(2, CASES))
def test_sixteen_bit_weights_are_rounded_once(
    built: Callable[[str], Built], tmp_path: Path, name: str, dtype: str
) -> None:
    case = built(name)
    base = tmp_path / "base"
    type(case.case.base()).from_pretrained(case.base).to(NAMES[dtype]).save_pretrained(base)
    merge(base, case.adapter, tmp_path / "merged")
    got, before = state(case.load(tmp_path / "merged", "auto")), state(case.load(base, "auto"))
    assert_rounded_once(got, before, case.expected(base), dtype)


def assert_rounded_once(got: dict[str, Any], before: dict[str, Any], want: dict[str, Any], dtype: str) -> None:
    """All but a share equal the correctly rounded values; none is off by more than one unit of the larger of W0, W'."""
    wrong = total = 0
    for key, values in want.items():
        right = round_to(values, dtype)
        off = np.abs(f64(got[key]) - right)
        largest = np.maximum(
            np.abs(values), np.abs(f64(before[key])) if key in before and before[key].shape == values.shape else 0
        )
        assert (off <= spacing(largest, dtype)).all(), key
        wrong, total = wrong + int((off > 0).sum()), total + values.size
    assert wrong <= SHARE[dtype] * total, f"{wrong} of {total}"
