"""PEFT's names of tensors: which slot of which module a key is, and the key of a slot."""

import re
from typing import NamedTuple

from d2surgery.files.header import Header
from d2surgery.formats.layout import Stored
from d2surgery.kinds import TABLE

PREFIX = "base_model.model."
METADATA = "d2surgery"  # our key in the safetensors metadata: JSON {"config": …, "scaling": {module: …}}
TOKENS = "trainable_tokens_delta"
# Parameters of experts in the order in which transformers' models declare them.
PARAMETER_ORDER = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"
)  # fmt: skip
OTHER_METHODS = re.compile(
    r"(^|\.)(lora_|hada_|lokr_|vera_|oft_|boft_|ia3_|hra_|prompt_embeddings|delora_|vblora_|randlora_)"
)
# Beside `lm_head.weight`, trained, PEFT saves with the embeddings what its wrapper holds: the untrained original, and
# the trained weight once more. Loading, it takes `lm_head.weight` alone.
COPY = re.compile(r"(.+)\.(?:original_module|modules_to_save)\.([^.]+)")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_DIFFUSERS = re.compile(r"(unet|text_encoder\w*|transformer)\.(?!h\.)")  # transformer.h. is GPT-2's


class Leaf(NamedTuple):
    """What stands after the module's name."""

    slot: str
    stored: Stored
    adapter: str  # the adapter's name before .weight, mostly absent or "default"


def leaves() -> dict[str, tuple[str, Stored]]:
    """Leaf -> (slot, how the base stores the module), of every kind in the table."""
    found: dict[str, tuple[str, Stored]] = {f"lora_embedding_{slot}": (slot, "embedding") for slot in "AB"}
    for kind in TABLE.values():
        found |= {f"lora_{slot}{'_vector' * (slot in kind.vectors)}": (slot, "linear") for slot in kind.slots}
    return found


def looks_like_peft(header: Header) -> bool:
    known = leaves()
    return any(key.startswith(PREFIX) or f".{TOKENS}" in key for key in header.tensors) or any(
        part in known and not _DIFFUSERS.match(key) for key in header.tensors for part in key.split(".")
    )


def bare(key: str) -> str:
    """The key without the prefixes of PEFT and of training wrappers."""
    return _WRAPPERS.sub("", key).removeprefix("module.").lstrip(".").removeprefix(PREFIX)


def target_of(name: str) -> str:
    """The base tensor that a full weight under a bare name replaces: the name without PEFT's wrappers."""
    return re.sub(r"\.(modules_to_save\.[^.]+|token_adapter|base_layer|original_module)(?=\.)", "", name)


def unwrapped(name: str) -> str:
    """A module without the wrappers around it: PEFT puts one around a module for each of its adapted parameters."""
    return re.sub(r"(\.base_layer)+$", "", name)


def split(name: str, known: dict[str, tuple[str, Stored]]) -> tuple[str, Leaf | None]:
    """A bare name as module and leaf: `module.leaf[.adapter][.weight|.bias]`; `known` are the `leaves`."""
    parts = name.split(".")
    at = next((i for i in reversed(range(len(parts))) if parts[i] in known), 0)
    rest = parts[at + 1 :]
    if not at or len(rest) > 2:
        return name, None
    ending = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if len(rest) > 1:
        return name, None
    slot, stored = known[parts[at]]
    if ending == "bias":
        if slot != "B":
            return name, None
        slot = "bias"
    return ".".join(parts[:at]), Leaf(slot, stored, rest[0] if rest else "")


def key_of(module: str, kind: str, slot: str, stored: Stored = "linear") -> str:
    """The key under which PEFT keeps a slot."""
    if slot == "bias":
        return f"{PREFIX}{module}.lora_B.bias"
    if slot in TABLE[kind].vectors:
        return f"{PREFIX}{module}.lora_{slot}_vector"
    leaf = f"lora_embedding_{slot}" if stored == "embedding" else f"lora_{slot}.weight"
    return f"{PREFIX}{module}.{leaf}"


def in_declared_order(parameters: set[str]) -> list[str]:
    """Parameters of one module in the order in which PEFT wraps them, the innermost wrapper first."""
    return sorted(sorted(parameters), key=lambda p: PARAMETER_ORDER.index(p) if p in PARAMETER_ORDER else -1)
