"""Tinker's adapters (Thinking Machines), which look like PEFT's and have names of their own.

    adapter_model.safetensors + adapter_config.json with r and lora_alpha
    key := "base_model.model." module "." leaf

    module                            transformers
    model.unembed_tokens              lm_head
    model.layers.N.attn.…             model.layers.N.self_attn.…      (gpt-oss)
    ….mlp.experts.w1, w3, w2          ….mlp.experts.gate_up_proj, down_proj: a parameter for all experts

    leaf             shape                      of experts
    lora_A.weight    (r, in)                    (E, r, in), or (1, r, in) for all of them
    lora_B.weight    (out, r)                   (E, out, r), or (1, out, r)

scaling = lora_alpha/r.  w1 is gate, w3 up; in gpt-oss their rows take turns.  A file without these names is PEFT's.
Parts of a fused module of linear attention (in_proj_q …) fit no base and are refused there.
Source: tinker-cookbook 05fffe3, scripts/merge_tinker_adapter_to_hf_model.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.experts import Part, add_experts, alternating, by_parameter
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import Layout
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.config import Config
from d2surgery.formats.peft.keys import bare

NAME = "tinker"
TITLE, READS = "Tinker", "LoRA, heads, experts with shared factors"
_LEAVES = {"lora_A.weight": "A", "lora_B.weight": "B"}
_EXPERT = re.compile(r"(.*\.experts)\.(w[123])")
_AS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_OWN = re.compile(r"(?:.*\.)?(?:unembed_tokens|experts\.w[123])\.lora_[AB]\.weight")

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return next((f"keys such as {key}" for key in header.tensors if _OWN.fullmatch(key)), "")


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    said, pairs = Config(config or {}, {}), Pairs(header, values)
    pairs.say.all += (problem for problem in said.problems(pairs.say.file) if problem.code == "BAD_CONFIG")
    experts: dict[str, dict[str, Part]] = {}
    for module, group in pairs.groups(_LEAVES, lambda key: _renamed(bare(key))).items():
        if not pairs.lacks(module, group, "A", "B"):
            if found := _EXPERT.fullmatch(module):
                experts.setdefault(found[1], {})[_AS[found[2]]] = Part(0, group["A"], group["B"])
            else:
                _add(pairs, module, group, said)
    for parameter, count, parts in by_parameter(experts):
        add_experts(pairs, parameter, count, parts, lambda rank: _scaling(said, rank))
    if any(entry.scaling is None for entry in pairs.adapters.values()):
        pairs.say("SCALING_UNKNOWN", "no r and lora_alpha in an adapter_config.json")
    about = replace(said.about(), settings={})
    layout = pairs.layout(NAME, about)
    of_gpt_oss = "gpt-oss" in (about.base_model or "").lower() or any(".attn." in key for key in header.tensors)
    return _in_turn(layout) if of_gpt_oss else layout


def _renamed(name: str) -> str:
    name = re.sub(r"^(?:.*\.)?unembed_tokens\.", "lm_head.", name)
    return re.sub(r"(\.layers\.\d+)\.attn\.", r"\1.self_attn.", name)


def _scaling(said: Config, rank: int) -> float | None:
    return said.scaling("", "lora", {"update": rank}) if rank and "lora_alpha" in said.values else None


def _add(pairs: Pairs, module: str, group: Group, said: Config) -> None:
    down, up = (pairs.factor(group[which]) for which in "AB")
    pairs.add(module, group, down, up, scaling=_scaling(said, down.shape[0] if down.shape else 0))


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    return _in_turn(layout) if model.get("model_type") == "gpt_oss" else layout


def _in_turn(layout: Layout) -> Layout:
    """The rows of gate and up in turn."""
    adapters = {
        module: alternating(entry) if module.endswith(".gate_up_proj") and entry.stored == "experts" else entry
        for module, entry in layout.adapters.items()
    }
    return replace(layout, adapters=adapters)
