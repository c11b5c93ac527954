"""What surgery did to an adapter, and the error that it made: measured on the result as it is stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, inf, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.measures.delta import Delta, cuts
from d2surgery.measures.dense import lower_gram
from d2surgery.surgery.truncation import Triplets

EXACT = 1e-6
"""A relative error that float32 factors may leave of what is exact in real arithmetic."""
EPS32 = 2.0**-23
_GRAM_UP_TO = 256  # the smaller side up to which ‖·‖₂ comes from a Gram matrix
_STEPS, _BLOCK = 8, 16


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one module: how the delta that came of it differs from the delta that was wanted.

    `norm` is ‖wanted‖_F. Both errors are relative, to ‖wanted‖_F and ‖wanted‖₂; infinite where something came of
    nothing. `curve[k]` is the least Frobenius error of any matrix of rank k, where it is known (Eckart and Young 1936).
    exact: what float32 leaves of it, in the factors, or in magnitudes, which hold all of a vector's length.
    weighted_error: where inputs were weighted, the relative Frobenius error of the delta times diag(weights), that of
    the module's outputs on the text; `curve` is of it then.
    """

    rank: int
    norm: float
    relative_error: float
    spectral_error: float
    exact: bool
    curve: tuple[float, ...] = field(default=(), repr=False)
    weighted_error: float | None = None

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

    @property
    def weighted_error(self) -> float | None:
        """The mean over the modules whose inputs were weighted; None where none was."""
        known = [loss.weighted_error for loss in self.losses.values() if loss.weighted_error is not None]
        return sum(known) / len(known) if known else None


class Tiled(Protocol):
    """A matrix that is had tile by tile, in float64."""

    shape: tuple[int, int]

    def tile(self, *, out: slice) -> Tensor: ...

    def dense(self, dtype: torch.dtype) -> Tensor: ...


Form = LowRank | Tiled
"""A delta as it can be had: from factors where it is an update, else tile by tile."""


def form(adapter: Adapter, base_weight: Tensor | None) -> Form:
    """The adapter's delta. Raises D2SurgeryError USAGE where it depends on a base weight that is not given."""
    update = None if adapter.normalises else adapter.update()
    return Delta(adapter, base_weight) if update is None else update


def dense(matrix: Form, dtype: torch.dtype = torch.float32) -> Tensor:
    """All of it, each entry computed in float64 and rounded once."""
    return matrix.dense().to(dtype) if isinstance(matrix, LowRank) else matrix.dense(dtype)


@torch.no_grad()
def loss(
    wanted: Form | Tensor,
    got: Form | Tensor,
    rank: int,
    *,
    curve: Sequence[float] = (),
    largest: float | None = None,
    weights: Tensor | None = None,
    into: Tensor | None = None,
) -> Loss:
    """Of one delta against another. Of factors to eps64 of the larger; else Frobenius norms are sums in float64, and
    ‖·‖₂ comes from a Gram matrix or from a block Krylov space, which errs to the low side, by 1 % seldom.

    largest: ‖wanted‖₂ where it is known. weights: by column, for `weighted_error`. into: a float32 matrix to be written
    over, `wanted` itself if it is not needed any more.
    """
    if got is wanted:
        return Loss(rank=rank, norm=_norm(wanted), relative_error=0.0, spectral_error=0.0, exact=True)
    weighted = None
    if isinstance(wanted, LowRank) and isinstance(got, LowRank):
        wrong = wanted + -1.0 * got
        ours, theirs = wanted.singular_values(), wrong.singular_values()
        norms = [float(each.norm()) for each in (ours, theirs)]
        sizes = [float(each[0]) if len(each) else 0.0 for each in (ours, theirs)]
        if weights is not None:
            weighted = _share(*(float(_times(each, weights).frobenius_norm()) for each in (wrong, wanted)))
    else:
        size = _largest(_whole(wanted)) if largest is None else largest
        formed = torch.empty(*wanted.shape) if into is None else into
        norms, weighted = _dense_norms(wanted, got, weights, formed)
        sizes = [size, _largest(formed)]
    rounding = EPS32 * float(got.base.norm()) if isinstance(got, Delta) and got.triple is not None else 0.0
    return Loss(
        rank=rank,
        norm=norms[0],
        relative_error=_share(norms[1], norms[0]),
        spectral_error=_share(sizes[1], sizes[0]),
        exact=norms[1] <= max(EXACT * norms[0], rounding),
        curve=tuple(curve),
        weighted_error=weighted,
    )


