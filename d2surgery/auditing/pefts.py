"""PEFT's merges in all of its modes: what it rounds, and when, while a LoRA or DoRA layer is merged.

PEFT 0.21: tuners/lora/layer.py Linear.merge, unmerge, get_delta_weight, Embedding.merge; variants.py DoraLinearVariant;
model.py add_weighted_adapter. The same operations in the same order, under torch's own autocast where that was on.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, DoRA, LoRA
from d2surgery.files.tensors import rounded

_LOW = (torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """One weight, or whole rows of it, laid out (out_features, in_features)."""

    base: Tensor  # as stored
    adapter: Adapter  # slots as stored
    dtype: torch.dtype  # of the merged file

    @property
    def work_dtype(self) -> torch.dtype:
        """One precision above the output, as our own engine."""
        wide = torch.float64 in (self.base.dtype, self.dtype) or self.dtype == torch.float32
        return torch.float64 if wide else torch.float32


Dtype = torch.dtype | Literal["file", "load"] | None


@dataclass(frozen=True)
class Mode:
    """How PEFT was called."""

    load: Dtype = None  # of the base while it is merged: as stored (None), as the file is written, or another
    factors: Dtype = None  # what the adapter was rounded to: nothing (None), the base's dtype at load, or another
    kept: bool = False  # and it stayed so, not float32 again: the delta is rounded to it, too
    autocast: torch.dtype | None = None
    safe: bool = False
    unmerged: tuple[bool, ...] = ()  # merges undone before, each safe or not
    weighted: bool = False  # by add_weighted_adapter: the root of the scaling in either factor

    @property
    def name(self) -> str:
        """peft, and what was unusual about it."""
        parts = [
            "peft",
            *(() if self.load is None else ("loaded",) if self.load == "file" else (f"in-{_name(self.load)}",)),
        ]
        if self.factors == "load":
            parts.append("low" if self.kept else "low-cpu")
        elif self.factors is not None:
            parts.append(f"{'low' if self.kept else 'rounded'}-{_name(self.factors)}")
        parts += [f"autocast-{_name(self.autocast)}"] if self.autocast else []
        parts += ["safely-again" if safe else "again" for safe in self.unmerged]
        return "-".join([*parts, *["weighted"] * self.weighted, *["safe"] * self.safe])

    @property
    def words(self) -> str:
        base = f"the base in {_name(self.load)}" if isinstance(self.load, torch.dtype) else ""
        base = "the base first cast to the file's dtype" if self.load == "file" else base
        low = "the base's dtype" if self.factors == "load" else _name(self.factors)
        said = (
            base,
            self.factors and (f"adapter and delta in {low}" if self.kept else f"the adapter first rounded to {low}"),
            self.autocast and f"under autocast to {_name(self.autocast)}",
            self.weighted and "by add_weighted_adapter of one adapter",
            self.unmerged and f"merged and unmerged {'twice' if len(self.unmerged) > 1 else 'once'} before",
            self.safe and "safe_merge, and embeddings: delta first rounded to the base's dtype",
        )
        return ", ".join(("PEFT merge_and_unload", *(part for part in said if part)))

    def resolved(self, stored: torch.dtype, file: torch.dtype) -> "Mode":
        """With dtypes for words: what two modes share when they are the same here."""
        load = self.load if isinstance(self.load, torch.dtype) else file if self.load == "file" else stored
        factors = load if self.factors == "load" else self.factors
        if factors not in _LOW:
            factors = None
        safe, unmerged = self.safe and load in _LOW, tuple(s and load in _LOW for s in self.unmerged)
        return replace(
            self, load=load, factors=factors, kept=self.kept and factors is not None, safe=safe, unmerged=unmerged
        )

    def seen(self, it: Operands) -> Operands:
        """Base and adapter as PEFT holds them while it merges."""
        assert isinstance(it.adapter, LoRA | DoRA)
        here = self.resolved(it.base.dtype, it.dtype)
        adapter: Adapter = it.adapter
        if isinstance(here.factors, torch.dtype):
            adapter = adapter.to(dtype=here.factors)
        if not here.kept:
            adapter = adapter.to(dtype=torch.float32)  # autocast_adapter_dtype
        assert isinstance(here.load, torch.dtype)
        return it._replace(base=it.base.to(here.load), adapter=adapter)

    def merge(self, it: Operands) -> Tensor:
        base, adapter, _ = self.seen(it)
        on = torch.autocast("cpu", dtype=self.autocast) if self.autocast else nullcontext()
        with on:
            delta = self._delta(adapter)
            if isinstance(adapter, DoRA):
                return _doras(base, delta, adapter, len(self.unmerged)).to(it.dtype)
            for safe in self.unmerged:
                base = _added(base, delta, safe) - delta.to(base.dtype)
            return _added(base, delta, self.safe).to(it.dtype)

    def _delta(self, adapter: Adapter) -> Tensor:
        """get_delta_weight: the product, then the scaling, in float32 for a low adapter too, on a CPU."""
        assert isinstance(adapter, LoRA | DoRA)
        A, B = adapter.A, adapter.B
        if self.weighted:
            root = torch.tensor(sqrt(abs(float(adapter.scaling))))
            A, B = A * root * (1 if adapter.scaling >= 0 else -1), B * root
            return B @ A
        low = A.dtype in _LOW
        product = (B.float() @ A.float() if low else B @ A) * adapter.scaling
        return product.to(A.dtype) if low else product


def _added(base: Tensor, delta: Tensor, safe: bool) -> Tensor:
    return (base + (delta.to(base.dtype) if safe else delta)).to(base.dtype)


def _doras(base: Tensor, delta: Tensor, adapter: DoRA, unmerged: int) -> Tensor:
    """merge_unsafe and merge_safe, which are the same, after some merges that unmerge undid."""
    for again in range(unmerged + 1):
        gain = dora_gain(base, delta, adapter.magnitude)
        merged = (gain * (base + delta)).to(base.dtype)
        if again < unmerged:
            base = (merged / gain - delta).to(base.dtype)
    return merged


def dora_gain(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude/‖W0 + delta‖ (out_features, 1), each rounded to the dtype that PEFT has there."""
    both = base + delta
    gain: Tensor = magnitude / torch.linalg.norm(both, dim=1).to(both.dtype)
    return gain.view(-1, 1)


