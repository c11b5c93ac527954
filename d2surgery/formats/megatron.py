"""Megatron's adapters, as Megatron-Bridge and NeMo name them: their checkpoints saved by names, safetensors or .pt.

    key := ["module."…] "decoder.layers." n "." part ".adapter." ["adapter_" one "."] leaf

    part                           transformers                     with adapter_q …, each has factors of its own
    self_attention.linear_qkv      self_attn.{q,k,v}_proj           adapter_q, adapter_k, adapter_v
    self_attention.linear_proj     self_attn.o_proj
    mlp.linear_fc1                 mlp.{gate,up}_proj               adapter_gate, adapter_up
    mlp.linear_fc2                 mlp.down_proj
    output_layer (of the model)    lm_head

    leaf                  shape        meaning
    linear_in.weight      (r, in)      A, shared by what is fused
    linear_out.weight     (out, r)     B
    weight_magnitude      (out,)       DoRA

Rows of linear_qkv lie in groups, one for each key-value head: its queries, its key, its value; those of linear_fc1 are
gate, then up.  Heads, and that the base is of this kind, the base's config says.  scaling = alpha/dim, which no tensor
says: it is asked for.  Experts are refused by name; directories of torch's distributed checkpoints are not read.
Source: NVIDIA-NeMo/Megatron-Bridge, peft/ and models/conversion/peft_bridge.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from d2surgery.errors import Problem
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import AdapterLayout, Layout
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.rows import LIKE_LLAMA, Heads, by_group, cut, fused, heads_of

NAME = "megatron"
TITLE, READS = "Megatron-Bridge, NeMo", "LoRA, DoRA; fused and canonical; blocks with Llama's names"
_LEAVES = {"linear_in.weight": "A", "linear_out.weight": "B", "weight_magnitude": "m"}
_NAME = re.compile(r"(?:.*\.)?(?:decoder\.layers\.(\d+)\.([\w.]+?)|(output_layer))\.adapter(?:\.adapter_(\w+))?")
_PARTS: dict[tuple[str, str | None], str] = {  # part, and which of it -> transformers
    ("self_attention.linear_qkv", None): "self_attn.qkv_proj",
    ("self_attention.linear_proj", None): "self_attn.o_proj",
    ("mlp.linear_fc1", None): "mlp.gate_up_proj",
    ("mlp.linear_fc2", None): "mlp.down_proj",
    **{("self_attention.linear_qkv", which): f"self_attn.{which}_proj" for which in "qkv"},
    **{("mlp.linear_fc1", which): f"mlp.{which}_proj" for which in ("gate", "up")},
}
_FUSED = {".self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), ".mlp.gate_up_proj": ("gate_proj", "up_proj")}

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    ends = tuple(f".{leaf}" for leaf in _LEAVES)
    found = (key for key in header.tensors if ".adapter." in key and key.endswith(ends))
    return f"keys such as {first}" if (first := next(found, "")) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs = Pairs(header, values)
    for name, group in pairs.groups(_LEAVES).items():
        _add(pairs, name, group)
    if pairs.adapters:
        pairs.say("SCALING_UNKNOWN", "alpha stands in the run's config alone")
    return pairs.layout(NAME)


def _add(pairs: Pairs, name: str, group: Group) -> None:
    if (module := _module(name)) is None:
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", "no module of the models that are read", module=name)
    elif not pairs.lacks(name, group, "A", "B"):
        down, up = (pairs.factor(group[which]) for which in "AB")
        is_fused = module.endswith(tuple(_FUSED))
        up = Factor(fused(group["B"]), up.shape) if is_fused else up
        pairs.add(module, group, down, up, scaling=None, magnitude=group.get("m", ""))
        if is_fused and module in pairs.adapters:
            pairs.say("HEADS_UNKNOWN", "which of its rows are whose", module=module)


def _module(name: str) -> str | None:
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if found[3]:
        return "lm_head" if found[4] is None else None
    part = _PARTS.get((found[2], found[4]))
    return f"model.layers.{found[1]}.{part}" if part else None


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """The layout with what is fused by itself."""
    heads = heads_of(model) if model.get("model_type") in LIKE_LLAMA else None
    adapters: dict[str, AdapterLayout] = {}
    problems: list[Problem] = [problem for problem in layout.problems if problem.code != "HEADS_UNKNOWN"]
    open_before = {problem.module: problem for problem in layout.problems if problem.code == "HEADS_UNKNOWN"}
    for module, entry in layout.adapters.items():
        parts = list(_apart(entry, heads)) if module in open_before else [entry]
        if not parts:
            problems.append(replace(open_before[module], got=f"{model.get('model_type')}, {entry.out_features} rows"))
        for part in parts or [entry]:
            if part.module in adapters:
                message = "factors of its own and of the fused module"
                problems.append(Problem(code="TWO_ADAPTERS", message=message, module=part.module))
            adapters[part.module] = part
    return replace(layout, adapters=adapters, problems=tuple(problems))


def _apart(entry: AdapterLayout, heads: Heads | None) -> Iterator[AdapterLayout]:
    """The modules of a fused one; none where its rows are not theirs."""
    fused_as = next(end for end in _FUSED if entry.module.endswith(end))
    before = entry.module.removesuffix(fused_as.rpartition(".")[2])
    names = [f"{before}{leaf}" for leaf in _FUSED[fused_as]]
    B = entry.slots["B"]._replace(made=None)
    whole = replace(entry, slots={**entry.slots, "B": B})
    if heads is None:
        return
    if len(names) == 3 and sum(heads.qkv) == entry.out_features:
        yield from by_group(whole, heads, names)
    elif len(names) == 2 and entry.out_features % 2 == 0:
        yield from cut(whole, [(name, entry.out_features // 2) for name in names])
