"""What surgery did to an adapter, and the error that it made: measured on the result as it is stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, inf, sqrt
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.lowrank import LowRank
from d2surgery.measures.delta import Delta, cuts
from d2surgery.measures.dense import lower_gram

EXACT = 1e-6
"""A relative error that float32 factors may leave of what is exact in real arithmetic."""
EPS32 = 2.0**-23
_GRAM_UP_TO = 768  # the smaller side up to which ‖·‖₂ comes from a Gram matrix
_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one module: how the delta that came of it differs from the delta that was wanted.

    `norm` is ‖wanted‖_F. Both errors are relative, to ‖wanted‖_F and ‖wanted‖₂; infinite where something came of
    nothing. `curve[k]` is the least Frobenius error of any matrix of rank k, where it is known (Eckart and Young 1936).
    exact: what float32 leaves of it, in the factors, or in magnitudes, which hold all of a vector's length.
    """

    rank: int
    norm: float
    relative_error: float
    spectral_error: float
    exact: bool
    curve: tuple[float, ...] = field(default=(), repr=False)

    @property
    def energy_kept(self) -> float:
        """1 − relative_error²: of a truncation the share of Σσ² that is kept; 0 at worst."""
        return max(1 - self.relative_error**2, 0.0)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was done and how well, by module."""

    method: str
    settings: Mapping[str, Any]
    losses: Mapping[str, Loss]

    def __repr__(self) -> str:
        error = "exact" if self.exact else f"error {self.relative_error:.3g}, at most {self.max_relative_error:.3g}"
        return f"Certificate({self.method}: {len(self.losses)} modules, {error})"

    @property
    def exact(self) -> bool:
        return all(loss.exact for loss in self.losses.values())

    @property
    def max_relative_error(self) -> float:
        return max((loss.relative_error for loss in self.losses.values()), default=0.0)

    @property
    def relative_error(self) -> float:
        """Of all deltas together: √Σ‖wrong‖²/√Σ‖wanted‖²."""
        whole = hypot(*(loss.norm for loss in self.losses.values()))
        wrong = hypot(*(loss.relative_error * loss.norm for loss in self.losses.values() if loss.norm))
        return wrong / whole if whole else self.max_relative_error


Form = LowRank | Delta
"""A delta as it can be had: from factors where it is an update, else tile by tile."""


def form(adapter: Adapter, base_weight: Tensor | None) -> Form:
    """The adapter's delta. Raises D2SurgeryError USAGE where it depends on a base weight that is not given."""
    update = None if adapter.normalises else adapter.update()
    return Delta(adapter, base_weight) if update is None else update


def dense(matrix: Form, dtype: torch.dtype = torch.float32) -> Tensor:
    """All of it, each entry computed in float64 and rounded once."""
    return matrix.dense().to(dtype) if isinstance(matrix, LowRank) else matrix.dense(dtype)


@torch.no_grad()
def loss(wanted: Form | Tensor, got: Form | Tensor, rank: int, curve: Sequence[float] = ()) -> Loss:
    """Of one delta against another. Of factors to eps64 of the larger; else Frobenius norms are sums in float64, and
    ‖·‖₂ comes from a Gram matrix or from 40 steps of the power method, which errs to the low side, by 1 % seldom."""
    if got is wanted:
        return Loss(rank=rank, norm=_norm(wanted), relative_error=0.0, spectral_error=0.0, exact=True)
    if isinstance(wanted, LowRank) and isinstance(got, LowRank):
        ours, theirs = wanted.singular_values(), (wanted + -1.0 * got).singular_values()
        norms = [float(each.norm()) for each in (ours, theirs)]
        largest = [float(each[0]) if len(each) else 0.0 for each in (ours, theirs)]
    else:
        norms, largest = _dense_norms(wanted, got)
    rounding = EPS32 * float(got.base.norm()) if isinstance(got, Delta) and got.triple is not None else 0.0
    return Loss(
        rank=rank,
        norm=norms[0],
        relative_error=_share(norms[1], norms[0]),
        spectral_error=_share(largest[1], largest[0]),
        exact=norms[1] <= max(EXACT * norms[0], rounding),
        curve=tuple(curve),
    )


def _dense_norms(wanted: Form | Tensor, got: Form | Tensor) -> tuple[list[float], list[float]]:
    shape = (wanted.shape[0], wanted.shape[1])
    W, D = torch.empty(shape), torch.empty(shape)
    squares = [0.0, 0.0]
    for part in cuts(*shape):
        ours = _tile(wanted, part)
        theirs = ours - _tile(got, part)
        W[part], D[part] = ours, theirs
        squares = [s + float(tile.square().sum()) for s, tile in zip(squares, (ours, theirs), strict=True)]
    return [sqrt(s) for s in squares], [_largest(W), _largest(D)]


def _norm(matrix: Form | Tensor) -> float:
    if isinstance(matrix, LowRank):
        return float(matrix.frobenius_norm())
    return sqrt(sum(float(_tile(matrix, part).square().sum()) for part in cuts(*matrix.shape)))


def _tile(matrix: Form | Tensor, part: slice) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix[part].double()
    return LowRank(matrix.P[part], matrix.Q).dense() if isinstance(matrix, LowRank) else matrix.tile(out=part)


def _largest(matrix: Tensor) -> float:
    """‖·‖₂."""
    out, in_ = matrix.shape
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0:
        return 0.0
    unit = matrix / scale
    if min(out, in_) <= _GRAM_UP_TO:
        gram = lower_gram(_long_tiles(unit), (out, in_))
        return scale * sqrt(float(torch.linalg.eigvalsh(gram, UPLO="L")[-1].clamp(min=0)))
    basis = torch.randn(in_, 4, generator=torch.Generator().manual_seed(0)).to(unit)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(unit.T @ (unit @ basis)).Q
    return scale * float(torch.linalg.matrix_norm(unit @ basis, 2))


def _long_tiles(matrix: Tensor) -> Iterator[Tensor]:
    tall = matrix.shape[0] >= matrix.shape[1]
    for part in cuts(max(matrix.shape), min(matrix.shape)):
        yield matrix[part] if tall else matrix[:, part]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (inf if part else 0.0)
