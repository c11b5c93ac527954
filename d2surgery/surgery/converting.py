"""One module's adapter as another kind. What is exact and what is not: docs/mathematics.md#conversions."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.thin import Thin
from d2surgery.adapters.vectors import Weight, squared_norms
from d2surgery.errors import refuse
from d2surgery.kinds import TABLE
from d2surgery.surgery.certificate import Form, Loss, dense, form, loss, truncation_loss
from d2surgery.surgery.choices import ALL, Keep
from d2surgery.surgery.fitting import dora_of, without_rounding
from d2surgery.surgery.truncation import Triplets, triplets


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to make of an adapter. along, tau: of the kinds that have them; None for the source's, else the kind's.

    weights: √ of the second moments of the module's inputs (in_features,); what is cut off is then least in the
    outputs, not in the weights. slack: of DoRA, by entry, how far rounding may have moved W': see `dora_of`.
    """

    kind: str
    keep: Keep = ALL
    along: Axis | None = None
    tau: float | None = None
    weights: Tensor | None = None
    slack: Tensor | None = None


@torch.no_grad()
def as_kind(adapter: Adapter, base_weight: Weight | None, wish: Wish) -> tuple[Adapter, Loss]:
    """The adapter as one of `wish.kind`, slots in float32, with the error that this makes.

    keep counts a kind's own rank: an update of D2-LoRA has twice it, of Dual LoRA no bound. Where it asks for nothing,
    the rank is the source's, or what its update may have where the kind has one group only.
    Raises D2SurgeryError USAGE where the base weight is needed and not given, NOT_FINITE, ZERO_NORM.
    """
    if wish.kind not in _MAKE:
        raise refuse("USAGE", "no such kind", wanted=" or ".join(_MAKE), got=wish.kind)
    if base_weight is None and (needs_base(adapter, wish.kind)):
        raise refuse("USAGE", f"{TABLE[wish.kind].title} depends on the base weight", wanted="a base", got="none")
    wish, wanted = _completed(wish, adapter), form(adapter, base_weight)
    if _stays(adapter, wish):
        return adapter, loss(wanted, wanted, rank_of(adapter))
    made: Adapter
    found: Triplets | None
    if _is_exact_dora(adapter, wish):
        assert isinstance(adapter, Thin)
        assert base_weight is not None
        assert wish.along is not None
        made, found = _thin_as_dora(adapter, base_weight, wish.along), None
    else:
        made, found = nearest(wanted, base_weight, wish, adapter)
    if isinstance(made, LoRA) and isinstance(wanted, LowRank) and found is not None and wish.weights is None:
        return made, truncation_loss(found, made)
    curve = [] if found is None else found.curve()
    largest = None if found is None or wish.weights is not None else found.largest
    got = form(made, base_weight)
    return made, loss(wanted, got, rank_of(made), curve=curve, largest=largest, weights=wish.weights)


def nearest(wanted: Form, base_weight: Weight | None, wish: Wish, source: Adapter | None = None) -> "Made":
    """The adapter of a kind that is nearest to a delta, as `wish` has it, slots in float32."""
    made, found = _MAKE[wish.kind](source, base_weight, wanted, wish)
    return made.to(dtype=torch.float32), found


def needs_base(adapter: Adapter, kind: str) -> bool:
    return adapter.normalises or kind in ("dora", "d2lora")


def rank_of(adapter: Adapter) -> int:
    """The largest of the ranks of its groups: r, as a config has it."""
    return max(int(getattr(adapter, group.down).shape[0]) for group in TABLE[adapter.kind].groups.values())


def bound_of(adapter: Adapter) -> int:
    """Of the rank of its update; of Dual LoRA, which has none, its two ranks together."""
    return sum(getattr(adapter, group.down).shape[0] for group in TABLE[adapter.kind].groups.values())


def _completed(wish: Wish, adapter: Adapter) -> Wish:
    """With what it leaves open."""
    keep, settings = wish.keep, TABLE[wish.kind].settings
    if keep.rank is None and keep.by is None:
        keep = Keep(rank=bound_of(adapter) if len(TABLE[wish.kind].groups) == 1 else rank_of(adapter))
    along = wish.along or adapter.along or settings.get("along")
    tau = adapter.settings.get("tau", settings.get("tau")) if wish.tau is None else wish.tau
    return replace(wish, keep=keep, along=along, tau=tau)


def _stays(adapter: Adapter, wish: Wish) -> bool:
    """Whether it is what is wished for."""
    own = adapter.settings
    same = own.get("along", wish.along) == wish.along and own.get("tau", wish.tau) == wish.tau
    small = wish.keep.by is None and wish.keep.rank is not None and rank_of(adapter) <= wish.keep.rank
    return adapter.kind == wish.kind and same and small


Made = tuple[Adapter, Triplets | None]
"""The adapter, and the triplets of the delta (times the weights) where they were found."""


def _lora(source: Adapter | None, base_weight: Weight | None, wanted: Form, wish: Wish) -> Made:
    """The leading triplets of the delta."""
    found = _weighted(wanted, wish)
    A, B = found.factors(wish.keep.count(found) or 0)
    return LoRA(A=A, B=B, scaling=1.0), found


