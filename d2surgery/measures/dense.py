"""Spectra of matrices without structure: by the Gram matrix, or a converged head and an estimated tail."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from d2surgery.measures.delta import cuts
from d2surgery.measures.ranks import NUMBERS, Spectrum, check_finite, ranks, spectrum_of

GRAM_FLOOR = 3e-8
"""Relative to σ₁: below it a float64 Gram matrix of this size shows its own rounding (measured; √eps64 = 1.5e-8)."""
CONVERGED = 3e-3
"""A Ritz value whose residual is below this share of it counts as converged: its error is of the second order."""
SINGLE_FLOOR = 1e-6
"""Relative to σ₁: below it nothing counts as converged; float32's own noise looks like a value there."""
CALIBRATE = 1e-3
"""The tail's energy is known by subtraction if it is at least this share of the whole."""
_BLOCK = 512
HEAD = 128
OVERSAMPLING = 16
POWER_ITERATIONS = 2
PROBES = 16
STEPS = 40

# Exact -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gram_spectrum(tiles: Iterator[Tensor], shape: tuple[int, int], cancellation: float | None = None) -> Spectrum:
    """√ of the eigenvalues of Σ TᵀT (tall) or Σ TTᵀ (wide) over tiles T that hold the smaller side whole, in float64.

    An error of eps64·σ₁² in σ² is one of GRAM_FLOOR·σ₁ in a small σ and far less in a large one. Raises NOT_FINITE.
    """
    sigma = _roots(lower_gram(tiles, shape))
    return spectrum_of(
        of="delta",
        method="exact",
        shape=shape,
        singular_values=sigma,
        numerical_rank=None,
        error_bound=GRAM_FLOOR,
        cancellation=cancellation,
        **ranks(sigma),
    )


def zero_spectrum(shape: tuple[int, int]) -> Spectrum:
    return replace(gram_spectrum(iter(()), (0, 0)), shape=shape)


def lower_gram(tiles: Iterator[Tensor], shape: tuple[int, int]) -> Tensor:
    """Σ TᵀT (tall) or Σ TTᵀ (wide) in float64; of the half above the diagonal only what the blocks hold.

    Raises NOT_FINITE.
    """
    side = min(shape)
    gram = torch.zeros(side, side, dtype=torch.float64)
    for tile in tiles:
        rows = (tile.double().T if shape[0] >= shape[1] else tile.double()).contiguous()
        gram = gram.to(rows.device)
        for start in range(0, side, _BLOCK):
            stop = start + _BLOCK
            gram[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)
    check_finite(gram.diagonal())  # a sum of squares: no NaN or infinity can hide
    return gram


def _roots(gram: Tensor) -> Tensor:
    scale = float(gram.diagonal().max()) if gram.numel() else 0.0
    if scale == 0:
        return torch.zeros(gram.shape[0], dtype=torch.float64)
    values: Tensor = torch.linalg.eigvalsh(gram / scale, UPLO="L")
    return values.clamp(min=0).sqrt().flip(0).cpu() * sqrt(scale)


# Head and tail ---------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """Ritz triples on the smaller side: rows of V orthonormal, the matrix times V has singular values θ."""

    theta: Tensor
    V: Tensor
    residual: Tensor

    def converged(self) -> int:
        """How many leading ones did; after one that did not, an index would be in doubt."""
        good = (self.residual <= CONVERGED * self.theta) & (self.theta > SINGLE_FLOOR * self.theta.max())
        return int(good.cumprod(0).sum())

    def error(self, rounding: float) -> float:
        """A singular value lies within the residual of each θ, and within `rounding` of the delta's; relative to σ₁."""
        return (float(self.residual.max()) + rounding) / float(self.theta[0]) if len(self.theta) else 0.0


