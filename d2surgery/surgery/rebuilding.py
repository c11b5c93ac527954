"""A checkpoint with other adapters in it, and all else as it was."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import raise_errors
from d2surgery.files.base import BaseWeights
from d2surgery.formats.layout import About
from d2surgery.kinds import TABLE
from d2surgery.surgery.certificate import Certificate, Loss
from d2surgery.surveying.modules import BaseMatrices, Place, Progress, naming, places

Operation = Callable[[Place, Adapter, Tensor | None], tuple[Adapter, Loss]]


def no_progress(done: int, total: int) -> None: ...


def over_modules(
    checkpoint: Checkpoint,
    base: BaseWeights | None,
    operate: Operation,
    method: str,
    settings: Mapping[str, Any],
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """`operate` on every adapter, with the base weight that it lands on; one module in memory at a time.

    Raises D2SurgeryError with the problems of the layout and of its place in the base; `operate`'s name the module.
    """
    raise_errors(checkpoint.layout.problems)
    where = BaseMatrices(checkpoint, base) if base is not None else None
    made: dict[str, list[Adapter]] = {}
    losses: dict[str, Loss] = {}
    every = places(checkpoint)
    for done, place in enumerate(every, 1):
        with naming(place.name):
            weight = where[place] if where is not None else None
            adapter, losses[place.name] = operate(place, checkpoint.adapter(place.module, place.expert or 0), weight)
        made.setdefault(place.module, []).append(adapter)
        progress(done, len(every))
    certificate = Certificate(method=method, settings=settings, losses=losses)
    return rebuilt(checkpoint, made, history(checkpoint, certificate)), certificate


def rebuilt(
    checkpoint: Checkpoint, adapters: Mapping[str, Sequence[Adapter]], steps: tuple[Mapping[str, Any], ...]
) -> Checkpoint:
    """The checkpoint with these adapters by module, an adapter for each expert, and its replacements, rows, biases."""
    layout = checkpoint.layout
    entries = layout.adapters
    biases = {
        module: checkpoint.bias(module) * (float(entries[module].scaling or 0.0) / float(each[0].scaling))
        for module, each in adapters.items()
        if "bias" in entries[module].slots
    }
    return from_adapters(
        {m: each[0] if entries[m].stored != "experts" else alike(each) for m, each in adapters.items()},
        replace(layout.about, history=steps),
        embeddings=[module for module in adapters if entries[module].stored == "embedding"],
        kernels={module: entries[module].kernel for module in adapters if entries[module].kernel},
        biases=biases,
        replacements={target: checkpoint.tensor(key) for target, key in layout.replacements.items()},
        rows={target: (rows.indices, checkpoint.tensor(rows.key)) for target, rows in layout.rows.items()},
    )


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


def history(
    checkpoint: Checkpoint, certificate: Certificate, others: Sequence[Checkpoint] = ()
) -> tuple[Mapping[str, Any], ...]:
    """What the file was before, and this step."""
    inputs = [entry for each in (checkpoint, *others) for entry in inputs_of(each)]
    return (*checkpoint.layout.about.history, step_of(certificate, inputs))


def step_of(certificate: Certificate, inputs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """For the file's own header: inputs by sha256, version, method, error; no path and no time."""
    return {
        "method": certificate.method,
        "settings": dict(certificate.settings),
        "inputs": list(inputs),
        "d2surgery": version("d2surgery"),
        "exact": certificate.exact,
        "relative_error": certificate.relative_error,
        "max_relative_error": certificate.max_relative_error,
    }


def inputs_of(checkpoint: Checkpoint) -> Iterator[dict[str, str]]:
    """The files of an adapter that came from files."""
    for file in checkpoint.layout.header.files if checkpoint.layout.format else ():
        with file.open("rb") as stream:
            yield {"file": file.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def about_of(checkpoints: Sequence[Checkpoint]) -> About:
    """What several say alike; of the rest nothing."""
    first, *others = (checkpoint.layout.about for checkpoint in checkpoints)

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
