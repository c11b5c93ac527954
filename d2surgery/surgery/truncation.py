"""The best approximation of a matrix by one of lower rank: its leading singular triplets, and how many to keep."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from d2surgery.adapters.lowrank import LowRank
from d2surgery.measures.delta import cuts
from d2surgery.measures.dense import lower_gram
from d2surgery.surgery.choices import Keep

EXACT_UP_TO = 1536
"""The smaller side up to which all singular values of a dense matrix are computed."""
_FIRST = 64  # triplets that are looked for at first above that
_OVERSAMPLING = 16
_SETTLED = 1e-9  # of the energy: what another iteration may still find
_MOST_ITERATIONS = 24


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix, in float64, and the energy Σσ² of all of it.

    Of a dense matrix more singular values may be known than vectors: those beyond what was asked to be kept.
    """

    U: Float64[Tensor, "out_features k"]
    sigma: Float64[Tensor, " known"]
    Vh: Float64[Tensor, "k in_features"]
    energy: float
    complete: bool
    """Whether there are no others but zeros."""

    @property
    def side(self) -> int:
        return min(self.U.shape[0], self.Vh.shape[1])

    @property
    def largest(self) -> float:
        """σ₁."""
        return float(self.sigma[0]) if len(self.sigma) else 0.0

    def left(self) -> Float64[Tensor, " k_plus_1"]:
        """The energy left out where 0, 1, … k triplets are kept; summed from the small end where all are known."""
        squares = self.sigma.square()
        if self.complete:
            return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return (self.energy - torch.cat([squares.new_zeros(1), squares.cumsum(0)])).clamp(min=0)

    def summed(self) -> Float64[Tensor, " k_plus_1"]:
        """Σσ of the first 0, 1, … k that are known."""
        return torch.cat([self.sigma.new_zeros(1), self.sigma.cumsum(0)])

    def curve(self) -> list[float]:
        """The relative Frobenius error at rank 0, 1, … k: √Σ_{i>k} σ²/√Σσ², the least there is."""
        return (self.left() / self.energy).sqrt().tolist() if self.energy else [0.0]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of the best approximation of this rank, √σ on either side. Of rank 0 they are zeros of rank 1."""
        if rank == 0:
            return self.Vh.new_zeros(1, self.Vh.shape[1]), self.U.new_zeros(self.U.shape[0], 1)
        root = self.sigma[:rank].sqrt()
        return root[:, None] * self.Vh[:rank], self.U[:, :rank] * root

    def leading(self, count: int) -> "Triplets":
        """So many of them, or all there are."""
        if count >= self.U.shape[1]:
            return self
        return Triplets(self.U[:, :count], self.sigma[:count], self.Vh[:count], self.energy, complete=False)

    def reweighted(self, weights: Float[Tensor, " in_features"]) -> "Triplets":
        """Of a matrix whose columns were multiplied by the weights: Vᵀ of the matrix itself, no longer orthonormal."""
        return self._replace(Vh=self.Vh / weights.double())


def triplets(matrix: LowRank | Tensor, keep: Keep, generator: Generator | None = None) -> Triplets:
    """As many of the leading triplets as it takes to keep what is asked for; all of them where that is cheap.

    Of factors and of a matrix whose smaller side is at most EXACT_UP_TO they are exact, else by subspace iteration
    (Halko, Martinsson, Tropp 2011) until another step finds less than 1e-9 of the energy. Raises NOT_FINITE.
    """
    if isinstance(matrix, LowRank):
        return _thin(matrix, keep)
    side = min(matrix.shape)
    if side <= EXACT_UP_TO:
        return _all(matrix, keep)
    wanted = min(keep.rank or _FIRST, side)
    while wanted < side // 2:
        found = _leading(matrix, wanted, generator)
        if keep.count(found) is not None:
            return found
        wanted *= 2
    return _all(matrix, keep)


def improved(matrix: Tensor, found: Triplets) -> Triplets:
    """The triplets of a matrix that differs little from the one whose triplets were found: one more iteration."""
    tall = matrix.shape[0] >= matrix.shape[1]
    rows = matrix.T if tall else matrix
    basis = found.Vh.T if tall else found.U
    basis = rows @ torch.linalg.qr(rows.T @ basis).Q
    return _projected(matrix, torch.linalg.qr(basis).Q, complete=False)


def _thin(matrix: LowRank, keep: Keep) -> Triplets:
    def count(sigma: Tensor) -> int:
        return keep.count(_values(sigma, matrix.shape)) or 0

    U, sigma, Vh = matrix.svd(count)
    return Triplets(U, sigma, Vh, float(sigma.square().sum()), True)


def _values(sigma: Tensor, shape: tuple[int, int]) -> Triplets:
    """All singular values, and no vectors."""
    nothing = sigma.new_empty(shape[0], 0), sigma.new_empty(0, shape[1])
    return Triplets(nothing[0], sigma, nothing[1], float(sigma.square().sum()), True)


def _all(matrix: Tensor, keep: Keep) -> Triplets:
    """From the Gram matrix of the smaller side; √eps64 of σ₁ and below is rounding and counts as zero."""
    tall = matrix.shape[0] >= matrix.shape[1]
    cut = cuts(max(matrix.shape), min(matrix.shape))
    gram = lower_gram((matrix[part] if tall else matrix[:, part] for part in cut), (matrix.shape[0], matrix.shape[1]))
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    known = int((values > values[-1:].clamp(min=0) * torch.finfo(torch.float64).eps * len(values)).sum())
    sigma = values[len(values) - known :].sqrt().flip(0)
    count = keep.count(_values(sigma, (matrix.shape[0], matrix.shape[1]))) or 0
    found = _projected(matrix, vectors[:, len(values) - count :].flip(1), complete=True)
    return found._replace(sigma=torch.cat([found.sigma, sigma[count:]]))


def _leading(matrix: Tensor, count: int, generator: Generator | None) -> Triplets:
    tall = matrix.shape[0] >= matrix.shape[1]
    rows = matrix.T if tall else matrix  # the small side first
    size = min(count + _OVERSAMPLING, rows.shape[0])
    generator = generator or torch.Generator().manual_seed(0)
    basis = torch.randn(rows.shape[0], size, generator=generator).to(rows)
    before = 0.0
    for _ in range(_MOST_ITERATIONS):
        image = torch.linalg.qr(rows.T @ torch.linalg.qr(basis).Q).Q
        basis = rows @ image
        caught = float(basis.double().square().sum())
        if caught - before <= _SETTLED * caught:
            break
        before = caught
    found = _projected(matrix, torch.linalg.qr(basis.double()).Q, complete=False)
    return found._replace(U=found.U[:, :count], sigma=found.sigma[:count], Vh=found.Vh[:count])


def _projected(matrix: Tensor, basis: Tensor, *, complete: bool) -> Triplets:
    """The triplets of the matrix within an orthonormal basis of its smaller side (Rayleigh and Ritz), in float64."""
    tall = matrix.shape[0] >= matrix.shape[1]
    image, energy = basis.new_empty(max(matrix.shape), basis.shape[1]), 0.0  # pieces kept apart leave holes in memory
    for part in cuts(*sorted(matrix.shape, reverse=True)):
        tile = (matrix[part] if tall else matrix[:, part].T).double()
        image[part] = tile @ basis
        energy += float(tile.square().sum())
    U, sigma, Wh = torch.linalg.svd(image, full_matrices=False)
    found = U, sigma, Wh @ basis.T
    return Triplets(*(found if tall else (found[2].T, sigma, U.T)), energy, complete)
