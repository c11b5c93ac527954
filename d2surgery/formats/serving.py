"""PEFT's form as every engine reads it: what vLLM, SGLang, TGI, LoRAX and hosts refuse or ignore is not in it.

As `peft`, with one rank R and lora_alpha = R for all modules, so that the scaling is 1 whatever divides alpha: each
scaling is in its lora_B, smaller ranks are padded with zeros; no rsLoRA, no patterns, no bias, no whole modules;
target_modules are the last parts of names.  One LoRA per linear module; it is read as PEFT's form is.

R is the smallest of the ranks that vLLM allows which is none of the adapter's less (1, 8, 16, 32, 64, 128, 256, 320,
512), else the largest of them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header
from d2surgery.files.whole import write_whole
from d2surgery.formats import peft
from d2surgery.formats.engines import OUTPUTS, RANKS
from d2surgery.formats.flat import flattened
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import Layout, Stored

if TYPE_CHECKING:
    from torch import Tensor

NAME = "peft-serving"
TITLE, READS = "PEFT for every engine: vLLM, SGLang, TGI …", "as `peft`"

_NOTHING_MORE: dict[str, Any] = {
    "bias": "none", "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None,
}  # fmt: skip


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return ""  # it is PEFT's form


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    return peft.layout(header, config, values)


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear",)) if kind == "lora" else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises FORMAT_CANNOT_HOLD before anything is written."""
    from d2surgery.formats.peft.keys import key_of
    from d2surgery.formats.peft.writer import WEIGHTS
    from d2surgery.formats.saving import brought_to, common, held_whole, saving  # torch

    layout = checkpoint.layout
    raise_errors([*held_whole(layout, NAME), *flattened(layout), *_cannot_hold(layout)])
    most, _ = common(layout)
    rank = next((allowed for allowed in RANKS if allowed >= most), most)

    def tensors() -> "Iterator[tuple[str, Tensor]]":
        for module in layout.adapters:
            for slot, tensor in brought_to(checkpoint.adapter(module), rank, 1.0).items():
                yield key_of(module, "lora", slot), tensor

    several = len({tensor.dtype for _, tensor in tensors()}) > 1  # and engines want one dtype
    parts = (lambda: ((key, tensor.float()) for key, tensor in tensors())) if several else tensors
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": layout.base_model,
        "task_type": layout.about.task or "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": layout.about.transposed,
        "target_modules": sorted({module.rpartition(".")[2] for module in layout.adapters}),
    } | _NOTHING_MORE
    with saving(directory / WEIGHTS, parts, {"format": "pt"}):
        write_whole(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))


def _cannot_hold(layout: Layout) -> Iterator[Problem]:
    for module in layout.adapters:
        if module.rpartition(".")[2] in OUTPUTS:
            message = "engines serve no adapter on embeddings and heads"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module)
