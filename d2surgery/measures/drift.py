"""Drift: how far an adapter moves the length and the direction of every vector of a base weight.

Everything follows, per vector, from how w' lies to w: `along` it and `across` it (docs/mathematics.md#drift). The
change of length along w, not the length itself, is what is computed, so that no result is a difference of nearly equal
numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import erf, exp, nan, pi, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.thin import gains_of
from d2surgery.adapters.vectors import Triple
from d2surgery.errors import refuse
from d2surgery.measures.delta import Delta, cuts

Vectors = Float64[Tensor, " vectors"]


class Moments(NamedTuple):
    """Over the vectors of a module."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Drift:
    """One number per vector along `along`, and what they come to. W' is the effective weight, delta = W' − W0.

    A vector whose base is zero has no relative drift and no angle: nan per vector, left out of the means.
    """

    along: Axis
    length: int
    """Entries of each vector."""
    base_norms: Vectors
    drift: Vectors
    """‖w'‖/‖w‖ − 1, signed."""
    one_minus_cosine: Vectors
    """1 − cos(w', w); 0 to 2."""
    angle: Vectors
    """In radians; 0 to π."""
    norm_ratio: Moments
    """Of ‖w'‖/‖w‖."""
    mean_drift: float
    cosine_mean: float
    cosine_min: float
    delta_magnitude: float
    """ΔM: the mean of abs(‖w'‖ − ‖w‖)  (DoRA, arXiv:2402.09353, section 3)."""
    delta_direction: float
    """ΔD: the mean of 1 − cos(w', w)  (the same)."""
    frobenius_norm: float
    """‖delta‖_F."""
    base_frobenius_norm: float
    relative_update: float
    """‖delta‖_F/‖W0‖_F; nan when W0 is zero."""
    undefined: int
    """How many base vectors are zero."""

    def __repr__(self) -> str:
        moved = f"‖delta‖/‖W0‖ {self.relative_update:.4g}, mean drift {self.mean_drift:+.3g}"
        return f"Drift({len(self.drift)} vectors along {self.along}: {moved}, mean cosine {self.cosine_mean:.6g})"


@torch.no_grad()
def delta_drift(adapter: Adapter, base_weight: Tensor, along: Axis | None = None) -> Drift:
    """One pass over W0 for the axis along which the kind's gains are constant (any axis for LoRA), two for the other
    axis of DoRA and D2-LoRA and for Dual LoRA, whose deltas are formed tile by tile in float64.

    along: None is the adapter's own axis, else "out_features". Raises NOT_FINITE, ZERO_NORM, SHAPE_MISMATCH.
    """
    shape = adapter.out_features, adapter.in_features
    if tuple(base_weight.shape) != shape:
        raise refuse("SHAPE_MISMATCH", "the base weight", wanted=str(shape), got=str(tuple(base_weight.shape)))
    along = along or adapter.along or "out_features"
    length = shape[1] if along == "out_features" else shape[0]
    update = adapter.update()
    if update is None or (adapter.normalises and along != adapter.along):
        return _record(_formed(Delta(adapter, base_weight), along), along, length)
    triple = thin_triple(update, base_weight, along)
    gains, norms = gains_of(adapter, triple)
    return _record(_position(triple, *gains)._replace(norms=norms), along, length)


def thin_triple(update: LowRank, base_weight: Tensor, along: Axis) -> Triple:
    """(‖w‖², <w,u>, ‖u‖²) per vector in one pass, all in float64: a norm ratio near 1 is a difference of two norms, and
    float32 products err by what the library's order of summing makes of them. Products with W0 are of the update's
    singular vectors, so that branches that nearly cancel cost no accuracy: u = Σ_k P_k Q_k with orthogonal P_k and
    orthonormal Q_k, hence ‖u_i‖² = Σ_k P_ik² along the rows and ‖u_j‖² = Σ_k ‖P_k‖² Q_kj² along the columns.
    """
    thin = update.recompressed()
    P, Q = thin.P, thin.Q
    rows = along == "out_features"
    base = P.new_zeros(base_weight.shape[0 if rows else 1])
    images = P.new_zeros(P.shape if rows else Q.shape)  # W0·Qᵀ or Pᵀ·W0
    for cut in cuts(*base_weight.shape):
        tile = base_weight[cut].double()
        if rows:
            images[cut] = tile @ Q.T
            base[cut] = tile.square().sum(1)
        else:
            images.addmm_(P[cut].T, tile)
            base += tile.square().sum(0)
    if not bool(base.isfinite().all()):
        raise refuse("NOT_FINITE", "The base weight holds NaN or infinity.")
    if rows:
        return Triple(base, (P * images).sum(1), P.square().sum(1))
    return Triple(base, (Q * images).sum(0), P.square().sum(0) @ Q.square())


