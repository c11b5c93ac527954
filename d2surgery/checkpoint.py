"""Checkpoint: an adapter as a value. It knows no format: a layout says what there is, tensors come when asked for."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2surgery import formats
from d2surgery.adapters import KINDS, Adapter
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import D2SurgeryError, found_in, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.locate import WEIGHTS
from d2surgery.files.tensors import NAMES, header_of, read_tensor
from d2surgery.formats.layout import About, AdapterLayout, Layout, Reading, Rows, Slot, Stored
from d2surgery.kinds import TABLE, Group

_SAME = 1e-6  # how far a delta may be from what was meant, relative: a scaling folded in float32 is 6e-8 off


class Checkpoint(Mapping[str, Adapter]):
    """The adapters by module; each access reads that module's tensors, in their stored dtype.

    A module with several experts has one adapter per expert: ask `adapter(module, expert)`. `layout` has all that is
    known without numbers: replaced tensors and token rows too, what the file says of itself, and its problems.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __repr__(self) -> str:
        return f"Checkpoint{repr(self.layout).removeprefix('Layout')}"

    @property
    def in_memory(self) -> bool:
        """Whether the tensors are held, and not read from the file when asked for."""
        return self.layout.header.loaded is not None

    def __contains__(self, module: object) -> bool:
        return module in self.layout.adapters

    def __getitem__(self, module: str) -> Adapter:
        experts = self._entry(module).experts
        if experts != 1:
            raise refuse("USAGE", f"has {experts} experts; ask adapter(module, expert)", module=module)
        return self.adapter(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.adapters)

    def __len__(self) -> int:
        return len(self.layout.adapters)

    def tensor(self, key: str) -> Tensor:
        """A tensor by its key in the file, as stored."""
        loaded = self.layout.header.loaded
        file = str(self.layout.path)
        if loaded is not None:
            return found_in(loaded, key, "tensor", file)
        return read_tensor(found_in(self.layout.header.tensors, key, "tensor", file))

    def _entry(self, module: str) -> AdapterLayout:
        return found_in(self.layout.adapters, module, "module", str(self.layout.path))

    def adapter(self, module: str, expert: int = 0) -> Adapter:
        """The adapter of one module: factors as (r, in) and (out, r), a convolution's kernel flattened into in.

        Raises D2SurgeryError SCALING_UNKNOWN when the scaling is.
        """
        entry = self._entry(module)
        if entry.scaling is None:
            raise refuse("SCALING_UNKNOWN", "what multiplies B·A?", file=str(self.layout.path), module=module)
        vectors = TABLE[entry.kind].vectors
        slots = {name: self._matrix(slot, flat=name in vectors) for name, slot in entry.slots.items() if name != "bias"}
        if entry.experts > 1:
            rank = entry.ranks["update"]
            block, comb = slice(expert * rank, (expert + 1) * rank), slice(expert, None, entry.experts)
            slots["A"] = slots["A"][block if "A" in entry.blocked else comb]
            slots["B"] = slots["B"][:, block if "B" in entry.blocked else comb]
        return KINDS[entry.kind](scaling=entry.scaling, **slots, **entry.settings)

    def bias(self, module: str) -> Tensor:
        """lora_bias's vector (out,), which is added to the base's bias times the scaling."""
        return self._matrix(self._entry(module).slots["bias"], flat=True)

    def _matrix(self, slot: Slot, *, flat: bool) -> Tensor:
        tensor = self.tensor(slot.key)
        if slot.made is not None:
            tensor = slot.made(tensor, *map(self.tensor, slot.also))
        if slot.rows is not None:
            tensor = tensor[slice(*slot.rows)]
        if flat:
            return tensor.reshape(-1)
        matrix = tensor.reshape(tensor.shape[0], -1)
        return matrix.T if slot.transposed else matrix


def load(
    adapter: str | os.PathLike[str],
    *,
    base: BaseWeights | None = None,
    **reading: Unpack[Reading],
) -> Checkpoint:
    """Open an adapter: a file, a directory or a hub id. Nothing but the header is read until it is asked for.

    base: where flattened names are looked up, and how many heads share the rows of a GGUF's q and k. reading:
    expert_layout, scale or alpha of a file that does not say it, see `Reading`.

    Misfits are in `.layout.problems`. Raises D2SurgeryError when the file cannot be read at all.
    """
    layout = formats.open_layout(adapter, **reading)
    return Checkpoint(layout if base is None else formats.with_base(layout, base.header.tensors, base.config))


