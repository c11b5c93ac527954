"""MLX-LM's adapters, as its trainer saves them and `mlx_lm.load(adapter_path=…)` reads them.

    adapters.safetensors (before April 2024 adapters.npz) + adapter_config.json
    key := module "." leaf;  module is the name in MLX-LM's model, mostly that of transformers

    leaf             linear               embedding               meaning
    lora_a, lora_b   (in, r), (r, out)    (vocab, r), (r, dim)    both transposed: ΔW = scale · lora_bᵀ · lora_aᵀ
    m                (out,)               (vocab,)                DoRA: the norm of each row of the stored weight

The embedding's weight lies (vocab, dim); where the output is tied to it, the update moves both.

The config is the whole of what the training was asked: fine_tune_type "lora", "dora" or "full"; model, the base;
lora_parameters {rank, scale, dropout, keys}.  `scale` multiplies as it stands; before June 2024 there was an `alpha`
beside it, and scale·alpha/rank multiplied.  A file has one rank and one scale: what differs is padded with zeros and
scaled in its lora_b.  `keys` are whole names here, which MLX-LM takes as it takes names within a block.

Experts lie in `switch_mlp`, not transposed: lora_a (E, r, in), lora_b (E, out, r).  They are read as adapters of the
parameters that transformers has for them, gate and up in one; to write them the base must be known.  Other layers of
three dimensions and fine_tune_type "full" are refused by name.
Source: mlx-lm 0.32 as it reads and writes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, brief, raise_errors
from d2surgery.files.header import Header
from d2surgery.files.whole import write_whole
from d2surgery.formats.experts import PARTS, Part, add_experts, by_parameter
from d2surgery.formats.flat import flattened
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import About, Layout, Stored
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.fields import is_number

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mlx"
TITLE, READS = "MLX-LM", "LoRA, DoRA, experts; `.npz`, the scale of before June 2024"
WEIGHTS = "adapters.safetensors"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embedding", "embeddings")
_SWITCH = ".switch_mlp."
_SPARSE = ("mixtral", "minimax", "phimoe")  # whose block MLX-LM calls block_sparse_moe
_NAMES = {"A": "lora_a", "B": "lora_b", "magnitude": "m"}
_STACKED = [leaf for leaves in PARTS.values() for leaf in leaves]
_LEAVES = {leaf: leaf for leaf in ("lora_a", "lora_b", "m")}
_CONFIG = ("fine_tune_type", "lora_parameters", "lora_layers")


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    if any(key.endswith((".lora_a", ".lora_b")) for key in header.tensors):
        return "keys end in .lora_a and .lora_b"
    return next((f"{field} in adapter_config.json" for field in _CONFIG if field in (config or {})), "")


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    found, pairs = config or {}, Pairs(header, values)
    if found.get("fine_tune_type") == "full":
        pairs.skip(header.tensors, "UNSUPPORTED_VARIANT", "fine_tune_type is full: trained weights, not factors")
        return pairs.layout(NAME, _about(found))
    if (kind := found.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        pairs.say("BAD_CONFIG", "fine_tune_type", wanted="lora, dora or full", got=brief(kind))
    switches: dict[str, dict[str, Part]] = {}
    for module, group in pairs.groups(_LEAVES).items():
        block, _, leaf = module.partition(_SWITCH)
        if leaf in _STACKED and {"lora_a", "lora_b"} == group.keys():
            root = re.sub(r"(^|\.)block_sparse_moe$", r"\1mlp", block)  # Mixtral's, as transformers has it now
            parts = switches.setdefault(f"{root}.experts", {})
            if leaf in parts:
                pairs.skip(group.values(), "TWO_ADAPTERS", "the experts have two pairs of factors", module=module)
            else:
                parts[leaf] = Part(0, group["lora_a"], group["lora_b"])
        else:
            _add(pairs, module, group, found)
    for parameter, count, those in by_parameter(switches):
        add_experts(pairs, parameter, count, those, lambda rank: _scaling(found, rank))
    if any(entry.scaling is None for entry in pairs.adapters.values()):
        pairs.say("SCALING_UNKNOWN", "no scale in lora_parameters of an adapter_config.json")
    tied = any(entry.stored == "embedding" for entry in pairs.adapters.values())
    return pairs.layout(NAME, replace(_about(found), tied=tied))


def _add(pairs: Pairs, module: str, group: Group, config: Mapping[str, Any]) -> None:
    missing = {"lora_a", "lora_b"} - group.keys()
    is_dora = config.get("fine_tune_type") == "dora"
    if missing or (is_dora and "m" not in group):
        code = "MISSING_HALF" if missing else "MISSING_MAGNITUDE"
        absent = ", ".join(sorted(missing)) or "m"
        pairs.skip(group.values(), code, f"has {', '.join(sorted(group))} but no {absent}", module=module)
    elif config and "m" in group and not is_dora:
        pairs.skip(group.values(), "BAD_CONFIG", "an m although fine_tune_type is not dora", module=module)
    elif len(pairs.shape(group["lora_a"])) == 3:
        pairs.skip(
            group.values(), "UNSUPPORTED_VARIANT", "a layer of three dimensions that is no switch_mlp", module=module
        )
    else:
        is_embedding = module.rpartition(".")[2] in EMBEDDINGS
        down, up = (pairs.factor(group[leaf], transposed=True) for leaf in ("lora_a", "lora_b"))
        pairs.add(
            module,
            group,
            down,
            up,
            scaling=_scaling(config, down.shape[0]),
            magnitude=group.get("m", ""),
            along="in_features" if is_embedding else "out_features",
            stored="embedding" if is_embedding else "linear",
        )


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("lora_parameters")
    return found if isinstance(found, Mapping) else {}


def _scaling(config: Mapping[str, Any], rank: int) -> float | None:
    """The scale as it stands; where an alpha stands beside it, as before June 2024, times alpha/rank."""
    found = _parameters(config)
    scale, alpha = found.get("scale"), found.get("alpha")
    if not is_number(scale) or not (alpha is None or is_number(alpha)):
        return None
    return float(scale) if alpha is None else float(scale) * float(alpha) / rank  # type: ignore[arg-type]


def _about(config: Mapping[str, Any]) -> About:
    base, dropout = config.get("model"), _parameters(config).get("dropout")
    return About(
        base_model=base if isinstance(base, str) and base else None,
        dropout=dropout if is_number(dropout) else None,
    )


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    experts: frozenset[Stored] = frozenset(("experts",)) if kind == "lora" else frozenset()
    return experts | frozenset(("linear", "embedding")) if kind in ("lora", "dora") else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """adapters.safetensors and adapter_config.json. Raises FORMAT_CANNOT_HOLD before anything is written."""
    from d2surgery.formats.saving import brought_to, common, held_whole, saving  # torch

    layout, entries = checkpoint.layout, checkpoint.layout.adapters
    raise_errors([*held_whole(layout, NAME), *flattened(layout), *_cannot_hold(layout)])
    rank, scaling = common(layout)
    switches = {m: _switch_of(m, layout.about.model) for m, entry in entries.items() if entry.stored == "experts"}

    def tensors() -> "Iterator[tuple[str, Tensor]]":
        for module, entry in entries.items():
            each = [brought_to(checkpoint.adapter(module, e), rank, scaling) for e in range(entry.experts)]
            if module in switches:
                yield from _switch(switches[module], each).items()
            else:
                for slot, tensor in each[0].items():
                    yield f"{module}.{_NAMES[slot]}", tensor.T if tensor.dim() == 2 else tensor

    config = {
        "fine_tune_type": next(iter(entries.values())).kind,
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scaling, "dropout": layout.about.dropout or 0.0,
                            "keys": sorted(name for m in entries for name in switches.get(m, [m]))},
        "model": layout.base_model,
    }  # fmt: skip
    with saving(directory / WEIGHTS, tensors, {"format": "mlx"}):
        write_whole(directory / "adapter_config.json", json.dumps(config, indent=4))


def _switch(names: list[str], each: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """The experts of one parameter as switch layers: every part has A, and its own rows of B."""
    import torch

    A, B = (torch.stack([slots[slot] for slots in each]) for slot in "AB")
    found: dict[str, Tensor] = {}
    for name, rows in zip(names, B.chunk(len(names), 1), strict=True):
        found |= {f"{name}.lora_a": A.clone(), f"{name}.lora_b": rows}
    return found


def _switch_of(module: str, model: Mapping[str, Any]) -> list[str]:
    """The switch layers of a parameter of experts; none where the model has them otherwise, or is not known."""
    block, _, parameter = module.rpartition(".experts.")
    kind = model.get("model_type")
    if not block or parameter not in PARTS or kind in (None, "gpt_oss", "llama4", "llama4_text"):
        return []
    if kind in _SPARSE:
        block = re.sub(r"(^|\.)mlp$", r"\1block_sparse_moe", block)
    return [f"{block}{_SWITCH}{leaf}" for leaf in PARTS[parameter]]


def _cannot_hold(layout: Layout) -> Iterator[Problem]:
    """One file is LoRA or DoRA; a magnitude has one axis; an embedding's update moves the output tied to it."""
    kinds = {entry.kind for entry in layout.adapters.values()}
    if len(kinds) > 1:
        yield Problem(
            code="FORMAT_CANNOT_HOLD", message="one file of MLX-LM's holds one kind", got=", ".join(sorted(kinds))
        )
    for module, entry in layout.adapters.items():
        if entry.stored == "experts" and (entry.as_declared or not _switch_of(module, layout.about.model)):
            message = "which rows of experts are gate and up depends on the model"
            got = str(layout.about.model.get("model_type", "no base"))
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module, wanted="--base", got=got)
        is_embedding = entry.stored == "embedding"
        if entry.kind == "dora" and (entry.settings["along"] == "in_features") != is_embedding:
            message = "MLX-LM's magnitude is per row of the stored weight"
            yield Problem(
                code="FORMAT_CANNOT_HOLD", message=message, module=module, got=f"along {entry.settings['along']}"
            )
        if is_embedding and not layout.about.tied:
            message = "MLX-LM moves an output that is tied to the embedding with it, this adapter does not"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module)
        if is_embedding != (module.rpartition(".")[2] in EMBEDDINGS):
            message = f"MLX-LM tells an embedding by its name: {', '.join(EMBEDDINGS)}"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module, got=entry.stored)