class _Position(NamedTuple):
    """Of w' with respect to w, per vector: its change along w, what of it is across w, ‖w‖, and ‖w'‖ where known."""

    change: Vectors
    across: Vectors
    base: Vectors
    norms: Vectors | None = None


def _position(triple: Triple, base_excess: Tensor, update_gain: Tensor) -> _Position:
    """w' = (1 + e)·w + f·u: change e‖w‖ + f<w,u>/‖w‖, across abs(f)·√(‖u‖² − (<w,u>/‖w‖)²)."""
    base = triple.base.sqrt()
    radial = torch.where(base > 0, triple.cross / base, 0)
    across = (triple.update - radial.square()).clamp(min=0).sqrt()
    return _Position(base_excess * base + update_gain * radial, update_gain.abs() * across, base)


def _formed(delta: Delta, along: Axis) -> _Position:
    """From the delta itself: w' = w + δ."""
    vectors = delta.shape[0 if along == "out_features" else 1]
    sums = [torch.zeros(vectors, dtype=torch.float64, device=delta.base.device)] * 3
    for cut in cuts(*delta.shape):
        W, D = delta.base[cut].double(), delta.tile(out=cut)
        products = (W * W, W * D, D * D)
        if along == "out_features":
            sums = [torch.cat([s[: cut.start], p.sum(1), s[cut.stop :]]) for s, p in zip(sums, products, strict=True)]
        else:
            sums = [s + p.sum(0) for s, p in zip(sums, products, strict=True)]
    if not all(bool(s.isfinite().all()) for s in sums):
        raise refuse("NOT_FINITE", "The base weight or the adapter holds NaN or infinity.")
    triple = Triple(*sums)
    return _position(triple, torch.zeros_like(triple.base), torch.ones_like(triple.base))


def _record(position: _Position, along: Axis, length: int) -> Drift:
    change, across, base = position.change.cpu(), position.across.cpu(), position.base.cpu()
    norms = None if position.norms is None else position.norms.cpu()
    ahead = base + change  # <w', w>/‖w‖
    norm = torch.hypot(ahead, across) if norms is None else norms
    difference = (change * (base + ahead) + across.square()) / (norm + base) if norms is None else norms - base
    difference = torch.where(norm + base > 0, difference, 0)
    defined = base > 0
    drifts = torch.where(defined, difference / base, nan)
    versed = torch.where(defined, _one_minus_cosine(ahead, across), nan)
    energy, base_energy = float((change.square() + across.square()).sum()), float(base.square().sum())
    some = bool(defined.any())
    ratio, away = 1 + drifts[defined], versed[defined]
    return Drift(
        along=along,
        length=length,
        base_norms=base,
        drift=drifts,
        one_minus_cosine=versed,
        angle=torch.where(defined, torch.atan2(across, ahead), nan),
        norm_ratio=_moments(ratio),
        mean_drift=float(drifts[defined].mean()),
        cosine_mean=1 - float(away.mean()),
        cosine_min=1 - float(away.max()) if some else nan,
        delta_magnitude=float(difference.abs().mean()),
        delta_direction=float(away.mean()),
        frobenius_norm=sqrt(energy),
        base_frobenius_norm=sqrt(base_energy),
        relative_update=sqrt(energy / base_energy) if base_energy else nan,
        undefined=int((~defined).sum()),
    )


def _one_minus_cosine(ahead: Tensor, across: Tensor) -> Tensor:
    """t/(√(1+t)(1+√(1+t))), t = tan², where w' still points along w; 1 − cos where it does not; a zero w' has cos 0."""
    t = (across / ahead).square()
    r = (1 + t).sqrt()
    norm = torch.hypot(ahead, across)
    direct = torch.where(norm > 0, 1 - ahead / norm, 1)
    return torch.where((ahead > 0) & t.isfinite(), t / (r * (1 + r)), direct)


