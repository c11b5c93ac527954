"""Subspace: how two updates, or an update and its base, lie to each other. Every number comes with its null:
what two matrices without any relation give."""

from dataclasses import dataclass
from math import acos, isnan, nan, pi, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import refuse
from d2surgery.measures.delta import Delta, cuts
from d2surgery.measures.dense import lower_gram

RELIABLE = 1e-6
"""Relative to σ₁: singular vectors of a float64 Gram matrix below it are not to be trusted."""


class Directions(NamedTuple):
    """The singular vectors and values of an update, above rounding: what all comparisons with it are made of."""

    U: Float64[Tensor, "out_features rank"]
    sigma: Float64[Tensor, " rank"]
    V: Float64[Tensor, "in_features rank"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[0]

    @property
    def norm(self) -> float:
        return float(self.sigma.norm())

    def side(self, along: Axis) -> Tensor:
        """The vectors of the input side ("in_features") or of the output side, leading first."""
        vectors: Tensor = self.V if along == "in_features" else self.U
        return vectors


def directions(update: LowRank) -> Directions:
    return Directions(*update.directions())


class Overlaps(NamedTuple):
    """The inner products of the singular vectors of two updates, on either side."""

    first: Directions
    second: Directions
    out_features: Float64[Tensor, "rank1 rank2"]
    in_features: Float64[Tensor, "rank1 rank2"]


def overlaps(first: Directions, second: Directions) -> Overlaps:
    """Raises SHAPE_MISMATCH."""
    if first.shape != second.shape:
        raise refuse("SHAPE_MISMATCH", "two matrices", wanted=str(first.shape), got=str(second.shape))
    return Overlaps(first, second, first.U.T @ second.U, first.V.T @ second.V)


class Cosine(NamedTuple):
    """<M, N>/(‖M‖‖N‖), nan when either is zero. Two unrelated matrices: mean 0, standard deviation `null_sd` = 1/√(mn).

    Adapters that started from the same A are not unrelated: compare their subspaces side by side.
    """

    value: float
    null_sd: float


def cosine(pair: Overlaps) -> Cosine:
    """Σ_ij p_i q_j <u_i, u'_j> <v_i, v'_j>, p and q the σ over their norms."""
    null_sd = 1 / sqrt(pair.first.shape[0] * pair.first.shape[1])
    sizes = pair.first.norm, pair.second.norm
    if not all(sizes):
        return Cosine(nan, null_sd)
    both = pair.out_features * pair.in_features
    value = float((pair.first.sigma / sizes[0]) @ both @ (pair.second.sigma / sizes[1]))
    return Cosine(min(max(value, -1.0), 1.0), null_sd)


# Subspaces -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Similarity:
    """φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖²_F/min(i, j)  (LoRA, arXiv:2106.09685, section 7.2); 0 to 1.

    `phi[i − 1, j − 1]`; U are the leading singular vectors on the side `along`: right ones for "in_features".
    """

    along: Axis
    phi: Float64[Tensor, "rank1 rank2"]
    angles: Float64[Tensor, " angles"]
    """Principal angles between the whole subspaces, ascending, in radians."""
    features: int

    @property
    def null(self) -> Float64[Tensor, "rank1 rank2"]:
        """max(i, j)/n, what random subspaces of n dimensions give."""
        i, j = _counting(*self.phi.shape)
        return (torch.maximum(i, j) / self.features).clamp(max=1)


def similarity(pair: Overlaps, along: Axis = "in_features") -> Similarity:
    """Of the two updates' row spaces ("in_features") or column spaces ("out_features")."""
    U, V, inside = pair.first.side(along), pair.second.side(along), getattr(pair, along)
    squares = inside.square().cumsum(0).cumsum(1).cpu()
    phi = squares / torch.minimum(*_counting(*squares.shape))
    return Similarity(along, phi, principal_angles(U, V, inside).cpu(), U.shape[0])


def _counting(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """1, 2, … down and across."""
    return torch.arange(1.0, rows + 1).double()[:, None], torch.arange(1.0, columns + 1).double()[None]


def principal_angles(U: Tensor, V: Tensor, inside: Tensor) -> Float64[Tensor, " angles"]:
    """arccos of the singular values of inside = UᵀV, U and V with orthonormal columns; where the cosine is above √½
    through arcsin of those of V − UUᵀV, which keeps small angles (Björck and Golub 1973)."""
    cosines = torch.linalg.svdvals(inside).clamp(max=1)  # descending: angles ascend
    if bool((cosines.square() < 0.5).all()):
        angles: Tensor = cosines.arccos()
        return angles
    apart = V - U @ inside if U.shape[1] >= V.shape[1] else U - V @ inside.T
    sines = torch.linalg.svdvals(apart).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.arccos(), sines.arcsin())


# Signs -----------------------------------------------------------------------------------------------------------


class SignAgreement(NamedTuple):
    """Share of entries whose signs agree; `null` is that of Gaussian entries with the same cosine."""

    share: float
    null: float
    standard_error: float = 0.0
    """Of a share that a sample of the entries estimates; 0 where all were counted."""


class Agreement(NamedTuple):
    """What one pass over the entries of two matrices gives."""

    signs: SignAgreement
    cosine: Cosine
    norms: tuple[float, float]


@torch.no_grad()
def agreement(first: LowRank | Delta, second: LowRank | Delta) -> Agreement:
    """mean[sign(M) = sign(N)], null 1 − arccos(cosine)/π; both formed tile by tile in float64."""
    if first.shape != second.shape:
        raise refuse("SHAPE_MISMATCH", "two matrices", wanted=str(first.shape), got=str(second.shape))
    count = first.shape[0] * first.shape[1]
    same, sums = 0, torch.zeros(3, dtype=torch.float64)
    for cut in cuts(*first.shape):
        M, N = first.tile(out=cut), second.tile(out=cut)
        same += int((torch.sign(M) == torch.sign(N)).sum())
        sums += torch.stack([(M * N).sum(), M.square().sum(), N.square().sum()]).cpu()
    inner, energy1, energy2 = sums.tolist()
    norms = sqrt(energy1), sqrt(energy2)
    value = min(max(inner / (norms[0] * norms[1]), -1.0), 1.0) if norms[0] and norms[1] else nan
    signs = SignAgreement(same / max(count, 1), gaussian_agreement(value))
    return Agreement(signs, Cosine(value, 1 / sqrt(max(count, 1))), norms)


def gaussian_agreement(cosine: float) -> float:
    """1 − arccos(cosine)/π: how often the signs of Gaussian entries agree."""
    return nan if isnan(cosine) else 1 - acos(cosine) / pi


# Against the base ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amplification:
    """‖D‖_F/‖UᵀW0Vᵀ‖_F, U and V the leading singular vectors of D  (LoRA, section 7.3); inf when W0 has nothing there.

    It is mostly a norm: `null` is what a D unrelated to W0 gives, `aligned` = null/factor how much more of W0 lies in
    D's directions than chance.
    """

    rank: int
    factor: float
    null: float
    """ρ√(mn)/r, ρ = ‖D‖_F/‖W0‖_F."""

    @property
    def aligned(self) -> float:
        return self.null / self.factor if self.factor else nan


@torch.no_grad()
def amplification(update: LowRank, base_weight: Tensor, rank: int | None = None) -> Amplification:
    """Of the update's `rank` leading directions; None is all of them. Both norms are of that part of D."""
    thin = update.recompressed()
    kept = min(rank or thin.rank, thin.rank)
    P, Q = thin.P[:, :kept], thin.Q[:kept]
    if not kept:
        return Amplification(0, nan, nan)
    inside = P.new_zeros(kept, kept)
    energy = 0.0
    U = P / P.norm(dim=0)
    for cut in cuts(*base_weight.shape):
        tile = base_weight[cut].double()
        inside += U[cut].T @ (tile @ Q.T)
        energy += float(tile.square().sum())
    size, found = float(P.norm()), float(inside.norm())
    count = base_weight.numel()
    null = size / sqrt(energy) * sqrt(count) / kept if energy else nan
    return Amplification(kept, size / found if found else float("inf"), null)


@dataclass(frozen=True, eq=False)
class Intruders:
    """Leading left singular vectors of W' that resemble no left singular vector of W0  (Shuttleworth et al.,
    arXiv:2410.21228, algorithm 1): largest abs cosine below `epsilon`."""

    count: int
    k: int
    epsilon: float
    cosines: Float64[Tensor, " k"]
    """Of each leading vector of W', the largest abs cosine with any left singular vector of W0."""
    strength: float
    """σ₁(delta)/σ_k(W0): below about 1 there are none."""


@torch.no_grad()
def intruders(adapter: Adapter, base_weight: Tensor, k: int = 10, epsilon: float = 0.5) -> Intruders:
    """All left singular vectors of W0 by one float64 eigendecomposition on the smaller side N, those of W' likewise:
    cost 2·(Gram + eigh), about 50 s for 4096 × 4096 on one thread and 3 N² float64 of memory.

    Vectors of W0 with σ below RELIABLE·σ₁ are left out where they follow from the right ones (out > in).
    """
    delta = Delta(adapter, base_weight)
    k = min(k, *delta.shape)
    base = _left_vectors(delta, delta.shape[0], with_delta=False)
    tuned = _left_vectors(delta, k, with_delta=True)
    cosines = (base.vectors.T @ tuned.vectors).abs().amax(0).clamp(max=1)
    strength = _largest(delta) / float(base.sigma[k - 1]) if float(base.sigma[k - 1]) else float("inf")
    return Intruders(int((cosines < epsilon).sum()), k, epsilon, cosines.cpu(), strength)


class _Left(NamedTuple):
    sigma: Tensor
    vectors: Tensor  # (out, count)


def _left_vectors(delta: Delta, count: int, *, with_delta: bool) -> _Left:
    """The leading left singular vectors of W0, or of W0 + delta."""
    out, in_ = delta.shape

    def tile(**cut: slice) -> Tensor:
        W = delta.base[cut.get("out", slice(None)), cut.get("in_", slice(None))].double()
        return W + delta.tile(**cut) if with_delta else W

    wide = out < in_
    tiles = (tile(in_=cut) if wide else tile(out=cut) for cut in cuts(max(out, in_), min(out, in_)))
    values, vectors = torch.linalg.eigh(lower_gram(tiles, delta.shape), UPLO="L")
    sigma, vectors = values.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    if wide:
        return _Left(sigma, vectors[:, :count])
    kept = (sigma > RELIABLE * sigma[0])[:count]
    right = vectors[:, : len(kept)][:, kept]
    left = torch.cat([tile(out=cut) @ right for cut in cuts(out, in_)]) / sigma[: len(kept)][kept]
    return _Left(sigma, left)


def _largest(delta: Delta) -> float:
    """σ₁ of the delta by power iteration, good to a few per cent: it is compared with 1."""
    x = torch.ones(delta.shape[1], 1, dtype=torch.float64, device=delta.base.device)
    norm = 0.0
    for _ in range(8):
        image = torch.zeros_like(x)
        for cut in cuts(*delta.shape):
            tile = delta.tile(out=cut)
            image += tile.T @ (tile @ x)
        norm = float(image.norm())
        if not norm:
            return 0.0
        x = image / norm
    return sqrt(norm)
