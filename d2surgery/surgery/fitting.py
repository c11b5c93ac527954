"""An adapter from two weights, a base and what came of it."""

import torch
from torch import Tensor

from d2surgery.adapters import DoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.vectors import Weight
from d2surgery.surgery.truncation import Keep, Triplets, improved, triplets

SETTLED = 1e-4
"""The step of the alternation that ends it, relative to what the fit still misses."""
_MOST_STEPS = 200


@torch.no_grad()
def dora_of(base_weight: Weight, target: Weight, keep: Keep, along: Axis) -> DoRA:
    """The DoRA whose W' is nearest to `target`, by turns: with U the target's vectors at length 1 and n their lengths
    before m, L = the leading part of n ⊙ U − W0, then n = <W0 + L, U>. From n = ‖W0‖ it comes closer at each turn; at
    the rank of the true update it ends at rounding, at a smaller one at the best that this path finds.
    """
    rows = along == "out_features"
    W, T = (base_weight.double(), target.double()) if rows else (base_weight.double().T, target.double().T)
    lengths = T.norm(dim=1)
    U = T / torch.where(lengths == 0, 1.0, lengths)[:, None]
    n = W.norm(dim=1)
    missed = float("inf")
    found: Triplets | None = None
    for _ in range(_MOST_STEPS):
        left = without_rounding(n[:, None] * U - W, W)
        fixed = found is not None and keep.by is None and found.U.shape[1] == keep.rank
        found = improved(left, found) if found is not None and fixed else triplets(left, keep)
        A, B = found.factors(keep.count(found) or 0)
        V = torch.addmm(W, B, A)
        n = (V * U).sum(1)
        before, missed = missed, float((V / _lengths(V)[:, None] * lengths[:, None] - T).norm())
        if before - missed <= SETTLED * missed or missed <= 1e-12 * float(lengths.norm()):
            break
    magnitude = (T * V).sum(1) / _lengths(V)
    A, B = (A, B) if rows else (B.T, A.T)
    return DoRA(A=A, B=B, magnitude=magnitude, scaling=1.0, along=along)


def without_rounding(difference: Tensor, of: Tensor) -> Tensor:
    """A difference of matrices of this size in float64, or zero where rounding is all that is left of it."""
    nothing = float(difference.norm()) <= 64 * torch.finfo(torch.float64).eps * float(of.norm())
    return torch.zeros_like(difference) if nothing else difference


def _lengths(V: Tensor) -> Tensor:
    """Of the rows, 1 in place of zero."""
    lengths = V.norm(dim=1)
    return torch.where(lengths == 0, 1.0, lengths)
