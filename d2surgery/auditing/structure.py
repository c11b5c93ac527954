"""Whether what differs from the nearest recipe is random in place and size, as rounding is, or has structure.

Rounding errors of whatever order of operations have no preferred sign and no preferred place. So of the elements that
no recipe gives (strays):

- Signs. Which way a stray lies from the expected value is a fair coin, whatever W0, delta and its place. That s of n
  strays of a part (a row, a column, a block, all) lie the way of W0, of delta, or upwards has the chance of a binomial:
  P ≤ 2·exp(−n·KL(s/n, ½)).
- Places. A stray is as likely in one part as in another, at the same ratio of delta to the spacing of the stored
  numbers. That a part holds O strays where twice as many as expected are X: P ≤ exp(O − X − O·ln(O/X)).

Each bound is exact for its null (Chernoff), and the chance of one false alarm in a whole audit is at most `ALARM`, by
Bonferroni over all parts and directions. Beside significance a structure must move more than products in 16 bits do:
1/256 of delta's norm there, and a millionth of the weight's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2surgery.auditing.strays import SIZES, SUMS, Marks
from d2surgery.files.tensors import rounded
from d2surgery.measures.fidelity import spacing

ALARM = 1e-6  # chance of a false alarm in one audit
SLOPPY = 1 / 256  # of delta, which products in 16 bits lose
FLOAT32 = 1e-6  # of the weight, which sums and gains in float32 lose
LOCAL = 1 / 64  # of delta's strength in a row: factors in 16 bits make it as uneven
_FEW = 1 / 64  # of the rows
_NEARLY = 0.95  # of the strays
_BLOCKS = (8, 16, 32, 64, 128, 256)  # neighbouring rows or columns: heads
_STEPS = tuple(range(2, 17))  # every n-th row or column

Axis = Literal["row", "column"]


class Structure(NamedTuple):
    """What stands out of rounding: where, and which way."""

    code: str
    what: str
    axis: Axis | None = None
    places: tuple[int, ...] = ()  # rows or columns
    factors: tuple[float, ...] = ()  # of each, where they are scaled


@dataclass(frozen=True)
class _Parts:
    """The sums of parts of one way of dividing, and what stands out in each."""

    sums: Tensor  # (sums, parts)
    limit: float  # of the logarithm of a chance
    gain: float = 0.0  # by which a row may be scaled in rounding its magnitude

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[SUMS.index(name)]

    @property
    def allowed(self) -> Tensor:
        """How much rounding moves a part, as a norm."""
        return SLOPPY * self["DD"].sqrt() + FLOAT32 * self["EE"].sqrt()

    @property
    def factor(self) -> Tensor:
        """M ≈ factor·E."""
        return 1 + self["dE"] / self["EE"].clamp(min=1e-300)

    @property
    def explained(self) -> float:
        """How much of ‖d‖² a factor of each part's own explains, beyond three times what it would by chance."""
        by_factor = self["dE"].square() / self["EE"].clamp(min=1e-300)
        return float((by_factor - 3 * self["dd"] / self["count"].clamp(min=1)).sum())

    @property
    def share(self) -> Tensor:
        """Of the delta that is there beyond the expected: M ≈ E + share·delta."""
        return self["dD"] / self["DD"].clamp(min=1e-300)

    def one_way(self, name: str) -> Tensor:
        """Parts whose strays lie the way of something more often than coins fall."""
        n, most = self["strays"], (self["strays"] + self[name].abs()) / 2
        p = most / n.clamp(min=1)
        bits = p * p.clamp(min=1e-9).log() + (1 - p) * (1 - p).clamp(min=1e-9).log() + log(2)
        return (n > 0) & (log(2) - n * bits < self.limit)

    @property
    def scaled(self) -> Tensor:
        moved = (self.factor - 1).abs()
        return self.one_way("base") & (moved * self["EE"].sqrt() > self.allowed) & (moved > self.gain)

    @property
    def shifted(self) -> Tensor:
        return self.one_way("up") & (self["d"].abs() / self["count"].clamp(min=1).sqrt() > self.allowed)

    @property
    def restrained(self) -> Tensor:
        """Of another strength than the rest."""
        return self.one_way("delta") & (self.share.abs() > LOCAL)

    @property
    def of_strength(self) -> bool:
        """Of the whole: its strays lie the way of the delta, more than any other way, as at another strength."""
        delta, base, up = (float(self[name].abs()) for name in ("delta", "base", "up"))
        return bool(self.one_way("delta")) and delta >= max(base, up)

    @property
    def crowded(self) -> Tensor:
        """With more strays than the others, twice as many as expected and beyond chance."""
        strays, twice = self["strays"], 2 * self["expected"].clamp(min=1e-12)
        chance = strays - twice - strays * (strays.clamp(min=1e-12) / twice).log()
        by_gain = (self.factor - 1).abs() <= self.gain
        return (strays > twice) & (chance < self.limit) & (self["dd"].sqrt() > self.allowed) & ~by_gain

    @property
    def out(self) -> Tensor:
        return self.scaled | self.shifted | self.restrained | self.crowded


