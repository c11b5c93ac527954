"""A matrix of low rank kept as its two factors, with what follows exactly from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from d2surgery.errors import refuse

WELL_CONDITIONED = 1e5
_PIECE = 2048  # rows


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """P @ Q, never formed unless asked. Every number it gives is computed in float64.

    Singular values, norms and inner products come from thin QRs of the joint factors, not from Gram matrices: their
    absolute error is a few eps64 · Σ_k ‖p_k‖‖q_k‖ (p_k, q_k the columns of P and rows of Q), also where the terms of a
    sum nearly cancel. They raise NOT_FINITE if a factor holds NaN or infinity.
    """

    P: Float[Tensor, "out_features rank"]
    Q: Float[Tensor, "rank in_features"]

    def __post_init__(self) -> None:
        shapes = tuple(self.P.shape), tuple(self.Q.shape)
        if self.P.ndim != 2 or self.Q.ndim != 2 or self.P.shape[1] != self.Q.shape[0]:
            wanted = "P (out_features, rank) and Q (rank, in_features)"
            raise refuse("SHAPE_UNEXPECTED", "The factors of a product do not fit.", wanted=wanted, got=f"{shapes}")

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]} × {self.shape[1]}, rank at most {self.rank})"

    @property
    def shape(self) -> tuple[int, int]:
        return self.P.shape[0], self.Q.shape[1]

    @property
    def rank(self) -> int:
        """An upper bound of the rank: what the factors have room for."""
        return min(self.P.shape[0], self.P.shape[1], self.Q.shape[1])

    def __add__(self, other: "LowRank") -> "LowRank":
        if self.shape != other.shape:
            wanted, got = str(self.shape), str(other.shape)
            raise refuse("SHAPE_UNEXPECTED", "Two matrices of different shape have no sum.", wanted=wanted, got=got)
        return LowRank(torch.cat([self.P, other.P], 1), torch.cat([self.Q, other.Q], 0))

    def __mul__(self, scalar: float) -> "LowRank":
        return LowRank(self.P.double() * scalar, self.Q)

    __rmul__ = __mul__

    def dense(self) -> Float64[Tensor, "out_features in_features"]:
        return self.P.double() @ self.Q.double()

    def tile(self, *, out: slice) -> Float64[Tensor, "rows in_features"]:
        """Some rows of it."""
        return LowRank(self.P[out], self.Q).dense()

    def singular_values(self) -> Float64[Tensor, " values"]:
        """σ₁ ≥ σ₂ ≥ …, as many as `rank`; what rounding leaves of a zero shows as about eps64 · Σ ‖p_k‖‖q_k‖."""
        return self.values_and_rounding()[0]

    def values_and_rounding(self) -> tuple[Float64[Tensor, " values"], float]:
        """The singular values, and what any of them may be off by."""
        upper, lower = self._triangles()
        return torch.linalg.svdvals(upper @ lower.T), self._rounding(upper, lower)

    def frobenius_norm(self) -> Float64[Tensor, ""]:
        norm: Tensor = torch.linalg.matrix_norm(self._middle())
        return norm

    def inner(self, other: "LowRank") -> Float64[Tensor, ""]:
        """Σ_ij M_ij N_ij, with an error relative to ‖M‖‖N‖."""
        ours, theirs = self._core(), other._core()
        theirs_in_our_basis = (ours.left.T @ theirs.left) @ theirs.middle @ (theirs.right @ ours.right.T)
        return (ours.middle * theirs_in_our_basis).sum()

    def svd(self, count: Callable[[Tensor], int] = len) -> tuple[Tensor, Tensor, Tensor]:
        """(U, σ, Vᵀ) in float64 without the σ that are only rounding: (out_features, k), (k,), (k, in_features).

        count: from σ, how many vectors are wanted of them.
        """
        upper, lower = self._triangles()
        U, sigma, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        sigma = sigma[sigma > self._rounding(upper, lower)]
        kept = count(sigma)
        left, right = _basis_times(self.P, upper, U[:, :kept]), _basis_times(self.Q.T, lower, Vh[:kept].T)
        return left, sigma, right.T

    def directions(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U, σ, V) as of `svd`, with V (in_features, k), and U and V orthonormal to rounding however the factors are
        conditioned."""
        P, Q = self._finite()
        left, upper = torch.linalg.qr(P)
        right, lower = torch.linalg.qr(Q.T)
        U, sigma, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        kept = int((sigma > self._rounding(upper, lower)).sum())
        return left @ U[:, :kept], sigma[:kept], right @ Vh[:kept].T

    def recompressed(self) -> "LowRank":
        """The same matrix with the fewest columns: P = U·Σ, Q = Vᵀ of its SVD."""
        U, sigma, Vh = self.svd()
        return LowRank(U * sigma, Vh)

    def _rounding(self, upper: Tensor, lower: Tensor) -> float:
        """Of the factors' triangles, whose columns have the factors' norms: Householder QR errs by eps relative to each
        column, so the core by about eps · Σ_k ‖p_k‖‖q_k‖."""
        terms = upper.square().sum(0).sqrt() * lower.square().sum(0).sqrt()
        return float(terms.sum()) * self.rank * torch.finfo(torch.float64).eps

    def _core(self) -> "_Core":
        P, Q = self._finite()
        left, upper = torch.linalg.qr(P)
        right, lower = torch.linalg.qr(Q.T)
        return _Core(left, upper @ lower.T, right.T)

    def _middle(self) -> Tensor:
        """The core's alone, at a third of the cost."""
        upper, lower = self._triangles()
        middle: Tensor = upper @ lower.T
        return middle

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """R of P's and of Qᵀ's QR, whose columns have the factors' norms; not finite where a factor is not."""
        upper, lower = _triangle(self.P), _triangle(self.Q.T)
        _check_finite(upper, lower)
        return upper, lower

    def _finite(self) -> tuple[Tensor, Tensor]:
        P, Q = self.P.double(), self.Q.double()
        _check_finite(P, Q)
        return P, Q


def _check_finite(*factors: Tensor) -> None:
    if not all(bool(torch.linalg.vector_norm(factor).isfinite()) for factor in factors):
        raise refuse("NOT_FINITE", "A factor of a low-rank matrix holds NaN or infinity.")


def _triangle(factor: Tensor) -> Tensor:
    """R of a tall factor's QR, from those of pieces that a core's cache holds; as stable (TSQR, Demmel et al. 2012)."""
    pieces = torch.split(factor, max(_PIECE, 2 * factor.shape[1]))
    triangles = [torch.linalg.qr(piece.double(), mode="r").R for piece in pieces]
    found: Tensor = triangles[0] if len(triangles) == 1 else torch.linalg.qr(torch.cat(triangles), mode="r").R
    return found


def _basis_times(factor: Tensor, upper: Tensor, columns: Tensor) -> Tensor:
    """Q·columns of factor = Q·upper. As factor·upper⁻¹·columns, which errs by eps times the condition of `upper`, where
    that is small, at a third of the cost of Q. A few columns take BLAS three times as long as a few long rows."""
    factor = factor.double()
    if upper.shape[0] == upper.shape[1]:
        inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
        if float(upper.norm() * inverse.norm()) < WELL_CONDITIONED:
            return torch.matmul((inverse @ columns).T, factor.T).T
    return torch.matmul(columns.T, torch.linalg.qr(factor).Q.T).T


class _Core(NamedTuple):
    """left @ middle @ right, with orthonormal columns and rows outside and a small matrix in the middle."""

    left: Tensor
    middle: Tensor
    right: Tensor