@torch.no_grad()
def head_tail(
    matrix: Tensor,
    *,
    head: int = HEAD,
    probes: int = PROBES,
    steps: int = STEPS,
    cancellation: float | None = None,
    generator: Generator | None = None,
) -> Spectrum:
    """Leading singular values by randomized subspace iteration (Halko, Martinsson, Tropp 2011); the others through
    Golub–Kahan quadrature from `probes` random vectors orthogonal to what converged (Ubaru, Chen, Saad 2017).

    The quadrature's nodes are singular values, its weights how many they stand for, so that one formula (`ranks`)
    serves every method; the standard errors are the jackknife's over probes. What finds the head's subspace and what is
    an estimate uses products in the matrix's dtype; the head's values and residuals are of float64 products, so that
    they hold to `error_bound` however a library sums. The Frobenius norm is exact.
    `generator` is of the CPU; None is a fixed seed.
    """
    check_finite(matrix.abs().max())
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # small side first
    side = rows.shape[0]
    energy = float(_sum_of_squares(rows))
    if energy == 0:
        return zero_spectrum((matrix.shape[0], matrix.shape[1]))
    generator = generator or torch.Generator().manual_seed(0)
    found = _leading(rows, head, generator)
    bound = float(found.theta.sum()) + sqrt((side - len(found.theta)) * max(energy - _energy(found.theta), 0.0))
    kept = _Head(*(part[: found.converged()] for part in found))
    theta, V = kept.theta, kept.V
    rest = energy - _energy(theta)
    known = rest if rest > CALIBRATE * energy else None
    diagonal, below = _bidiagonal(rows, V, probes, steps, generator)
    tail = _tail(theta, diagonal, below, side, known)
    numbers = tail.ranks(range(probes))
    errors = _standard_errors(tail, numbers, _tail(theta, diagonal, below, side, known, half=True), side)
    numbers["frobenius_norm"] = sqrt(energy)
    exact = set(NUMBERS) - set(errors)
    return spectrum_of(
        of="delta",
        method="head-tail",
        shape=(matrix.shape[0], matrix.shape[1]),
        singular_values=theta.cpu(),
        numerical_rank=None,
        error_bound=kept.error(torch.finfo(rows.dtype).eps / 2 * sqrt(energy)),
        cancellation=cancellation,
        nuclear_norm_bound=bound,
        standard_errors=errors,
        quality={name: "exact" if name in exact else "estimate" for name in NUMBERS},
        **numbers,
    )


@dataclass(frozen=True)
class _Tail:
    """A converged head, and for each probe a distribution of the other singular values."""

    theta: Tensor
    nodes: Tensor  # (probes, steps)
    weights: Tensor  # (probes, steps); each row sums to the number of values in the tail
    energy: float | None  # of the tail, if known

    def ranks(self, chosen: "range | list[int]") -> dict[str, float]:
        """From the mean of the chosen probes' distributions, scaled to the energy that is known."""
        nodes, weights = self.nodes[list(chosen)], self.weights[list(chosen)] / len(chosen)
        if self.energy is not None:
            nodes = nodes * sqrt(self.energy / float((weights * nodes.square()).sum()))
        ones = torch.ones_like(self.theta)
        return ranks(torch.cat([self.theta, nodes.reshape(-1)]), torch.cat([ones, weights.reshape(-1)]))

    def jackknife(self) -> dict[str, float]:
        """√((p − 1)/p · Σ (x₍ᵢ₎ − mean)²) over the p numbers that leave one probe out (Quenouille, Tukey), times
        1 + 2/p, so that twice it covers 95 % although p is small (Student's t and the scaling to a known energy)."""
        probes = len(self.nodes)
        left_out = [self.ranks([i for i in range(probes) if i != out]) for out in range(probes)]
        values = torch.tensor([list(numbers.values()) for numbers in left_out], dtype=torch.float64)
        errors = ((probes - 1) * values.var(0, correction=0)).sqrt() * (1 + 2 / probes)
        return dict(zip(NUMBERS, errors.tolist(), strict=True))


