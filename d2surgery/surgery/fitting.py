"""An adapter from two weights, a base and what came of it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import DoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.vectors import Weight
from d2surgery.surgery.truncation import Keep, Triplets, improved, triplets

SETTLED = 1e-4
"""The step of the alternation that ends it, relative to what the fit still misses."""
SETTLED_IN_ROUNDING = 0.03
_MOST_STEPS, _MOST_IN_ROUNDING = 200, 40
_MORE = 16  # triplets than are kept, which are followed from turn to turn and tell how many stand above a threshold
_OVER = 1.8  # of the way to what rounds to the target; below 2, beyond which it would not settle


@torch.no_grad()
def dora_of(base_weight: Weight, target: Weight, keep: Keep, along: Axis, slack: Tensor | None = None) -> DoRA:
    """The DoRA whose W' is nearest to `target`, by turns: with U the target's vectors at length 1 and n their lengths
    before m, L = the leading part of n ⊙ U − W0, then n = <W0 + L, U>. From n = ‖W0‖ it comes closer at each turn; at
    the rank of the true update it ends at rounding, at a smaller one at the best that this path finds.

    slack: by entry, how far rounding may have moved the target, half a unit in its last place. Any W' within it is as
    good, so that at each turn the target moves to the nearest such matrix (projection onto convex sets, relaxed): what
    a merge was made of is found through the rounding that hides most of it.
    """
    rows = along == "out_features"
    W, T = (base_weight.double(), target.double()) if rows else (base_weight.double().T, target.double().T)
    fit = _settled(W, T, keep)
    if slack is not None:
        fit = _within(W, T, slack.double() if rows else slack.double().T, fit)
    A, B = fit.found.factors(fit.rank)
    A, B = (A, B) if rows else (B.T, A.T)
    return DoRA(A=A, B=B, magnitude=fit.magnitude, scaling=1.0, along=along)


class _Fit(NamedTuple):
    """A turn: the update's triplets, the lengths before m, m, and W'."""

    found: Triplets
    rank: int
    lengths: Tensor
    magnitude: Tensor
    fitted: Tensor


def _settled(W: Tensor, T: Tensor, keep: Keep) -> _Fit:
    fit, missed = None, float("inf")
    for _ in range(_MOST_STEPS):
        fit = _turn(W, T, keep, fit)
        before, missed = missed, float((fit.fitted - T).norm())
        if before - missed <= SETTLED * missed or missed <= 1e-12 * float(T.norm()):
            break
    assert fit is not None
    return fit


def _within(W: Tensor, T: Tensor, slack: Tensor, fit: _Fit) -> _Fit:
    """The fit that comes nearest to lying within the slack, from one that lies near the middle."""
    keep, best, least = Keep(rank=fit.rank or 1), fit, float("inf")
    lowest, highest = T - slack, T + slack
    for _ in range(_MOST_IN_ROUNDING):
        wrong = torch.clamp(fit.fitted, lowest, highest).sub_(fit.fitted)
        missed = float(wrong.norm())
        if least - missed <= SETTLED_IN_ROUNDING * missed:
            break
        best, least = fit, missed
        fit = _turn(W, fit.fitted + _OVER * wrong, keep, fit)
    return best


def _turn(W: Tensor, aim: Tensor, keep: Keep, before: _Fit | None) -> _Fit:
    U = aim / _lengths(aim)[:, None]
    left = without_rounding((W.norm(dim=1) if before is None else before.lengths)[:, None] * U - W, W)
    more = 0 if keep.by is None else _MORE
    found = improved(left, before.found.leading(before.rank + more)) if before is not None else None
    if found is None or (rank := keep.count(found)) is None:
        found = triplets(left, replace(keep, extra=keep.extra + more))
        rank = keep.count(found)
    A, B = found.factors(rank or 0)
    V = torch.addmm(W, B, A)
    magnitude = (aim * V).sum(1) / _lengths(V)
    return _Fit(found, rank or 0, (V * U).sum(1), magnitude, V * (magnitude / _lengths(V))[:, None])


def without_rounding(difference: Tensor, of: Tensor) -> Tensor:
    """A difference of matrices of this size in float64, or zero where rounding is all that is left of it."""
    nothing = float(difference.norm()) <= 64 * torch.finfo(torch.float64).eps * float(of.norm())
    return torch.zeros_like(difference) if nothing else difference


def _lengths(V: Tensor) -> Tensor:
    """Of the rows, 1 in place of zero."""
    lengths = V.norm(dim=1)
    return torch.where(lengths == 0, 1.0, lengths)
