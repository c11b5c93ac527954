"""What happened to one weight that no recipe replays: every usual fault is tried, and the one that fits is named."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import hypot, inf, isnan, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2surgery.auditing.case import Case, Named
from d2surgery.auditing.faults import hypotheses, scalings, strengths
from d2surgery.auditing.orders import head_size
from d2surgery.files.tensors import rounded
from d2surgery.measures.fidelity import Comparison, bits, regress, strength_of

SIGNIFICANT = 5.0  # standard errors
EXCESS = 1.3  # noise above this many times the noise of rounding once is not rounding (double rounding: 1.01)
PLAIN = 1.1  # noise that is rounding and nothing else
_HALF = 0.5  # of a fault's move must be in the file
_LEAST = 0.1  # of a strength that leaves more than rounding: with less, something else was merged
_FEW = 16  # elements that a fault must move, where it does not give every bit
_PARTS = 4  # of which a fault must be seen in more than one
_LOCAL = 16  # the part of rows or columns that is a few of them
_FAR = 3.0  # noise of a row that was damaged
_SAMPLE = 64  # rows on which most faults are seen not to have been made
_RANK_SIDE = 384  # rows and columns of the block whose residual is decomposed


@dataclass(frozen=True)
class Diagnosis:
    """code "": nothing explains it better than a right merge does."""

    code: str = ""
    what: str = ""
    exact: bool = False  # every bit is as this fault gives it
    fit: "Fit | None" = None  # where one strength explains all but rounding
    residual_rank: int | None = None  # of what nothing explains


class Fit(NamedTuple):
    """The strength of `strength_of`, and what it leaves."""

    strength: float
    error: float  # standard
    noise: float  # in units of the noise of rounding once

    def like(self, other: "Fit") -> bool:
        """Whether the two may be one strength."""
        return abs(self.strength - other.strength) <= SIGNIFICANT * hypot(self.error, other.error)


@dataclass(frozen=True)
class _Trial:
    named: Named
    against: Comparison  # strength: 0 for the right merge, 1 for this fault
    noise: float  # ‖merged − effective‖ over that of rounding once

    def diagnosis(self, fit: "Fit | None") -> Diagnosis:
        return Diagnosis(self.named.code, self.named.what, exact=not self.against.mismatched, fit=fit)

    def explains(self, own: float, fitted: float) -> bool:
        """Whether it gives every bit, or far less is left than by a right merge (`own`) and a fitted strength."""
        if not self.against.mismatched:
            return True
        plain_strength = fitted <= min(EXCESS, 0.9 * self.noise)
        return not plain_strength and (self.noise <= EXCESS or self.noise < 0.5 * min(own, fitted))


def diagnose(case: Case, merged: Tensor, before: Diagnosis) -> Diagnosis:
    """`merged` as stored, of the same block as the case; `before`: of another module, suspected here first.

    A fault moves the weight from E to F. How much of that move is in the file is a strength with an error, like λ̂; the
    fault is believed when at least half of the move is there, significantly, and nothing else leaves less unexplained.
    """
    look = _Look(case, merged, rounded(case.right, merged.dtype), _unit(case.right, merged.dtype))
    own = look.noise(case.right)
    known = look.best_fault(before.what) if before.what else None
    if known is not None and (not known.against.mismatched or known.noise <= PLAIN):
        return known.diagnosis(look.fit() if before.fit else None)
    if (what := _zeros(look.stored, merged)) and ("pruning" in what or not _steps(look.stored, merged)):
        return Diagnosis("ZEROED", what)
    if look.in_few_vectors():
        return look.of_few_vectors()
    fit = look.fit()
    if before.code == "WRONG_STRENGTH" and before.fit and fit.noise <= PLAIN and fit.like(before.fit):
        return replace(before, fit=fit)
    fault = look.best_fault()
    if fault is not None and fault.explains(own, fit.noise):
        return fault.diagnosis(fit if fit.noise <= EXCESS else None)
    if own > EXCESS and (grid := _grid(look.stored, merged)):
        return Diagnosis("REQUANTIZED", grid)
    if what := look.base_rows():
        return Diagnosis("DELTA_UNEXPLAINED", what)  # another adapter leaves some, too
    if fit.noise <= EXCESS or (fit.noise < 0.5 * own and abs(fit.strength) > _LEAST):
        off = abs(fit.strength - 1) > SIGNIFICANT * fit.error
        return Diagnosis("WRONG_STRENGTH", _factor(case, fit), fit=fit) if off else Diagnosis()
    if own <= EXCESS or look.sloppy():
        return Diagnosis()
    rank, side = look.residual_rank(fit.strength)
    origin = "another base, or noise" if rank > side // 4 else "another adapter, or a change of low rank"
    what = f"what is left has rank {rank} of {side} above rounding noise: {origin}"
    if rank == 0:
        what = "what is left has no rank above rounding noise: it is uneven, or spread over many directions"
    return Diagnosis("DELTA_UNEXPLAINED", what, residual_rank=rank)


def rows_moved(case: Case, merged: Tensor) -> Diagnosis | None:
    """Whether the rows are the right ones in another order, of a block that holds some columns of all rows."""
    right = case.right
    there, wanted = (F.normalize(x.to(right.dtype), dim=1) for x in (merged, right))
    order = torch.cat([(part @ wanted.T).argmax(1) for part in torch.split(there, 256)])
    right = right[order]
    left = _norm(merged.to(right.dtype) - right)
    moved = bool((order != torch.arange(len(order))).any())
    if not moved or len(torch.unique(order)) < len(order) or left > EXCESS * _unit(right, merged.dtype):
        return None
    return Diagnosis("HEADS_PERMUTED" if head_size(case) else "DELTA_UNEXPLAINED", "its rows are in another order")


@dataclass(frozen=True)
class _Look:
    """The block, the weight that a right merge makes of it, and the noise of rounding that once."""

    case: Case
    merged: Tensor
    stored: Tensor  # as a right merge leaves it
    unit: float

    def noise(self, effective: Tensor) -> float:
        """‖merged − effective‖ in units of the noise of rounding once: the right merge or, if that makes more, this."""
        unit = max(self.unit, _unit(effective, self.merged.dtype))
        return _norm(self.merged.to(effective.dtype) - effective) / unit

    def in_few_vectors(self) -> bool:
        """Whether a few rows, or columns, are far off and the others right: what a merge does wrong it does to all."""
        right = self.case.right
        off = self.merged.to(right.dtype) - right
        for dim in (1, 0):
            noise = torch.linalg.vector_norm(off, dim=dim) / _units(right, self.merged.dtype, dim)
            far = noise > _FAR
            if 0 < int(far.sum()) <= len(far) / _LOCAL and float(noise[~far].square().mean()) <= PLAIN**2:
                return True
        return False

    def of_few_vectors(self) -> Diagnosis:
        """What is done to a few vectors has no strength and no rank that would say something of the module."""
        if what := self.base_rows():
            return Diagnosis("PARTIAL_MERGE", what)
        what = "what is left lies in a few rows or columns"
        return Diagnosis() if self.sloppy() else Diagnosis("DELTA_UNEXPLAINED", what)

    def best_fault(self, what: str = "") -> _Trial | None:
        """What is believed and leaves least, of all faults or of those so described."""
        trials = (self._try(named) for named in hypotheses(self.case) if what in ("", named.what))
        believed = [trial for trial in trials if trial is not None]
        return min(believed, key=lambda trial: (trial.against.mismatched > 0, trial.against.dd), default=None)

    def _try(self, named: Named) -> _Trial | None:
        """None for what was not done here, as a few rows show of most faults."""
        weight = named.weight()
        if weight.shape != self.case.right.shape:
            return None
        for rows in (slice(None, None, max(len(weight) // _SAMPLE, 1)), slice(None)):
            wanted = rounded(weight[rows], self.merged.dtype)
            stored, right = self.stored[rows].to(weight.dtype), self.case.right[rows]
            against = regress(stored, weight[rows] - right, wanted, self.merged[rows])
            if against.strength + SIGNIFICANT * against.strength_error < _HALF:
                return None
        if not torch.isfinite(weight).all() or not _believed(against):
            return None
        if against.mismatched and not self._everywhere(weight):
            return None
        return _Trial(named, against, self.noise(weight))

    def _everywhere(self, weight: Tensor) -> bool:
        """Whether a fault is believed without any quarter of the rows, or columns: a damaged one is no fault of all."""
        move, wanted = weight - self.case.right, rounded(weight, self.merged.dtype)
        if int(torch.count_nonzero(bits(wanted) != bits(self.stored))) < _FEW:
            return False  # it hardly shows in this dtype, and what shows may be chance
        values = (self.stored.to(weight.dtype), move, wanted, self.merged)
        for across in (values, tuple(x.T for x in values)):
            sums = [regress(*(x[first::_PARTS] for x in across)) for first in range(_PARTS)]
            others = (sum(sums[:at] + sums[at + 1 :], Comparison()) for at in range(_PARTS))
            if not all(map(_believed, others)):
                return False
        return True

    def fit(self) -> Fit:
        base, delta = self.case.base, self.case.delta
        strength, error = strength_of(base, delta, self.merged)
        return Fit(strength, error, self.noise(base + strength * delta))

    def base_rows(self) -> str:
        """Whether some rows, and not all, are still the base's."""
        base = self.case.base.to(self.merged.dtype)
        there, kept, wanted = bits(self.merged), bits(base), bits(self.stored)
        for dim, noun in ((1, "rows"), (0, "columns")):
            moved = (wanted != kept).sum(dim) > 4
            left = (there == kept).all(dim) & moved
            if 0 < (count := int(left.sum())) < int(moved.sum()):
                return f"{count} of {len(moved)} {noun} are as in the base"
        return ""

    def sloppy(self) -> bool:
        """Whether what is left is what products in 16 bits or TF32 leave of a delta."""
        right, delta = self.case.right, self.case.delta
        return _norm(self.merged.to(delta.dtype) - right) <= _norm(delta) / 256 + EXCESS * self.unit

    def residual_rank(self, strength: float) -> tuple[int, int]:
        """How many singular values of merged − W0 − λ̂·delta stand out of rounding noise, and of how many, in a leading
        block (Marchenko–Pastur edge)."""
        block = (slice(_RANK_SIDE), slice(_RANK_SIDE))
        base, right = self.case.base[block].double(), self.case.right[block].double()
        left = self.merged[block].double() - base - strength * (right - base)
        noise = self.unit / sqrt(self.case.right.numel())
        edge = 1.05 * noise * (sqrt(left.shape[0]) + sqrt(left.shape[1]))
        values = torch.linalg.svdvals(left)
        return int((values > max(edge, 1e-3 * float(values[0]))).sum()), min(left.shape)


