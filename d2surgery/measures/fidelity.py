"""How much of a delta outlives rounding, and how a merged weight compares with the one that was wanted."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from math import inf, nan, sqrt
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2surgery.files.tensors import rounded

LOW_GAIN = 0.95  # below it a right merge has visibly lost part of the adapter (docs/mathematics.md#rounding)


@dataclass(frozen=True)
class Survival:
    """Sums over entries, additive over tiles. applied = round(W0 + delta) − W0."""

    elements: int = 0
    changed: int = 0  # entries whose stored value differs from the base's
    delta_squared: float = 0.0  # ‖delta‖²
    applied_squared: float = 0.0  # ‖applied‖²
    inner: float = 0.0  # <applied, delta>
    error_squared: float = 0.0  # ‖applied − delta‖², summed by itself: the difference of sums would cancel

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(*map(add, astuple(self), astuple(other)))

    @property
    def gain(self) -> float:
        """<applied, delta>/‖delta‖²: 1 when rounding loses nothing of the delta; nan for a zero delta."""
        return self.inner / self.delta_squared if self.delta_squared else nan

    @property
    def relative_error(self) -> float:
        """‖applied − delta‖/‖delta‖; nan for a zero delta."""
        return sqrt(self.error_squared / self.delta_squared) if self.delta_squared else nan

    @property
    def cosine(self) -> float:
        """Of applied and delta, −1 to 1; nan when either is zero."""
        norms = sqrt(self.delta_squared * self.applied_squared)
        return self.inner / norms if norms else nan

    @property
    def changed_share(self) -> float:
        """Share of entries whose stored value changed, 0 to 1. Alarming and harmless: judge by the gain."""
        return self.changed / self.elements if self.elements else nan


def survival(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Survival:
    """Of one tile. `base` and `delta` in the dtype of the computation; `base` is taken as stored in `dtype`."""
    return measured(rounded(base, dtype).to(base.dtype), delta, rounded(base + delta, dtype))


def measured(base: Tensor, delta: Tensor, merged: Tensor, space: Tensor | None = None) -> Survival:
    """As `survival`, of a merged weight that exists; base and delta in the dtype of the computation.

    `space`: memory of that dtype and shape to work in; fresh memory costs more here than the arithmetic.
    """
    space = torch.empty_like(base) if space is None else space
    if base.stride(0) < base.stride(1):  # sums of what does not lie together take four times as long
        base, delta, merged, space = base.T, delta.T, merged.T, space.T
    applied = space.copy_(merged).sub_(base)
    changed, norm = count((applied != 0).cpu()), torch.linalg.vector_norm
    rows = [  # sums over rows in the dtype of the computation, over their sums in float64
        norm(delta, dim=-1).square_(),
        norm(applied, dim=-1).square_(),
        torch.linalg.vecdot(applied, delta),
        norm(applied.sub_(delta), dim=-1).square_(),
    ]
    return Survival(base.numel(), changed, *torch.stack(rows).sum(1, dtype=torch.float64).tolist())


SPARSE = 1 / 16  # of the entries: gathering more takes longer than looking at all
MANY = 4096  # mismatched entries that are too many to look at all of them: fewer are counted one by one
MANTISSA = {4: 23, 8: 52}  # bits of it, by a float's size in bytes
_PIECE = 1 << 17  # entries compared at once: what is made of them stays in the cache, and in memory that malloc keeps
ULPS = (1, 2, 4, 16)  # upper ends of the bins of Comparison.ulps; the last bin has no end


@dataclass(frozen=True)
class Comparison:
    """Sums over entries, additive over tiles: a merged weight M beside the wanted one E = round(W0 + delta).

    e = E − W0, d = M − E. M = W0 + λ·e + noise gives d = (λ − 1)·e + noise, and with delta as the instrument
    λ̂ = 1 + <d, delta>/<e, delta>: exactly 1 for a right merge, whatever rounding leaves of a small delta.
    """

    elements: int = 0
    mismatched: int = 0  # entries whose bits differ from the wanted ones
    ulps: tuple[int, ...] = (0,) * (len(ULPS) + 1)  # mismatched entries by distance in units in the last place
    beyond: int = 0  # entries whose difference is more than rounding and sloppy products make: see `_beyond`
    halfway: int = 0  # mismatched entries whose exact value lies halfway, where none is `beyond`: see `halfway`
    e_delta: float = 0.0  # <e, delta>
    d_delta: float = 0.0  # <d, delta>
    ee: float = 0.0  # ‖e‖²
    de: float = 0.0  # <d, e>
    dd: float = 0.0  # ‖d‖²
    ee_delta2: float = 0.0  # Σ e²·delta², for the standard error
    de_delta2: float = 0.0
    dd_delta2: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        sums: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Comparison(**sums | {"ulps": tuple(map(add, self.ulps, other.ulps))})

    @property
    def strength(self) -> float:
        """λ̂; nan where nothing of the delta is left that could be measured."""
        return 1 + self.d_delta / self.e_delta if self.e_delta else nan

    @property
    def strength_error(self) -> float:
        """Standard error of λ̂ with entries of unequal noise (White): √Σ(d − (λ̂−1)e)²·delta² / <e, delta>."""
        if not self.e_delta:
            return nan
        x = self.d_delta / self.e_delta
        return sqrt(max(self.dd_delta2 - 2 * x * self.de_delta2 + x * x * self.ee_delta2, 0)) / abs(self.e_delta)

    @property
    def residual(self) -> float:
        """‖M − W0 − λ̂·e‖/‖e‖: what no strength explains, as a share of the update; nan for a zero update."""
        if not self.ee or not self.e_delta:
            return nan
        x = self.d_delta / self.e_delta
        return sqrt(max(self.dd - 2 * x * self.de + x * x * self.ee, 0) / self.ee)


def compare(base: Tensor, delta: Tensor, wanted: Tensor, merged: Tensor, size: float | None = None) -> Comparison:
    """Of one tile. `base` and `delta` in the dtype of the computation; `wanted` and `merged` as stored, one dtype;
    `size`: the root mean square of delta, where it is known."""
    if torch.equal(bits(wanted), bits(merged)):
        return regress(base, delta, wanted, merged)
    return _over_pieces(base, delta, wanted, merged, sqrt(_square(delta) / delta.numel()) if size is None else size)


def regress(base: Tensor, delta: Tensor, wanted: Tensor, merged: Tensor) -> Comparison:
    """As `compare`, without looking at single entries: `ulps`, `beyond`, `halfway` stay 0, and it takes a third."""
    return _over_pieces(base, delta, wanted, merged, None)


def _over_pieces(base: Tensor, delta: Tensor, wanted: Tensor, merged: Tensor, size: float | None) -> Comparison:
    dim = int(base.stride(0) < base.stride(1))
    some = pieces(dim, base, delta, wanted, merged)
    return sum((_compared(w0, change, e, m, size) for w0, change, e, m in some), Comparison())


def pieces(dim: int, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each (dim 0), or columns, some at a time."""
    first = matrices[0]
    step = max(_PIECE * first.shape[dim] // max(first.numel(), 1), 1)
    yield from zip(*(torch.split(values, step, dim) for values in matrices), strict=True)


def _compared(base: Tensor, delta: Tensor, wanted: Tensor, merged: Tensor, size: float | None) -> Comparison:
    """`size`: the root mean square of the tile's delta, where single entries are looked at."""
    other = differing(wanted, merged)
    mismatched, expected = count(other), wanted.to(base.dtype)
    e = expected - base  # not in place: `to` may give `wanted` itself
    e_delta = e * delta
    sums = Comparison(elements=base.numel(), mismatched=mismatched, e_delta=_sum(e_delta), ee=_square(e))
    if not mismatched:
        return sums
    there, ee_delta2 = merged.to(base.dtype), _square(e_delta)
    sums = replace(sums, ee_delta2=ee_delta2)
    if np.array_equal(there.numpy(), base.numpy()):  # the adapter was lost, as in most wrong merges: d is −e
        d = e.neg_()
        sums = replace(sums, d_delta=-sums.e_delta, de=-sums.ee, dd=sums.ee, de_delta2=-ee_delta2, dd_delta2=ee_delta2)
    else:
        d = there - expected
        d_delta = d * delta
        sums = replace(sums, d_delta=_sum(d_delta), de=_sum(e.mul_(d)), dd=_square(d))
        sums = replace(sums, de_delta2=_sum(e_delta.mul_(d_delta)), dd_delta2=_square(d_delta))
    if size is None:
        return sums
    if mismatched < SPARSE * sums.elements:
        base, delta, wanted, merged, expected, d = (m[other] for m in (base, delta, wanted, merged, expected, d))
        other = other[other]
    distances = _distances(wanted, merged)
    within = [int(np.count_nonzero(distances <= edge)) for edge in ULPS]
    edges: tuple[int, ...] = (other.numel() - mismatched, *within, other.numel())
    bins = (upper - lower for lower, upper in pairwise(edges))
    beyond = _beyond(other, base, delta, expected, d, wanted.dtype, size)
    between = 0 if beyond else count(other & halfway(base, delta, expected, d, size))
    return replace(sums, ulps=tuple(bins), beyond=beyond, halfway=between)


def strength_of(base: Tensor, delta: Tensor, merged: Tensor) -> tuple[float, float]:
    """λ with <merged − round(W0 + λ·delta), delta> = 0, and its standard error; (1, inf) where there is none.

    `Comparison.strength` is the first step towards it, and right near 1 only: rounding keeps another share of λ·delta
    than of delta. The error is White's, and no less than what one entry more or less would make of λ.
    """
    from scipy.optimize import brentq  # half a second, which a right merge need not spend

    values, known = (base, delta, merged), dict[float, float]()  # nothing of these in a closure, which brentq keeps

    def missing(strength: float) -> float:
        return _missing(strength, values, known)

    each = missing(0.0) - missing(1.0)
    if not each > 0:
        return 1.0, inf
    low = high = 1 + missing(1.0) / each
    reach = 0.01 * max(1.0, abs(low))
    while missing(low) < 0 and reach < 1e6:
        low, reach = low - reach, 2 * reach
    while missing(high) > 0 and reach < 1e6:
        high, reach = high + reach, 2 * reach
    if not missing(low) >= 0 >= missing(high):
        return 1.0, inf
    strength = float(brentq(_missing, low, high, args=(values, known), xtol=1e-7, rtol=1e-7))
    slope = max((missing(strength - 0.01) - missing(strength + 0.01)) / 0.02, 0.0) or each
    one, left = _missed(1.0, *values).square(), _missed(strength, *values).square()
    entry = float(one.sum()) / max(int(torch.count_nonzero(one)), 1)
    return strength, sqrt(float(left.sum()) + entry) / slope


def _missing(strength: float, values: tuple[Tensor, Tensor, Tensor], known: dict[float, float]) -> float:
    """<merged − round(W0 + λ·delta), delta>, which falls as λ grows: rounding is monotone. `known` is filled."""
    if strength not in known:
        known[strength] = float(_missed(strength, *values).sum(dim=-1).sum(dtype=torch.float64))
    return known[strength]


def _missed(strength: float, base: Tensor, delta: Tensor, merged: Tensor) -> Tensor:
    """Its terms."""
    return merged.to(base.dtype).sub(rounded(base + strength * delta, merged.dtype)).mul_(delta)


def _beyond(
    other: Tensor, base: Tensor, delta: Tensor, expected: Tensor, d: Tensor, stored: torch.dtype, size: float
) -> int:
    """How many of `other` are not by rounding; of MANY about how many, where most of every sixteenth row are not."""
    for every in (16, 1) if other.ndim == 2 and count(other) >= MANY else (1,):
        some = slice(None, None, every)
        here = other[some]
        found = count(here & ~_by_rounding(base[some], delta[some], expected[some], d[some], stored, size))
        if 2 * found > here.numel():
            return min(found * other.numel() // here.numel(), count(other))
    return found


def _by_rounding(base: Tensor, delta: Tensor, expected: Tensor, d: Tensor, stored: torch.dtype, size: float) -> Tensor:
    """Which entries are off by no more than 4 units in the last place of the larger of W0 and E, 1/64 of delta, and
    1/256 of delta's `size`, its root mean square (products in TF32 err by the size of their terms). NaN is not."""
    bound = spacing(base, expected, stored).mul_(4).add_(delta.abs(), alpha=1 / 64).add_(size / 256)
    return _at_most(d.abs(), bound)


def halfway(base: Tensor, delta: Tensor, expected: Tensor, d: Tensor, size: float) -> Tensor:
    """Where W0 + delta lies halfway between E and E + d, to 32 units in the last place of the computation's dtype, of
    the entry and of delta's `size`: what other sums and gains change of it decides which is nearer. Of a value changed
    by hand that is a rare chance."""
    middle = expected.add(d, alpha=0.5)
    largest = torch.maximum(base.abs(), middle.abs()).add_(size)
    return _at_most((base + delta).sub_(middle).abs_(), largest.mul_(32 * torch.finfo(base.dtype).eps))


def spacing(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of the larger of two numbers in `dtype`, each entry; a and b in float32 or float64."""
    return exponents(a, b, dtype).view(a.dtype).mul_(torch.finfo(dtype).eps)


def exponents(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of the larger exponent of two numbers, no smaller than those of normal ones in `dtype`."""
    exponent, least = (int(bits(torch.tensor(each, dtype=a.dtype))) for each in (inf, torch.finfo(dtype).tiny))
    larger = torch.maximum(bits(a) & exponent, bits(b) & exponent)
    return larger.clamp_(min=least)


def bits(values: Tensor) -> Tensor:
    """The stored bits as integers of the same size: NaN equals itself, and 0 differs from −0."""
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many floating-point numbers lie between two of one dtype, each entry; 0 between 0 and −0."""
    wide = torch.int32 if a.itemsize < 4 else torch.int64
    return _ordinal(a).to(wide).sub_(_ordinal(b)).abs_()


def _distances(a: Tensor, b: Tensor) -> "np.ndarray[Any, Any]":
    """`ulps` of finite numbers, as far as the bins of ULPS tell distances apart: in 16 bits those above 32767 wrap, to
    258 and more."""
    if a.itemsize != 2:
        return ulps(a, b).numpy()
    apart = _ordinal(a).sub_(_ordinal(b)).numpy().view(np.uint16)
    return np.minimum(apart, -apart)


def _ordinal(values: Tensor) -> Tensor:
    """Integers in the order of the floats they stand for, of the same size."""
    stored = bits(values)
    negative = stored >> (8 * stored.itemsize - 1)  # −1 or 0: floats are sign and size, integers two's complement
    return (negative & torch.iinfo(stored.dtype).max).bitwise_xor_(stored).sub_(negative)


# numpy compares and counts six times as fast as torch on a processor.


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Which entries have other bits."""
    return torch.from_numpy(bits(a).numpy() != bits(b).numpy())


def count(entries: Tensor) -> int:
    """How many are true."""
    return int(np.count_nonzero(entries.numpy()))


def _at_most(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(a.numpy() <= b.numpy())


def _sum(products: Tensor) -> float:
    """Of rows in the tile's dtype, and of these in float64."""
    return float(products.sum(dim=-1).sum(dtype=torch.float64))


def _square(values: Tensor) -> float:
    """The sum of squares, likewise."""
    return float(torch.linalg.vector_norm(values, dim=-1).square_().sum(dtype=torch.float64))