def save(checkpoint: Checkpoint, directory: str | os.PathLike[str], *, format: str = "peft") -> dict[str, float]:
    """Write a checkpoint in a format: "peft" is adapter_config.json and adapter_model.safetensors as PEFT writes them.

    Any other is read back and compared, which gives `differences`; PEFT's form holds every bit, and gives {}.

    Raises D2SurgeryError OUTPUT_EXISTS when the directory already holds an adapter, FORMAT_CANNOT_HOLD with all that
    the format has no place for, and the checkpoint's own problems; nothing is written then. READ_BACK_DIFFERS where
    what was written is something else.
    """
    out = Path(directory)
    for name in WEIGHTS:
        if (out / name).exists():
            raise refuse("OUTPUT_EXISTS", "an adapter is there already", file=str(out / name))
    formats.write(checkpoint, out, format)
    if format == "peft":
        return {}
    try:
        return _same(checkpoint, load(out), format)
    except D2SurgeryError:
        for name in (*WEIGHTS, "adapter_config.json"):
            (out / name).unlink(missing_ok=True)
        raise


def _same(meant: Checkpoint, written: Checkpoint, format: str) -> dict[str, float]:
    found = differences(meant, written)
    worst = max(found, key=lambda module: found[module])
    if found[worst] > _SAME:
        file, got = str(written.layout.path), f"{found[worst]:.2g} of the delta"
        raise refuse("READ_BACK_DIFFERS", f"written as {format}", file=file, module=worst, got=got)
    return found


def differences(one: Checkpoint, other: Checkpoint) -> dict[str, float]:
    """By module ‖ΔW − ΔW′‖/‖ΔW‖ of the updates in float64, or the same of a vector where that is more.

    0 for the same numbers, and infinity for a module that only one of the two has, unless it adds nothing.
    """
    ours, theirs = one.layout.adapters, other.layout.adapters
    found = dict.fromkeys([*ours, *theirs], inf)
    for mine, its in ((one, theirs), (other, ours)):
        alone = (module for module in mine.layout.adapters.keys() - its.keys() if _adds_nothing(mine, module))
        found |= dict.fromkeys(alone, 0.0)
    for module in ours.keys() & theirs.keys():
        counts = {each[module].experts for each in (ours, theirs)}
        pairs = ((one.adapter(module, e), other.adapter(module, e)) for e in range(counts.pop()))
        found[module] = inf if counts else max(_difference(*pair) for pair in pairs)
    return found


