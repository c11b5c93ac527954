"""llama.cpp's LoRA adapter, a GGUF file (see `files.gguf`), which Ollama, LM Studio and KoboldCpp load too.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha (float), general.architecture
    key := "blk." n "." part ".weight" leaf

    leaf      shape      meaning
    .lora_a   (r, in)    A
    .lora_b   (out, r)   B; of attn_q and attn_k in the architecture `llama` its rows in another order

One alpha for the file: scaling = alpha/r, r each tensor's own; 1 where alpha is 0 or absent.  What differs is in the
lora_b that is written.  F32, F16, BF16; quantised ones (`files.grids`) are only read.

llama.cpp rotates the two halves of a head's rows interleaved where transformers has one after the other, so its
converter puts row (head, half, i) of q and k at (head, i, half).  How many heads there are stands in the base's config;
a file that is written here also says it.  Architectures whose modules have Llama's names in transformers are read:
those of `ARCHITECTURES`.  Embeddings, heads and DoRA are not in the format.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.gguf import TYPES, Part, gguf_bytes
from d2surgery.files.header import Header, TensorInfo, small_values
from d2surgery.files.whole import write_whole_bytes
from d2surgery.formats.flat import flattened
from d2surgery.formats.format import Holding, Values
from d2surgery.formats.layout import About, Layout, Slot, Stored
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.rows import halves, interleaved

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gguf"
TITLE, READS = "llama.cpp, Ollama, LM Studio (GGUF)", "LoRA; F32, F16, BF16, quantised; seven families"
WEIGHTS = "adapter.gguf"
ARCHITECTURES = {  # transformers' model_type -> llama.cpp's architecture
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}  # fmt: skip
_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_MODULES = {path: part for part, path in _PARTS.items()}
_LEAVES = {"weight.lora_a": "lora_a", "weight.lora_b": "lora_b"}
_PERMUTED = {("llama", "attn_q"): "head_count", ("llama", "attn_k"): "head_count_kv"}
_ALORA = "adapter.alora.invocation_tokens"
_ARCHITECTURE, _ALPHA, _BASE = "general.architecture", "adapter.lora.alpha", "general.base_model.0.name"


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return "a GGUF file" if _ARCHITECTURE in header.metadata and "general.type" in header.metadata else ""


def heads_of(model: Mapping[str, Any]) -> dict[str, str]:
    """What a base's config says of its heads, as fields of a file of its architecture."""
    heads, kv = model.get("num_attention_heads"), model.get("num_key_value_heads")
    counts = {"head_count": heads, "head_count_kv": heads if kv is None else kv}
    return {f"llama.attention.{name}": str(count) for name, count in counts.items() if type(count) is int}


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs, said = Pairs(header, values), header.metadata
    architecture = said[_ARCHITECTURE]
    about = About(base_model=said.get(_BASE) or None)
    if said["general.type"] != "adapter" or said.get("adapter.type") != "lora":
        pairs.skip(header.tensors, "NOT_AN_ADAPTER", "no adapter of llama.cpp's", got=said["general.type"])
        return pairs.layout(NAME, about)
    if _ALORA in said:
        pairs.skip(header.tensors, "UNSUPPORTED_VARIANT", "aLoRA (applies to some tokens only)")
        return pairs.layout(NAME, about)
    if architecture not in ARCHITECTURES.values():
        wanted = ", ".join(sorted(set(ARCHITECTURES.values())))
        pairs.skip(header.tensors, "UNSUPPORTED_VARIANT", f"architecture {architecture}", wanted=wanted)
        return pairs.layout(NAME, about)
    try:
        alpha = float(said.get(_ALPHA, 0))
    except ValueError:
        alpha = 0.0
    for name, group in pairs.groups(_LEAVES).items():
        _add(pairs, name, group, architecture, alpha)
    return pairs.layout(NAME, about)


