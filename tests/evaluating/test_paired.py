"""The statistics of paired answers: against scipy, against drawing items by hand, against all outcomes at once."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from d2surgery.evaluating.paired import bootstrap, mcnemar, mean_gap, paired_gap, percentile_interval, wilson

choice = st.none() | st.integers(0, 2)
answers = st.lists(st.tuples(st.integers(0, 2), choice, choice), min_size=1, max_size=60)


def outcomes(lost: int, gained: int, items: int) -> tuple[list[int], list[int], list[int]]:
    """The first model is right but for what is gained, the second but for what is lost."""
    gold = [0] * items
    before = [1] * gained + [0] * (items - gained)
    after = [0] * gained + [1] * lost + [0] * (items - gained - lost)
    return gold, before, after


@given(answers)
def test_counts_are_those_of_a_loop(rows: list[tuple[int, int | None, int | None]]) -> None:
    gold, before, after = zip(*rows, strict=True)
    gap = paired_gap(gold, before, after)
    assert gap.items == len(rows)
    assert gap.lost == sum(b == g != a for g, b, a in rows)
    assert gap.gained == sum(a == g != b for g, b, a in rows)
    assert gap.changed == sum(a != b for _, b, a in rows)
    assert gap.accuracy_before == pytest.approx(sum(b == g for g, b, _ in rows) / len(rows))
    assert gap.gap_pp == pytest.approx(100 * (gap.accuracy_after - gap.accuracy_before))


@given(answers)
def test_swapping_the_models_turns_the_signs(rows: list[tuple[int, int | None, int | None]]) -> None:
    gold, before, after = zip(*rows, strict=True)
    one, other = paired_gap(gold, before, after), paired_gap(gold, after, before)
    assert other.gap_pp == -one.gap_pp
    assert other.mcnemar_p == pytest.approx(one.mcnemar_p)
    assert other.equivalence_pp == pytest.approx((-one.equivalence_pp[1], -one.equivalence_pp[0]))


def test_the_bootstrap_is_that_of_scipy() -> None:
    lost, gained, items = 7, 19, 200
    data = np.array([-1] * lost + [1] * gained + [0] * (items - lost - gained)) * 100.0
    wanted = stats.bootstrap((data,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    gap = paired_gap(*outcomes(lost, gained, items))
    assert gap.ci_pp == pytest.approx(tuple(wanted), abs=0.3)  # one flip is half a point
    assert np.std(bootstrap(lost, gained, items, seed=0)) == pytest.approx(data.std() / sqrt(items), rel=0.03)


def test_the_bootstrap_repeats_under_a_seed() -> None:
    case = outcomes(3, 5, 50)
    assert paired_gap(*case, seed=4) == paired_gap(*case, seed=4)
    assert not np.array_equal(bootstrap(3, 5, 50, seed=4), bootstrap(3, 5, 50, seed=5))


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_sums_the_splits_that_are_as_uneven(lost: int, gained: int) -> None:
    flips = lost + gained
    tail = sum(comb(flips, k) for k in range(flips + 1) if abs(2 * k - flips) >= abs(lost - gained))
    assert mcnemar(lost, gained) == pytest.approx(tail / 2**flips)


@given(st.integers(1, 300), st.data())
def test_wilsons_ends_solve_the_score_equation(items: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, items))
    share, z = successes / items, stats.norm.ppf(0.975)
    for end in wilson(successes, items):
        assert abs(share - end) == pytest.approx(z * sqrt(max(end * (1 - end), 0) / items), abs=1e-6)


@pytest.mark.parametrize("true", [(0.01, 0.01), (0.02, 0.005), (0.05, 0.05), (0.002, 0.002), (0.1, 0.06)])
@pytest.mark.parametrize("items", [50, 200, pytest.param(1000, marks=pytest.mark.long)])
def test_equivalence_is_seldom_claimed_wrongly(true: tuple[float, float], items: int) -> None:
    """TOST at the true gap as the margin: a false claim in at most about 5 % of samples, by all likely outcomes."""
    b, c = true
    margin = 100 * abs(c - b)
    counts = np.random.default_rng(0).multinomial(items, [b, 1 - b - c, c], size=2000)
    unique, times = np.unique(counts, axis=0, return_counts=True)
    gaps = [paired_gap(*outcomes(int(lost), int(gained), items)) for lost, _, gained in unique]
    claimed = np.array([gap.equivalent(margin) for gap in gaps])
    assert (claimed * times).sum() / 2000 < 0.075


def test_no_flips_among_a_few_items_prove_nothing() -> None:
    few, many = (paired_gap(*outcomes(0, 0, items)) for items in (20, 2000))
    assert few.ci_pp == (0.0, 0.0)
    assert not few.equivalent(1.0)
    assert many.equivalent(1.0)


def test_the_items_needed_give_the_power_promised() -> None:
    """f = 1 %, margin 0.5 points: 4,330 items (analysis), and then 95 % of samples show equivalence, one side each."""
    gap = paired_gap(*outcomes(5, 5, 1000))
    assert gap.items_needed(0.5) == pytest.approx(4330, rel=0.1)
    items = 4330
    counts = np.random.default_rng(0).multinomial(items, [0.005, 0.99, 0.005], size=400)
    shown = [paired_gap(*outcomes(int(lost), int(gained), items)).equivalent(0.5) for lost, _, gained in counts]
    assert np.mean(shown) == pytest.approx(0.90, abs=0.05)  # 5 % are lost on either side


def test_the_mean_over_tasks_has_the_interval_of_a_mean() -> None:
    gaps = [paired_gap(*outcomes(lost, gained, 400)) for lost, gained in ((10, 12), (3, 9), (20, 8))]
    mean, (low, high) = mean_gap(gaps)
    assert mean == pytest.approx(np.mean([gap.gap_pp for gap in gaps]))
    variances = [(g.lost + g.gained - (g.gained - g.lost) ** 2 / 400) / 400**2 for g in gaps]
    assert high - low == pytest.approx(2 * 1.96 * 100 * sqrt(sum(variances)) / 3, rel=0.05)
    assert percentile_interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))
