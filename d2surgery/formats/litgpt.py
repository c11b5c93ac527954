"""litgpt's LoRA, as `litgpt finetune_lora` saves it.

    lit_model.pth.lora, a pickle {"model": tensors}; beside it hyperparameters.yaml and model_config.yaml
    key := name "." leaf;  name is the module in litgpt's GPT

    transformer.h.N.attn.qkv        self_attn.q_proj, k_proj, v_proj      mlp.fc_1, fc_2    mlp.gate_proj, up_proj
    transformer.h.N.attn.proj       self_attn.o_proj                      mlp.proj          mlp.down_proj
    lm_head                         lm_head

    leaf     shape                     of qkv
    lora_A   (r, in)                   (n·r, in): r rows for each of those of q, k, v that are trained, in this order
    lora_B   (out, r)                  their rows below each other: B·A is not defined

scaling = lora_alpha/r of hyperparameters.yaml, which is asked for where that is missing.  Which of q, k and v are
trained stands there, too (lora_query …); else their sizes must tell.  How many heads there are, model_config.yaml or
the base says.  Rows are as in transformers, for models whose blocks have Llama's names there.  Other models' modules,
experts, and files of before the fused qkv (attn.attn) are refused by name.
Source: litgpt 0.5.13.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from d2surgery.errors import Problem
from d2surgery.files.header import Header, TensorInfo
from d2surgery.files.reading import read_plain_yaml
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import About, AdapterLayout, Layout, Slot
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.peft.keys import bare
from d2surgery.formats.rows import LIKE_LLAMA, Heads, fused, heads_of

NAME = "litgpt"
TITLE, READS = "litgpt (`.pth.lora`)", "LoRA; models whose blocks have Llama's names"
_PARTS = {
    "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip
_OWN = re.compile(r"(?:.*\.)?transformer\.h\.\d+\.(?:attn\.(?:qkv|proj|attn)|mlp\.(?:\w+\.)*(?:fc|fc_1|fc_2|proj))"
                  r"\.lora_[AB]")  # fmt: skip
_FUSED = ".self_attn.qkv"
_TRAINED = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return next((f"keys such as {key}" for key in header.tensors if _OWN.fullmatch(key)), "")


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    beside = header.files[0].parent
    said, model = (read_plain_yaml(beside / f"{name}.yaml") for name in ("hyperparameters", "model_config"))
    pairs, alpha = Pairs(header, values), _number(said.get("lora_alpha", ""))
    for name, group in pairs.groups({"lora_A": "A", "lora_B": "B"}, bare).items():
        _add(pairs, name, group, alpha)
    if pairs.adapters and alpha is None:
        pairs.say("SCALING_UNKNOWN", "no lora_alpha in a hyperparameters.yaml beside it")
    trained = [which for which, field in _TRAINED.items() if said.get(field) == "true"]
    known = trained if all(field in said for field in _TRAINED.values()) else []
    found = pairs.layout(NAME, About(alpha=alpha, settings={"trained": tuple(known)}))
    counts = [_count(model.get(name, "")) for name in ("n_head", "n_query_groups", "head_size")]
    return _split(found, Heads(*counts) if min(counts) else None)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _count(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 8 else 0


def _add(pairs: Pairs, name: str, group: Group, alpha: float | None) -> None:
    if pairs.lacks(name, group, "A", "B"):
        return
    if (module := _module(name)) is None:
        pairs.skip(group.values(), "UNSUPPORTED_VARIANT", "no module of the models that are read", module=name)
        return
    down, up = (pairs.factor(group[which]) for which in "AB")
    if not module.endswith(_FUSED):
        rank = down.shape[0] if down.shape else 1
        pairs.add(module, group, down, up, scaling=None if alpha is None or not rank else alpha / rank)
        return
    rank = up.shape[1] if len(up.shape) == 2 else 0
    if len(down.shape) != 2 or not rank or down.shape[0] not in (rank, 2 * rank, 3 * rank):
        message = f"the factors {down.shape} and {up.shape} are not those of q, k and v"
        pairs.skip(group.values(), "RANK_MISMATCH", message, module=name)
        return
    whole = Factor(fused(group["B"]), (up.shape[0], down.shape[0]))
    pairs.add(module, group, down, whole, scaling=None if alpha is None else alpha / rank)
    if module in pairs.adapters:
        pairs.adapters[module] = replace(pairs.adapters[module], divisor=rank)
        pairs.say("HEADS_UNKNOWN", "which rows are those of q, k and v", module=module)


def _module(name: str) -> str | None:
    found = re.fullmatch(r"(?:.*\.)?transformer\.h\.(\d+)\.(.+)", name)
    part = _PARTS.get(found[2]) if found else None
    if name.rpartition(".")[2] == "lm_head":
        return "lm_head"
    return f"model.layers.{found[1]}.{part}" if found and part else None


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """The layout with q, k and v by themselves."""
    return _split(layout, heads_of(model) if model.get("model_type") in LIKE_LLAMA else None)


def _split(layout: Layout, heads: Heads | None) -> Layout:
    adapters: dict[str, AdapterLayout] = {}
    settled: set[str] = set()
    for module, entry in layout.adapters.items():
        parts = list(_of_qkv(entry, heads, layout.about.settings["trained"])) if module.endswith(_FUSED) else []
        settled |= {module} if parts else set()
        adapters |= {part.module: part for part in parts or [entry]}
    return replace(layout, adapters=adapters, problems=tuple(_unsettled(layout, heads, settled)))


def _unsettled(layout: Layout, heads: Heads | None, settled: set[str]) -> Iterator[Problem]:
    for problem in layout.problems:
        if problem.code != "HEADS_UNKNOWN":
            yield problem
        elif problem.module not in settled:
            got = f"{heads.query} and {heads.kv} heads of {heads.size}, which leave it open" if heads else ""
            yield replace(problem, got=got or problem.got)


def _of_qkv(entry: AdapterLayout, heads: Heads | None, trained: Sequence[str]) -> Iterator[AdapterLayout]:
    """One entry for each of q, k and v that is trained; none where that is not known."""
    rank, (A, B) = entry.divisor or 1, (entry.slots[name].key for name in "AB")
    sizes = dict(zip("qkv", heads.qkv, strict=True)) if heads else {}
    count = entry.ranks["update"] // rank
    ways = [way for way in combinations(sizes, count) if sum(sizes[w] for w in way) == entry.out_features]
    ways = [way for way in ways if way == tuple(trained)] if trained else ways
    start = 0
    for at, which in enumerate(ways[0] if len(ways) == 1 else ()):
        rows = (start, start + sizes[which])
        slots = {"A": Slot(A, rows=(at * rank, (at + 1) * rank)), "B": Slot(B, rows=rows)}
        yield replace(entry, module=f"{entry.module.removesuffix('qkv')}{which}_proj", slots=slots, divisor=None,
                      ranks={"update": rank}, out_features=sizes[which])  # fmt: skip
        start = rows[1]