def tests_of(out_features: int, in_features: int) -> int:
    """How many tests are made of a patch."""
    divisions = 2 + len(_BLOCKS) + len(_STEPS)
    return 4 * divisions * (out_features + in_features) + 8 * SIZES


def is_of_strength(marks: Marks, tests: int) -> bool:
    """Whether what strays does so as at another strength."""
    return _Parts(marks.rows.sum(1, keepdim=True), log(ALARM / max(tests, 1))).of_strength


def structure_of(marks: Marks, tests: int, gain: float = 0.0) -> Structure | None:
    """The plainest structure in the strays of a patch; None where they are as random as rounding.

    tests: made in the whole audit. gain: the largest relative error that rows' magnitudes and norms may have.
    """
    limit = log(ALARM / max(tests, 1))
    everything = _Parts(marks.rows.sum(1, keepdim=True), limit)
    zeroed = marks.zeros > max(0.8 * marks.strays, 2)
    if not zeroed and not marks.far and bool((everything["dd"].sqrt() <= everything.allowed).all()):
        return None
    rows, columns = _Parts(marks.rows, limit, gain), _Parts(marks.columns, limit)
    local = min(_all_places(rows, columns), key=lambda place: (not place.covers, place.cost), default=None)
    if zeroed:
        where = f" in {_where(local.axis, local.chosen)}" if local is not None and local.covers else ""
        return Structure("ZEROED", f"{marks.zeros} of {marks.elements} elements are zero{where}")
    by_size = None if everything.of_strength else _by_size(marks, limit)
    gross = marks.far > 0.2 * marks.strays
    if local is not None and local.covers and (by_size is None or local.filled > 0.5 * by_size[1]):
        return _named(local, gross)
    if everything.of_strength:
        return None
    if by_size is not None:
        return by_size[0]
    if (spread := _spread(everything, rows, columns, gross)) is not None:
        return spread
    if local is not None and not bool(everything.restrained):
        what = f"what differs is not random in place: most in {_where(local.axis, local.chosen)}"
        return Structure("DELTA_UNEXPLAINED", what)
    if marks.far and marks.strays < 0.05 * marks.elements:
        return _single(marks)
    return None


# Where -----------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    axis: Axis
    parts: _Parts
    chosen: Tensor  # which rows or columns
    covers: bool  # most strays
    cost: float  # share of the weight that it names
    filled: float  # share of its elements that stray


def _all_places(rows: _Parts, columns: _Parts) -> Iterator[_Place]:
    """Rows, then columns, unless a few rows hold it all."""
    for place in _places("row", rows):
        yield place
        if place.covers and place.cost < _FEW:
            return
    yield from _places("column", columns)


