"""An adapter from a base and a model that was tuned from it: what changed, tensor by tensor, and what is left out."""

import hashlib
import re
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, DoRA, LoRA
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import FLOATS
from d2surgery.files.tensors import as_bytes
from d2surgery.formats.layout import About
from d2surgery.measures.delta import cuts
from d2surgery.measures.ranks import NOISE_MARGIN
from d2surgery.placement.orientation import stored_in_out
from d2surgery.surgery.certificate import Certificate, Loss, form, loss
from d2surgery.surgery.fitting import dora_of, lora_of
from d2surgery.surgery.rebuilding import no_progress, step_of
from d2surgery.surgery.truncation import ALL, Keep
from d2surgery.surveying.modules import Progress, naming

ROWS_AT_MOST = 8
"""Of an embedding: trained rows are stored one by one where they are fewer than this part of all."""
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|word_embeddings)(\.\w+)?$")


@dataclass
class _Found:
    """What has changed, so far."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # tensor -> why
    energy: dict[str, float] = field(default_factory=dict)  # tensor -> Σ of the squares of its change
    digests: dict[str, Any] = field(default_factory=lambda: {"base": hashlib.sha256(), "tuned": hashlib.sha256()})
    """Of the tensors that both have, in the order of the tuned model."""


def extract(
    base: BaseWeights,
    tuned: BaseWeights,
    kind: Literal["lora", "dora"] = "lora",
    *,
    keep: Keep = ALL,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """The adapter whose merge is nearest to `tuned`: a LoRA, or in DoRA's form, which also un-merges a DoRA.

    Weights get factors, of as many ranks as stand above the rounding of the two files where `keep` says nothing.
    Vectors (norms, biases), tensors of another shape and new ones are stored whole, embeddings too, or as rows where
    few changed. What is the same value by value is skipped. One pair of tensors is in memory at a time.

    `settings` of the certificate have `left_out`, tensor by tensor with the reason, and `left_out_share`, of Σ of the
    squares of all that changed. Raises D2SurgeryError USAGE where nothing changed; NOT_FINITE.
    """
    found = _Found()
    names = [*tuned.header.tensors]
    for done, name in enumerate(names, 1):
        with naming(name):
            _take(found, base, tuned, name, kind, keep)
        progress(done, len(names))
    for name in base.header.tensors.keys() - tuned.header.tensors.keys():
        found.left_out[name] = "not in the tuned model"
    if not (found.adapters or found.replacements or found.rows):
        raise refuse("USAGE", "nothing has changed that an adapter can hold", file=str(tuned.directory),
                     got=f"{len(names)} tensors, {len(found.left_out)} left out")  # fmt: skip
    all_of_it = sum(found.energy.values())
    lost = sum(found.energy.get(name, 0.0) for name in found.left_out)
    settings: dict[str, Any] = {
        "kind": kind,
        "left_out": dict(sorted(found.left_out.items())),
        "left_out_share": lost / all_of_it if all_of_it else 0.0,
    }
    certificate = Certificate(method="extract", settings=settings, losses=found.losses)
    return _checkpoint(found, base, certificate), certificate


def _checkpoint(found: _Found, base: BaseWeights, certificate: Certificate) -> Checkpoint:
    whole = sorted({t.rpartition(".")[0] for t in found.replacements if t.rpartition(".")[0] not in found.adapters})
    name = base.config.get("_name_or_path")
    inputs = [{"file": what, "sha256": digest.hexdigest()} for what, digest in found.digests.items()]
    about = About(
        base_model=name if isinstance(name, str) and name and not Path(name).is_absolute() else None,
        saved_modules=tuple(whole),
        history=(step_of(certificate, inputs),),
    )
    return from_adapters(found.adapters, about, kernels=found.kernels, replacements=found.replacements, rows=found.rows)


def _take(found: _Found, base: BaseWeights, tuned: BaseWeights, name: str, kind: str, keep: Keep) -> None:
    """Where one tensor of the tuned model goes."""
    old, new = base.header.tensors.get(name), tuned.header.tensors[name]
    if new.dtype not in FLOATS or (old is not None and old.dtype not in FLOATS):
        if old is None or old.dtype != new.dtype or not torch.equal(base[name], tuned[name]):
            found.left_out[name] = f"{new.dtype}, no floating-point tensor"
        return
    if old is None or old.shape != new.shape:
        found.replacements[name] = tuned[name]
        return
    changed, energy = _changed(found, base, tuned, name)
    if not changed:
        return
    found.energy[name] = energy
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and _EMBEDDING.search(module):
        _take_rows(found, tuned, name, changed)
    elif leaf != "weight" or len(new.shape) < 2:
        found.replacements[name] = tuned[name]
    elif len(new.shape) == 2 or kind == "lora":
        _take_factors(found, base, tuned, name, kind, keep)
    else:
        found.replacements[name] = tuned[name]


def _changed(found: _Found, base: BaseWeights, tuned: BaseWeights, name: str) -> tuple[list[int], float]:
    """The rows that differ in a value, and Σ of the squares of the differences; tile by tile."""
    shape = tuned.header.tensors[name].shape
    count = (shape or (1,))[0]
    rows: list[int] = []
    energy = 0.0
    for part in cuts(count, prod(shape) // max(count, 1)):
        one, other = (each.rows(name, part.start, part.stop) for each in (base, tuned))
        for digest, tile in zip(found.digests.values(), (one, other), strict=True):
            digest.update(as_bytes(tile))
        same = one.to(other.dtype) == other  # what only became narrower has not changed
        difference = torch.where(same, 0.0, other.double() - one.double())
        rows += [part.start + int(i) for i in (difference != 0).any(1).nonzero()[:, 0]]
        energy += float(difference.square().sum())
    return rows, energy


def _take_rows(found: _Found, tuned: BaseWeights, name: str, changed: list[int]) -> None:
    count = tuned.header.tensors[name].shape[0]
    if len(changed) * ROWS_AT_MOST < count:
        found.rows[name] = (changed, torch.cat([tuned.rows(name, row, row + 1) for row in changed]))
    else:
        found.replacements[name] = tuned[name]


def _take_factors(found: _Found, base: BaseWeights, tuned: BaseWeights, name: str, kind: str, keep: Keep) -> None:
    shape, module = tuned.header.tensors[name].shape, name.removesuffix(".weight")
    W, T = (each[name].reshape(shape[0], -1) for each in (base, tuned))
    if len(shape) == 2 and stored_in_out(base.header, base.config, name):
        W, T = W.T, T.T
    chosen = Keep(by="above", value=noise_edge(T)) if keep is ALL else keep
    adapter: LoRA | DoRA
    if kind == "dora":
        adapter, curve = dora_of(W, T, chosen, "out_features"), list[float]()
    else:
        adapter, curve = lora_of(W, T, chosen)
    adapter = adapter.to(dtype=torch.float32)
    W, wanted = W.double(), T.double() - W.double()
    found.adapters[module] = adapter
    found.losses[module] = loss(wanted, form(adapter, W if adapter.normalises else None), adapter.A.shape[0], curve)
    if len(shape) > 2:
        found.kernels[module] = tuple(shape[1:])


def noise_edge(target: Tensor) -> float:
    """The largest singular value that rounding the target alone may give: of entries whose standard deviation is
    ulp/√12, NOISE_MARGIN·(largest row norm + largest column norm) of these, as in `rank_above_noise`."""
    squares = (_ulps(target) / sqrt(12)).square().double()
    return NOISE_MARGIN * float(squares.sum(1).max().sqrt() + squares.sum(0).max().sqrt())


def _ulps(tensor: Tensor) -> Tensor:
    """The unit in the last place of every entry."""
    _, exponent = torch.frexp(tensor.float())
    info = torch.finfo(tensor.dtype)
    return (info.eps * torch.exp2((exponent - 1).float())).clamp(min=info.smallest_normal * info.eps)
