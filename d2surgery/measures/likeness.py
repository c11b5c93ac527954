"""Likeness: what two adapters have in common, module by module and over all modules. Every number has its null."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import NamedTuple

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.measures.delta import Delta
from d2surgery.measures.subspace import Cosine, SignAgreement, Similarity, agreement, cosine, similarity

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
    out_features: Similarity | None
    in_features: Similarity | None

    def __repr__(self) -> str:
        shared = "".join(f", φ {side} {found[0]:.3f}" for side in SIDES if (found := phi(getattr(self, side))))
        return f"Difference({self.shape[0]}×{self.shape[1]}, cosine {self.cosine.value:.3f}{shared})"


def difference(first: Adapter, second: Adapter) -> Difference:
    """Of two adapters of one module. Raises SHAPE_MISMATCH."""
    M, N = (update if (update := a.update()) is not None else Delta(a, None) for a in (first, second))
    signs, value, norms = agreement(M, N)
    if isinstance(M, Delta) or isinstance(N, Delta):
        return Difference(shape=M.shape, norms=norms, cosine=value, signs=signs, out_features=None, in_features=None)
    return Difference(
        shape=M.shape,
        norms=norms,
        cosine=cosine(M, N),
        signs=signs,
        out_features=similarity(M, N, "out_features"),
        in_features=similarity(M, N, "in_features"),
    )


def phi(found: Similarity | None) -> tuple[float, float] | None:
    """φ(r, r) of the whole subspaces and its null, each 0 to 1; None where one of them is empty or unknown."""
    if found is None or not found.phi.numel():
        return None
    return float(found.phi[-1, -1]), float(found.null[-1, -1])


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
    )


def _means(values: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Of the values and of their nulls, where they are known."""
    known = [value for value in values if value is not None and value[0] == value[0]]
    if not known:
        return nan, nan
    return sum(v[0] for v in known) / len(known), sum(v[1] for v in known) / len(known)
