"""Orientation: whether a stored weight lies (out, in) or (in, out), and which rows of it an adapter changes."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from d2surgery.errors import Problems
from d2surgery.files.header import FLOATS, Header
from d2surgery.formats.layout import AdapterLayout
from d2surgery.placement.names import Names, Place
from d2surgery.placement.site import Patch

# Models whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")


class Patches:
    """The patches of adapters on the tensors of a base."""

    def __init__(self, base: Header, config: Mapping[str, Any], names: Names, say: Problems, *, hint: bool) -> None:
        """`hint`: the adapter's writer took base weights to lie (in, out)."""
        self.base, self.config, self.names, self.say, self.hint = base, config, names, say, hint

    def of(self, adapter: AdapterLayout, place: Place, shape: tuple[int, ...]) -> tuple[Patch, ...]:
        info = self.base.tensors.get(place.tensor)
        if info is not None and info.dtype not in FLOATS:
            self.say("QUANTIZED_BASE", "not a floating-point tensor", module=place.tensor, got=info.dtype)
            return ()
        out = adapter.out_features if place.out[1] is None else place.out[1] - place.out[0]
        if adapter.stored == "experts" and len(shape) == 3:
            return self._stacked(adapter, place, out, shape)
        start, stop = place.rows or (0, shape[0])
        transposed = self._transposed(adapter, out, (stop - start, *shape[1:]), place.turned)
        if transposed is None:
            return ()
        return (Patch(adapter.module, start, stop, transposed, place.out, place.expert),)

    def _stacked(self, adapter: AdapterLayout, place: Place, out: int, shape: tuple[int, ...]) -> tuple[Patch, ...]:
        """All experts in one tensor, (E, out, in) or, in GPT-OSS and Llama 4, (E, in, out)."""
        want = (adapter.experts, out, adapter.in_features)
        swapped = (want[0], want[2], want[1])
        fitting = (want, swapped) if not adapter.as_declared else (swapped,) if place.turned else (want,)
        if shape not in fitting:
            self.say("SHAPE_MISMATCH", "experts", module=adapter.module, wanted=str(shape), got=str(want))
            return ()
        transposed = shape != want
        if want == swapped:
            always = not adapter.as_declared and self.config.get("model_type") in TRANSPOSED_EXPERTS
            transposed = bool(place.turned) or always
        rows = shape[1]
        return tuple(
            Patch(adapter.module, expert * rows, (expert + 1) * rows, transposed, place.out, expert)
            for expert in range(adapter.experts)
        )

    def _transposed(self, adapter: AdapterLayout, out: int, shape: tuple[int, ...], turned: bool | None) -> bool | None:
        """Whether the base stores this module's weight (in, out). None, and a problem, when it does not fit."""
        inside = adapter.in_features
        if adapter.stored == "embedding":
            if shape == (inside, out):
                return True
        elif adapter.stored == "conv":
            if len(shape) > 2 and (shape[0], prod(shape[1:])) == (out, inside):
                return False
            if len(shape) > 2 and shape[0] == out and inside > prod(shape[1:]) and inside % prod(shape[1:]) == 0:
                self.say("GROUPED_CONV", "the base convolution is grouped", module=adapter.module, got=str(shape))
                return None
        elif shape == (out, inside) and out != inside:
            return False
        elif shape == (inside, out) and out != inside:
            return True
        elif shape == (out, inside):
            return self._square(adapter.module) if turned is None else turned
        wanted, got = f"{shape}", f"(out {out}, in {inside})"
        self.say("SHAPE_MISMATCH", f"stored as {adapter.stored}", module=adapter.module, wanted=wanted, got=got)
        return None

    def _square(self, module: str) -> bool | None:
        """The orientation of a square weight: as its non-square neighbours with a bias, else by the kind of model."""
        evidence = {_orientation(self.base, name) for name in self._neighbours(module)} - {None}
        if len(evidence) == 1:
            return evidence.pop()
        if not evidence and self.config.get("model_type") in _CONV1D_MODELS:
            return True
        if evidence or (self.hint and not self.config.get("model_type")):
            self.say("AMBIGUOUS_ORIENTATION", "(out, in) or (in, out)?", module=module)
            return None
        return False

    def _neighbours(self, module: str) -> Iterator[str]:
        """Weights in the same numbered block; in the whole base when the module is in none."""
        places = self.names.find(f"{module}.weight")
        block = re.match(r".*?\.?\d+\.", places[0].tensor) if places else None
        return (name for name in self.base.tensors if name.startswith(block[0] if block else ""))


def stored_in_out(base: Header, config: Mapping[str, Any], tensor: str) -> bool:
    """Whether a linear weight of a base lies (in, out): by its bias, else by the kind of model."""
    own = _orientation(base, tensor)
    return config.get("model_type") in _CONV1D_MODELS if own is None else own


def _orientation(base: Header, name: str) -> bool | None:
    """Whether a non-square weight with a bias is stored (in, out); None when it cannot tell."""
    bias = base.tensors.get(f"{name.removesuffix('.weight')}.bias")
    shape = base.tensors[name].shape
    if not name.endswith(".weight") or bias is None or len(shape) != 2 or shape[0] == shape[1]:
        return None
    return {shape[0]: False, shape[1]: True}.get(prod(bias.shape))
