"""How mergers round: recipes that take a base weight and an adapter to the stored bits of the merged weight.

Merging is deterministic: the recipe that made a file gives every element again, on the same linear-algebra library.
Each is read in the merger's own code, named beside it. All of them are right merges; they differ within rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from d2surgery.adapters import DoRA, LoRA
from d2surgery.auditing.pefts import Mode, Operands, PluginMode, dora_gain, modes, plugin_modes
from d2surgery.files.tensors import rounded

OURS = "d2surgery"


def _as_stored(it: Operands) -> Operands:
    return it


@dataclass(frozen=True)
class Recipe:
    """`merge` gives the merged weight in the file's dtype, of base and adapter as the merger holds them (`seen`)."""

    name: str
    what: str
    kinds: tuple[str, ...]  # none: any kind
    merge: Callable[[Operands], Tensor]
    seen: Callable[[Operands], Operands] = _as_stored
    mode: Mode | PluginMode | None = None  # of PEFT
    axes: tuple[str | None, ...] = (None, "out_features")

    def fits(self, kind: str, axis: str | None = None) -> bool:
        """Whether its merger knows the kind, and the axis along which that rescales."""
        return not self.kinds or (kind in self.kinds and axis in self.axes)

    def load(self, stored: torch.dtype, file: torch.dtype) -> torch.dtype:
        """The dtype in which its merger holds the base."""
        if self.mode is None:
            return stored if self.seen is _as_stored else file
        load = self.mode.resolved(stored, file).load
        assert isinstance(load, torch.dtype)
        return load


@cache
def bank(kind: str, axis: str | None, stored: torch.dtype, file: torch.dtype) -> tuple[Recipe, ...]:
    """The recipes of a kind along an axis that may differ for a base and a file of these dtypes, the usual first."""
    unlike: dict[Mode | PluginMode | str, Recipe] = {}
    for recipe in RECIPES:
        if recipe.fits(kind, axis):
            unlike.setdefault(recipe.mode.resolved(stored, file) if recipe.mode else recipe.name, recipe)
    return tuple(unlike.values())


def _ours(it: Operands) -> Tensor:
    """In the order of our engine's operations, not of `delta`: an element of 100,000 would be rounded otherwise."""
    engine = it.adapter.over_tiles(it.work_dtype)
    return rounded(engine.merged(it.base.to(it.work_dtype, copy=True)), it.dtype)


# Other mergers ----------------------------------------------------------------------------------------------------


def _axolotl(it: Operands) -> Tensor:
    base = it.base.float()
    assert isinstance(it.adapter, DoRA)
    update = (it.adapter.B.float() @ it.adapter.A.float()) * it.adapter.scaling
    delta = dora_gain(base, update, it.adapter.magnitude.float()) * (base + update) - base
    return (base + delta).to(it.dtype)


def _scaled_first(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA | DoRA)
    return (it.adapter.scaling * it.adapter.B.float()) @ it.adapter.A.float()


def _term_by_term(it: Operands) -> Tensor:
    """(s·B)·A in float32 as mlx has it on a CPU: every product rounded before it is added, where others fuse both."""
    assert isinstance(it.adapter, LoRA | DoRA)
    up, down = it.adapter.scaling * it.adapter.B.float(), it.adapter.A.float()
    total = up.new_zeros(up.shape[0], down.shape[1])
    for k in range(down.shape[0]):
        total += up[:, k : k + 1] * down[k]
    return total


Product = Callable[[Operands], Tensor]


def _mlx(product: Product, it: Operands) -> Tensor:
    return it.base.to(it.dtype) + product(it).to(it.dtype)


def _mlx_dora(product: Product, it: Operands) -> Tensor:
    """The norm as mlx has it: squares rounded, summed in float32, the sum and its root rounded."""
    assert isinstance(it.adapter, DoRA)
    weight = it.base + product(it).to(it.base.dtype)
    norm = weight.square().float().sum(1).to(weight.dtype).sqrt()
    return ((it.adapter.magnitude / norm)[:, None] * weight).to(it.dtype)


def _scaled_once(it: Operands) -> Tensor:
    return (it.base + _scaled_first(it)).to(it.dtype)


def _in_files_dtype(it: Operands) -> Operands:
    return it._replace(base=it.base.to(it.dtype), adapter=it.adapter.to(dtype=it.dtype))


def _torchtune(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA | DoRA)
    low = it.adapter.to(dtype=it.dtype)
    merged = it.base.to(it.dtype) + (low.scaling * low.B) @ low.A
    if isinstance(low, DoRA):
        merged = merged * (low.magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1)
    return merged


