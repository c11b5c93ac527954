"""Checkpoints added, scaled, and cut to a part: what `combining` does with one module, over all."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, DoRA, LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.thin import Thin
from d2surgery.adapters.vectors import Weight, squared_norms
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.surgery.certificate import Certificate, Form, Loss, dense, form, loss
from d2surgery.surgery.combining import ENTRYWISE, Recipe, combined
from d2surgery.surgery.converting import bound_of, rank_of
from d2surgery.surgery.rebuilding import by_place, history, no_progress, over_modules, rebuilt, threads
from d2surgery.surgery.truncation import ALL, Keep
from d2surgery.surveying.modules import BaseMatrices, Place, Progress, places

_DIFFER = "trained in several, differently"

# Combine --------------------------------------------------------------------------------------------------------------


def combine(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    recipe: Recipe = Recipe(),  # noqa: B008  # a frozen value
    base: BaseWeights | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """One LoRA checkpoint of several: of their true deltas, on every module that one of them adapts.

    Where the recipe says nothing of ranks, exact keeps what the sum has, the others the sum of the ranks. Replacements
    and token rows are kept where all that have them have the same. Biases (lora_bias) are summed as deltas are.

    The base is needed for kinds that normalise: a DoRA of DoRAs is no sum, so their deltas are summed and the result is
    a LoRA. Raises D2SurgeryError: USAGE, SHAPE_MISMATCH and REPLACEMENTS_DISAGREE with all misfits at once.
    """
    if len(checkpoints) != len(weights) or not checkpoints:
        raise refuse("USAGE", "a weight for each adapter", wanted=str(len(checkpoints)), got=str(len(weights)))
    raise_errors(problem for each in checkpoints for problem in each.layout.problems)
    if base is None and (names := [m for c in checkpoints for m, e in c.layout.adapters.items() if e.axis]):
        raise refuse("USAGE", "the delta depends on the base weights", module=names[0], wanted="a base", got="none")
    raise_errors(_misfits(checkpoints))
    where = [BaseMatrices(each, base) if base is not None else None for each in checkpoints]

    def one(place: Place) -> tuple[Adapter, Loss]:
        having = [i for i, each in enumerate(checkpoints) if place.module in each.layout.adapters]
        adapters = [checkpoints[i].adapter(place.module, place.expert or 0) for i in having]
        deltas = [form(a, _weight(where[i], place, a)) for i, a in zip(having, adapters, strict=True)]
        whole = recipe if recipe.keep is not ALL else replace(recipe, keep=_room(recipe, adapters))
        return combined(deltas, [weights[i] for i in having], whole, place.name)

    union = list(dict.fromkeys(place for each in checkpoints for place in places(each)))
    made, losses = by_place(one, union, threads(checkpoints, base), progress)
    settings = {"weights": list(weights), "recipe": recipe.method, "meaning": "sum of true deltas"} | _chosen(recipe)
    certificate = Certificate(method="combine", settings=settings, losses=losses)
    steps = history(checkpoints[0], certificate, checkpoints[1:])
    return rebuilt(checkpoints, made, steps, lambda number, module: weights[number]), certificate


def _chosen(recipe: Recipe) -> dict[str, Any]:
    entries = {"density": recipe.density, "space": recipe.space, "seed": recipe.seed}
    return entries if recipe.method in ENTRYWISE else {}


def _weight(where: BaseMatrices | None, place: Place, adapter: Adapter) -> Tensor | None:
    return where[place] if where is not None and adapter.normalises else None


def _room(recipe: Recipe, adapters: Sequence[Adapter]) -> Keep:
    """Where nothing is said: all that an exact sum of factors has, else the sum of what the updates may have."""
    if recipe.method != "exact":
        return Keep(rank=sum(map(bound_of, adapters)))
    if any(each.normalises or each.update() is None for each in adapters):
        raise refuse("USAGE", "an exact sum of deltas that are no factors is of full rank",
                     wanted="a rank or a criterion, or svd, which keeps the sum of ranks", got="neither")  # fmt: skip
    return ALL


def _misfits(checkpoints: Sequence[Checkpoint]) -> Iterator[Problem]:
    """What the adapters do not agree on."""
    first: dict[str, Any] = {}
    for checkpoint in checkpoints:
        for module, entry in checkpoint.layout.adapters.items():
            what = (entry.out_features, entry.in_features, entry.stored, entry.kernel, entry.experts)
            if (known := first.setdefault(module, what)) != what:
                yield Problem(code="SHAPE_MISMATCH", message="the adapters differ", module=module, wanted=str(known),
                              got=str(what))  # fmt: skip
    whole: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        for target, key in checkpoint.layout.replacements.items():
            tensor = checkpoint.tensor(key)
            if not _same(whole.setdefault(target, tensor), tensor):
                yield Problem(code="REPLACEMENTS_DISAGREE", message=_DIFFER, module=target)
    rows: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for checkpoint in checkpoints:
        for target, found in checkpoint.layout.rows.items():
            mine = (found.indices, checkpoint.tensor(found.key))
            known_rows = rows.setdefault(target, mine)
            if known_rows[0] != mine[0] or not _same(known_rows[1], mine[1]):
                yield Problem(code="REPLACEMENTS_DISAGREE", message=_DIFFER, module=target)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


# Scale ----------------------------------------------------------------------------------------------------------------


def scale(
    checkpoint: Checkpoint,
    factor: float,
    base: BaseWeights | None = None,
    *,
    chosen: Mapping[str, bool] | None = None,
    only: bool = False,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """Every chosen delta times a factor; negative ones too. `only`: the others are left out, else they stay.

    LoRA and Dual LoRA by their scaling, exactly. What normalises becomes the DoRA on its axis whose delta this is,
    exactly: it needs the base. Times 0 everything is a LoRA of zeros. Raises D2SurgeryError USAGE.
    """
    picked = dict.fromkeys(checkpoint.layout.adapters, True) if chosen is None else dict(chosen)
    if not any(picked.values()):
        raise refuse("USAGE", "no module is chosen", got=f"{len(picked)} modules")
    if not isfinite(factor):
        raise refuse("USAGE", "a factor", wanted="a number", got=str(factor))
    if factor == 0 and not (only or all(picked.values())):
        raise refuse("USAGE", "times 0 on a part", wanted="leave the part out, or all modules", got="0")

    def operate(place: Place, adapter: Adapter, weight: Tensor | None) -> tuple[Adapter, Loss]:
        wanted = form(adapter, weight if adapter.normalises else None)
        made = scaled(adapter, factor if picked[place.module] else 1.0, weight)
        got = form(made, weight if made.normalises else None)
        return made, loss(_times(wanted, factor if picked[place.module] else 1.0), got, rank_of(made))

    needs = base if any(entry.axis for entry in checkpoint.layout.adapters.values()) else None
    part = _part(checkpoint, [m for m, wanted in picked.items() if wanted]) if only else checkpoint
    return over_modules(part, needs, operate, "scale", {"factor": factor, "only": only or None}, progress)


def _times(wanted: Form, factor: float) -> LowRank | Tensor:
    """A delta times a number; formed where it has no factors."""
    return factor * wanted if isinstance(wanted, LowRank) else factor * dense(wanted, torch.float64)


@torch.no_grad()
def scaled(adapter: Adapter, factor: float, base_weight: Weight | None) -> Adapter:
    """An adapter whose delta is factor · the delta."""
    if factor == 1:
        return adapter
    if factor == 0:
        zeros = {"A": torch.zeros(1, adapter.in_features), "B": torch.zeros(adapter.out_features, 1)}
        return LoRA(**zeros, scaling=1.0)
    if not adapter.normalises:
        return replace(adapter, scaling=float(adapter.scaling) * factor)
    if base_weight is None or not isinstance(adapter, Thin) or adapter.along is None:
        raise refuse("USAGE", "the delta depends on the base weight", wanted="a base", got=adapter.kind)
    gains, update, along = adapter.gains(base_weight), adapter.update(), adapter.along
    a, b = 1 + factor * gains.base_excess, factor * gains.update_gain
    if bool((a == 0).any()):
        raise refuse("USAGE", "a vector of the base would vanish, which no DoRA can do", wanted="another factor")
    ratio = b / a
    P, Q = (ratio[:, None] * update.P, update.Q) if along == "out_features" else (update.P, update.Q * ratio)
    lengths = squared_norms(base_weight.double() + P @ Q, along).sqrt()
    return DoRA(A=Q.float(), B=P.float(), magnitude=(a * lengths).float(), scaling=1.0, along=along)


def choose(checkpoint: Checkpoint, modules: str | None, layers: range | None) -> dict[str, bool]:
    """Which modules a regular expression (anywhere in the name) and layer numbers choose."""
    try:
        pattern = re.compile(modules or "")
    except re.error as error:
        raise refuse("USAGE", f"not a regular expression: {error}", got=str(modules)) from None

    def wanted(module: str) -> bool:
        number = re.search(r"\.(\d+)\.", module)
        inside = layers is None or (number is not None and int(number[1]) in layers)
        return inside and pattern.search(module) is not None

    return {module: wanted(module) for module in checkpoint.layout.adapters}


def _part(checkpoint: Checkpoint, modules: Sequence[str]) -> Checkpoint:
    """The checkpoint with some of its modules; all else stays."""
    layout = checkpoint.layout
    return Checkpoint(replace(layout, adapters={module: layout.adapters[module] for module in modules}))
