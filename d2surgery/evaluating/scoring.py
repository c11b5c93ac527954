"""What the models of one adapter answer: the base, the base with the adapter live in it, the merged model."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from d2surgery.checkpoint import Checkpoint, load
from d2surgery.evaluating.tasks import Progress, silent
from d2surgery.files.base import BaseWeights
from d2surgery.files.tensors import find_device
from d2surgery.live.loading import load_model, stored_dtype, tokenizer_of, unmerged
from d2surgery.live.quantization import Quantization

Directory = str | os.PathLike[str]
Found = TypeVar("Found")
Answer = Callable[[nn.Module, Any, Progress], Found]
"""answer(model, tokenizer, progress): what is found of one model; progress(done, total) counts its items."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which models answer: "unmerged" where there is an adapter, "merged" where it is given, else the "base" alone."""

    base: Directory
    adapter: Checkpoint | Directory | None = None
    merged: Directory | None = None
    dtype: torch.dtype | None = None
    """That they compute in. None: float32 on a CPU, elsewhere the dtype stored in `merged`, else in `base`."""
    quantization: Quantization | None = None
    """Of the base, with the adapter or alone."""
    device: str | torch.device = "cpu"


def scores(models: Models, answer: Answer[Found], progress: Progress = silent) -> dict[str, Found]:
    """Model -> its scores, or what else is found. One model at a time is in memory; progress(done, total) counts the
    items of all of them.

    Raises USAGE for a device that is not here, NOT_RUNNABLE, and what reading base, adapter and merged raises.
    """
    device = find_device(str(models.device))
    weights = [BaseWeights(directory) for directory in (models.merged, models.base) if directory is not None]
    stored = torch.float32 if device.type == "cpu" else stored_dtype(weights[0].header)
    tokenizer = tokenizer_of(*(each.directory for each in weights))
    makers = _makers(models, device, models.dtype or stored)
    found: dict[str, Found] = {}
    for at, (name, make) in enumerate(makers.items()):

        def told(done: int, total: int, at: int = at) -> None:
            progress(at * total + done, len(makers) * total)

        found[name] = answer(make(), tokenizer, told)
    return found


def _makers(models: Models, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """Model -> what loads it."""
    plain: dict[str, Any] = {"dtype": dtype, "device": device}
    held: dict[str, Any] = plain | {"quantization": models.quantization}
    makers: dict[str, Callable[[], nn.Module]] = {}
    if models.adapter is not None:
        checkpoint = models.adapter if isinstance(models.adapter, Checkpoint) else load(models.adapter)
        makers["unmerged"] = partial(unmerged, models.base, checkpoint, **held)
    if models.merged is not None:
        makers["merged"] = partial(load_model, models.merged, **plain)
    return makers or {"base": partial(load_model, models.base, **held)}