@torch.no_grad()
def truncation_loss(found: Triplets, stored: LoRA) -> Loss:
    """Of the leading triplets as they are stored, against a matrix of which all singular values are known.

    The error is Σ_{i>k} σᵢuᵢvᵢᵀ and what rounding the factors to float32 adds, (B + E)(A + F) − B·A. These two are
    orthogonal but for E·F, so that ‖error‖_F is that of the two, and ‖error‖₂ the larger of the two to 1e-7·σ₁.
    """
    rank, scaling = stored.A.shape[0], float(stored.scaling)
    A, B = found.factors(min(rank, found.U.shape[1]))
    right, left = A.new_empty(2 * rank, A.shape[1]), A.new_empty(2 * rank, len(B))  # [F; A + F] and [B, E]ᵀ
    right[rank:], left[:rank] = stored.A, B.T
    torch.sub(right[rank:], A, out=right[:rank])
    torch.sub(stored.B.T.double().mul_(scaling), B.T, out=left[rank:])
    rounding = _root(left @ left.T).T @ _root(right @ right.T)
    kept = min(rank, len(found.sigma)) if found.U.shape[1] else 0
    tail = found.sigma[kept:]
    norm, error = sqrt(found.energy), hypot(float(tail.norm()), float(rounding.norm()))
    largest = max(float(tail[0]) if len(tail) else 0.0, float(torch.linalg.matrix_norm(rounding, 2)))
    return Loss(
        rank=rank,
        norm=norm,
        relative_error=_share(error, norm),
        spectral_error=_share(largest, found.largest),
        exact=error <= EXACT * norm,
        curve=tuple(found.curve()),
    )


def _root(gram: Tensor) -> Tensor:
    """X with X Xᵀ = gram."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _times(matrix: LowRank, weights: Tensor) -> LowRank:
    return LowRank(matrix.P, matrix.Q.double() * weights.double())


def _dense_norms(
    wanted: Form | Tensor, got: Form | Tensor, weights: Tensor | None, wrong: Tensor
) -> tuple[list[float], float | None]:
    """‖wanted‖_F and ‖wrong‖_F, and the relative weighted error; `wrong`, of float32, is filled in."""
    squares = torch.zeros(4, dtype=torch.float64)
    for part in cuts(*wrong.shape):
        ours = tile(wanted, part)
        theirs = ours - tile(got, part)
        wrong[part] = theirs
        squares[:2] += torch.stack([torch.linalg.vector_norm(each) for each in (ours, theirs)]).square()
        if weights is not None:
            squares[2:] += torch.stack([(each * weights).square().sum() for each in (ours, theirs)])
    whole, error, weighted_whole, weighted_error = squares.sqrt().tolist()
    return [whole, error], None if weights is None else _share(weighted_error, weighted_whole)


def _whole(matrix: Form | Tensor) -> Tensor:
    return matrix.float() if isinstance(matrix, Tensor) else dense(matrix)


def _norm(matrix: Form | Tensor) -> float:
    if isinstance(matrix, LowRank):
        return float(matrix.frobenius_norm())
    return sqrt(sum(float(tile(matrix, part).square().sum()) for part in cuts(*matrix.shape)))


def tile(matrix: Form | Tensor, part: slice) -> Tensor:
    """Some rows of it, in float64."""
    return matrix[part].double() if isinstance(matrix, Tensor) else matrix.tile(out=part)


def _largest(matrix: Tensor) -> float:
    """‖·‖₂ of a float32 matrix."""
    out, in_ = matrix.shape
    scale = float(torch.linalg.vector_norm(matrix, float("inf"))) if matrix.numel() else 0.0
    if scale == 0:
        return 0.0
    if min(out, in_) <= _GRAM_UP_TO:
        return scale * _largest_by_gram(matrix / scale)
    basis = torch.linalg.qr(torch.randn(in_, _BLOCK, generator=torch.Generator().manual_seed(0))).Q.to(matrix)
    images = matrix.new_empty(out, _BLOCK * (_STEPS + 1))
    images[:, :_BLOCK] = matrix @ (basis / scale)
    for start in range(0, _BLOCK * _STEPS, _BLOCK):
        new = matrix.T @ (images[:, start : start + _BLOCK] / scale)
        for _ in range(2):  # once leaves of a small remainder what is not orthogonal
            new = torch.linalg.qr(new - basis @ (basis.T @ new)).Q
        basis = torch.cat([basis, new], 1)
        images[:, start + _BLOCK : start + 2 * _BLOCK] = matrix @ (new / scale)
    return scale * _largest_by_gram(images)


def _largest_by_gram(matrix: Tensor) -> float:
    """σ₁ is no less exact for being squared on the way."""
    gram = lower_gram(_long_tiles(matrix), (matrix.shape[0], matrix.shape[1]))
    return sqrt(float(torch.linalg.eigvalsh(gram, UPLO="L")[-1].clamp(min=0)))


def _long_tiles(matrix: Tensor) -> Iterator[Tensor]:
    tall = matrix.shape[0] >= matrix.shape[1]
    for part in cuts(max(matrix.shape), min(matrix.shape)):
        yield matrix[part] if tall else matrix[:, part]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (inf if part else 0.0)