def _unit(effective: Tensor, dtype: torch.dtype) -> float:
    """‖round(effective) − effective‖; in float32 also what sums in float32 cost."""
    return max(float(_units(effective, dtype, None)), 1e-300)


def _units(effective: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """The same of each row (1), of each column (0) or of all."""
    norm = torch.linalg.vector_norm
    once: Tensor = norm(rounded(effective, dtype).to(effective.dtype) - effective, dim=dim)
    return once + 1e-7 * norm(effective, dim=dim) if dtype in (torch.float32, torch.float64) else once


def _believed(sums: Comparison) -> bool:
    if isnan(sums.strength) or not sums.e_delta:
        return False  # the file's dtype cannot tell this fault from a right merge
    return sums.strength >= _HALF and sums.strength > SIGNIFICANT * sums.strength_error


def _factor(case: Case, fit: Fit) -> str:
    """The usual mistake that gives this strength, where there is one."""
    near = max(SIGNIFICANT * fit.error, 2e-4 * abs(fit.strength))
    for what, factor in (strengths(case) | scalings(case)).items():
        if not case.adapter.normalises and abs(fit.strength - factor) <= near:
            return what
    return "a factor of its own"


def _zeros(right: Tensor, merged: Tensor) -> str:
    """What was set to zero, where that is more than a few values."""
    zero = (merged == 0) & (right != 0)
    share = float(zero.double().mean())
    if share < 0.02:
        return ""
    if bool(zero.all()):
        return "every value is zero"
    if merged.shape[1] % 4 == 0 and float((zero.view(-1, 4).sum(1) >= 2).double().mean()) > 0.95:
        return "two of every four values are zero: 2:4 pruning"
    whole = [(int(zero.all(dim).sum()), noun) for dim, noun in ((1, "rows"), (0, "columns"))]
    rows = next((f", {count} whole {noun} among them" for count, noun in whole if count), ": pruned")
    return f"{share:.0%} of the values are zero{rows}"


def _steps(right: Tensor, merged: Tensor) -> str:
    """A grid that has a zero among its values, to which small ones were rounded; "" where all are zero."""
    return _grid(right, merged) if bool(merged.any()) else ""


def _grid(right: Tensor, merged: Tensor) -> str:
    """Which coarser grid the merged values lie on, "" for none or the one where a right merge's values lie too."""
    values, wanted = merged.to(torch.float32), right.to(torch.float32)
    for name, dtype in (("float8", torch.float8_e4m3fn), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        if dtype.itemsize < merged.dtype.itemsize and _holds(dtype, values) and not _holds(dtype, wanted):
            return f"every value is a {name}"
    for what, groups, usual in _grouped(values, wanted):
        top = _multiples(groups)
        if 0 < top <= 128 and not _multiples(usual):
            return f"multiples of one step per {what}: {4 if top <= 8 else 8} bits"
    for size in (values.shape[1], 128, 64, 32, 16):
        if values.shape[1] % size == 0:
            levels, usually = _levels(values.reshape(-1, size)), _levels(wanted.reshape(-1, size))
            if levels <= 16 and usually > 1.25 * levels:
                return f"at most {levels} levels per group of {size}: 4 bits"
    for what, groups, usual in _grouped(values, wanted):
        if _mantissas(groups) <= 8 and _mantissas(usual) > 12:
            return f"scaled float8, one scale per {what}"
    return ""


def _grouped(values: Tensor, wanted: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Both in groups that may share a scale: (groups, entries)."""
    yield "tensor", values.reshape(1, -1), wanted.reshape(1, -1)
    yield "row", values, wanted
    yield "column", values.T, wanted.T
    for size in (128, 64, 32):
        if values.shape[1] % size == 0 and size < values.shape[1]:
            yield f"{size} values", values.reshape(-1, size), wanted.reshape(-1, size)


def _mantissas(groups: Tensor) -> float:
    """The median number of distinct mantissas in a group, of those that the group has often; of some groups."""
    counts = []
    for group in groups[:: max(len(groups) // 16, 1)]:
        group = group[group != 0]
        mantissa = (group.abs().frexp().mantissa * 512).round().long()
        mantissa = torch.where(mantissa == 512, 256, mantissa)  # the next octave begins
        often = mantissa.bincount(minlength=513)
        counts.append(float((often > 0.01 * max(len(group), 1)).sum()) if len(group) >= 48 else inf)
    return sorted(counts)[len(counts) // 2]


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).to(torch.float32), values)


def _multiples(groups: Tensor) -> float:
    """How many steps the largest value of a group is, where all are multiples of one step; else 0.

    The step is 1/127 of the largest or, in a block that holds part of a group, the smallest.
    """
    sizes = groups.abs()
    for step in (sizes.amax(1, keepdim=True) / 127, sizes.masked_fill(sizes == 0, inf).amin(1, keepdim=True)):
        steps = sizes / step
        small = steps[(steps > 0) & (steps < 16)]
        if small.numel() > 64 and float(((small - small.round()).abs() < 0.1).float().mean()) > 0.9:
            return float(steps.amax(1).median())
    return 0.0


def _levels(groups: Tensor) -> int:
    """The median number of distinct values in a group, of some groups."""
    some = groups[:: max(len(groups) // 32, 1)].sort(1).values
    return 1 + int((some.diff(dim=1) != 0).sum(1).median())


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dim=-1).double().norm())
