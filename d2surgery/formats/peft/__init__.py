"""PEFT's on-disk form of LoRA and DoRA, and our own PEFT-shaped form of Dual LoRA and D2-LoRA.

    adapter_config.json + adapter_model.safetensors (or .bin)
    key    := ["base_model.model."] module "." leaf
    module := dotted name in the base model; ".base_layer" once per parameter adapted outside it (target_parameters)

    leaf                                 shape                       meaning
    lora_A.weight, lora_B.weight         (r, in), (out, r)           Linear, and Conv1D, whose weight lies (in, out)
                                         (r, Cin, *k), (out, r, 1…)  convolution
                                         (E·r, in), (out, r·E)       E experts: rows of A expert-slowest, columns of B
                                                                     expert-fastest (PEFT 0.19.1 and later), or expert-
                                                                     slowest: lora_B_layout is grouped_by_expert
    lora_embedding_A, lora_embedding_B   (r, vocab), (dim, r)        Embedding, whose weight lies (vocab, dim)
    lora_magnitude_vector                (out,) | (1, out, 1…)       DoRA
    lora_B.bias                          (out,)                      lora_bias: the bias grows by scaling times it
    token_adapter.trainable_tokens_delta (n, dim)                    rows that replace the base's rows
    weight, bias, base_layer.weight …    as in the base              values that replace the base's
    lora_C.weight, lora_D.weight         (r2, in), (out, r2)         Dual LoRA's direction group
    lora_{A,B}_{plus,minus}.weight       (r, in), (out, r)           D2-LoRA's branches

Another kind's slots stand under lora_<slot>.weight, its vectors under lora_<slot>_vector.

scaling = lora_alpha/r, or lora_alpha/√r with use_rslora; Dual LoRA lora_alpha/√(r1·r2).  r and lora_alpha of a module
are those of the first pattern, in file order, that matches `(.*\\.)?(pattern)$`.  Source: PEFT 0.21.2 as it reads and
writes; `.weight` may be absent, an adapter name may stand before it, wrappers' prefixes may stand before the module.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2surgery.files.header import Header
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import Layout, Stored
from d2surgery.formats.peft.fields import is_number
from d2surgery.formats.peft.keys import METADATA, looks_like_peft
from d2surgery.formats.peft.reader import read
from d2surgery.kinds import TABLE

NAME = "peft"
TITLE, READS = "PEFT", "the four kinds, replaced tensors, token rows, biases"


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    """A config of PEFT's, beside the file or inside it, or a key marks the file as PEFT's."""
    found = (embedded(header)[0] or {}) if config is None else config
    if "peft_type" in found:
        return f"peft_type in {'adapter_config.json' if config is not None else 'the header'}"
    return "keys are named as PEFT names them" if looks_like_peft(header) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    """The file's layout with every misfit in `problems`."""
    inside, scaling = embedded(header)
    found = (inside or {}) if config is None else config
    disagrees = inside is not None and found != inside
    said = read(header, found, exact={} if disagrees else scaling, disagrees=disagrees)
    return replace(said, about=replace(said.about, history=history(header))) if METADATA in header.metadata else said


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    """PEFT's own kinds wherever PEFT has them; ours on linear modules."""
    everywhere: frozenset[Stored] = frozenset(("linear", "embedding", "conv"))
    if kind in ("lora", "dora"):
        return everywhere | (frozenset(("experts",)) if kind == "lora" else frozenset())
    return frozenset(("linear",)) if kind in TABLE else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """adapter_config.json and adapter_model.safetensors as PEFT writes them, the config also in the header."""
    from d2surgery.formats.peft.writer import write_files  # torch, which describing needs none of

    write_files(checkpoint, directory)


def history(header: Header) -> tuple[dict[str, Any], ...]:
    """What surgery made the file, as it says itself."""
    try:
        steps = json.loads(header.metadata[METADATA]).get("history", [])
    except (KeyError, ValueError, AttributeError, RecursionError):
        return ()
    return tuple(step for step in steps if isinstance(step, dict)) if isinstance(steps, list) else ()


def embedded(header: Header) -> tuple[dict[str, Any] | None, dict[str, float]]:
    """Our own config inside the file and the exact scaling by module; anything else under our key is not ours."""
    try:
        value = json.loads(header.metadata[METADATA])
        config, scaling = value["config"], value.get("scaling", {})
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None, {}
    if not isinstance(config, dict) or not isinstance(scaling, dict):
        return None, {}
    return config, {module: float(number) for module, number in scaling.items() if is_number(number)}
