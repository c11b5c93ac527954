"""Two models on the same questions: the gap between their accuracies and how sure it is.

Paired: only the questions on which the two differ carry information. With n items, b of which only the first answers
rightly ("lost") and c only the second ("gained"), the gap is (c − b)/n.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
DRAWS = 10_000
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Accuracies 0 to 1; gaps and intervals in percentage points, positive where the second model is better."""

    items: int
    accuracy_before: float
    accuracy_after: float
    lost: int  # b: right before, wrong after
    gained: int  # c: wrong before, right after
    changed: int  # another answer, whether right or wrong
    gap_pp: float
    ci_pp: Interval  # 95 %, paired bootstrap
    equivalence_pp: Interval  # 90 %: inside ±margin, the two are equivalent within the margin at 5 % (TOST)
    mcnemar_p: float

    def equivalent(self, margin_pp: float) -> bool:
        """Whether a gap of the margin or more is refuted either way, each by a one-sided test at 5 %."""
        low, high = self.equivalence_pp
        return -margin_pp < low and high < margin_pp

    def items_needed(self, margin_pp: float) -> int:
        """n = f·(z₀.₉₅ + z₀.₉₅)²/margin², f the share of flips (b + c)/n: for 95 % power when there is no gap."""
        flips = (self.lost + self.gained + 1) / (self.items + 2)
        return ceil(flips * (2 * _NORMAL.inv_cdf(0.95)) ** 2 / (margin_pp / 100) ** 2)


def paired_gap(gold: Sequence[int], before: Sequence[int | None], after: Sequence[int | None], *, seed: int = 0) -> Gap:
    """From the right choices and those of the two models, None where a model chose none."""
    right, first, second = (np.array([-1 if c is None else c for c in cs]) for cs in (gold, before, after))
    was, now = first == right, second == right
    lost, gained, items = int((was & ~now).sum()), int((now & ~was).sum()), len(gold)
    return Gap(
        items=items,
        accuracy_before=float(was.mean()),
        accuracy_after=float(now.mean()),
        lost=lost,
        gained=gained,
        changed=int((first != second).sum()),
        gap_pp=100 * (gained - lost) / items,
        ci_pp=percentile_interval(bootstrap(lost, gained, items, seed=seed), 0.95),
        equivalence_pp=_wald(lost, gained, items, 0.90),
        mcnemar_p=mcnemar(lost, gained),
    )


def mean_gap(gaps: Iterable[Gap], *, seed: int = 0) -> tuple[float, Interval]:
    """The mean over tasks in percentage points and its 95 % bootstrap interval; tasks are fixed, their items drawn."""
    gaps = list(gaps)
    draws = [bootstrap(g.lost, g.gained, g.items, seed=seed + at) for at, g in enumerate(gaps)]
    return float(np.mean([gap.gap_pp for gap in gaps])), percentile_interval(np.mean(draws, axis=0), 0.95)


def mean_accuracy(correct: Sequence[int], items: Sequence[int], *, seed: int = 0) -> tuple[float, Interval]:
    """The mean accuracy over tasks, 0 to 1, and its 95 % bootstrap interval; tasks are fixed, their items drawn."""
    draws = [bootstrap(0, c, n, seed=seed + at) / 100 for at, (c, n) in enumerate(zip(correct, items, strict=True))]
    return float(np.mean(np.divide(correct, items))), percentile_interval(np.mean(draws, axis=0), 0.95)


def bootstrap(lost: int, gained: int, items: int, *, seed: int, draws: int = DRAWS) -> npt.NDArray[np.float64]:
    """Gaps of resampled items, in percentage points. Drawing n of n items with replacement draws their outcomes
    −1, 0, +1 from a multinomial, so no item need be drawn."""
    generator = np.random.default_rng(seed)
    shares = np.array([lost, items - lost - gained, gained]) / items
    counts = generator.multinomial(items, shares, size=draws)
    return np.asarray(100 * (counts[:, 2] - counts[:, 0]) / items)


def percentile_interval(draws: npt.NDArray[np.float64], level: float) -> Interval:
    """Between the (1 − level)/2 and the (1 + level)/2 quantile of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Exact, two-sided: P(a split of the b + c flips at least as uneven | each way equally likely); 1 without flips."""
    from scipy.stats import binomtest  # a second, which an audit of weights need not spend

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def wilson(successes: int, items: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share, 0 to 1."""
    from scipy.stats import binomtest

    found = binomtest(successes, items).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _wald(lost: int, gained: int, items: int, level: float) -> Interval:
    """gap ± z·√(b + c − (c − b)²/n)/n in percentage points.

    Half an item is added to each of the four cells of the table (b + ½, c + ½, n + 2): without it, no flips among a
    few items would prove equivalence.
    """
    b, c, n = lost + 0.5, gained + 0.5, items + 2
    centre, z = (c - b) / n, _NORMAL.inv_cdf((1 + level) / 2)
    half = z * sqrt(b + c - (c - b) ** 2 / n) / n
    return 100 * (centre - half), 100 * (centre + half)
