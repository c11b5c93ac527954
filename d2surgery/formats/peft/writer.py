"""Writing PEFT's form: the config that reads back as the adapters, and their tensors under PEFT's keys."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import isclose, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header, TensorInfo
from d2surgery.files.tensors import NAMES
from d2surgery.files.whole import write_whole
from d2surgery.formats.flat import flattened
from d2surgery.formats.format import Holding
from d2surgery.formats.layout import AdapterLayout, Layout, Slot, alpha_divisor, with_expert_layout
from d2surgery.formats.peft.config import peft_type, version_of
from d2surgery.formats.peft.keys import METADATA, PREFIX, TOKENS, bare, in_declared_order, key_of
from d2surgery.formats.peft.reader import read
from d2surgery.formats.saving import saving
from d2surgery.kinds import TABLE

WEIGHTS = "adapter_model.safetensors"
PACKED_SINCE = (0, 19, 1)  # PEFT packs experts as it does now
_KEPT = (  # fields of a config that was found which say nothing of the values
    "auto_mapping", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version", "revision",
    "runtime_config", "use_rslora",
)  # fmt: skip


def write_files(checkpoint: Holding, directory: Path) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises FORMAT_CANNOT_HOLD before anything is written."""
    layout = checkpoint.layout
    raise_errors([*_cannot_hold(layout), *flattened(layout)])
    infos = {k: TensorInfo(Path(), NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for k, t in tensors_of(checkpoint)}
    config = _config(layout, infos)
    scaling = {module: entry.scaling for module, entry in layout.adapters.items()}
    history = {"history": list(layout.about.history)} if layout.about.history else {}
    ours = json.dumps({"config": config, "scaling": scaling} | history, sort_keys=True)
    with saving(directory / WEIGHTS, partial(tensors_of, checkpoint), {"format": "pt", METADATA: ours}):
        write_whole(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))


def _cannot_hold(layout: Layout) -> Iterator[Problem]:
    """One config describes all modules: one peft_type, one use_dora, one value of each setting."""
    kinds = {entry.kind: module for module, entry in layout.adapters.items()}
    if len(kinds) > 1:
        got = ", ".join(f"{kind} on {module}" for kind, module in sorted(kinds.items()))
        yield Problem(code="FORMAT_CANNOT_HOLD", message="one file of PEFT's holds one kind", got=got)
        return
    for kind in kinds:
        for name in (*TABLE[kind].settings, *TABLE[kind].training):
            values = {str(entry.settings.get(name)) for entry in layout.adapters.values()}
            if len(values) > 1:
                got = ", ".join(sorted(values))
                yield Problem(code="FORMAT_CANNOT_HOLD", message=f"one file of PEFT's holds one {name}", got=got)
    for module, entry in layout.adapters.items():
        if entry.kind == "dora" and entry.settings["along"] != "out_features" and entry.stored != "linear":
            message = "DoRA with a magnitude per input feature exists for linear modules only"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module, got=entry.stored)
        if entry.as_declared:
            message = "experts of PEFT 0.17 and 0.18: which axis today's PEFT takes for out depends on the model"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module)


# Tensors ---------------------------------------------------------------------------------------------------------


def tensors_of(checkpoint: Holding) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its key, as PEFT lays it out."""
    layout = checkpoint.layout
    for module, entry in layout.adapters.items():
        name = _wrapped(layout, module) if entry.stored == "experts" else module
        experts = [checkpoint.adapter(module, expert).slots() for expert in range(entry.experts)]
        for slot in TABLE[entry.kind].slots:
            stored = _packed([each[slot] for each in experts], slot, entry)
            yield key_of(name, entry.kind, slot, entry.stored), stored
        if "bias" in entry.slots:
            yield key_of(name, entry.kind, "bias"), checkpoint.bias(name)
    for target, key in layout.replacements.items():
        module, _, leaf = target.rpartition(".")
        rows = "token_adapter." if target in layout.rows else ""
        inside = "base_layer." if rows or module in layout.adapters else ""
        yield f"{PREFIX}{module}.{rows}{inside}{leaf}", checkpoint.tensor(key)
    for target, rows_ in layout.rows.items():
        name = f"{PREFIX}{target.rpartition('.')[0]}.token_adapter.{TOKENS}"
        yield name, checkpoint.tensor(rows_.key)
    for key in layout.superseded if layout.format == "peft" else ():
        yield PREFIX + bare(key), checkpoint.tensor(key)


def _wrapped(layout: Layout, parameter: str) -> str:
    """The name of the wrapper in which PEFT keeps the factors of a parameter: the innermost comes first."""
    module, _, own = parameter.rpartition(".")
    beside = {m.rpartition(".")[2] for m, e in layout.adapters.items() if e.stored == "experts" and
              m.rpartition(".")[0] == module}  # fmt: skip
    ordered = in_declared_order(beside)
    return module + ".base_layer" * (len(ordered) - 1 - ordered.index(own))


def _packed(matrices: list[Tensor], slot: str, entry: AdapterLayout) -> Tensor:
    """One slot of a module's adapters as PEFT stores it."""
    first = matrices[0]
    if entry.stored == "experts" and entry.experts > 1:  # rows of A expert-slowest, columns of B expert-fastest
        return torch.cat(matrices) if slot == "A" else torch.stack(matrices, 2).reshape(first.shape[0], -1)
    return shaped(first, slot, entry)


