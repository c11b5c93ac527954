"""AdapterHub's LoRA, as the adapters library saves it (`save_adapter`).

    pytorch_adapter.bin (or adapter.safetensors) + adapter_config.json, which is not PEFT's
    key := module ".loras." name "." leaf;  module as in transformers, without the prefix of a model with a head

    leaf        shape                        meaning
    lora_A      (r, in)                      A
    lora_B      (out, r)                     B
    m.weight    (out, 1)                     DoRA

scaling = alpha/r of the config's `config`.  In a fused c_attn (GPT-2) lora_A is (n·r, in) and lora_B (n·out/3, r): a
product for each of attn_matrices, below each other, which is read as one of rank n·r.

Its DoRA divides W + alpha/r·BA by the norm of W + BA, and merges W + BA: where alpha is not r it is no DoRA, and
refused; a bias grows with the magnitude in its forward, in its merge it does not.  Refused by name, too: (IA)³
(composition_mode scale), VeRA, gates; bottleneck adapters and prefixes are other methods.
Source: adapters 1.3.0.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import About, Layout, Slot
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.peft.fields import is_number
from d2surgery.formats.rows import stacked

NAME = "adapterhub"
TITLE, READS = "AdapterHub (adapters)", "LoRA, fused c_attn, DoRA whose alpha is its rank"
_INSIDE = re.compile(r"\.loras\.[^.]+\.")
_LEAVES = {"lora_A": "A", "lora_B": "B", "m.weight": "m"}
_OTHERS = {  # leaf -> what is refused
    "gate.weight": "a gate", "gate.bias": "a gate", "vera_B": "VeRA", "vera_D": "VeRA",
    "task_specific.values": "MTL-LoRA", "weights": "MTL-LoRA",
}  # fmt: skip
_FUSED = ("c_attn",)

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return "keys have .loras. in them" if any(_INSIDE.search(key) for key in header.tensors) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    found = (config or {}).get("config")
    said: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    pairs = Pairs(header, values)
    leaves = _LEAVES | {leaf: leaf for leaf in _OTHERS}
    for module, group in pairs.groups(leaves, lambda key: _INSIDE.sub(".", key)).items():
        _add(pairs, module, group, said)
    if any(entry.scaling is None for entry in pairs.adapters.values()):
        pairs.say("SCALING_UNKNOWN", "no r and alpha in an adapter_config.json of AdapterHub's")
    base, alpha = (config or {}).get("model_name"), said.get("alpha")
    about = About(
        base_model=base if isinstance(base, str) and base else None,
        alpha=float(alpha) if is_number(alpha) and alpha is not None else None,
    )
    return pairs.layout(NAME, about)


def _add(pairs: Pairs, module: str, group: Group, said: Mapping[str, Any]) -> None:
    others = {_OTHERS[leaf] for leaf in group if leaf in _OTHERS}
    if said.get("composition_mode", "add") != "add":
        others = {"(IA)³"}
    if others:
        message = f"{' and '.join(sorted(others))} of AdapterHub"
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", message, module=module)
    elif pairs.lacks(module, group, "A", "B", *("m" if said.get("use_dora") else "")):
        return
    elif "m" not in group or not pairs.no_column(module, group, "m"):
        _add_pair(pairs, module, group, said)


def _add_pair(pairs: Pairs, module: str, group: Group, said: Mapping[str, Any]) -> None:
    down, up = (pairs.factor(group[name]) for name in "AB")
    rank = up.shape[1] if len(up.shape) == 2 else 0
    r, alpha = said.get("r"), said.get("alpha")
    known = type(r) is int and is_number(alpha)
    if known and rank != r:
        pairs.skip(group.values(), "RANK_DISAGREES", "rank", module=module, wanted=str(r), got=str(rank))
        return
    if "m" in group and known and alpha != r:
        message = f"DoRA with alpha {alpha} on rank {r}: AdapterHub divides by the norm of W + BA, whatever alpha is"
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", message, module=module)
        return
    if len(down.shape) == 2 and rank and (module.endswith(_FUSED) or down.shape[0] != rank):
        found = said.get("attn_matrices")
        enabled = tuple(isinstance(found, list) and which in found for which in "qkv")
        each, rest = divmod(up.shape[0], max(sum(enabled), 1))
        if rest or down.shape[0] != sum(enabled) * rank:
            message = f"the factors {down.shape} and {up.shape} are not those of attn_matrices"
            pairs.skip(group.values(), "RANK_MISMATCH", message, module=module, got=str(found))
            return
        made = partial(stacked, (each,) * 3, enabled)
        up = Factor(Slot(group["B"], made=made), (3 * each, down.shape[0]))
    scaling = float(alpha) / rank if known and rank else None  # type: ignore[arg-type]
    pairs.add(module, group, down, up, scaling=scaling, magnitude=group.get("m", ""))
    if module in pairs.adapters:
        pairs.adapters[module] = replace(pairs.adapters[module], divisor=rank)


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """The modules under the one prefix that all of them have in the base."""
    held = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    before = [{path.removesuffix(module) for path in held if f".{path}".endswith(f".{module}")}
              for module in layout.adapters]  # fmt: skip
    common = set.intersection(*before) if before else set()
    if len(common) != 1:
        return layout
    prefix = common.pop()
    adapters = {f"{prefix}{module}": replace(entry, module=f"{prefix}{module}")
                for module, entry in layout.adapters.items()}  # fmt: skip
    return replace(layout, adapters=adapters)
