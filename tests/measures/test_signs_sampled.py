"""Signs of large modules are estimated from a sample: against the count of all, and by its standard error."""

from math import sqrt

import pytest
from kinds import make, normal

from d2surgery.measures import likeness
from d2surgery.measures.likeness import SAMPLE, compared, difference, profile


@pytest.fixture(autouse=True)
def _sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "COUNTED", 100)


def test_the_sample_lies_about_its_standard_error_from_the_count() -> None:
    W = normal(90, 110, seed=0)
    off = []
    for seed in range(40):
        first, second = make("lora", W, seed=10 * seed), make("lora", W, seed=10 * seed + 5)
        guess, exact = difference(first, second, seed=seed), difference(first, second, exact_signs=True)
        assert guess.signs.null == pytest.approx(exact.signs.null)
        assert guess.signs.standard_error == pytest.approx(0.5 / sqrt(SAMPLE), rel=0.2)
        assert exact.signs.standard_error == 0
        off.append((guess.signs.share - exact.signs.share) / guess.signs.standard_error)
    assert max(map(abs, off)) < 4
    assert sqrt(sum(x * x for x in off) / len(off)) == pytest.approx(1, abs=0.35)


def test_a_sample_in_which_all_agree_is_still_an_estimate() -> None:
    adapter = make("lora", normal(90, 110, seed=0))
    found = difference(adapter, adapter).signs
    assert found.share == 1
    assert 0 < found.standard_error < 1e-3


def test_the_same_inputs_give_the_same_sample_and_another_seed_another() -> None:
    W = normal(90, 110, seed=0)
    first, second = make("lora", W, seed=1), make("lora", W, seed=7)
    one, again, other = (difference(first, second, seed=s).signs.share for s in (3, 3, 4))
    assert one == again != other


def test_a_small_matrix_is_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "COUNTED", 30 * 40)
    W = normal(30, 40, seed=0)
    first, second = make("d2lora", W, seed=1), make("d2lora", W, seed=7)
    found = compared(profile(first), profile(second)).signs
    assert found == difference(first, second, exact_signs=True).signs
    assert found.standard_error == 0


def test_dual_lora_is_compared_entry_by_entry() -> None:
    W = normal(30, 40, seed=0)
    found = difference(make("duallora", W, seed=1), make("lora", W, seed=7))
    assert found.in_features is None
    assert found.signs.standard_error == 0
