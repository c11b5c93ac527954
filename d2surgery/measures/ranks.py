"""Ranks and norms that follow from singular values, and the record of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from d2surgery.errors import refuse
from d2surgery.measures.table import NUMBERS as NUMBERS
from d2surgery.measures.table import Method as Method
from d2surgery.measures.table import Of as Of

Quality = Literal["exact", "bracket", "estimate"]

NOISE_MARGIN = 1.05


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spectrum:
    """Ranks and norms of one matrix, which is an adapter's update or its delta. The ranks of zero are 0."""

    of: Of
    method: Method
    shape: tuple[int, int]
    """(out_features, in_features)."""
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

    def __repr__(self) -> str:
        ranks = f"rank used {self.energy_entropy_rank:.4g}, stable rank {self.stable_rank:.4g}"
        return (
            f"Spectrum({self.of}, {self.method}: {ranks}, ‖·‖F {self.frobenius_norm:.4g}, σ₁ {self.spectral_norm:.4g})"
        )

    @property
    def rms_entry(self) -> float:
        """‖·‖F/√(mn): the size of an entry, which matrices of any shape can be compared by. 0 for an empty matrix."""
        return self.frobenius_norm / sqrt(max(self.shape[0] * self.shape[1], 1))


def ranks(singular_values: Tensor, counts: Tensor | None = None) -> dict[str, float]:
    """Every number of NUMBERS. `counts` says how many singular values each given one stands for (1 by default).

    All ranks of a zero matrix are 0. Raises NOT_FINITE.
    """
    check_finite(singular_values)
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


def spectrum_of(**numbers: Any) -> Spectrum:
    whole = {name: round(numbers[name]) for name in NUMBERS if name.startswith("energy_rank_")}
    return Spectrum(**{"nuclear_norm_bound": numbers["nuclear_norm"], **numbers, **whole})


def check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise refuse("NOT_FINITE", "The matrix holds NaN or infinity.")


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
