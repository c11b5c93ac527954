"""Likeness: what two adapters have in common, module by module and over all modules. Every number has its null."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import refuse
from d2surgery.measures.delta import Delta
from d2surgery.measures.subspace import (
    Cosine,
    Directions,
    SignAgreement,
    Similarity,
    agreement,
    cosine,
    directions,
    gaussian_agreement,
    overlaps,
    similarity,
)

COUNTED = 1 << 18
"""Entries up to which all signs are counted: forming them costs no more than a sample."""
SAMPLE = 1 << 12
"""Entries whose signs are looked at in a larger matrix: a standard error of 0.008 at most."""
SIDES: tuple[Axis, ...] = ("in_features", "out_features")

# Of one module --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Difference:
    """What two adapters of one module have in common: of their updates; of Dual LoRA's delta, without subspaces."""

    shape: tuple[int, int]
    norms: tuple[float, float]
    """‖·‖_F of the first and of the second."""
    cosine: Cosine
    signs: SignAgreement
    out_features: "Shared | None"
    in_features: "Shared | None"

    def __repr__(self) -> str:
        shared = "".join(f", φ {side} {found[0]:.3f}" for side in SIDES if (found := phi(getattr(self, side))))
        return f"Difference({self.shape[0]}×{self.shape[1]}, cosine {self.cosine.value:.3f}{shared})"


class Shared(NamedTuple):
    """How much of their directions on one side two updates share: as numbers, of which thousands are held."""

    phi: float
    """φ(r, r) of the whole subspaces, 0 to 1; nan where one of them is empty. And its null."""
    null: float
    angles: tuple[float, ...]
    """Principal angles, ascending, in radians."""


def shared(found: Similarity) -> Shared:
    if not found.phi.numel():
        return Shared(nan, nan, ())
    return Shared(float(found.phi[-1, -1]), float(found.null[-1, -1]), tuple(found.angles.tolist()))


def difference(first: Adapter, second: Adapter, *, exact_signs: bool = False, seed: int = 0) -> Difference:
    """Of two adapters of one module. Signs are counted over SAMPLE entries of a matrix that has more than COUNTED, or
    over all. Raises SHAPE_MISMATCH and NOT_FINITE."""
    return compared(*(profile(adapter, exact_signs=exact_signs, seed=seed) for adapter in (first, second)))


class Profile(NamedTuple):
    """What any comparison with an adapter needs, computed once."""

    shape: tuple[int, int]
    matrix: LowRank | Delta | None
    """None where what follows is all that is needed of it."""
    directions: Directions | None
    """None for Dual LoRA, whose delta has no factors."""
    signs: Tensor | None
    """Of all entries or of those that `sample` picks, as int8; None where each comparison is to count all anew."""

    @property
    def sampled(self) -> bool:
        return self.signs is not None and self.signs.numel() < self.shape[0] * self.shape[1]

    def entries(self) -> LowRank | Delta:
        if self.matrix is not None:
            return self.matrix
        assert self.directions is not None
        return LowRank(self.directions.U * self.directions.sigma, self.directions.V.T)


@torch.no_grad()
def profile(adapter: Adapter, *, exact_signs: bool = False, seed: int = 0) -> Profile:
    """Two adapters are compared by profiles of one seed: it picks the entries whose signs are looked at."""
    update = adapter.update()
    if update is None:
        delta = Delta(adapter, None)
        return Profile(delta.shape, delta, None, None)
    found = directions(update)
    if exact_signs:
        return Profile(update.shape, update, found, None)
    if update.shape[0] * update.shape[1] <= COUNTED:
        return Profile(update.shape, None, found, update.dense().sign().flatten().to(torch.int8))
    i, j = sample(update.shape, seed)
    entries = torch.einsum("nr,nr->n", update.P[i].double(), update.Q.T[j].double())
    return Profile(update.shape, None, found, entries.sign().to(torch.int8))


