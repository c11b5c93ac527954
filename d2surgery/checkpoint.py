"""Checkpoint: a layout with its tensors, loaded when asked for."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from d2surgery import formats
from d2surgery.adapters import KINDS, Adapter
from d2surgery.errors import raise_errors, refuse
from d2surgery.files.header import Header, TensorInfo, is_pickle
from d2surgery.files.tensors import STORED_NAMES, read_tensor
from d2surgery.formats import peft
from d2surgery.formats.layout import RANK_GROUPS, Layout

_OF_TRAINING: dict[str, tuple[str, ...]] = {"lora": (), "dora": (), "duallora": ("ste",), "d2lora": ("detach_norm",)}
"""Fields that change no value, only the gradient: the config keeps them under `training`."""


class Checkpoint(Mapping[str, Adapter]):
    """The adapters of a file, by module; each access reads that module's tensors, in their stored dtype.

    A module with several experts has one adapter per expert: ask `adapter(module, expert)`.
    """

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.layout = layout
        self._tensors = tensors

    @property
    def in_memory(self) -> bool:
        """Whether the tensors are held, and not read from the file when asked for."""
        return self._tensors is not None

    def __getitem__(self, module: str) -> Adapter:
        experts = self.layout.adapters[module].experts
        if experts != 1:
            raise refuse("USAGE", f"has {experts} experts; ask adapter(module, expert)", module=module)
        return self.adapter(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.adapters)

    def __len__(self) -> int:
        return len(self.layout.adapters)

    def tensor(self, key: str) -> Tensor:
        """A tensor by its key in the file, as stored."""
        return read_tensor(self.layout.header.tensors[key]) if self._tensors is None else self._tensors[key]

    def adapter(self, module: str, expert: int = 0) -> Adapter:
        """The adapter of one module: factors as (r, in) and (out, r), a convolution's kernel flattened into in.

        Raises D2SurgeryError MISSING_CONFIG when the scaling is unknown.
        """
        entry = self.layout.adapters[module]
        if entry.scaling is None:
            raise refuse("MISSING_CONFIG", "the scaling is unknown", file=str(self.layout.path), module=module)
        slots = {slot: self._matrix(slot, key) for slot, key in entry.slots.items() if slot != "bias"}
        if entry.experts > 1:
            rank = entry.ranks["update"]
            slots["A"] = slots["A"][expert * rank : (expert + 1) * rank]
            slots["B"] = slots["B"][:, expert :: entry.experts]
        extra: dict[str, Any] = {"along": entry.along} if entry.along else {}
        if entry.kind == "d2lora":
            extra |= {"tau": entry.tau, "form": entry.form}
        training = self.layout.config.get("training")
        if isinstance(training, Mapping):
            extra |= {name: training[name] for name in _OF_TRAINING[entry.kind] if name in training}
        return KINDS[entry.kind](scaling=entry.scaling, **slots, **extra)

    def bias(self, module: str) -> Tensor:
        """lora_bias's vector (out,), which is added to the base's bias times the scaling."""
        return self.tensor(self.layout.adapters[module].slots["bias"])

    def _matrix(self, slot: str, key: str) -> Tensor:
        tensor = self.tensor(key)
        return tensor.reshape(-1) if slot == "magnitude" else tensor.reshape(tensor.shape[0], -1)


def load(adapter: str | os.PathLike[str]) -> Checkpoint:
    """Open an adapter: a file, a directory or a hub id. Nothing but the header is read until it is asked for.

    Misfits are in `.layout.problems`. Raises D2SurgeryError when the file cannot be read at all.
    """
    return opened(formats.open_layout(adapter))


def opened(layout: Layout) -> Checkpoint:
    """The checkpoint of a layout that was read from a file."""
    if not is_pickle(layout.path):
        return Checkpoint(layout)
    from d2surgery.files.pickled import read_pickled  # the one reader that must load everything

    return Checkpoint(layout, read_pickled(layout.path))


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT writes them, the config also in the header.

    Raises D2SurgeryError OUTPUT_EXISTS when the directory already holds an adapter.
    """
    out = Path(directory)
    layout = checkpoint.layout
    raise_errors(layout.problems)
    target = out / "adapter_model.safetensors"
    if target.exists():
        raise refuse("OUTPUT_EXISTS", "an adapter is there already", file=str(target))
    out.mkdir(parents=True, exist_ok=True)
    config = dict(layout.config)
    scaling = {module: entry.scaling for module, entry in layout.adapters.items()}
    ours = json.dumps({"config": config, "scaling": scaling}, sort_keys=True)
    tensors = {name: checkpoint.tensor(key).contiguous() for name, key in peft.names(layout).items()}
    partial = target.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt", peft.METADATA: ours})
    _sort_metadata(partial)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    partial.replace(target)


