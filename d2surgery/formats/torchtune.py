"""torchtune's adapters, as its trainer saves them: `adapter_model.pt`, a flat dictionary, no config beside it.

    key := module "." leaf;  module is the name in torchtune's decoder

    layers.N.attn.q_proj, k_proj, v_proj, output_proj     self_attn.q_proj, k_proj, v_proj, o_proj
    layers.N.mlp.w1, w2, w3                               mlp.gate_proj, down_proj, up_proj
    output                                                lm_head

    leaf             shape       meaning
    lora_a.weight    (r, in)     A
    lora_b.weight    (out, r)    B
    magnitude        (out,)      DoRA

The scaling alpha/r stands in the recipe alone, so it is asked for.  Llama, Mistral and Gemma rotate interleaved rows
there: row (head, half, i) of q and k in transformers is (head, i, half) in lora_b and magnitude; Qwen's are as in
transformers.  Which it is, and how many heads there are, the base says.

torchtune's own export in PEFT's form leaves the magnitudes of q and k in its order, permutes Qwen's, and does not say
use_dora: the .pt beside it is right.  Experts (lora_gate_a …) and Phi's fused projections are refused by name.
Source: torchtune bd2a0fc7, models/convert_weights.py and modules/peft.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from d2surgery.errors import Problem
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import Layout
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.rows import halves, reordered

NAME = "torchtune"
TITLE, READS = "torchtune (`.pt`)", "LoRA, DoRA; Llama, Mistral, Gemma, Qwen"
INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")  # transformers' model types whose rows lie otherwise
AS_THERE = ("qwen2", "qwen3")
_LEAVES = {leaf: leaf for leaf in ("lora_a.weight", "lora_b.weight", "magnitude")}
_PARTS = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_ROTATED = re.compile(r"\.self_attn\.([qk])_proj$")

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return "keys end in .lora_a.weight" if any(key.endswith(".lora_a.weight") for key in header.tensors) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs = Pairs(header, values)
    for name, group in pairs.groups(_LEAVES).items():
        _add(pairs, name, group)
    for module in filter(_ROTATED.search, pairs.adapters):
        pairs.say("HEADS_UNKNOWN", "in which order its rows lie", module=module)
    if pairs.adapters:
        pairs.say("SCALING_UNKNOWN", "it stands in torchtune's recipe alone")
    return pairs.layout(NAME)


def _add(pairs: Pairs, name: str, group: Group) -> None:
    if pairs.lacks(name, group, "lora_a.weight", "lora_b.weight"):
        return
    if (module := _module(name)) is None:
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", "no module of the decoders that are read", module=name)
    else:
        down, up = (pairs.factor(group[leaf]) for leaf in ("lora_a.weight", "lora_b.weight"))
        pairs.add(module, group, down, up, scaling=None, magnitude=group.get("magnitude", ""))


def _module(name: str) -> str | None:
    if name == "output":
        return "lm_head"
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    part = _PARTS.get(found[2]) if found else None
    return f"model.layers.{found[1]}.{part}" if found and part else None


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """The layout with its rows as the base of this config has them."""
    kind, adapters = model.get("model_type"), dict(layout.adapters)
    others = [problem for problem in layout.problems if problem.code != "HEADS_UNKNOWN"]
    wrong: list[Problem] = []
    for module, found in ((module, _ROTATED.search(module)) for module in layout.adapters):
        if found is None or kind in AS_THERE:
            continue
        entry, heads = layout.adapters[module], _heads(model, found[1])
        if kind in INTERLEAVED and heads and entry.out_features % (2 * heads) == 0:
            adapters[module] = reordered(entry, partial(halves, heads))
        else:
            got = f"{kind}, {heads} heads of {entry.out_features} rows"
            wanted = ", ".join((*INTERLEAVED, *AS_THERE))
            wrong.append(Problem(code="HEADS_UNKNOWN", message="in which order its rows lie", module=module,
                                 wanted=wanted, got=got))  # fmt: skip
    return replace(layout, adapters=adapters, problems=(*others, *wrong))


def _heads(model: Mapping[str, Any], which: str) -> int:
    heads = model.get("num_attention_heads")
    kv = model.get("num_key_value_heads")
    found = kv if which == "k" and kv is not None else heads
    return found if isinstance(found, int) else 0