def sample(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Row and column of SAMPLE entries, drawn independently and with replacement: the same of a shape and a seed."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(side, (SAMPLE,), generator=generator) for side in shape)
    return rows, columns


@torch.no_grad()
def compared(first: Profile, second: Profile) -> Difference:
    """Of two profiles of one module."""
    if first.shape != second.shape:
        raise refuse("SHAPE_MISMATCH", "two matrices", wanted=str(first.shape), got=str(second.shape))
    one, other = first.directions, second.directions
    if one is None or other is None:
        signs, value, norms = agreement(first.entries(), second.entries())
        return Difference(shape=first.shape, norms=norms, cosine=value, signs=signs, out_features=None,
                          in_features=None)  # fmt: skip
    pair = overlaps(one, other)
    value = cosine(pair)
    return Difference(
        shape=first.shape,
        norms=(one.norm, other.norm),
        cosine=value,
        signs=_signs(first, second, value),
        out_features=shared(similarity(pair, "out_features")),
        in_features=shared(similarity(pair, "in_features")),
    )


def _signs(first: Profile, second: Profile, value: Cosine) -> SignAgreement:
    """Sampled, with the error of (k + 1)/(n + 2), which is not zero where all n agree."""
    if first.signs is None or second.signs is None:
        return agreement(first.entries(), second.entries()).signs
    count, same = first.signs.numel(), int((first.signs == second.signs).sum())
    about = (same + 1) / (count + 2)
    error = sqrt(about * (1 - about) / count) if first.sampled else 0.0
    return SignAgreement(same / max(count, 1), gaussian_agreement(value.value), error)


def phi(found: Shared | None) -> tuple[float, float] | None:
    """φ(r, r) of the whole subspaces and its null, each 0 to 1; None where one of them is empty or unknown."""
    return None if found is None or found.phi != found.phi else (found.phi, found.null)


# Of all modules -------------------------------------------------------------------------------------------------------


class Likeness(NamedTuple):
    """What two adapters have in common over the modules both have; nan where there is nothing to compare."""

    cosine: float
    """Of all modules together: Σ<M, N>/√(Σ‖M‖² Σ‖N‖²); −1 to 1."""
    cosine_null: float
    """One standard deviation of unrelated updates with these norms."""
    in_features: float
    """φ(r, r), 0 to 1, mean over modules; and its null."""
    in_null: float
    out_features: float
    out_null: float
    signs: float
    """Share of entries of equal sign, mean over modules; and its null."""
    signs_null: float
    modules: int
    signs_error: float = 0.0
    """Standard error of `signs`; 0 where all entries were counted."""

    def __repr__(self) -> str:
        known = f"cosine {self.cosine:.3f} ± {self.cosine_null:.1g}: {self.in_words()}"
        return f"Likeness({self.modules} modules, {known})"

    def in_words(self) -> str:
        """`much alike`, `unrelated`. Beyond chance is more than four standard deviations of unrelated updates."""
        if self.cosine != self.cosine:
            return "not comparable, one of the updates is zero"
        if abs(self.cosine) <= 4 * self.cosine_null:
            return "unrelated"
        words = ((0.95, "nearly the same"), (0.5, "much alike"), (0.1, "somewhat alike"), (0.0, "faintly alike"))
        word = next(word for least, word in words if abs(self.cosine) >= least)
        return word if self.cosine > 0 else f"opposed ({word} but for the sign)"


def likeness(differences: Mapping[str, Difference]) -> Likeness:
    """Module -> Difference, put together."""
    records = list(differences.values())
    inner = sum(d.cosine.value * d.norms[0] * d.norms[1] for d in records if d.norms[0] and d.norms[1])
    norms = sqrt(sum(d.norms[0] ** 2 for d in records) * sum(d.norms[1] ** 2 for d in records))
    spread = sqrt(sum((d.cosine.null_sd * d.norms[0] * d.norms[1]) ** 2 for d in records))
    inside, outside = ([phi(getattr(d, side)) for d in records] for side in SIDES)
    return Likeness(
        inner / norms if norms else nan,
        spread / norms if norms else nan,
        *_means(inside),
        *_means(outside),
        *_means([(d.signs.share, d.signs.null) for d in records]),
        len(records),
        sqrt(sum(d.signs.standard_error**2 for d in records)) / max(len(records), 1),
    )


def closest(pairs: Mapping[tuple[int, int], Likeness], most: int) -> list[tuple[int, int]]:
    """The pairs that are most alike or most opposed, at most so many, in their order."""
    known = {at: abs(whole.cosine) for at, whole in pairs.items() if whole.modules and whole.cosine == whole.cosine}
    return sorted(sorted(known, key=lambda at: -known[at])[:most])


def _means(values: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Of the values and of their nulls, where they are known."""
    known = [value for value in values if value is not None and value[0] == value[0]]
    if not known:
        return nan, nan
    return sum(v[0] for v in known) / len(known), sum(v[1] for v in known) / len(known)
