"""A checkpoint with other adapters in it, and all else as it was."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import raise_errors
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import header_of
from d2surgery.formats.layout import About
from d2surgery.kinds import TABLE
from d2surgery.machine import side_by_side, workers
from d2surgery.surgery.certificate import Certificate, Loss
from d2surgery.surgery.provenance import history
from d2surgery.surveying.modules import BaseMatrices, Place, Progress, naming, places

Operation = Callable[[Place, Adapter, Tensor | None], tuple[Adapter, Loss]]
LARGE = 1 << 23
"""Entries of a dense matrix above which one is worked on at a time, so that memory stays bounded."""


def no_progress(done: int, total: int) -> None: ...


def unchanged(number: int, module: str) -> float:
    return 1.0


def over_modules(
    checkpoint: Checkpoint,
    base: BaseWeights | None,
    operate: Operation,
    method: str,
    settings: Mapping[str, Any],
    progress: Progress = no_progress,
    bias: Callable[[int, str], float] = unchanged,
    chosen_by: BaseWeights | None = None,
) -> tuple[Checkpoint, Certificate]:
    """`operate` on every adapter, with the base weight that it lands on; a core does a module from end to end. `bias`
    as `weight` of `rebuilt`; chosen_by: the base that decided the settings, where `operate` needs none.

    Raises D2SurgeryError with the problems of the layout and of its place in the base; `operate`'s name the module.
    """
    raise_errors(checkpoint.layout.problems)
    where = BaseMatrices(checkpoint, base) if base is not None else None

    def one(place: Place) -> tuple[Adapter, Loss]:
        weight = where[place] if where is not None else None
        return operate(place, checkpoint.adapter(place.module, place.expert or 0), weight)

    made, losses = by_place(one, places(checkpoint), threads([checkpoint], base), progress)
    certificate = Certificate(method=method, settings=settings, losses=losses)
    return rebuilt(
        [checkpoint], made, history([checkpoint], certificate, chosen_by if base is None else base), bias
    ), certificate


def threads(checkpoints: Sequence[Checkpoint], base: BaseWeights | None, *, formed: bool = False) -> int:
    """How many modules are worked on at a time: one for each core, but one alone where dense matrices are large.

    formed: whether every delta is, too.
    """
    entries = (entry for checkpoint in checkpoints for entry in checkpoint.layout.adapters.values())
    dense = [e.out_features * e.in_features for e in entries if formed or base is not None or e.rank is None]
    return workers() if max(dense, default=0) <= LARGE else 1


def by_place(
    one: Callable[[Place], tuple[Adapter, Loss]], every: Sequence[Place], threads: int, progress: Progress
) -> tuple[dict[str, list[Adapter]], dict[str, Loss]]:
    """Adapters by module, and what each lost."""
    made: dict[str, list[Adapter]] = {}
    losses: dict[str, Loss] = {}

    def named(place: Place) -> tuple[Adapter, Loss]:
        with naming(place.name):
            return one(place)

    for done, (place, found) in enumerate(zip(every, side_by_side(named, every, threads), strict=True), 1):
        made.setdefault(place.module, []).append(found[0])
        losses[place.name] = found[1]
        progress(done, len(every))
    return made, losses


def rebuilt(
    checkpoints: Sequence[Checkpoint],
    adapters: Mapping[str, Sequence[Adapter]],
    steps: tuple[Mapping[str, Any], ...],
    weight: Callable[[int, str], float] = unchanged,
) -> Checkpoint:
    """These adapters by module, an adapter for each expert, with the replacements, rows and biases of the checkpoints.

    weight: by checkpoint and module, what its bias is multiplied with before they are summed.
    """
    entries = {module: entry for each in checkpoints for module, entry in each.layout.adapters.items()}
    biases: dict[str, Tensor] = {}
    for number, checkpoint in enumerate(checkpoints):
        for module, each in adapters.items():
            entry = checkpoint.layout.adapters.get(module)
            if entry is not None and "bias" in entry.slots:
                share = weight(number, module) * float(entry.scaling or 0.0) / float(each[0].scaling)
                own = share * checkpoint.bias(module).float()
                biases[module] = biases[module] + own if module in biases else own
    return from_adapters(
        {m: each[0] if entries[m].stored != "experts" else alike(each) for m, each in adapters.items()},
        replace(about_of(checkpoints), history=steps),
        embeddings=[module for module in adapters if entries[module].stored == "embedding"],
        kernels={module: entries[module].kernel for module in adapters if entries[module].kernel},
        biases=biases,
        replacements={t: c.tensor(key) for c in checkpoints for t, key in c.layout.replacements.items()},
        rows={t: (rows.indices, c.tensor(rows.key)) for c in checkpoints for t, rows in c.layout.rows.items()},
    )


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint in memory with other tensors under some of its keys."""
    loaded = checkpoint.layout.header.loaded
    assert loaded is not None
    return Checkpoint(replace(checkpoint.layout, header=header_of({**loaded, **tensors})))


def alike(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Experts of one parameter, all of the largest rank among them: the others get zeros."""
    groups = TABLE[adapters[0].kind].groups.values()
    most = {group: max(getattr(each, group.down).shape[0] for each in adapters) for group in groups}
    return [
        replace(each, **{slot: _padded(getattr(each, slot), count, dim) for group, count in most.items()
                         for slot, dim in ((group.down, 0), (group.up, 1))})
        for each in adapters
    ]  # fmt: skip


def _padded(factor: Tensor, count: int, dim: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = count - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim)


def about_of(checkpoints: Sequence[Checkpoint]) -> About:
    """What several say alike; of the rest nothing."""
    first, *others = (checkpoint.layout.about for checkpoint in checkpoints)
    if not others:
        return first

    def common(name: str) -> Any:
        value = getattr(first, name)
        return value if all(getattr(other, name) == value for other in others) else None

    return About(
        base_model=common("base_model"),
        task=common("task"),
        model_class=common("model_class"),
        transposed=bool(common("transposed")),
        tied=bool(common("tied")),
        saved_modules=tuple(dict.fromkeys(name for each in (first, *others) for name in each.saved_modules)),
    )