def shaped(tensor: Tensor, slot: str, entry: AdapterLayout) -> Tensor:
    """A slot's matrix or vector as PEFT stores it: a convolution's with its kernel."""
    ones = (1,) * (len(entry.kernel) - 1)
    if tensor.dim() == 1:
        return tensor.reshape(1, -1, *ones) if entry.kernel else tensor
    if not entry.kernel:
        return tensor
    downs = {group.down for group in TABLE[entry.kind].groups.values()}
    return tensor.reshape(-1, *entry.kernel) if slot in downs else tensor.reshape(*tensor.shape, *ones)


# The config ------------------------------------------------------------------------------------------------------


def _config(layout: Layout, infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The config that was found where it still describes the adapters, else one made anew."""
    found = dict(layout.about.settings) if layout.format == "peft" else {}
    if found and _describes(found, with_expert_layout(layout, "interleaved"), infos):
        return found
    return made_config(layout)


def _describes(found: Mapping[str, Any], layout: Layout, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the file, read with this config, gives the same adapters; scalings but for alpha's rounding."""
    again = read(Header((layout.path,), infos, {}), found, exact={}, disagrees=False)
    said = (again.about, again.adapters.keys(), again.replacements.keys(), again.rows.keys())
    if said != (layout.about, layout.adapters.keys(), layout.replacements.keys(), layout.rows.keys()):
        return False
    written = {module: entry.with_packing("interleaved") for module, entry in layout.adapters.items()}
    return all(_alike(again.adapters[module], entry) for module, entry in written.items())


def _alike(one: AdapterLayout, other: AdapterLayout) -> bool:
    def shown(entry: AdapterLayout) -> AdapterLayout:
        return replace(entry, slots=dict.fromkeys(entry.slots, Slot("")), scaling=None, misread={})

    known = one.scaling is not None and other.scaling is not None
    return known and isclose(one.scaling, other.scaling, rel_tol=1e-12) and shown(one) == shown(other)  # type: ignore[arg-type]


def made_config(layout: Layout) -> dict[str, Any]:
    """The commonest rank and alpha, patterns for the rest."""
    about, entries = layout.about, layout.adapters
    kept = {name: about.settings[name] for name in _KEPT if name in about.settings}
    kind = next((entry.kind for entry in entries.values()), "lora")
    fields = list(dict.fromkeys(group.rank for group in TABLE[kind].groups.values()))
    root = bool(kept.get("use_rslora")) and len(fields) == 1
    ranks = {module: _ranks(entry) for module, entry in entries.items()}
    alphas = {module: _alpha(entry, root) for module, entry in entries.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else (8,)
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    config = {
        "peft_type": peft_type(kind, next((entry.settings for entry in entries.values()), {})),
        "base_model_name_or_path": about.base_model,
        "task_type": about.task,
        "inference_mode": True,
        "lora_alpha": alpha,
        "rank_pattern": {m: r[0] if len(r) == 1 else list(r) for m, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(module for module, entry in entries.items() if entry.stored != "experts"),
    }
    return config | kept | dict(zip(fields, rank, strict=True)) | _of_kind(kind, layout) | _beside(layout)


def _of_kind(kind: str, layout: Layout) -> dict[str, Any]:
    entry = next(iter(layout.adapters.values()), None)
    row, settings = TABLE[kind], entry.settings if entry else {}
    if peft_type(kind, settings) == "LORA":
        found = layout.about.settings
        return {"use_dora": kind == "dora", "use_rslora": bool(found.get("use_rslora")), "bias": "none",
                "fan_in_fan_out": layout.about.transposed}  # fmt: skip
    training = dict(layout.about.training) | {name: settings[name] for name in row.training if name in settings}
    dora = {"use_dora": True} if kind == "dora" else {}
    return {name: settings[name] for name in row.settings} | {"format_version": 1, "training": training} | dora


def _beside(layout: Layout) -> dict[str, Any]:
    """What the config says of all that is not a factor of a linear module."""
    about, config = layout.about, dict[str, Any]()
    experts = sorted(module for module, entry in layout.adapters.items() if entry.stored == "experts")
    biases = [t.rpartition(".")[0] in layout.adapters for t in layout.replacements if t.endswith(".bias")]
    if experts:
        config["target_parameters"] = experts
        found = about.settings.get("peft_version", "")
        config["peft_version"] = found if version_of(found) >= PACKED_SINCE else "0.19.1"  # whose packing this is
    if about.saved_modules:
        config["modules_to_save"] = list(about.saved_modules)
    if about.tied:
        config["ensure_weight_tying"] = True
    if any("bias" in entry.slots for entry in layout.adapters.values()):
        config["lora_bias"] = True
    if any(biases):
        config["bias"] = "lora_only" if all(biases) else "all"
    if layout.rows:
        config["trainable_token_indices"] = {t.rpartition(".")[0]: list(r.indices) for t, r in layout.rows.items()}
    return config


def _ranks(entry: AdapterLayout) -> tuple[int, ...]:
    """One number for each field of the config that holds a rank."""
    fields = {group.rank: entry.ranks[name] for name, group in TABLE[entry.kind].groups.items()}
    return tuple(fields.values())


def _alpha(entry: AdapterLayout, root: bool) -> float | int:
    """What is divided by r, or √r, to give the scaling; the short number that does, where there is one."""
    rank = alpha_divisor(entry.ranks)
    divisor = sqrt(rank) if root else rank
    alpha = float(entry.scaling or 0.0) * divisor
    short = round(alpha, 9)
    alpha = short if short / divisor == entry.scaling else alpha
    return int(alpha) if alpha == int(alpha) else alpha