def modes(kind: str) -> Iterator[Mode]:
    """Every mode in which a kind may have been merged, the usual first."""
    loads: tuple[Dtype, ...] = (None, "file", torch.float32, *_LOW)
    dora, safes = kind == "dora", (False,) if kind == "dora" else (False, True)  # DoRA's safe merge is the other
    yield from (Mode(load, safe=safe) for load in loads for safe in safes)
    roundings: tuple[Dtype, ...] = ("load", *_LOW)
    for load, factors, kept in product(loads, roundings, (True, False)):
        autocasts = (None, *_LOW) if factors == "load" else (None,)
        yield from (Mode(load, factors, kept, autocast, safe) for autocast in autocasts for safe in safes)
    for load in loads:
        yield from (Mode(load, autocast=autocast, safe=safe) for autocast in _LOW for safe in safes)
        undone = [(), *((first,) * times for first in safes for times in (1, 2))]
        yield from (Mode(load, unmerged=before, safe=safe) for before in undone[1:] for safe in safes)
        yield from () if dora else (Mode(load, weighted=True, safe=safe) for safe in safes)


@dataclass(frozen=True)
class PluginMode:
    """How d2surgery.peft_plugin merges: base and adapter in any dtype, the sum in float32, rounded to the base's."""

    load: Dtype = None
    factors: Dtype = None

    @property
    def name(self) -> str:
        return Mode(self.load, self.factors, kept=True).name.replace("peft", "plugin", 1)

    @property
    def words(self) -> str:
        return Mode(self.load, self.factors).words.replace("PEFT merge_and_unload", "d2surgery.peft_plugin", 1)

    def resolved(self, stored: torch.dtype, file: torch.dtype) -> "PluginMode":
        """As Mode's."""
        here = Mode(self.load, self.factors).resolved(stored, file)
        return PluginMode(here.load, here.factors)

    def seen(self, it: Operands) -> Operands:
        """As Mode's."""
        here = self.resolved(it.base.dtype, it.dtype)
        adapter = it.adapter.to(dtype=here.factors) if isinstance(here.factors, torch.dtype) else it.adapter
        assert isinstance(here.load, torch.dtype)
        return it._replace(base=it.base.to(here.load), adapter=adapter)

    def merge(self, it: Operands) -> Tensor:
        base, adapter, _ = self.seen(it)
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        return rounded(wide + adapter.delta(wide), base.dtype).to(it.dtype)


def plugin_modes() -> Iterator[PluginMode]:
    """Every mode of the plugin, the usual first."""
    loads: tuple[Dtype, ...] = (None, "file", torch.float32, *_LOW)
    for factors in (None, "load", *_LOW):
        yield from (PluginMode(load, factors) for load in loads)


def _name(dtype: Dtype) -> str:
    return str(dtype).removeprefix("torch.")
