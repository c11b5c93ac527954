"""How mergers round: recipes that take a base weight and an adapter to the stored bits of the merged weight.

Merging is deterministic: the recipe that made a file gives every element again, on the same linear-algebra library.
Each is read in the merger's own code, named beside it. All of them are right merges; they differ within rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, DoRA, LoRA
from d2surgery.files.tensors import rounded

OURS = "d2surgery"


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


@dataclass(frozen=True)
class Recipe:
    """`merge` gives the merged weight in the file's dtype."""

    name: str
    what: str
    kinds: tuple[str, ...]  # none: any kind
    merge: Callable[[Operands], Tensor]

    def fits(self, kind: str) -> bool:
        """Whether its merger knows the kind."""
        return not self.kinds or kind in self.kinds


def _ours(it: Operands) -> Tensor:
    """In the order of our engine's operations, not of `delta`: an element of 100,000 would be rounded otherwise."""
    engine = it.adapter.over_tiles(it.work_dtype)
    return rounded(engine.merged(it.base.to(it.work_dtype, copy=True)), it.dtype)


# PEFT 0.21: tuners/lora/layer.py Linear.merge, Embedding.merge, get_delta_weight; variants.py DoraLinearVariant ---


def _product(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Tensor:
    """get_delta_weight: the product, then the scaling, in float32."""
    assert isinstance(adapter, LoRA | DoRA)
    return (adapter.B.to(dtype) @ adapter.A.to(dtype)) * adapter.scaling


def _dora(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoraLinearVariant.merge_unsafe, in the promoted dtype of what it is given."""
    norm = torch.linalg.norm(base + delta, dim=1).to(torch.promote_types(base.dtype, delta.dtype))
    merged: Tensor = (magnitude / norm).view(-1, 1) * (base + delta)
    return merged


def _peft(it: Operands, base: Tensor, delta: Tensor) -> Tensor:
    if isinstance(it.adapter, DoRA):
        return _dora(base, delta, it.adapter.magnitude.to(delta.dtype)).to(it.dtype)
    return (base + delta).to(it.dtype)


def _peft_once(it: Operands) -> Tensor:
    return _peft(it, it.base, _product(it.adapter))


def _peft_safe(it: Operands) -> Tensor:
    return (it.base + _product(it.adapter).to(it.base.dtype)).to(it.dtype)


def _peft_loaded(it: Operands) -> Tensor:
    return _peft(it, it.base.to(it.dtype), _product(it.adapter))


def _peft_loaded_safe(it: Operands) -> Tensor:
    return it.base.to(it.dtype) + _product(it.adapter).to(it.dtype)


def _peft_low(it: Operands) -> Tensor:
    low = it.base.to(it.dtype)
    return _peft(
        it._replace(adapter=it.adapter.to(dtype=it.dtype)), low, _product(it.adapter.to(dtype=it.dtype)).to(it.dtype)
    )


def _peft_low_cpu(it: Operands) -> Tensor:
    return _peft(it, it.base, _product(it.adapter.to(dtype=it.base.dtype)))


def _peft_again(it: Operands) -> Tensor:
    low = it.base.to(it.dtype)
    delta = _product(it.adapter)
    once = (low + delta).to(it.dtype)
    return ((once - delta.to(it.dtype)) + delta).to(it.dtype)


# Other mergers ----------------------------------------------------------------------------------------------------


def _axolotl(it: Operands) -> Tensor:
    base = it.base.float()
    assert isinstance(it.adapter, DoRA)
    delta = _dora(base, _product(it.adapter), it.adapter.magnitude.float()) - base
    return (base + delta).to(it.dtype)


def _scaled_first(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA)
    return (it.adapter.scaling * it.adapter.B.float()) @ it.adapter.A.float()


def _mlx(it: Operands) -> Tensor:
    return it.base.to(it.dtype) + _scaled_first(it).to(it.dtype)


def _scaled_once(it: Operands) -> Tensor:
    return (it.base + _scaled_first(it)).to(it.dtype)


def _torchtune(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA | DoRA)
    low = it.adapter.to(dtype=it.dtype)
    merged = it.base.to(it.dtype) + (low.scaling * low.B) @ low.A
    if isinstance(low, DoRA):
        merged = merged * (low.magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1)
    return merged


def _addmm(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA)
    low = it.adapter
    return it.base.float().addmm_(low.B.float(), low.A.float(), alpha=float(low.scaling)).to(it.dtype)


def _in_float32(it: Operands) -> Tensor:
    base = it.base.float()
    return (base + it.adapter.delta(base)).to(it.dtype)


def _delta_rounded(it: Operands) -> Tensor:
    base = it.base.to(it.dtype)
    return base + rounded(it.adapter.delta(base.to(it.work_dtype)), it.dtype)


def _loaded(it: Operands) -> Tensor:
    return _ours(it._replace(base=it.base.to(it.dtype)))


def _widened(it: Operands) -> Tensor:
    return _ours(it._replace(dtype=it.base.dtype)).to(it.dtype)


LORA, DORA = ("lora",), ("dora",)
BOTH = LORA + DORA
RECIPES = (
    Recipe(OURS, "one precision above the output, rounded once", (), _ours),
    Recipe("peft", "PEFT merge_and_unload: delta in float32, rounded once", BOTH, _peft_once),
    Recipe("peft-safe", "PEFT safe_merge, and embeddings: delta first rounded to the base's dtype", LORA, _peft_safe),
    Recipe("peft-loaded", "PEFT, the base first cast to the file's dtype", BOTH, _peft_loaded),
    Recipe("peft-loaded-safe", "PEFT safe_merge, the base first cast to the file's dtype", LORA, _peft_loaded_safe),
    Recipe("peft-low", "PEFT, adapter and delta in the file's dtype (autocast_adapter_dtype=False)", BOTH, _peft_low),
    Recipe("peft-low-cpu", "PEFT low_cpu_mem_usage: adapter first rounded to the base's dtype", BOTH, _peft_low_cpu),
    Recipe("peft-again", "PEFT merged, unmerged by subtraction, and merged again", LORA, _peft_again),
    Recipe("axolotl", "axolotl merge-lora: DoRA's delta taken off the base and added again", DORA, _axolotl),
    Recipe("mlx", "mlx-lm fuse: (s·B)·A in float32, rounded to the file's dtype, then added", LORA, _mlx),
    Recipe("scaled-first", "(s·B)·A in float32, added, rounded once", LORA, _scaled_once),
    Recipe("torchtune", "torchtune: all in the file's dtype, (s·B)·A first", LORA + DORA, _torchtune),
    Recipe("addmm", "unsloth: addmm(W0, B, A, alpha=s) in float32, rounded once", LORA, _addmm),
    Recipe("float32", "everything in float32, rounded once", (), _in_float32),
    Recipe("delta-rounded", "delta rounded to the file's dtype, then added", (), _delta_rounded),
    Recipe("loaded", "as ours, the base first cast to the file's dtype", (), _loaded),
    Recipe("widened", "merged in the base's dtype, then stored in a wider one", (), _widened),
)