def _moments(values: Tensor) -> Moments:
    if not len(values):
        return Moments(nan, nan, nan, nan)
    std = float((values - values.mean()).square().mean().sqrt())
    return Moments(float(values.mean()), std, float(values.min()), float(values.max()))


# Over modules ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """Pearson's r between ΔM and ΔD over modules, and what random updates of the same relative sizes give.

    The null is not 0: modules that move more move more in both. `null_mean` and `null_sd` are over `draws` draws.
    """

    pearson: float
    null_mean: float
    null_sd: float
    modules: int
    draws: int


def correlation(drifts: Sequence[Drift], draws: int = 50, generator: torch.Generator | None = None) -> Correlation:
    """DoRA's Figure 2 as a number: LoRA's slope is positive, full fine-tuning's and DoRA's negative.

    The null draws for every module an update of independent Gaussian entries with the module's relative size: per
    vector ‖u‖ = ρ‖W0‖_F/√vectors and <w,u>/‖w‖ = ‖u‖·z/√length, z ~ N(0, 1). nan for less than two modules.
    """
    generator = generator or torch.Generator().manual_seed(0)
    points = [(d.delta_magnitude, d.delta_direction) for d in drifts]
    nulls = torch.tensor([_pearson([_random_point(d, generator) for d in drifts]) for _ in range(draws)])
    return Correlation(_pearson(points), float(nulls.mean()), float(nulls.std()), len(drifts), draws)


def expected_point(of: Drift) -> tuple[float, float]:
    """The expected (ΔM, ΔD) of independent Gaussian entries of the module's relative size.

    Per vector ‖u‖ = ‖delta‖F/√vectors and <w,u>/‖w‖ ~ N(0, ‖u‖²/length): to first order in ‖u‖/‖w‖ the length changes
    by a normal number of mean ‖u‖²/2‖w‖, whose absolute value folds it.
    """
    norms = [norm for norm in of.base_norms.tolist() if norm > 0]
    if not norms:
        return 0.0, 0.0
    size = of.frobenius_norm / sqrt(len(of.base_norms))
    sd = size / sqrt(of.length)
    magnitude = sum(_folded(size**2 * (1 - 1 / of.length) / (2 * norm), sd) for norm in norms)
    return magnitude / len(norms), sum(1 - 1 / sqrt(1 + (size / norm) ** 2) for norm in norms) / len(norms)


def _folded(mean: float, sd: float) -> float:
    """E|x| for x ~ N(mean, sd²)."""
    if sd == 0:
        return abs(mean)
    z = mean / sd
    return sd * sqrt(2 / pi) * exp(-z * z / 2) + mean * erf(z / sqrt(2))


def _random_point(of: Drift, generator: torch.Generator) -> tuple[float, float]:
    base = of.base_norms.cpu()
    size = of.frobenius_norm / sqrt(max(len(base), 1))
    radial = size / sqrt(of.length) * torch.randn(len(base), generator=generator, dtype=torch.float64)
    across = (size**2 - radial.square()).clamp(min=0).sqrt()
    record = _record(_Position(radial, across, base), of.along, of.length)
    return record.delta_magnitude, record.delta_direction


def _pearson(points: Sequence[tuple[float, float]]) -> float:
    if len(points) < 2:
        return nan
    return float(torch.corrcoef(torch.tensor(points, dtype=torch.float64).T)[0, 1])


# Entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """Shares of the entries of a module, 0 to 1."""

    sign_flips: float
    """sign(W') ≠ sign(W0), zero being a sign of its own."""
    sparsity: float
    """The delta is exactly zero (in float64, before any rounding)."""


@torch.no_grad()
def entries(adapter: Adapter, base_weight: Tensor) -> Entries:
    """Forms the delta tile by tile in float64."""
    delta = Delta(adapter, base_weight)
    flips = zeros = 0
    for W, D in _tiles(delta):
        flips += int(torch.count_nonzero(torch.sign(W + D) != torch.sign(W)))
        zeros += D.numel() - int(torch.count_nonzero(D != 0))
    count = max(base_weight.numel(), 1)
    return Entries(flips / count, zeros / count)


def _tiles(delta: Delta) -> Iterator[tuple[Tensor, Tensor]]:
    for cut in cuts(*delta.shape):
        yield delta.base[cut].double(), delta.tile(out=cut)
