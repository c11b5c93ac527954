"""PEFT's names of tensors: which slot of which module a key is, and the key of a slot."""

import re
from collections.abc import Collection
from typing import NamedTuple

from d2surgery.files.header import Header
from d2surgery.formats.layout import Stored, lies_transposed
from d2surgery.kinds import TABLE

PREFIX = "base_model.model."
METADATA = "d2surgery"  # our key in the safetensors metadata: JSON {"config": …, "scaling": {module: …}}
TOKENS = "trainable_tokens_delta"
# Parameters of experts in the order in which transformers' models declare them.
PARAMETER_ORDER = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"
)  # fmt: skip
# No pattern is compiled here: most files need none.
OTHER_METHODS = r"(^|\.)(lora_|hada_|lokr_|vera_|oft_|boft_|ia3_|hra_|prompt_embeddings|delora_|vblora_|randlora_)"
# PEFT's wrapper of a saved module holds the untrained original and the trained weight.
_ORIGINAL = r"(?:^|(?<=\.))original_module\."
_SAVED = r"(?:^|(?<=\.))modules_to_save\."
# What trainers put around a model: compiling, FSDP, checkpointing; DDP and DeepSpeed, Fabric, TRL's value heads.
_WRAPPERS = r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)"
_AROUND = r"\.?(?:(?:module|_forward_module|pretrained_model)\.)*"
# PEFT's own prefix, again where a PEFT model was wrapped in another; what stands before it is a wrapper of any trainer.
_ROOT = r"(?:.*?\.)?base_model\.model\.(?:(?:(?:module|model)\.)?base_model\.model\.)*"


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
    pairs = (
        (header.tensors[key].shape, header.tensors[up].shape)
        for key in header.tensors
        for end in (".lora_A", ".lora_A.weight")
        if key.endswith(end) and (up := key.removesuffix(end) + end.replace("A", "B")) in header.tensors
    )
    if any(PREFIX in key or f".{TOKENS}" in key for key in header.tensors):
        return True
    named = any(part in known for key in header.tensors for part in key.split("."))
    return named and not lies_transposed(pairs)


def bare(key: str) -> str:
    """The key without the prefixes of PEFT and of training wrappers."""
    if key.startswith(PREFIX) and key.count("base_model") == 1 and "._" not in key:  # as nearly every key is
        return key[len(PREFIX) :]
    name = re.sub(_WRAPPERS, "", key)
    before = re.match(_ROOT, name) or re.match(_AROUND, name)
    return name[before.end() :] if before else name


def copies(names: Collection[str]) -> dict[str, str]:
    """Bare name of a copy -> the name of the trained weight, "" where it is not there.

    Beside `lm_head.weight` PEFT saves with the embeddings what its wrapper holds, the untrained original and the
    trained weight once more; loading, it takes `lm_head.weight` alone. A raw state dict has the wrapper's two only.
    """
    saved = {name for name in names if "modules_to_save." in name and re.search(_SAVED, name)}
    found = {name: plain for name in saved if (plain := re.sub(_SAVED, "", name)) in names}
    trained = {target_of(name): name for name in saved - found.keys()}
    for name in names:
        if "original_module." in name and re.search(_ORIGINAL, name):
            plain = re.sub(_ORIGINAL, "", name)
            found[name] = plain if plain in names else trained.get(plain, "")
    return found


def target_of(name: str) -> str:
    """The base tensor that a full weight under a bare name replaces: the name without PEFT's wrappers."""
    return re.sub(r"\.(modules_to_save\.[^.]+|token_adapter|base_layer|original_module)(?=\.)", "", name)


def unwrapped(name: str) -> str:
    """A module without the wrappers around it: PEFT puts one around a module for each of its adapted parameters."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def split(name: str, known: dict[str, tuple[str, Stored]]) -> tuple[str, Leaf | None]:
    """A bare name as module and leaf: `module.leaf[.adapter][.weight|.bias]`; `known` are the `leaves`."""
    parts = name.split(".")
    for at in range(len(parts) - 1, max(len(parts) - 4, 0), -1):
        if parts[at] in known:
            break
    else:
        return name, None
    rest = parts[at + 1 :]
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
