"""Checkpoints added, scaled, and cut to a part: what `combining` does with one module, over all."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from d2surgery.placement.parameters import parameters
from d2surgery.surgery.certificate import Certificate, Form, Loss, dense, form, loss
from d2surgery.surgery.choices import ALL, Keep, Recipe
from d2surgery.surgery.combining import ENTRYWISE, combined
from d2surgery.surgery.converting import bound_of, rank_of
from d2surgery.surgery.provenance import files_of, history, inputs_of
from d2surgery.surgery.rebuilding import by_place, no_progress, over_modules, rebuilt, threads, with_tensors
from d2surgery.surveying.modules import BaseMatrices, Place, Progress, places

_DIFFER = "trained in several, differently"
AUDITED = 1e-5
"""What two roundings to float32 may add to a relative error."""

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
    needing = [m for each in checkpoints for m, entry in each.layout.adapters.items() if entry.axis]
    if base is None and needing:
        raise refuse("USAGE", "the delta depends on the base weights", module=needing[0], wanted="a base", got="none")
    raise_errors(_misfits(checkpoints))
    where = [BaseMatrices(each, base) if base is not None else None for each in checkpoints]

    def one(place: Place) -> tuple[Adapter, Loss]:
        having = [i for i, each in enumerate(checkpoints) if place.module in each.layout.adapters]
        adapters = [checkpoints[i].adapter(place.module, place.expert or 0) for i in having]
        deltas = [form(a, _weight(where[i], place, a)) for i, a in zip(having, adapters, strict=True)]
        whole = recipe if recipe.keep is not ALL else replace(recipe, keep=_room(recipe, adapters))
        return combined(deltas, [weights[i] for i in having], whole, place.name)

    union = list(dict.fromkeys(place for each in checkpoints for place in places(each)))
    formed = recipe.method in ENTRYWISE and recipe.space == "entries"
    made, losses = by_place(one, union, threads(checkpoints, base, formed=formed), progress)
    settings = {"weights": list(weights), "recipe": recipe.method, "meaning": "sum of true deltas"} | _chosen(recipe)
    certificate = Certificate(method="combine", settings=settings, losses=losses)
    steps = history(checkpoints, certificate, base if needing else None)
    return rebuilt(checkpoints, made, steps, lambda number, module: weights[number]), certificate


def audit_combination(
    made: Checkpoint,
    parts: Sequence[Checkpoint],
    base: BaseWeights | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[Certificate, list[Problem]]:
    """How far a combination is from what its parts give by the weights and the recipe in its own header.

    Problems: OTHER_PARTS by sha256, and OTHER_COMBINATION for every module whose error is above the one that the header
    states for the worst. Raises USAGE where the header tells of no combination.
    """
    step = made.layout.about.history[-1] if made.layout.about.history else {}
    settings = step.get("settings")
    weights = settings.get("weights") if isinstance(settings, dict) else None
    if step.get("method") != "combine" or not isinstance(settings, dict) or not isinstance(weights, list):
        raise refuse("USAGE", "its header tells of no combination", file=str(made.layout.path))
    stated, problems = step.get("max_relative_error"), list(_other_parts(made, step, parts, base))
    choices = {name: settings[name] for name in ("density", "space", "seed") if name in settings}
    recipe = Recipe(method=settings.get("recipe", ""), keep=Keep(by="energy", value=1.0), **choices)
    whole, _ = combine(parts, [float(weight) for weight in weights], recipe, base, progress=progress)
    losses: dict[str, Loss] = {}
    for place in places(whole):
        if place.module not in made.layout.adapters:
            problems.append(Problem(code="OTHER_COMBINATION", message="missing", module=place.name))
            continue
        wanted, got_ = (each.adapter(place.module, place.expert or 0).update() for each in (whole, made))
        assert wanted is not None
        assert got_ is not None
        losses[place.name] = lost = loss(wanted, got_, got_.rank)
        most = stated if isinstance(stated, float) else 0.0
        if lost.relative_error > most * (1 + 1e-3) + AUDITED:
            wanted_, measured = f"at most {most:.3g}", f"{lost.relative_error:.3g}"
            problems.append(Problem(code="OTHER_COMBINATION", message="an error above the stated one",
                                    module=place.name, wanted=wanted_, got=measured))  # fmt: skip
    return Certificate(method="audit of a combination", settings=dict(settings), losses=losses), problems


def _other_parts(
    made: Checkpoint, step: Mapping[str, Any], parts: Sequence[Checkpoint], base: BaseWeights | None
) -> Iterator[Problem]:
    """By the sha256 of their files, and of the base's where the header tells of one."""
    inputs = step.get("inputs")
    told = [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []
    files = [entry for part in parts for entry in inputs_of(part)]
    if base is not None and any(entry.get("what") == "base" for entry in told):
        files += files_of(base.header, "base")
    else:
        told = [entry for entry in told if entry.get("what") != "base"]
    if told != files:
        got = ", ".join(f"{entry['file']} {entry['sha256'][:8]}" for entry in files)
        yield Problem(code="OTHER_PARTS", message="by their sha256", file=str(made.layout.path), got=got)


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

    What replaces the base's tensors or rows is W0 + factor·(W − W0), which needs the base. LoRA and Dual LoRA by their
    scaling, exactly. What normalises becomes the DoRA on its axis whose delta this is, exactly: it needs the base.
    Times 0 everything is a LoRA of zeros, and nothing is replaced. Raises D2SurgeryError USAGE.
    """
    layout = checkpoint.layout
    picked = dict.fromkeys((*layout.adapters, *layout.replacements, *layout.rows), True) if chosen is None else chosen
    if not any(picked.values()):
        raise refuse("USAGE", "no module is chosen", got=f"{len(picked)} modules")
    if not isfinite(factor):
        raise refuse("USAGE", "a factor", wanted="a number", got=str(factor))
    if factor == 0 and not (only or all(picked.values())):
        raise refuse("USAGE", "times 0 on a part", wanted="leave the part out, or all modules", got="0")
    part = _part(checkpoint, [name for name, wanted in picked.items() if wanted]) if only else checkpoint
    part = _without_replacements(part) if factor == 0 else part
    values = dict(_replaced(part, factor, base, picked)) if factor not in (0, 1) else {}

    def operate(place: Place, adapter: Adapter, weight: Tensor | None) -> tuple[Adapter, Loss]:
        own = factor if picked[place.module] else 1.0
        wanted = form(adapter, weight if adapter.normalises else None)
        made = adapter if factor == 1 else scaled(adapter, own, weight)
        got = form(made, weight if made.normalises else None)
        return made, loss(_times(wanted, own), got, rank_of(made))

    needs = base if any(entry.axis for entry in layout.adapters.values()) else None
    settings = {"factor": factor, "only": only or None}
    made, certificate = over_modules(
        part, needs, operate, "scale", settings, progress, lambda number, module: factor if picked[module] else 1.0
    )
    return with_tensors(made, values) if values else made, certificate


def _without_replacements(checkpoint: Checkpoint) -> Checkpoint:
    """Times 0 what stands in the base's place is the base's again."""
    return Checkpoint(replace(checkpoint.layout, replacements={}, rows={}))


def _replaced(
    checkpoint: Checkpoint, factor: float, base: BaseWeights | None, picked: Mapping[str, bool]
) -> Iterator[tuple[str, Tensor]]:
    """W0 + factor·(W − W0) of every chosen tensor and row that replaces the base's, by its key in memory."""
    layout = checkpoint.layout
    named = [target for target in (*layout.replacements, *layout.rows) if picked[target]]
    if named and base is None:
        raise refuse("USAGE", "what the file replaces whole is scaled from the base's values", module=named[0],
                     wanted="a base, or other modules", got="none")  # fmt: skip
    stored = parameters(base) if named and base is not None else {}
    for target in named:
        old = stored[target].tensor() if target in stored else None
        found = layout.rows.get(target)
        new = checkpoint.tensor(layout.replacements[target] if found is None else found.key)
        if old is not None and found is not None:
            old = old[list(found.indices)]
        if old is None or old.shape != new.shape:
            raise refuse("USAGE", "the base has nothing from which it could be scaled", module=target,
                         wanted="other modules (--modules)", got=str(tuple(new.shape)))  # fmt: skip
        value = old.double() + factor * (new.double() - old.double())
        yield f"{'replacement' if found is None else 'rows of'} {target}", value.to(new.dtype)


def _times(wanted: Form, factor: float) -> LowRank | Tensor:
    """A delta times a number; formed where it has no factors."""
    return factor * wanted if isinstance(wanted, LowRank) else factor * dense(wanted, torch.float64)


@torch.no_grad()
def scaled(adapter: Adapter, factor: float, base_weight: Weight | None) -> Adapter:
    """An adapter whose delta is factor · the delta; what normalises becomes a DoRA whatever the factor, so that the
    modules of a file stay of one kind."""
    if factor == 1 and (adapter.kind == "dora" or not adapter.normalises):
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
    """Which modules, and tensors and rows that replace the base's, a regular expression (anywhere in the name) and
    layer numbers choose."""
    try:
        pattern = re.compile(modules or "")
    except re.error as error:
        raise refuse("USAGE", f"not a regular expression: {error}", got=str(modules)) from None

    def wanted(module: str) -> bool:
        number = re.search(r"\.(\d+)\.", module)
        inside = layers is None or (number is not None and int(number[1]) in layers)
        return inside and pattern.search(module) is not None

    layout = checkpoint.layout
    return {name: wanted(name) for name in (*layout.adapters, *layout.replacements, *layout.rows)}


def _part(checkpoint: Checkpoint, chosen: Collection[str]) -> Checkpoint:
    """The checkpoint with some of its modules, replaced tensors and rows."""
    layout = checkpoint.layout
    parts: dict[str, Any] = {
        name: {key: value for key, value in getattr(layout, name).items() if key in chosen}
        for name in ("adapters", "replacements", "rows")
    }
    return Checkpoint(replace(layout, **parts))