def _adds_nothing(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a LoRA is zero."""
    entry = checkpoint.layout.adapters[module]
    if entry.kind != "lora" or entry.experts > 1:
        return False
    return not bool(checkpoint.adapter(module).slots()["B"].any())


def _difference(one: Adapter, other: Adapter) -> float:
    ours, theirs = one.slots(), other.slots()
    if one.kind != other.kind or one.settings != other.settings:
        return inf
    if one.scaling == other.scaling and all(torch.equal(ours[name], theirs[name]) for name in ours):
        return 0.0
    vectors = ((ours[name].double(), theirs[name].double()) for name in TABLE[one.kind].vectors)
    found = [_relative((mine - its).norm(), mine.norm()) if mine.shape == its.shape else inf for mine, its in vectors]
    for group in TABLE[one.kind].groups.values():
        rank = max(slots[group.down].shape[0] for slots in (ours, theirs))
        P, Q = _padded(one, group, rank)
        its_P, its_Q = _padded(other, group, rank)
        if P.shape != its_P.shape or Q.shape != its_Q.shape:
            return inf
        if torch.equal(Q, its_Q) and torch.equal(P, its_P):
            continue
        off = LowRank(P - its_P, Q) if torch.equal(Q, its_Q) else LowRank(P, Q) + LowRank(-its_P, its_Q)
        found.append(_relative(off.frobenius_norm(), LowRank(P, Q).frobenius_norm()))
    return max(found, default=0.0)


def _padded(adapter: Adapter, group: Group, rank: int) -> tuple[Tensor, Tensor]:
    """A group's factors, the scaling in the up one, with zeros up to a rank."""
    down, up = (adapter.slots()[name] for name in (group.down, group.up))
    missing = rank - down.shape[0]
    return pad(up.double() * float(adapter.scaling), (0, missing)), pad(down, (0, 0, 0, missing))


def _relative(difference: Tensor, size: Tensor) -> float:
    return float(difference / size) if size else float(difference)


def from_adapters(
    adapters: Mapping[str, Adapter | Sequence[Adapter]],
    about: About = About(),  # noqa: B008  # a frozen value
    *,
    embeddings: Collection[str] = (),
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    replacements: Mapping[str, Tensor] | None = None,
    rows: Mapping[str, tuple[Sequence[int], Tensor]] | None = None,
) -> Checkpoint:
    """A checkpoint of adapters by module, of any kinds, ranks and scalings.

    adapters: an adapter, or one per expert for a parameter that stacks experts. embeddings: the modules that are
    embeddings, in_features their tokens. kernels: of the modules that are convolutions (in_channels, *kernel), whose
    product is in_features. biases: by module, (out,), added to the base's bias times the scaling. replacements: by base
    tensor name, what stands in its place. rows: by base tensor name, row numbers and what stands in theirs.

    Raises D2SurgeryError USAGE for nothing at all and for experts that differ in more than their numbers.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, AdapterLayout] = {}
    kernels, biases = kernels or {}, biases or {}
    for module, given in adapters.items():
        each = [given] if isinstance(given, Adapter) else list(given)
        stored: Stored = (
            "embedding" if module in embeddings
            else "conv" if module in kernels
            else "experts" if not isinstance(given, Adapter)
            else "linear"
        )  # fmt: skip
        entry, own = _entry(module, each, stored, kernels.get(module, ()))
        if module in biases:
            own[f"{module}.bias"] = biases[module]
            entry = replace(entry, slots={**entry.slots, "bias": Slot(f"{module}.bias")})
        entries[module] = entry
        tensors |= own
    for target, tensor in (replacements or {}).items():
        tensors[f"replacement {target}"] = tensor.detach()
    for target, (_, tensor) in (rows or {}).items():
        tensors[f"rows of {target}"] = tensor.detach()
    if not tensors:
        raise refuse("USAGE", "there is nothing in it", got="no adapters")
    layout = Layout(
        path=Path("adapter_model.safetensors"),
        format="",
        header=header_of(tensors),
        about=about,
        adapters=entries,
        replacements={target: f"replacement {target}" for target in replacements or {}},
        rows={target: Rows(f"rows of {target}", tuple(numbers)) for target, (numbers, _) in (rows or {}).items()},
    )
    return Checkpoint(layout)


def _entry(
    module: str, adapters: list[Adapter], stored: Stored, kernel: tuple[int, ...]
) -> tuple[AdapterLayout, dict[str, Tensor]]:
    """One module's adapters as names and shapes, and their tensors by key; experts packed as `adapter` unpacks them."""
    first = adapters[0]
    row = TABLE[first.kind]
    settings = {f.name: getattr(first, f.name) for f in fields(first) if f.name in (*row.settings, *row.training)}
    slots = first.slots()
    if len(adapters) > 1 and first.kind != "lora":
        raise refuse("USAGE", "only LoRA exists for parameters that stack experts", module=module, got=first.kind)
    for other in adapters[1:]:
        alike = {f.name: getattr(other, f.name) for f in fields(other) if f.name in settings}
        same = (other.kind, other.scaling, alike) == (first.kind, first.scaling, settings)
        if not same or {n: t.shape for n, t in other.slots().items()} != {n: t.shape for n, t in slots.items()}:
            raise refuse("USAGE", "experts of one parameter have one kind, rank and scaling", module=module)
    if len(adapters) > 1:
        every = [adapter.slots() for adapter in adapters]
        slots = {"A": torch.cat([each["A"] for each in every]),
                 "B": torch.stack([each["B"] for each in every], 2).reshape(first.out_features, -1)}  # fmt: skip
    tensors = {f"{module}.{slot}": tensor.detach() for slot, tensor in slots.items()}
    entry = AdapterLayout(
        module=module,
        kind=first.kind,
        stored=stored,
        slots={slot: Slot(f"{module}.{slot}") for slot in slots},
        ranks={name: first.slots()[group.down].shape[0] for name, group in row.groups.items()},
        out_features=first.out_features,
        in_features=first.in_features,
        dtype=NAMES[next(iter(slots.values())).dtype],
        scaling=float(first.scaling),
        settings=settings,
        kernel=kernel,
        experts=len(adapters),
    )
    return entry, tensors
