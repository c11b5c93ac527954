"""Spectra: the singular values of an update or a delta, and every rank and norm that follows from them.

Three methods (docs/mathematics.md#spectra). "structural": exact from the factors, never forming (out, in). "exact":
eigenvalues of the float64 Gram matrix on the smaller side. "head-tail": the leading values by a randomized method, all
the others as an estimated distribution (stochastic Golub–Kahan quadrature), with a standard error for every number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from d2surgery.adapters import Adapter, D2LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.vectors import Triple
from d2surgery.errors import refuse

Of = Literal["update", "delta"]
Method = Literal["structural", "exact", "head-tail"]
Quality = Literal["exact", "bracket", "estimate"]

GRAM_FLOOR = 3e-8
"""Relative to σ₁: below it a float64 Gram matrix of this size shows its own rounding (measured; √eps64 = 1.5e-8)."""
EXACT_UP_TO = 4096
"""The smaller side up to which the exact method is the default."""
NOISE_MARGIN = 1.05
CONVERGED = 3e-3
"""A Ritz value whose residual is below this share of it counts as converged: its error is of the second order."""
SINGLE_FLOOR = 1e-6
"""Relative to σ₁: what a delta rounded to float32 and multiplied in float32 says about the smallest values."""
CALIBRATE = 1e-3
"""The tail's energy is known by subtraction if it is at least this share of the whole."""
_TILE = 1 << 20  # entries
_BLOCK = 512

