"""What happened to one weight that no recipe replays: every usual fault is tried, and the one that fits is named."""

from dataclasses import dataclass
from math import isnan, sqrt

import torch
from torch import Tensor

from d2surgery.faults import Case, Named, hypotheses, scalings
from d2surgery.measures.fidelity import Comparison, compare
from d2surgery.tensors import rounded

SIGNIFICANT = 5.0  # standard errors
EXCESS = 1.3  # noise above this many times the noise of rounding once is not rounding (double rounding: 1.01)
_RANK_SIDE = 768  # rows and columns of the block whose residual is decomposed


@dataclass(frozen=True)
class Diagnosis:
    """code "": nothing explains it better than a right merge does."""

    code: str
    what: str
    exact: bool = False  # every bit is as this fault gives it
    strength: float | None = None  # fitted, where no named fault fits
    residual_rank: int | None = None
    explained: bool = True  # what is left is rounding


@dataclass(frozen=True)
class _Trial:
    named: Named
    against: Comparison  # strength: 0 for the right merge, 1 for this fault
    noise: float  # ‖merged − effective‖ over that of rounding it once


def diagnose(case: Case, merged: Tensor) -> Diagnosis:
    """`merged` as stored, of the same block as the case.

    A fault moves the weight from E to F. How much of that move is in the file is a strength with an error, like λ̂; the
    fault is believed when at least half of the move is there, significantly, and nothing else leaves less unexplained.
    """
    right = case.with_(case.adapter)
    stored = rounded(right, merged.dtype)
    trials = [_try(named, right, stored, merged) for named in hypotheses(case)]
    believed = [t for t in trials if t is not None and _believed(t)]
    believed.sort(key=lambda trial: (trial.against.mismatched > 0, trial.against.dd))
    own = noise(right, merged)
    fitted = _fit(case, right, stored, merged)
    best = believed[0] if believed else None
    if best is not None and best.against.mismatched and fitted[2] < 0.9 * best.noise and fitted[2] <= EXCESS:
        best = None  # a plain strength fits better
    if best is not None and (best.noise <= EXCESS or best.noise < 0.5 * min(own, fitted[2])):
        explained = best.against.mismatched == 0 or best.noise <= EXCESS
        return Diagnosis(best.named.code, best.named.what, best.against.mismatched == 0, explained=explained)
    strength, error, left = fitted
    if left <= EXCESS or left < 0.5 * own:
        if abs(strength - 1) > SIGNIFICANT * error:
            return Diagnosis(
                "WRONG_STRENGTH", _factor(case, strength, error), strength=strength, explained=left <= EXCESS
            )
        return Diagnosis("", "")
    if own <= EXCESS:
        return Diagnosis("", "")
    if grid := _grid(case.base, merged):
        return Diagnosis("REQUANTIZED", grid)
    rank, side = _residual_rank(case, merged, strength)
    full = f"what is left has rank {rank} of {side} above rounding noise"
    origin = "another base, or noise" if rank > side // 4 else "another adapter, or a change of low rank"
    return Diagnosis("DELTA_UNEXPLAINED", f"{full}: {origin}", residual_rank=rank, explained=False)


def noise(effective: Tensor, merged: Tensor) -> float:
    """‖merged − effective‖ in units of the noise of rounding `effective` once to merged's dtype."""
    once = rounded(effective, merged.dtype).to(effective.dtype) - effective
    floor = _norm(once) + 1e-7 * _norm(effective) * (merged.dtype == torch.float32)
    return _norm(merged.to(effective.dtype) - effective) / floor if floor else 0.0


def _try(named: Named, right: Tensor, stored: Tensor, merged: Tensor) -> _Trial | None:
    weight = named.weight()
    if weight.shape != right.shape or not bool(torch.isfinite(weight).all()):
        return None
    wanted = rounded(weight, merged.dtype)
    against = compare(stored.to(right.dtype), weight - right, wanted, merged)
    return _Trial(named, against, noise(weight, merged))


def _believed(trial: _Trial) -> bool:
    sums = trial.against
    if isnan(sums.strength) or not sums.e_delta:
        return False  # the file's dtype cannot tell this fault from a right merge
    return sums.strength >= 0.5 and sums.strength > SIGNIFICANT * sums.strength_error


def _fit(case: Case, right: Tensor, stored: Tensor, merged: Tensor) -> tuple[float, float, float]:
    """λ̂, its standard error, and the noise that W0 + λ̂·delta leaves."""
    sums = compare(case.base, right - case.base, stored, merged)
    if isnan(sums.strength):
        return 1.0, float("inf"), noise(right, merged)
    return sums.strength, sums.strength_error, noise(case.base + sums.strength * (right - case.base), merged)


def _factor(case: Case, strength: float, error: float) -> str:
    """The strength, with the usual mistake that gives it where there is one."""
    near = max(SIGNIFICANT * error, 2e-4 * abs(strength))
    for what, factor in scalings(case).items():
        if case.adapter.kind in ("lora", "duallora") and abs(strength - factor) <= near:
            return what
    return "a factor of its own"


def _grid(base: Tensor, merged: Tensor) -> str:
    """Which coarser grid the merged values lie on, "" for none: fewer mantissa bits, or few levels per group."""
    values = merged.to(torch.float32)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float8", torch.float8_e4m3fn)):
        narrower = dtype.itemsize < merged.dtype.itemsize
        if narrower and torch.equal(values.to(dtype).to(torch.float32), values):
            coarse = not torch.equal(base.to(torch.float32).to(dtype).to(torch.float32), base.to(torch.float32))
            return f"every value is a {name}" if coarse or dtype.itemsize == 1 else ""
    for size in (values.shape[1], 128, 64, 32):
        if values.shape[1] % size == 0 and size >= 16:
            groups = values.reshape(-1, size)
            levels, plain = _levels(groups), _levels(base.to(merged.dtype).reshape(-1, size))
            if levels <= min(16, size // 2) and plain > 1.5 * levels:
                return f"at most {levels} levels per group of {size}: 4 bits"
    steps = values.abs().amax(1, keepdim=True) / 127
    small = (values / steps)[values.abs() < 16 * steps]
    if small.numel() > 64 and float(((small - small.round()).abs() < 0.1).float().mean()) > 0.97:
        return "multiples of 1/127 of each row's largest: 8 bits"
    return ""


def _levels(groups: Tensor) -> int:
    """The median number of distinct values in a group, of some groups."""
    return int(torch.tensor([len(torch.unique(group)) for group in groups[:: max(len(groups) // 32, 1)]]).median())


def _residual_rank(case: Case, merged: Tensor, strength: float) -> tuple[int, int]:
    """How many singular values of merged − W0 − λ̂·delta stand out of rounding noise, and of how many, in a leading
    block of the weight (Marchenko–Pastur edge).
    """
    block = (slice(_RANK_SIDE), slice(_RANK_SIDE))
    effective = (case.base + strength * (case.with_(case.adapter) - case.base))[block].double()
    left = merged[block].double() - effective
    once = rounded(effective, merged.dtype).double() - effective
    edge = 1.05 * (_norm(once) / sqrt(once.numel())) * (sqrt(left.shape[0]) + sqrt(left.shape[1]))
    edge = max(edge, 1e-3 * float(torch.linalg.matrix_norm(left, 2)))
    return int((torch.linalg.svdvals(left) > edge).sum()), min(left.shape)


def _norm(values: Tensor) -> float:
    return float(values.double().norm())