def _weighted(wanted: Form, wish: Wish) -> Triplets:
    if wish.weights is None:
        return triplets(wanted if isinstance(wanted, LowRank) else dense(wanted), wish.keep)
    weights = wish.weights.double().clamp(min=float(wish.weights.max()) * 1e-6 or 1.0)
    if isinstance(wanted, LowRank):
        return triplets(LowRank(wanted.P, wanted.Q.double() * weights), wish.keep).reweighted(weights)
    return triplets((dense(wanted) * weights).float(), wish.keep).reweighted(weights)


def _dora(source: Adapter | None, base_weight: Weight | None, wanted: Form, wish: Wish) -> Made:
    """The DoRA that is nearest to W'."""
    assert base_weight is not None
    assert wish.along is not None
    target = base_weight.double() + dense(wanted, torch.float64)
    return dora_of(base_weight, target, wish.keep, wish.along, wish.slack), None


def _is_exact_dora(adapter: Adapter, wish: Wish) -> bool:
    """Whether it is thin along the same axis, and of no more ranks than asked for."""
    whole = wish.keep.by is None and wish.keep.rank is not None and bound_of(adapter) <= wish.keep.rank
    thin = isinstance(adapter, Thin) and (not adapter.normalises or adapter.along == wish.along)
    return wish.kind == "dora" and whole and thin


def _thin_as_dora(adapter: Thin, base_weight: Weight, along: Axis) -> DoRA:
    """W' = a·w + b·u = a·(w + (b/a)·u): the update times b/a, and m = ‖W'‖. Where a is 0, so is w."""
    update = adapter.update()
    P, Q = update.P, update.Q
    if adapter.normalises:
        gains = adapter.gains(base_weight)
        a, b = 1 + gains.base_excess, gains.update_gain
        ratio = torch.where(a == 0, 1.0, b / torch.where(a == 0, 1.0, a))
        P, Q = (ratio[:, None] * P, Q) if along == "out_features" else (P, Q * ratio)
    if isinstance(adapter, LoRA):
        A, B, scaling = adapter.A, adapter.B, float(adapter.scaling)
    else:
        A, B, scaling = Q, P, 1.0
    magnitude = _lengths(adapter, base_weight, along)
    return DoRA(A=A, B=B, magnitude=magnitude, scaling=scaling, along=along).to(dtype=torch.float32)


def _lengths(adapter: Adapter, base_weight: Weight, along: Axis) -> Tensor:
    """‖W'‖ of every vector, in float64."""
    W = base_weight.double()
    return squared_norms(W + adapter.delta(W), along).sqrt()


def _d2lora(source: Adapter | None, base_weight: Weight | None, wanted: Form, wish: Wish) -> Made:
    """ΔW = W0 + L − proj(W0 + L/2) gives W* + ΔW = W0 + L; cut to rank 2r, the larger half is the plus branch."""
    assert base_weight is not None
    assert wish.tau is not None
    along = wish.along or "in_features"
    W, L = base_weight.double(), dense(wanted, torch.float64)
    middle = W + L / 2
    lengths, halfway = squared_norms(W, along).sqrt(), squared_norms(middle, along).sqrt()
    ratio = torch.where(halfway == 0, 0.0, lengths / torch.where(halfway == 0, 1.0, halfway))
    update = W + L - middle * (ratio[:, None] if along == "out_features" else ratio)
    keep = replace(wish.keep, rank=None if wish.keep.rank is None else 2 * wish.keep.rank)
    found = triplets(without_rounding(update, W), keep)
    return d2_of(found, keep.count(found) or 0, wish.tau, along=along), None


def d2_of(found: Triplets, count: int, tau: float, **settings: Any) -> D2LoRA:
    """ΔW of the leading triplets, shared by two branches of one rank; without τ all of it is in the plus branch."""
    A, B = found.factors(count)
    rank = len(A) if tau == 0 else -(-len(A) // 2)
    spare = (2 * rank - len(A)) if tau else rank
    A = torch.cat([A, A.new_zeros(spare, A.shape[1])])
    B = torch.cat([B, B.new_zeros(B.shape[0], spare)], 1)
    minus = -B[:, rank:] / tau if tau else B[:, rank:]
    return D2LoRA(
        A_plus=A[:rank], B_plus=B[:, :rank], A_minus=A[rank:], B_minus=minus, scaling=1.0, tau=tau, **settings
    )


def _duallora(source: Adapter | None, base_weight: Weight | None, wanted: Form, wish: Wish) -> Made:
    """D·C = L of rank r gives the signs of the delta where that has this rank; B·A is the best of rank r of abs(L)."""
    sizes: LowRank | Tensor
    signs: LowRank | Tensor
    if isinstance(source, DualLoRA):
        sizes, signs = LowRank(float(source.scaling) * source.B.double(), source.A), LowRank(source.D, source.C)
    else:
        sizes, signs = dense(wanted).abs(), wanted if isinstance(wanted, LowRank) else dense(wanted)
    (A, B), (C, D) = (_factors(matrix, wish.keep) for matrix in (sizes, signs))
    return DualLoRA(A=A, B=B, C=C, D=D, scaling=1.0), None


def _factors(matrix: LowRank | Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    found = triplets(matrix, keep)
    return found.factors(keep.count(found) or 0)


_MAKE = {"lora": _lora, "dora": _dora, "d2lora": _d2lora, "duallora": _duallora}