def _places(axis: Axis, parts: _Parts) -> Iterator[_Place]:
    """Rows or columns that stand out, by themselves, in blocks, or every n-th."""
    total, count = float(parts["strays"].sum()), parts.sums.shape[1]
    for group in _divisions(count):
        among = torch.zeros(len(SUMS), int(group.max()) + 1, dtype=torch.float64).index_add_(1, group, parts.sums)
        out = _Parts(among, parts.limit, parts.gain).out
        if bool(out.any()) and not bool(out.all()):
            chosen = out[group] & (parts["strays"] > 0)
            within = float(parts["strays"][chosen].sum())
            share = float(chosen.double().mean())
            covers, filled = within >= 0.8 * total and share <= 0.5, within / float(parts["count"][chosen].sum())
            yield _Place(axis, parts, chosen, covers, share * total / max(within, 1), filled)
            if covers:
                return


def _divisions(count: int) -> Iterator[Tensor]:
    every = torch.arange(count)
    yield every
    yield from (every // size for size in _BLOCKS if size < count)
    yield from (every % step for step in _STEPS if step < count)


def _named(place: _Place, gross: bool) -> Structure:
    """gross: as in `_spread`."""
    parts, chosen, axis = place.parts, place.chosen, place.axis
    here = _Parts(parts.sums[:, chosen], parts.limit)
    n = float(here["strays"].sum())
    ways = {name: float(here[name].abs().sum()) / max(n, 1) for name in ("base", "delta", "up")}
    way = max(ways, key=ways.__getitem__)
    where = _where(axis, chosen)
    numbers = tuple(int(i) for i in chosen.nonzero().flatten())
    by_factor = float((here["dE"].square() / here["EE"].clamp(min=1e-300)).sum())
    by_another = way == "base" and gross and by_factor < 0.7 * float(here["dd"].sum())  # rows swapped, say
    if ways[way] < 0.6 or by_another:
        return Structure(
            "DELTA_UNEXPLAINED", f"more than rounding differs in {where}, and not in the rest", axis, numbers
        )
    if way == "base":
        factors = tuple(float(f) for f in here.factor)
        code = "ROW_SCALED" if axis == "row" else "COLUMN_SCALED"
        return Structure(code, f"{where} {_times(factors)}", axis, numbers, factors)
    if way == "up":
        return Structure("VALUES_SHIFTED", f"a constant was added to {where}", axis, numbers)
    size = float(here["DD"].sum().clamp(min=1e-300))
    share, error = float(here["dD"].sum()) / size, sqrt(float(here["dd"].sum()) / size / float(here["count"].sum()))
    if abs(share + 1) < max(0.1, 2 * error):
        return Structure("PARTIAL_MERGE", f"as in the base: {where}", axis, numbers)
    by_share = float((here["dD"].square() / here["DD"].clamp(min=1e-300)).sum())
    code = "PARTIAL_MERGE" if by_share > 0.7 * float(here["dd"].sum()) else "WRONG_STRENGTH"  # or another adapter there
    return Structure(code, f"strength {1 + share:.3g} in {where}", axis, numbers)


def _by_size(marks: Marks, limit: float) -> tuple[Structure, float] | None:
    """Strays that are the largest or the smallest elements, and which share of these stray."""
    count, strays, expected = marks.sizes
    total = float(strays.sum())
    for noun, flip in (("largest", True), ("smallest", False)):
        above, held, likely = ((t.flip(0) if flip else t).cumsum(0) for t in (count, strays, expected))
        enough = int((held >= 0.8 * total).nonzero()[0]) if total else 0
        usual = (
            total * float(above[enough]) / marks.elements if flip else float(likely[enough])
        )  # small ones stray more
        n, twice = float(held[enough]), 2 * usual
        chance = n - twice - n * log(max(n, 1) / max(twice, 1e-12)) if n else 0.0
        few = float(above[enough]) <= 0.2 * marks.elements
        if n > 4 and few and n > twice and chance < limit and n > 0.1 * float(above[enough]):
            grown = float(marks.rows[SUMS.index("base")].sum())
            how = "grown" if grown > 0.6 * total else "shrunk" if grown < -0.6 * total else "changed"
            return Structure("LARGEST_CHANGED", f"{int(total)} of the {noun} elements have {how}"), n / float(
                above[enough]
            )
    return None


def _spread(everything: _Parts, rows: _Parts, columns: _Parts, gross: bool) -> Structure | None:
    """What is everywhere. gross: by far more than rounding, so that it must explain most of what differs, or nearly all
    that differs lies that way: of a small constant 16 bits make few and large steps."""
    n = max(float(everything["strays"]), 1)
    whole = everything.explained
    least = 0.7 * float(everything["dd"]) if gross else 0.0
    for code, axis, parts in (("ROW_SCALED", "row", rows), ("COLUMN_SCALED", "column", columns)):
        explained = parts.explained
        if float(parts.scaled.double().mean()) > 0.1 and explained > max(least, 2 * whole):
            factors = tuple(float(f) for f in parts.factor[parts.scaled])
            return Structure(code, f"{_where(axis, parts.scaled)} {_times(factors)}")  # type: ignore[arg-type]
    one_way = {name: float(everything[name].abs()) / n for name in ("base", "up")}
    if bool(everything.scaled) and one_way["base"] >= one_way["up"] and (whole >= least or one_way["base"] > _NEARLY):
        what = f"all of the weight is multiplied by {float(everything.factor):.5g}"
        return Structure("WEIGHT_DECAYED", what, factors=(float(everything.factor),))
    lifted = float(everything["d"].square() / everything["count"].clamp(min=1))
    if bool(everything.shifted) and (lifted >= least or one_way["up"] > _NEARLY):
        each = float(everything["d"] / everything["count"])
        return Structure("VALUES_SHIFTED", f"all of the weight is shifted, by {each:.2g} on average")
    return None


def _single(marks: Marks) -> Structure:
    n = marks.strays
    what = f"{n} of {marks.elements} elements differ, {marks.far} by more than rounding; all else is replayed"
    top = marks.sizes[0].flip(0).cumsum(0)
    least = int(marks.sizes[1].nonzero()[0])
    largest = n > 2 and float(top[SIZES - 1 - least]) <= 4 * n
    return Structure("LARGEST_CHANGED" if largest else "DELTA_UNEXPLAINED", what)


# In words --------------------------------------------------------------------------------------------------------


def _where(axis: Axis, chosen: Tensor) -> str:
    numbers = [int(i) for i in chosen.nonzero().flatten()]
    if len(numbers) == 1:
        return f"{axis} {numbers[0]} of {len(chosen)}"
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{axis}s {numbers[0]} to {numbers[-1]} of {len(chosen)}"
    some = ", ".join(map(str, numbers[:3])) + (", …" if len(numbers) > 3 else "")
    return f"{len(numbers)} of {len(chosen)} {axis}s ({some})"


def _times(factors: tuple[float, ...]) -> str:
    low, high = min(factors), max(factors)
    alike = high - low < 2e-3 * max(abs(high), 1)
    return f"multiplied by {low:.4g}" + ("" if alike else f" to {high:.4g}")


# Of low rank -----------------------------------------------------------------------------------------------------


def low_rank(right: Tensor, delta: Tensor, merged: Tensor, *, tries: int = 5, margin: float = 1.3) -> bool:
    """Whether the errors of a block have a direction that errors of the same sizes with random signs do not have."""
    expected = rounded(right, merged.dtype).to(torch.float64)
    unit = spacing(right - delta, right, merged.dtype).double()
    errors = ((merged.double() - expected) / unit).clamp_(-2, 2)
    if not bool(errors.any()):
        return False
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, errors.shape, generator=generator) * 2 - 1 for _ in range(tries))
    chance = max(_largest(errors * sign) for sign in signs)
    top = _largest(errors)
    typical = float(unit.median()) * top
    return top > margin * chance and typical > SLOPPY * float(delta.norm())


def _largest(matrix: Tensor) -> float:
    """Its largest singular value, from below."""
    vector = torch.randn(matrix.shape[1], 4, generator=torch.Generator().manual_seed(1), dtype=matrix.dtype)
    for _ in range(12):
        vector, _ = torch.linalg.qr(matrix.T @ (matrix @ vector))
    return float(torch.linalg.matrix_norm(matrix @ vector, ord=2))
