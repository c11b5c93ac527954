"""fsdp_qlora's adapters (Answer.AI), its DoRA and its own LoRA, as the trainer's state dict has them.

    any .safetensors, no config
    key := module "." leaf

    leaf                           shape       meaning
    dora_layer.lora_A.weight       (r, in)     A
    dora_layer.lora_B.weight       (out, r)    B; no alpha: W + B·A
    magnitude_layer.magnitude      (out,)      the norm of each row of the dequantized base plus B·A
    lora_AB.0.weight, .1.weight    as A, B     LoRA, times an alpha/r that is asked for

The magnitudes are those of the base as it was quantized: on a base of 16 bits the merge is another model's by what
quantization changed.
Source: AnswerDotAI/fsdp_qlora, scripts/dora.py and train.py.
"""

from collections.abc import Mapping
from typing import Any

from d2surgery.files.header import Header
from d2surgery.formats.format import Values, as_read, holds_nothing, not_written
from d2surgery.formats.layout import Layout
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.keys import bare

NAME = "fsdp_qlora"
TITLE, READS = "fsdp_qlora", "DoRA, LoRA"
_LEAVES = {
    "dora_layer.lora_A.weight": "A", "dora_layer.lora_B.weight": "B", "magnitude_layer.magnitude": "m",
    "lora_AB.0.weight": "first", "lora_AB.1.weight": "second",
}  # fmt: skip

with_base, holds, write = as_read, holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    marks = (leaf for leaf in _LEAVES if any(key.endswith(f".{leaf}") for key in header.tensors))
    return f"keys end in .{mark}" if (mark := next(marks, "")) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs = Pairs(header, values)
    for module, group in pairs.groups(_LEAVES, bare).items():
        _add(pairs, module, group)
    if any(entry.scaling is None for entry in pairs.adapters.values()):
        pairs.say("SCALING_UNKNOWN", "the alpha of its own LoRA stands in the call of the training alone")
    return pairs.layout(NAME)


def _add(pairs: Pairs, module: str, group: Group) -> None:
    plain = {"first", "second"} & group.keys()
    if plain and plain != group.keys():
        pairs.skip(group.values(), "TWO_ADAPTERS", "a LoRA and a DoRA on one module", module=module)
    elif plain and not pairs.lacks(module, group, "first", "second"):
        pairs.add(module, group, pairs.factor(group["first"]), pairs.factor(group["second"]), scaling=None)
    elif not plain and not pairs.lacks(module, group, "A", "B", "m"):
        down, up = (pairs.factor(group[which]) for which in "AB")
        pairs.add(module, group, down, up, scaling=1.0, magnitude=group["m"])
