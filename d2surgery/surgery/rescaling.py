"""DoRA and D2-LoRA as a plain LoRA without loss: on a base whose vectors are rescaled."""

import os
import tempfile
from pathlib import Path

import torch

from d2surgery.adapters import Adapter, DoRA, LoRA
from d2surgery.adapters.thin import Thin
from d2surgery.adapters.vectors import Weight, squared_norms
from d2surgery.checkpoint import Checkpoint, from_adapters, save
from d2surgery.errors import raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.merging import merge
from d2surgery.surgery.certificate import Certificate, Loss, dense, form, loss
from d2surgery.surgery.converting import rank_of
from d2surgery.surgery.provenance import history
from d2surgery.surgery.rebuilding import no_progress, rebuilt
from d2surgery.surveying.modules import BaseMatrices, Progress, naming, places


@torch.no_grad()
def rescale(
    checkpoint: Checkpoint,
    base: BaseWeights,
    out: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """W' = a·w + b·u of every vector: writes the base of a·w to `out`, and gives the LoRA b·u, which is W' on it.

    Exact but for the rounding of the new base, which `dtype` (None: the base's) decides as it does a merge's: the
    errors are of what is written. Raises D2SurgeryError USAGE for a kind that needs none, and what `merge` raises.
    """
    raise_errors(checkpoint.layout.problems)
    where = BaseMatrices(checkpoint, base)
    lengths: dict[str, Adapter] = {}
    updates: dict[str, list[Adapter]] = {}
    for place in places(checkpoint):
        with naming(place.name):
            lengths[place.module], lora = _parts(checkpoint.adapter(place.module), where[place])
            updates[place.module] = [lora]
    with tempfile.TemporaryDirectory() as folder:
        save(from_adapters(lengths), folder)
        merge(base.directory, folder, out, dtype=dtype, tokenizer="base")
    new = BaseMatrices(checkpoint, BaseWeights(Path(out)))
    losses: dict[str, Loss] = {}
    for done, place in enumerate(places(checkpoint), 1):
        W, rescaled = where[place].double(), new[place].double()
        update = updates[place.module][0]
        wanted = dense(form(checkpoint.adapter(place.module), W), torch.float64)
        got = rescaled - W + update.delta(W)
        losses[place.name] = loss(wanted, got, rank_of(update))
        progress(done, len(places(checkpoint)))
    certificate = Certificate(method="rescale", settings={"dtype": dtype}, losses=losses)
    return rebuilt([checkpoint], updates, history([checkpoint], certificate, base)), certificate


def _parts(adapter: Adapter, base_weight: Weight) -> tuple[DoRA, LoRA]:
    """The DoRA without an update that makes a·w of w, and the LoRA b·u."""
    if not isinstance(adapter, Thin) or not adapter.normalises or adapter.along is None:
        raise refuse("USAGE", "nothing of it needs a rescaled base", wanted="DoRA or D2-LoRA", got=adapter.kind)
    gains, update, along = adapter.gains(base_weight), adapter.update(), adapter.along
    P, Q, b = update.P, update.Q, gains.update_gain
    P, Q = (b[:, None] * P, Q) if along == "out_features" else (P, Q * b)
    length = (1 + gains.base_excess) * squared_norms(base_weight.double(), along).sqrt()
    nothing = torch.zeros(1, adapter.in_features), torch.zeros(adapter.out_features, 1)
    only_lengths = DoRA(A=nothing[0], B=nothing[1], magnitude=length, scaling=1.0, along=along)
    return only_lengths, LoRA(A=Q.float(), B=P.float(), scaling=1.0)