def with_base(found: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """Read again, with the heads that the base's config has."""
    if not (heads := heads_of(model)):
        return found
    header = replace(found.header, metadata={**heads, **found.header.metadata})
    again = layout(header, None, lambda key: small_values(header, key))
    others = [problem for problem in found.problems if problem.code == "LEFT_OUT"]
    return replace(again, rule=found.rule, problems=(*again.problems, *others))


def _add(pairs: Pairs, name: str, group: Group, architecture: str, alpha: float) -> None:
    block, _, part = name.rpartition(".")
    if pairs.lacks(name, group, "lora_a", "lora_b"):
        return
    number = block.removeprefix("blk.")
    if part not in _PARTS or not number.isdecimal() or block == number:
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", "no linear module of a block", module=name)
        return
    down, up = (pairs.factor(group[leaf]) for leaf in ("lora_a", "lora_b"))
    if (field := _PERMUTED.get((architecture, part))) is not None:
        heads = pairs.header.metadata.get(f"llama.attention.{field}", "")
        rows = up.shape[0] if up.shape else 0
        if not heads.isdecimal() or not int(heads) or rows % (2 * int(heads)):
            got = f"{heads} of {rows} rows" if heads else "no base"
            pairs.skip(group.values(), "HEADS_UNKNOWN", "how many heads share its rows", module=name, got=got)
            return
        slot = Slot(up.slot.key, made=partial(_unpermuted, int(heads), up.slot.made))
        up = Factor(slot, up.shape)
    rank = down.shape[0] if down.shape else 1
    module = f"model.layers.{int(number)}.{_PARTS[part]}"
    pairs.add(module, group, down, up, scaling=alpha / rank if alpha else 1.0)


def _unpermuted(heads: int, before: Any, tensor: "Tensor") -> "Tensor":
    return halves(heads, tensor if before is None else before(tensor))


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear",)) if kind == "lora" else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """adapter.gguf. Raises FORMAT_CANNOT_HOLD before anything is written."""
    import torch

    from d2surgery.files.tensors import NAMES
    from d2surgery.formats.saving import common, held_whole

    layout, model = checkpoint.layout, checkpoint.layout.about.model
    architecture = ARCHITECTURES.get(str(model.get("model_type")), "")
    heads = heads_of(model)
    raise_errors([*held_whole(layout, NAME), *flattened(layout), *_cannot_hold(layout, architecture, heads)])
    rank, scaling = common(layout)
    (alpha,) = torch.tensor([scaling * rank], dtype=torch.float32).tolist()
    numbers, parts = {name: number for number, (name, _) in TYPES.items()}, []
    for module, entry in layout.adapters.items():
        own, name = entry.ranks["update"], _key(module)
        field = _PERMUTED.get((architecture, name.rpartition(".")[2]), "")
        shared = int(heads[f"llama.attention.{field}"]) if field else 0
        for slot, leaf in (("A", "lora_a"), ("B", "lora_b")):
            made = partial(_written, checkpoint, module, slot, alpha / own, shared)
            tensor = made()
            kind, data = numbers[NAMES[tensor.dtype]], partial(_bytes, made)
            parts.append(Part(f"{name}.weight.{leaf}", kind, tuple(tensor.shape), data))
    fields = {"general.type": "adapter", _ARCHITECTURE: architecture, "adapter.type": "lora", _ALPHA: alpha}
    if layout.base_model:
        fields |= {"general.base_model.count": 1, _BASE: layout.base_model}
    fields |= {field: int(count) for field, count in heads.items()} if architecture == "llama" else {}
    directory.mkdir(parents=True, exist_ok=True)
    write_whole_bytes(directory / WEIGHTS, gguf_bytes(fields, parts))


def _written(checkpoint: Holding, module: str, slot: str, scaling: float, heads: int) -> "Tensor":
    """A factor as llama.cpp has it; heads: that share the rows of B, 0 where these lie as in transformers."""
    import torch

    from d2surgery.formats.saving import brought_to

    adapter = checkpoint.adapter(module)
    factor = brought_to(adapter, adapter.slots()["A"].shape[0], scaling)[slot]
    factor = interleaved(heads, factor) if heads and slot == "B" else factor
    return factor.float() if factor.dtype == torch.float64 else factor


def _bytes(made: "Callable[[], Tensor]") -> bytes:
    from d2surgery.files.tensors import as_bytes

    return bytes(as_bytes(made().contiguous()))


def _key(module: str) -> str:
    """blk.3.attn_q of model.layers.3.self_attn.q_proj; "" for a module that has no such name."""
    steps = module.split(".")
    path = ".".join(steps[3:])
    fits = steps[:2] == ["model", "layers"] and len(steps) > 3 and steps[2].isdecimal() and path in _MODULES
    return f"blk.{steps[2]}.{_MODULES[path]}" if fits else ""


def _cannot_hold(layout: Layout, architecture: str, heads: Mapping[str, str]) -> Iterator[Problem]:
    def cannot(message: str, **details: str) -> Problem:
        return Problem(code="FORMAT_CANNOT_HOLD", message=message, **details)  # type: ignore[arg-type]

    if not architecture:
        got = str(layout.about.model.get("model_type", "no base"))
        yield cannot("a file is of one architecture", wanted=f"--base of {', '.join(ARCHITECTURES)}", got=got)
    elif architecture == "llama" and len(heads) < 2:
        yield cannot("the base's config does not say how many heads it has")
    for module in layout.adapters:
        if not _key(module):
            yield cannot("llama.cpp has no adapter on it", module=module)
