"""An adapter from a base and a model that was tuned from it: what changed, tensor by tensor, and what is left out."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from math import hypot, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, LoRA
from d2surgery.checkpoint import Checkpoint, from_adapters
from d2surgery.errors import refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import FLOATS
from d2surgery.formats.layout import About
from d2surgery.machine import side_by_side, trim, workers
from d2surgery.measures.delta import cuts
from d2surgery.measures.ranks import NOISE_MARGIN
from d2surgery.placement.parameters import Matrix, Parameter, parameters
from d2surgery.placement.ties import find_tie
from d2surgery.surgery.certificate import Certificate, Loss, form, loss
from d2surgery.surgery.choices import ALL, Keep
from d2surgery.surgery.converting import Wish, nearest, rank_of
from d2surgery.surgery.provenance import files_of, step_of
from d2surgery.surgery.rebuilding import LARGE, alike, no_progress
from d2surgery.surgery.truncation import triplets
from d2surgery.surveying.modules import Progress, naming

ROWS_AT_MOST = 8
"""Of an embedding: trained rows are stored one by one where they are fewer than this part of all."""
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|word_embeddings)(\.\w+)?$")


@dataclass
class _Found:
    """What has changed, of one parameter or of all."""

    adapters: dict[str, Adapter | list[Adapter]] = field(default_factory=dict)
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    replacements: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # parameter -> why
    energy: dict[str, float] = field(default_factory=dict)  # parameter -> Σ of the squares of its change
    rounding: dict[str, float] = field(default_factory=dict)  # the same of what rounding the tuned file alone gives

    def add(self, other: "_Found") -> None:
        for each in fields(self):
            getattr(self, each.name).update(getattr(other, each.name))


def extract(
    base: BaseWeights,
    tuned: BaseWeights,
    kind: str = "lora",
    *,
    keep: Keep = ALL,
    progress: Progress = no_progress,
) -> tuple[Checkpoint, Certificate]:
    """The adapter whose merge is nearest to `tuned`: a LoRA, in DoRA's form, which also un-merges a DoRA, or as
    D2-LoRA or Dual LoRA.

    Weights get factors, experts each their own, of as many ranks as stand above the rounding of the two files where
    `keep` says nothing. Vectors (norms, biases), routers, tensors of another shape and new ones are stored whole,
    embeddings too, or as rows where few changed. What is the same value by value is skipped. What is in memory is a
    matrix of each core, or one where they are large.

    `settings` of the certificate have `left_out`, by parameter with the reason, and `left_out_share`, of Σ of the
    squares of all that changed, and `rounding`, ‖what rounding the tuned file alone gives‖_F over that of the changes
    that got factors: no adapter that means something comes nearer. Raises D2SurgeryError USAGE where nothing changed;
    NOT_FINITE.
    """
    olds, news = parameters(base), parameters(tuned)
    found = _Found()
    large = max((prod(matrix.shape) for each in news.values() for matrix in each.matrices), default=0) > LARGE

    def take(name: str) -> _Found:
        with naming(name):
            return _take(olds.get(name), news[name], news.keys(), kind, keep)

    for done, part in enumerate(side_by_side(take, list(news), 1 if large else workers()), 1):
        found.add(part)
        if large:  # small ones use again what the last have left
            trim()
        progress(done, len(news))
    for name in olds.keys() - news.keys():
        found.left_out[name] = "not in the tuned model"
    if not (found.adapters or found.replacements or found.rows):
        raise refuse("USAGE", "nothing has changed that an adapter can hold", file=str(tuned.directory),
                     got=f"{len(news)} tensors, {len(found.left_out)} left out")  # fmt: skip
    all_of_it = sum(found.energy.values())
    lost = sum(found.energy.get(name, 0.0) for name in found.left_out)
    changed = sum(each.norm**2 for each in found.losses.values())
    settings: dict[str, Any] = {
        "kind": kind,
        "left_out": dict(sorted(found.left_out.items())),
        "left_out_share": lost / all_of_it if all_of_it else 0.0,
        "rounding": sqrt(sum(found.rounding.values()) / changed) if changed else 0.0,
    }
    certificate = Certificate(method="extract", settings=settings, losses=found.losses)
    turned = any(news[f"{m}.weight"].matrices[0].turned for m in found.adapters if f"{m}.weight" in news)
    return _checkpoint(found, base, tuned, certificate, turned), certificate


def _checkpoint(
    found: _Found, base: BaseWeights, tuned: BaseWeights, certificate: Certificate, turned: bool
) -> Checkpoint:
    tie = find_tie(tuned.header, tuned.config)
    shared = tie.embedding if tie.aliases else None  # loaded into the parameter that the output shares, and no copy
    replaced = (t.rpartition(".")[0] for t in found.replacements if t != shared)
    whole = sorted({module for module in replaced if module not in found.adapters})
    name = base.config.get("_name_or_path")
    inputs = [*files_of(base.header, "base"), *files_of(tuned.header, "tuned")]
    about = About(
        base_model=name if isinstance(name, str) and name and not Path(name).is_absolute() else None,
        saved_modules=tuple(whole),
        transposed=turned,
        history=(step_of(certificate, inputs),),
    )
    return from_adapters(found.adapters, about, kernels=found.kernels, replacements=found.replacements, rows=found.rows)


def _take(old: Parameter | None, new: Parameter, every: Collection[str], kind: str, keep: Keep) -> _Found:
    """Where one parameter of the tuned model goes. `every`: the names of all of them."""
    found, name = _Found(), new.name
    if new.dtype not in FLOATS or (old is not None and old.dtype not in FLOATS):
        if old is None or old.dtype != new.dtype or not torch.equal(old.tensor(), new.tensor()):
            found.left_out[name] = f"{new.dtype}, no floating-point tensor"
        return found
    if old is None or old.shape != new.shape:
        found.replacements[name] = new.tensor()
        return found
    changed, energy = _changed(old, new)
    if not changed:
        return found
    found.energy[name] = energy
    module, _, leaf = name.rpartition(".")
    routes = f"{module.rpartition('.')[0]}.experts."
    if new.experts:
        _take_experts(found, old, new, kind, keep)
    elif ".experts." in name and leaf != "weight":
        found.left_out[name] = "a vector of experts, which no adapter holds"
    elif leaf == "weight" and _EMBEDDING.search(module):
        _take_rows(found, new, changed)
    elif leaf != "weight" or len(new.shape) < 2 or any(other.startswith(routes) for other in every):
        found.replacements[name] = new.tensor()
    elif len(new.shape) == 2 or kind == "lora":
        change = _Change(old.matrices[0], new.matrices[0])
        found.adapters[module], found.losses[module], found.rounding[name] = _factors(change, kind, keep)
        if len(new.shape) > 2:
            found.kernels[module] = new.shape[1:]
    else:
        found.replacements[name] = new.tensor()
    return found


def _changed(old: Parameter, new: Parameter) -> tuple[list[int], float]:
    """The rows that differ in a value, and Σ of the squares of the differences; tile by tile."""
    rows: list[int] = []
    energy, start = 0.0, 0
    for one, other in zip(old.matrices, new.matrices, strict=True):
        for part in cuts(*other.shape):
            before, after = one.rows(part), other.rows(part)
            same = before.to(after.dtype) == after  # what only became narrower has not changed
            if not same.all():
                difference = after.double().sub_(before.double()).masked_fill_(same, 0.0)
                rows += (start + part.start + difference.any(1).nonzero()[:, 0]).tolist()
                energy += float(difference.square_().sum())
        start += other.shape[0]
    return rows, energy


def _take_rows(found: _Found, new: Parameter, changed: list[int]) -> None:
    if len(changed) * ROWS_AT_MOST < new.shape[0]:
        (matrix,) = new.matrices
        found.rows[new.name] = (changed, torch.cat([matrix.rows(slice(row, row + 1)) for row in changed]))
    else:
        found.replacements[new.name] = new.tensor()


def _take_experts(found: _Found, old: Parameter, new: Parameter, kind: str, keep: Keep) -> None:
    if kind != "lora":
        found.left_out[new.name] = "experts, for which only LoRA exists"
        return
    made: list[Adapter] = []
    for expert, (one, other) in enumerate(zip(old.matrices, new.matrices, strict=True)):
        place = f"{new.name}[{expert}]"
        adapter, found.losses[place], found.rounding[place] = _factors(_Change(one, other), kind, keep)
        made.append(adapter)
    found.adapters[new.name] = alike(made)


# One matrix -----------------------------------------------------------------------------------------------------------


class _Change:
    """W′ − W0 of two files, tile by tile in float64."""

    def __init__(self, old: Matrix, new: Matrix) -> None:
        self.old, self.new, self.shape = old, new, new.shape

    def tile(self, *, out: slice) -> Tensor:
        return self.new.rows(out).to(torch.float64, copy=True).sub_(self.old.rows(out))

    def dense(self, dtype: torch.dtype) -> Tensor:
        whole = torch.empty(self.shape, dtype=dtype)
        for part in cuts(*self.shape):
            whole[part] = self.tile(out=part)
        return whole


def _factors(change: _Change, kind: str, keep: Keep) -> tuple[Adapter, Loss, float]:
    """The adapter, its loss, and Σ of the squares of what rounding the tuned file alone gives.

    Without a wish, what stands above that rounding. Where there is no end to it below half of all ranks, the base was
    rounded after the tuned model was made of it, and its rounding counts too."""
    noise = noise_of(change.new)
    chosen = Keep(by="above", value=noise.edge) if keep is ALL else keep
    if kind != "lora":
        W, T = (each.rows(slice(0, change.shape[0])) for each in (change.old, change.new))
        slack = _ulps(T) / 2 if kind == "dora" and T.dtype in (torch.bfloat16, torch.float16) else None
        made, _ = nearest(change, W, Wish(kind=kind, keep=chosen, slack=slack, **_DEFAULTS[kind]))
        return made, loss(change, form(made, W), rank_of(made)), noise.energy
    found = triplets(change.dense(torch.float32), chosen)
    count = chosen.count(found) or 0
    if keep is ALL and 2 * count > found.side:
        count = Keep(by="above", value=hypot(noise.edge, noise_of(change.old).edge)).count(found) or 0
    A, B = found.factors(count)
    lora = LoRA(A=A, B=B, scaling=1.0).to(dtype=torch.float32)
    lost = loss(change, form(lora, None), len(A), curve=found.curve(), largest=found.largest)
    return lora, lost, noise.energy


_DEFAULTS: dict[str, Any] = {"dora": {"along": "out_features"}, "d2lora": {"tau": 0.5}, "duallora": {}}


class Noise(NamedTuple):
    """What rounding a stored matrix alone may give: entries of standard deviation ulp/√12."""

    edge: float
    """The largest singular value: NOISE_MARGIN·(largest row norm + largest column norm), as in `rank_above_noise`."""
    energy: float
    """‖·‖²_F."""


def noise_of(matrix: Matrix) -> Noise:
    rows, energy, columns = 0.0, 0.0, torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in cuts(*matrix.shape):
        squares = (_ulps(matrix.rows(part)) / sqrt(12)).square().double()
        rows, energy = max(rows, float(squares.sum(1).max())), energy + float(squares.sum())
        columns += squares.sum(0)
    return Noise(NOISE_MARGIN * (sqrt(rows) + float(columns.max().sqrt())), energy)


def _ulps(tensor: Tensor) -> Tensor:
    """The unit in the last place of every entry."""
    _, exponent = torch.frexp(tensor.float())
    info = torch.finfo(tensor.dtype)
    return (info.eps * torch.exp2((exponent - 1).float())).clamp(min=info.smallest_normal * info.eps)