def _tail(theta: Tensor, diagonal: Tensor, below: Tensor, side: int, energy: float | None, half: bool = False) -> _Tail:
    steps = max(diagonal.shape[1] // 2, 1) if half else diagonal.shape[1]
    nodes, weights = _gauss(diagonal[:, :steps], below[:, : steps - 1])
    return _Tail(theta.cpu(), nodes.cpu(), weights.cpu() * (side - len(theta)), energy)


def _standard_errors(tail: _Tail, numbers: Mapping[str, float], half: _Tail, side: int) -> dict[str, float]:
    """Four independent parts: the probes' (jackknife); the quadrature's own, which is at most a third of what the
    second half of its steps changed; float32's, whose noise adds about eps32·σ₁ to every value; and a rank's rounding.
    """
    jackknife = tail.jackknife()
    coarse = half.ranks(range(len(tail.nodes)))
    rounding = 10 * torch.finfo(torch.float32).eps * side * numbers["spectral_norm"] / numbers["nuclear_norm"]
    return {
        name: sqrt(
            jackknife[name] ** 2
            + ((numbers[name] - coarse[name]) / 3) ** 2
            + (rounding * numbers[name]) ** 2
            + (1 / 12 if name.startswith("energy_rank_") else 0)
        )
        for name in NUMBERS
        if name != "frobenius_norm"
    }


def _leading(rows: Tensor, head: int, generator: Generator) -> _Head:
    size = min(head + OVERSAMPLING, rows.shape[0])
    X = torch.randn(size, rows.shape[1], generator=generator).to(rows)
    Y = _orthonormal(_times_transposed(X, rows))
    for _ in range(POWER_ITERATIONS):
        Y = _orthonormal(_times_transposed(_orthonormal(Y @ rows), rows))
    Y = _orthonormal(Y.double())
    image = torch.cat([Y @ tile for _, tile in _widened(rows)], 1)  # (size, long side): what the matrix does to it
    gram = image @ image.T
    values, vectors = torch.linalg.eigh(gram)
    theta = values.clamp(min=0).sqrt().flip(0)[:head]
    mix = vectors.flip(1)[:, :head].T
    V, right = mix @ Y, mix @ image / theta.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    back = -theta[:, None] * V
    for cut, tile in _widened(rows):
        back.addmm_(right[:, cut], tile.T)
    return _Head(theta, V, back.norm(dim=1))


def _widened(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the matrix in float64, a tile at a time."""
    for cut in cuts(rows.shape[1], rows.shape[0]):
        yield cut, rows[:, cut].double()


def _bidiagonal(rows: Tensor, V: Tensor, probes: int, steps: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Diagonal and subdiagonal of Golub–Kahan bidiagonalisation of the matrix deflated by V, one row per probe.

    Without reorthogonalisation, which quadrature does not need, but kept orthogonal to V.
    """
    basis = V.to(rows.dtype)
    steps = min(steps, rows.shape[0] - len(V))

    def deflated(u: Tensor) -> Tensor:
        return u - (u @ basis.T) @ basis

    start = torch.randn(probes, rows.shape[0], generator=generator).to(rows)
    u = _normalised(deflated(start))[0]
    v, alpha = _normalised(u @ rows)
    alphas, betas = [alpha], []
    for _ in range(steps - 1):
        u, beta = _normalised(deflated(deflated(_times_transposed(v, rows) - alpha * u)))
        v, alpha = _normalised(u @ rows - beta * v)
        alphas.append(alpha)
        betas.append(beta)
    diagonal = torch.cat(alphas, 1).double()
    below = torch.cat(betas, 1).double() if betas else diagonal[:, :0]
    return diagonal, below


def _gauss(diagonal: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss quadrature for Σ f(σ): nodes are singular values of the bidiagonal matrix, weights squares of the first
    components of its left singular vectors."""
    bidiagonal = torch.diag_embed(diagonal) + torch.diag_embed(below, offset=-1)
    left, nodes, _ = torch.linalg.svd(bidiagonal)
    return nodes, left[:, 0].square()


def _normalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny), norms


def _orthonormal(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis.T.contiguous()


def _times_transposed(X: Tensor, rows: Tensor) -> Tensor:
    return X @ rows.T


def _energy(sigma: Tensor) -> float:
    return float(sigma.square().sum())


def _sum_of_squares(matrix: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    stored = matrix if matrix.is_contiguous() else matrix.T
    for cut in cuts(*stored.shape):
        total += stored[cut].double().square().sum()
    return total
