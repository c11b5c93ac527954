"""A whole checkpoint as another kind or of other ranks, and a budget of parameters that all modules share."""

import heapq
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.forwards import Axis
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.kinds import TABLE
from d2surgery.surgery.certificate import Certificate, Loss
from d2surgery.surgery.choices import ALL, Keep
from d2surgery.surgery.converting import Wish, as_kind, needs_base
from d2surgery.surgery.rebuilding import no_progress, over_modules
from d2surgery.surveying.modules import BaseMatrices, Place, Progress, places


def resize(checkpoint: Checkpoint, base: BaseWeights | None = None, **wishes: Any) -> tuple[Checkpoint, Certificate]:
    """Every adapter of its own kind, of fewer ranks: `convert` to no other kind."""
    return convert(checkpoint, None, base, **wishes)


def convert(
    checkpoint: Checkpoint,
    kind: str | None = None,
    base: BaseWeights | None = None,
    *,
    keep: Keep | Mapping[str, Keep] = ALL,
    max_error: float | None = None,
    along: Axis | None = None,
    tau: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """Every adapter as one of this kind (None: its own), of as many ranks as `keep` says, with the error of each.

    keep: for all, or by module. max_error: the largest relative Frobenius error of a module that may come of it; where
    `keep` says nothing, as few ranks as it takes.
    along, tau: of DoRA and D2-LoRA; None is the source's own, else the kind's. weights: by module, √ of the second
    moments of its inputs (in_features,): the error in the outputs is then made least, and `max_error` is of it.

    Replacements, token rows and biases are taken over. Raises D2SurgeryError: USAGE for a base that is needed and not
    given, ERROR_TOO_LARGE with every module above `max_error`, ZERO_NORM, NOT_FINITE, what `load` and `sites` found.
    """
    raise_errors(checkpoint.layout.problems)
    if max_error is not None and keep is ALL:
        keep = Keep(by="error", value=max_error)
    needed = [e.module for e in checkpoint.layout.adapters.values() if e.axis or (kind or e.kind) in ("dora", "d2lora")]
    if needed and base is None:
        what = f"{TABLE[kind].title}" if kind in TABLE else "this"
        raise refuse("USAGE", f"{what} depends on the base weights", wanted="a base", got="none")

    def operate(place: Place, adapter: Adapter, weight: Tensor | None) -> tuple[Adapter, Loss]:
        kept = keep if isinstance(keep, Keep) else keep.get(place.name, ALL)
        wish = Wish(
            kind=kind or adapter.kind, keep=kept, along=along, tau=tau, weights=(weights or {}).get(place.module)
        )
        return as_kind(adapter, weight if needs_base(adapter, wish.kind) else None, wish)

    method, settings = "convert" if kind else "resize", _settings(kind, keep, along, tau, weights)
    chosen_by = None if isinstance(keep, Keep) else base
    found = over_modules(checkpoint, base if needed else None, operate, method, settings, progress, chosen_by=chosen_by)
    if max_error is not None:
        raise_errors(_too_large(found[1], max_error))
    return found


def _settings(kind: str | None, keep: Keep | Mapping[str, Keep], along: Any, tau: Any, weights: Any) -> dict[str, Any]:
    """Those that were chosen, in words."""
    said: dict[str, Any] = {"kind": kind, "along": along, "tau": tau, "weighted": bool(weights) or None}
    if isinstance(keep, Keep):
        said |= {"rank": keep.rank, "by": keep.by, "value": keep.value if keep.by else None}
    else:
        said |= {"ranks": "by module"}
    return {name: value for name, value in said.items() if value is not None}


def _too_large(certificate: Certificate, most: float) -> Iterator[Problem]:
    for module, loss in certificate.losses.items():
        error = loss.relative_error if loss.weighted_error is None else loss.weighted_error
        if error > most:
            enough = next((k for k, error in enumerate(loss.curve) if error <= most), None)
            message = f"rank {enough} would do" if enough else "no rank of this kind is known to do"
            got = f"{error:.3g} at rank {loss.rank}"
            yield Problem(
                code="ERROR_TOO_LARGE", message=message, module=module, wanted=f"a relative error ≤ {most:g}", got=got
            )


# Ranks against the base -----------------------------------------------------------------------------------------------


def against_base(checkpoint: Checkpoint, share: float, base: BaseWeights) -> dict[str, Keep]:
    """By module, the directions whose σ is above a share of ‖W0‖_F."""
    where = BaseMatrices(checkpoint, base)
    return {
        place.name: Keep(by="above", value=share * float(torch.linalg.vector_norm(where[place].double())))
        for place in places(checkpoint)
    }


@torch.no_grad()
def budget(checkpoint: Checkpoint, parameters: int, base: BaseWeights | None = None) -> dict[str, Keep]:
    """Ranks by module for so many parameters in all: each next rank goes where it takes most error per parameter.

    The error is Σ‖·‖²_F over modules, of updates; with a base each relative to ‖W0‖²_F. Every module keeps rank 1 at
    least. This is the least error of truncated updates, since singular values fall. Magnitudes and biases count.

    Raises D2SurgeryError USAGE for Dual LoRA, whose update has no singular values; BUDGET where rank 1 does not fit.
    """
    where = BaseMatrices(checkpoint, base) if base is not None else None
    waiting: list[tuple[float, str, int]] = []
    gains: dict[str, list[float]] = {}
    costs: dict[str, int] = {}
    spent = 0
    for place in places(checkpoint):
        adapter = checkpoint.adapter(place.module, place.expert or 0)
        update = adapter.update()
        if update is None:
            raise refuse("USAGE", "a budget needs an update with singular values", module=place.name, got=adapter.kind)
        groups = len(TABLE[adapter.kind].groups)
        squares = update.singular_values().square()
        if where is not None:
            squares = squares / float(where[place].double().square().sum() or 1.0)
        gains[place.name] = [float(squares[at : at + groups].sum()) for at in range(0, len(squares), groups)]
        costs[place.name] = groups * (adapter.out_features + adapter.in_features)
        vectors = sum(getattr(adapter, name).numel() for name in TABLE[adapter.kind].vectors)
        spent += costs[place.name] + vectors
    if spent > parameters:
        raise refuse("BUDGET", "rank 1 on every module", wanted=f"at least {spent} parameters", got=str(parameters))
    ranks = dict.fromkeys(gains, 1)
    for name, found in gains.items():
        if len(found) > 1 and isfinite(found[1]):
            heapq.heappush(waiting, (-found[1] / costs[name], name, 1))
    while waiting:
        _, name, at = heapq.heappop(waiting)
        if spent + costs[name] > parameters:
            continue
        spent, ranks[name] = spent + costs[name], at + 1
        if at + 1 < len(gains[name]):
            heapq.heappush(waiting, (-gains[name][at + 1] / costs[name], name, at + 1))
    return {name: Keep(rank=rank) for name, rank in ranks.items()}
