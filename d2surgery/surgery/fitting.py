"""An adapter from two weights, a base and what came of it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import DoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.vectors import Weight
from d2surgery.surgery.choices import Keep
from d2surgery.surgery.truncation import Triplets, improved, triplets

SETTLED = 1e-4
"""The step of the alternation that ends it, relative to what the fit still misses."""
SETTLED_IN_ROUNDING = 0.03
_MOST_STEPS, _MOST_IN_ROUNDING = 200, 40
_MORE = 16  # triplets than are kept, which are followed from turn to turn and tell how many stand above a threshold
_FASTEST, _SLOWEST = 0.7, 0.8  # ratio of a turn's change of n to that of the turn before, as it is taken
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
    A, B, magnitude = *fit.found.factors(fit.rank), fit.magnitude
    if slack is not None:
        A, B, magnitude = _within(W.float(), T.float(), slack.float() if rows else slack.float().T, fit)
    A, B = (A, B) if rows else (B.T, A.T)
    return DoRA(A=A, B=B, magnitude=magnitude, scaling=1.0, along=along)


class _Fit(NamedTuple):
    """A turn: the update's triplets, the lengths before m, m, and W'."""

    found: Triplets
    rank: int
    lengths: Tensor
    magnitude: Tensor
    fitted: Tensor


def _settled(W: Tensor, T: Tensor, keep: Keep) -> _Fit:
    """From n = ‖W0‖ until a turn comes no closer.

    An error of n scales rows of W0, which is of full rank: where what stands above a threshold is kept, the threshold
    is higher by what n may still move makes of W0, and falls as n settles.
    """
    start, U = W.norm(dim=1), T / _lengths(T)[:, None]
    lengths = torch.where(start == 0, T.norm(dim=1), start)  # from zero it would not move
    short = (start - torch.linalg.vecdot(W, U)).clamp_(min=0)
    to_come = 2 * short + 3 * (2 * short * start / W.shape[1]).sqrt()  # an update this short may lean along W0, too
    step, unsure, fit, missed, rank = float(to_come.norm()), float("inf"), None, float("inf"), -1
    for _ in range(_MOST_STEPS):
        unsure = min(unsure, _edge(W, to_come / _or_one(lengths))) if keep.by == "above" else 0.0
        fit = _turn(W, T, lengths, replace(keep, value=keep.value + unsure), fit)
        moved, lengths = (fit.lengths - lengths) * (start > 0), fit.lengths
        before, step = step, float(moved.norm())
        slower = min(max(step / (before or 1.0), _FASTEST), _SLOWEST)
        to_come = moved * (slower / (1 - slower))  # as of a geometric series
        before, missed = missed, float((fit.fitted - T).norm())
        same, rank = fit.rank == rank and unsure <= keep.value / 8, fit.rank
        if (same and before - missed <= SETTLED * missed) or missed <= 1e-12 * float(T.norm()):
            break
    assert fit is not None
    return fit


def _edge(W: Tensor, scales: Tensor) -> float:
    """About the largest singular value of diag(scales)·W: the largest row norm and the largest column norm."""
    squares = (W * scales[:, None]).square_()
    return float(squares.sum(1).max().sqrt() + squares.sum(0).max().sqrt())


def _within(W: Tensor, T: Tensor, slack: Tensor, fit: _Fit) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and m of the W' that comes nearest to lying within the slack, by turns from a fit that lies near the middle.

    In float32, which 16 bits are seen from as exact; the leading part of n ⊙ U − W0 is followed by one multiplication
    either way at each turn.
    """
    A, B = (factor.float() for factor in fit.found.factors(fit.rank))
    lengths, magnitude, fitted = (values.float() for values in (fit.lengths, fit.magnitude, fit.fitted))
    best, least = (A, B, magnitude), float("inf")
    lowest, highest = T - slack, T + slack
    for _ in range(_MOST_IN_ROUNDING):
        wrong = torch.clamp(fitted, lowest, highest).sub_(fitted)
        missed = float(wrong.norm())
        if least - missed <= SETTLED_IN_ROUNDING * missed:
            break
        best, least = (A, B, magnitude), missed
        aim = fitted.add_(wrong, alpha=_OVER)
        sizes = _lengths(aim)
        U = aim.div_(sizes[:, None])
        if fit.rank:
            left = (U * lengths[:, None]).sub_(W)
            B = torch.linalg.qr(left @ torch.linalg.qr(A.T).Q).Q
            A = B.T @ left
        V = torch.addmm(W, B, A)
        lengths, own = torch.linalg.vecdot(V, U), _lengths(V)
        magnitude = sizes * lengths / own
        fitted = V.mul_((magnitude / own)[:, None])
    A, B, magnitude = (values.double() for values in best)
    left, sigma, right = torch.linalg.svd(A, full_matrices=False)
    root = sigma.sqrt()
    return root[:, None] * right, B @ left * root, magnitude


def _turn(W: Tensor, aim: Tensor, lengths: Tensor, keep: Keep, before: _Fit | None) -> _Fit:
    U = aim / _lengths(aim)[:, None]
    left = without_rounding(lengths[:, None] * U - W, W)
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
    return _or_one(V.norm(dim=1))


def _or_one(lengths: Tensor) -> Tensor:
    return torch.where(lengths == 0, 1.0, lengths)