NUMBERS = (
    "entropy_rank",
    "energy_entropy_rank",
    "stable_rank",
    "participation_ratio",
    "energy_rank_90",
    "energy_rank_95",
    "energy_rank_99",
    "frobenius_norm",
    "spectral_norm",
    "nuclear_norm",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Ranks and norms of one matrix, which is an adapter's update or its delta. The ranks of zero are 0."""

    of: Of
    method: Method
    singular_values: Tensor
    """Float64, descending. All that can differ from zero; with "head-tail" the converged head only."""
    numerical_rank: int | None
    """#{σ > σ₁·max(m, n)·eps64}; None where the method cannot tell (all but "structural")."""
    entropy_rank: float
    """exp(−Σ p ln p), p = σ/Σσ (Roy and Vetterli 2007); 1 to n."""
    energy_entropy_rank: float
    """exp(−Σ q ln q), q = σ²/Σσ²; 1 to n."""
    stable_rank: float
    """Σσ²/σ₁²; 1 to n."""
    participation_ratio: float
    """(Σσ²)²/Σσ⁴; 1 to n."""
    energy_rank_90: int
    """The least k whose leading σ² make up 90 % of Σσ²; likewise 95 and 99."""
    energy_rank_95: int
    energy_rank_99: int
    frobenius_norm: float
    spectral_norm: float
    nuclear_norm: float
    nuclear_norm_bound: float
    """Never exceeded but by rounding, whatever the method."""
    error_bound: float
    """Largest error of a singular value given, relative to σ₁."""
    cancellation: float | None = None
    """(‖ΔW₊‖ + ‖ΔW₋‖)/‖ΔW‖ of D2-LoRA's branches; None for other kinds and for zero."""
    standard_errors: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Of every number that is estimated."""
    quality: Mapping[str, Quality] = field(default_factory=lambda: dict.fromkeys(NUMBERS, "exact"))
    """Of every number: exact (to error_bound), or an estimate with its standard error. The bound is a bracket."""


# Ranks from singular values --------------------------------------------------------------------------------------


def ranks(singular_values: Tensor, counts: Tensor | None = None) -> dict[str, float]:
    """Every number of NUMBERS. `counts` says how many singular values each given one stands for (1 by default).

    All ranks of a zero matrix are 0. Raises NOT_FINITE.
    """
    _check_finite(singular_values)
    order = singular_values.argsort(descending=True)
    sigma = singular_values.double()[order].clamp(min=0)
    count = torch.ones_like(sigma) if counts is None else counts.double()[order]
    top = float(sigma[0]) if sigma.numel() else 0.0
    if top == 0:
        return dict.fromkeys(NUMBERS, 0.0)
    unit = sigma / top  # squares and fourth powers neither overflow nor vanish
    energy = unit.square()
    total, total_energy = float((count * unit).sum()), float((count * energy).sum())
    return {
        "entropy_rank": _perplexity(unit / total, count),
        "energy_entropy_rank": _perplexity(energy / total_energy, count),
        "stable_rank": total_energy,
        "participation_ratio": total_energy**2 / float((count * energy.square()).sum()),
        **{f"energy_rank_{share}": _energy_rank(energy * count, count, share / 100) for share in (90, 95, 99)},
        "frobenius_norm": top * sqrt(total_energy),
        "spectral_norm": top,
        "nuclear_norm": top * total,
    }


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """#{σ > σ₁·max(m, n)·eps}, eps of the values' dtype (the convention of numpy's and torch's matrix_rank)."""
    if not singular_values.numel():
        return 0
    tolerance = singular_values.max() * max(shape) * torch.finfo(singular_values.dtype).eps
    return int((singular_values > tolerance).sum())


def rank_above_noise(singular_values: Tensor, noise: float | Tensor, shape: tuple[int, int]) -> int:
    """#{σ > edge}: the rank to use on the difference of two checkpoints, whose small values are all rounding.

    `noise` is the standard deviation of each entry's noise: one number, where the edge is 1.05·noise·(√m + √n)
    (Marchenko–Pastur), or a matrix, where it is 1.05·(largest row norm + largest column norm).
    """
    sd = noise if isinstance(noise, Tensor) else torch.full((1, 1), noise)
    squares = sd.double().square().expand(shape)
    edge = NOISE_MARGIN * (squares.sum(1).max().sqrt() + squares.sum(0).max().sqrt())
    return int((singular_values.double() > edge).sum())


# Spectra of adapters ---------------------------------------------------------------------------------------------


def update_spectrum(adapter: Adapter) -> Spectrum:
    """Of ΔW, exactly, from its factors.

    Raises USAGE for Dual LoRA, which has no thin update, and NOT_FINITE.
    """
    update = adapter.update()
    if update is None:
        raise refuse("USAGE", "it has no thin update; ask for its delta", got=adapter.kind)
    return _structural(update, "update", cancellation(adapter))


def delta_spectrum(
    adapter: Adapter,
    base_weight: Tensor | None,
    method: Method | None = None,
    *,
    generator: Generator | None = None,
) -> Spectrum:
    """Of W' − W0. Dual LoRA and kinds that do not normalise need no base weight.

    method: None is "structural" where the delta is the update, else "exact" up to EXACT_UP_TO on the smaller side and
    "head-tail" above. A matrix too small for a head and a tail is done exactly, and the record says so. Raises
    NOT_FINITE, ZERO_NORM, and USAGE where the base weight is missing or the delta has no structure.
    """
    update = adapter.update()
    is_update = update is not None and not adapter.normalises
    method = method or ("structural" if is_update else _default_method(adapter))
    if method == "structural":
        if update is None or not is_update:
            raise refuse("USAGE", "the spectrum of this delta needs the exact or head-tail method", got=adapter.kind)
        return _structural(update, "delta", cancellation(adapter))
    delta = Delta(adapter, base_weight)
    if method == "head-tail" and min(delta.shape) > 2 * (HEAD + OVERSAMPLING):
        return head_tail(delta.dense(torch.float32), cancellation=cancellation(adapter), generator=generator)
    return gram_spectrum(delta.tiles(), delta.shape, cancellation=cancellation(adapter))


def cancellation(adapter: Adapter) -> float | None:
    """(‖ΔW₊‖ + ‖ΔW₋‖)/‖ΔW‖: 1 where a branch is alone, never less, large where the branches nearly cancel."""
    if not isinstance(adapter, D2LoRA):
        return None
    update = adapter.update()
    split = adapter.A_plus.shape[0]
    plus, minus = LowRank(update.P[:, :split], update.Q[:split]), LowRank(update.P[:, split:], update.Q[split:])
    whole = float(update.frobenius_norm())
    return (float(plus.frobenius_norm()) + float(minus.frobenius_norm())) / whole if whole else None


class Delta:
    """An adapter's delta, formed tile by tile in float64; vectors are normalised by the triple of the whole."""

    def __init__(self, adapter: Adapter, base_weight: Tensor | None) -> None:
        if base_weight is None and adapter.normalises:
            raise refuse("USAGE", "this delta depends on the base weight", got=adapter.kind)
        self.adapter = adapter
        self.shape = adapter.out_features, adapter.in_features
        device = next(iter(adapter.slots().values())).device
        self.base = torch.zeros((), device=device).expand(self.shape) if base_weight is None else base_weight
        if tuple(self.base.shape) != self.shape:
            raise refuse("SHAPE_MISMATCH", "the base weight", wanted=str(self.shape), got=str(tuple(self.base.shape)))
        self.triple = self._triple() if adapter.normalises else None

    def tiles(self) -> Iterator[Tensor]:
        """Cut across the longer side, so that each tile holds the smaller side whole."""
        out, in_ = self.shape
        if out >= in_:
            yield from (self.tile(out=cut) for cut in cuts(out, in_))
        else:
            yield from (self.tile(in_=cut) for cut in cuts(in_, out))

    def tile(self, *, out: slice = slice(None), in_: slice = slice(None)) -> Tensor:
        triple = self.triple
        if triple is not None:
            along = out if self.adapter.along == "out_features" else in_
            triple = Triple(*(sums[along] for sums in triple))
        return self.adapter.take(out=out, in_=in_).delta(self.base[out, in_].double(), triple)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole, each entry computed in float64 and rounded once."""
        whole = torch.empty(self.shape, dtype=dtype, device=self.base.device)
        for cut in cuts(*self.shape):
            whole[cut] = self.tile(out=cut)
        return whole

    def _triple(self) -> Triple:
        """Each vector is cut, not the set of vectors: the norms of the update then cost one small QR per tile."""
        out, in_ = self.shape
        if self.adapter.along == "in_features":
            parts = (self.adapter.take(out=cut).triple(self.base[cut].double()) for cut in cuts(out, in_))
        else:
            parts = (self.adapter.take(in_=cut).triple(self.base[:, cut].double()) for cut in cuts(in_, out))
        whole = next(parts)
        for part in parts:
            whole = whole.plus(part)
        return whole


def cuts(length: int, width: int) -> Iterator[slice]:
    """Ranges of a side that together with the other side make tiles of about _TILE entries."""
    step = max(_TILE // max(width, 1), 4)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


# Structural ------------------------------------------------------------------------------------------------------


def _structural(update: LowRank, of: Of, cancels: float | None) -> Spectrum:
    sigma = update.singular_values().cpu()
    rounding = float(update.rounding())
    return _record(
        of=of,
        method="structural",
        singular_values=sigma,
        numerical_rank=numerical_rank(sigma, update.shape),
        error_bound=rounding / float(sigma[0]) if sigma.numel() and sigma[0] > 0 else 0.0,
        cancellation=cancels,
        **ranks(sigma),
    )


def _record(**numbers: Any) -> Spectrum:
    whole = {name: round(numbers[name]) for name in NUMBERS if name.startswith("energy_rank_")}
    return Spectrum(**{"nuclear_norm_bound": numbers["nuclear_norm"], **numbers, **whole})


# Exact -----------------------------------------------------------------------------------------------------------


def matrix_spectrum(matrix: Tensor) -> Spectrum:
    """The exact spectrum of any matrix, taken as a delta."""
    shape = matrix.shape[0], matrix.shape[1]
    tall = shape[0] >= shape[1]
    tiles = (matrix[cut] if tall else matrix[:, cut] for cut in cuts(max(shape), min(shape)))
    return gram_spectrum(tiles, shape)


@torch.no_grad()
def gram_spectrum(tiles: Iterator[Tensor], shape: tuple[int, int], cancellation: float | None = None) -> Spectrum:
    """√ of the eigenvalues of Σ TᵀT (tall) or Σ TTᵀ (wide) over tiles T that hold the smaller side whole, in float64.

    An error of eps64·σ₁² in σ² is one of GRAM_FLOOR·σ₁ in a small σ and far less in a large one. Raises NOT_FINITE.
    """
    sigma = _roots(lower_gram(tiles, shape))
    return _record(
        of="delta",
        method="exact",
        singular_values=sigma,
        numerical_rank=None,
        error_bound=GRAM_FLOOR,
        cancellation=cancellation,
        **ranks(sigma),
    )


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
    _check_finite(gram.diagonal())  # a sum of squares: no NaN or infinity can hide
    return gram


def _roots(gram: Tensor) -> Tensor:
    scale = float(gram.diagonal().max()) if gram.numel() else 0.0
    if scale == 0:
        return torch.zeros(gram.shape[0], dtype=torch.float64)
    values: Tensor = torch.linalg.eigvalsh(gram / scale, UPLO="L")
    return values.clamp(min=0).sqrt().flip(0).cpu() * sqrt(scale)


# Head and tail ---------------------------------------------------------------------------------------------------

HEAD = 128
OVERSAMPLING = 16
POWER_ITERATIONS = 2
PROBES = 16
STEPS = 40


class _Head(NamedTuple):
    """Ritz triples on the smaller side: rows of V orthonormal, the matrix times V has singular values θ."""

    theta: Tensor
    V: Tensor
    residual: Tensor

    def converged(self) -> int:
        """How many leading ones did; after one that did not, an index would be in doubt."""
        good = (self.residual <= CONVERGED * self.theta) & (self.theta > SINGLE_FLOOR * self.theta.max())
        return int(good.cumprod(0).sum())

    def error(self) -> float:
        """A singular value lies within the residual of each θ; relative to σ₁, and not below float32's."""
        largest = float(self.residual.max() / self.theta[0]) if len(self.theta) else 0.0
        return max(largest, SINGLE_FLOOR)


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
    serves every method; the standard errors are the jackknife's over probes. The Frobenius norm is exact.
    `generator` is of the CPU; None is a fixed seed.
    """
    _check_finite(matrix.abs().max())
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # small side first
    side = rows.shape[0]
    energy = float(_sum_of_squares(rows))
    if energy == 0:
        return gram_spectrum(iter(()), (0, 0))
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
    return _record(
        of="delta",
        method="head-tail",
        singular_values=theta.cpu(),
        numerical_rank=None,
        error_bound=kept.error(),
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
    image = (Y @ rows).double()  # (size, long side): what the matrix does to the basis
    gram = image @ image.T
    values, vectors = torch.linalg.eigh(gram)
    theta = values.clamp(min=0).sqrt().flip(0)[:head]
    mix = vectors.flip(1)[:, :head].T
    V, right = mix @ Y.double(), mix @ image / theta.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    residual = (_times_transposed(right.to(rows.dtype), rows).double() - theta[:, None] * V).norm(dim=1)
    return _Head(theta, V, residual)


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


# Small things ----------------------------------------------------------------------------------------------------


def _default_method(adapter: Adapter) -> Method:
    return "exact" if min(adapter.out_features, adapter.in_features) <= EXACT_UP_TO else "head-tail"


def _perplexity(shares: Tensor, counts: Tensor) -> float:
    """exp of the entropy of shares that occur `counts` times."""
    return float((counts * torch.special.entr(shares)).sum().exp())


def _energy_rank(energy: Tensor, counts: Tensor, share: float) -> float:
    """The number of leading values that hold `share` of the energy; within a value that stands for many, in part."""
    running = energy.cumsum(0)
    wanted = share * float(running[-1])
    last = min(int((running < wanted).sum()), len(energy) - 1)
    missing = wanted - float(running[last] - energy[last])
    part = missing / float(energy[last]) * float(counts[last]) if float(counts[last]) > 1 else float(counts[last])
    return float(counts[:last].sum()) + part


def _energy(sigma: Tensor) -> float:
    return float(sigma.square().sum())


def _sum_of_squares(matrix: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    stored = matrix if matrix.is_contiguous() else matrix.T
    for cut in cuts(*stored.shape):
        total += stored[cut].double().square().sum()
    return total


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise refuse("NOT_FINITE", "The matrix holds NaN or infinity.")