def _sort_metadata(file: Path) -> None:
    """safetensors writes metadata in an order of chance: sorted, the same adapter is the same file, hash and all."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same entries in another order, padded with spaces
        stream.seek(8)
        stream.write(text.ljust(length))


def from_adapters(adapters: Mapping[str, Adapter], config: Mapping[str, Any] = MappingProxyType({})) -> Checkpoint:
    """A checkpoint of linear modules from adapters of one kind, ready to be saved.

    `config` adds or overrides fields of adapter_config.json (base_model_name_or_path, task_type, …).
    """
    kinds = {adapter.kind for adapter in adapters.values()}
    if len(kinds) != 1:
        raise refuse("USAGE", "one file holds one kind", got=", ".join(sorted(kinds)) or "no adapters")
    full = {**_config(adapters), **config}
    tensors = {
        peft.key_of(module, slot): tensor.detach()
        for module, adapter in adapters.items()
        for slot, tensor in adapter.slots().items()
    }
    infos = {
        key: TensorInfo(Path(), STORED_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for key, tensor in tensors.items()
    }
    scaling = {module: float(adapter.scaling) for module, adapter in adapters.items()}
    metadata = {peft.METADATA: json.dumps({"config": full, "scaling": scaling})}
    layout = formats.layout(Header((Path("adapter_model.safetensors"),), infos, metadata), full)
    return Checkpoint(layout, tensors)


def _config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The config that reads back as these adapters: the commonest rank and alpha, patterns for the rest."""
    kind = next(iter(adapters.values())).kind
    ranks = {module: _ranks(adapter) for module, adapter in adapters.items()}
    alphas = {module: float(a.scaling) * _divisor(a, ranks[module]) for module, a in adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    shown = {module: r[0] if kind != "duallora" else list(r) for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": peft.PEFT_TYPES[kind],
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "lora_alpha": _plain(alpha),
        "rank_pattern": shown,
        "alpha_pattern": {module: _plain(a) for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(adapters),
    }
    training = {name: _same(adapters, name) for name in _OF_TRAINING[kind]}
    if kind == "duallora":
        return config | {"r1": rank[0], "r2": rank[1], "format_version": 1, "training": training}
    config["r"] = rank[0]
    if kind == "d2lora":
        return config | {"tau": _same(adapters, "tau"), "along": _same(adapters, "along"),
                         "form": _same(adapters, "form"), "format_version": 1, "training": training}  # fmt: skip
    config |= {"use_dora": kind == "dora", "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
    if kind == "dora" and _same(adapters, "along") != "out_features":
        raise refuse("USAGE", "PEFT's DoRA keeps one magnitude per output feature", got="along in_features")
    return config


def _ranks(adapter: Adapter) -> tuple[int, ...]:
    slots = adapter.slots()
    return tuple(slots[down].shape[0] for down in RANK_GROUPS[adapter.kind].values())


def _divisor(adapter: Adapter, ranks: tuple[int, ...]) -> float:
    """What alpha is divided by to give the scaling."""
    return sqrt(prod(ranks)) if adapter.kind == "duallora" else ranks[0]


def _same(adapters: Mapping[str, Adapter], field: str) -> Any:
    values = {getattr(adapter, field) for adapter in adapters.values()}
    if len(values) != 1:
        raise refuse("USAGE", f"one file holds one {field}", got=", ".join(map(str, sorted(values))))
    return values.pop()


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