def _kohya(it: Operands) -> Tensor:
    """The product, s times it and the sum, each rounded to the file's dtype; there alpha and s are, too."""
    assert isinstance(it.adapter, LoRA)
    low, rank = it.adapter.to(dtype=it.dtype), it.adapter.A.shape[0]
    scaling = torch.tensor(low.scaling * rank, dtype=it.dtype) / rank
    return it.base.to(it.dtype) + (low.B @ low.A) * scaling


def _lycoris_dora(it: Operands) -> Tensor:
    """In float32, whose epsilon is added to the norm."""
    dora, base = it.adapter, it.base.float()
    assert isinstance(dora, DoRA)
    both = base + (dora.B.float() @ dora.A.float()) * dora.scaling
    norm = both.norm(dim=1 if dora.along == "out_features" else 0, keepdim=True) + torch.finfo(torch.float32).eps
    gain: Tensor = dora.magnitude.float().view_as(norm) / norm
    return (both * gain).to(it.dtype)


def _addmm(it: Operands) -> Tensor:
    assert isinstance(it.adapter, LoRA)
    low = it.adapter
    return torch.addmm(it.base.float(), low.B.float(), low.A.float(), alpha=float(low.scaling)).to(it.dtype)


def _in_float32(it: Operands) -> Tensor:
    base = it.base.float()
    return (base + it.adapter.delta(base)).to(it.dtype)


def _delta_rounded(it: Operands) -> Tensor:
    base = it.base.to(it.dtype)
    return base + rounded(it.adapter.delta(base.to(it.work_dtype)), it.dtype)


def _cast_first(it: Operands) -> Operands:
    return it._replace(base=it.base.to(it.dtype))


LORA, DORA = ("lora",), ("dora",)
_ALSO = {  # the same bits by others
    "peft": "; diffusers fuse_lora, AdapterHub, kohya and LyCORIS in float32",
    "peft-low-autocast-bfloat16": "; LyCORIS merge_to of a model in bfloat16",
    "peft-low-autocast-float16": "; LyCORIS merge_to of a model in float16",
}
_DORAS = frozenset(modes("dora"))
RECIPES = (
    Recipe(OURS, "one precision above the output, rounded once", (), _ours),
    *(
        Recipe(
            mode.name,
            mode.words + _ALSO.get(mode.name, ""),
            LORA + DORA if mode in _DORAS else LORA,
            mode.merge,
            mode.seen,
            mode,
        )
        for mode in modes("lora")
    ),
    *(Recipe(mode.name, mode.words, (), mode.merge, mode.seen, mode) for mode in plugin_modes()),
    Recipe("axolotl", "axolotl merge-lora: DoRA's delta taken off the base and added again", DORA, _axolotl),
    *(
        Recipe(f"mlx{name}", f"mlx-lm fuse{where}: {words}, then added", LORA, partial(_mlx, product), _cast_first)
        for name, where, words, product in (
            ("", "", "(s·B)·A in float32, rounded to the file's dtype", _scaled_first),
            ("-cpu", " on a CPU", "(s·B)·A term by term, rounded to the file's dtype", _term_by_term),
        )
    ),
    *(
        Recipe(f"mlx{name}-dora", f"mlx-lm fuse of DoRA{where}: {words}", DORA, partial(_mlx_dora, product))
        for name, where, words, product in (
            ("", "", "the sum and its norms in the base's dtype", _scaled_first),
            ("-cpu", " on a CPU", "as mlx-dora, (s·B)·A term by term", _term_by_term),
        )
    ),
    Recipe("scaled-first", "(s·B)·A in float32, added, rounded once", LORA, _scaled_once),
    Recipe("torchtune", "torchtune: all in the file's dtype, (s·B)·A first", LORA + DORA, _torchtune, _in_files_dtype),
    Recipe(
        "kohya",
        "kohya's merge scripts in 16 bits: B·A, s, their product and the sum each rounded",
        LORA,
        _kohya,
        _in_files_dtype,
    ),
    Recipe(
        "lycoris-dora",
        "LyCORIS merge_to of DoRA, ComfyUI's along in_features: float32, an epsilon at the norm",
        DORA,
        _lycoris_dora,
        axes=(None, "out_features", "in_features"),
    ),
    Recipe("addmm", "unsloth: addmm(W0, B, A, alpha=s) in float32, rounded once", LORA, _addmm),
    Recipe("float32", "everything in float32, rounded once", (), _in_float32),
    Recipe("delta-rounded", "delta rounded to the file's dtype, then added", (), _delta_rounded, _cast_first),
    Recipe(
        "loaded", "as ours, the base first cast to the file's dtype", (), lambda it: _ours(_cast_first(it)), _cast_first
    ),
)
