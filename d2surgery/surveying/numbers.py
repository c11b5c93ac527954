"""What `inspect --numbers` computes from the values: norms and ranks of every update, and what is not finite."""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import Problem
from d2surgery.formats.layout import AdapterLayout, Layout
from d2surgery.kinds import TABLE
from d2surgery.measures.ranks import ranks
from d2surgery.surveying.zeros import zero_problems

Numbers = dict[str, float | int | None]


def read_numbers(layout: Layout) -> tuple[dict[str, Numbers], list[Problem]]:
    """Module -> numbers of its update, before any normalisation; NOT_FINITE for every tensor that is, and ZERO_UPDATE.

    The numbers are None for Dual LoRA, whose update is dense, for values that are not finite, for a convolution with a
    third factor, and, where the scaling is unknown, for the norms.
    """
    checkpoint = Checkpoint(replace(layout, adapters={e.module: _scaled(e) for e in layout.adapters.values()}))
    broken = [key for key in layout.header.tensors if not _is_finite(checkpoint.tensor(key))]
    problems = [
        Problem(code="NOT_FINITE", message="holds NaN or infinity", file=str(layout.path), module=key) for key in broken
    ]
    numbers = {
        module: _numbers(checkpoint, entry)
        for module, entry in layout.adapters.items()
        if not {*entry.keys.values(), *entry.numbers} & set(broken) and _is_whole(layout, entry)
    }
    return numbers, [*problems, *zero_problems(checkpoint)]


def _scaled(entry: AdapterLayout) -> AdapterLayout:
    """Up to scale where the scaling is unknown. DoRA's update is LoRA's; other formats have other magnitudes."""
    if entry.scaling is not None:
        return entry
    if entry.kind == "dora":
        entry = replace(entry, kind="lora", settings={}, slots={slot: entry.slots[slot] for slot in "AB"})
    return replace(entry, scaling=1.0)


def _is_whole(layout: Layout, entry: AdapterLayout) -> bool:
    """Whether its two factors are all of its update: a `lora_mid` between them is not read."""
    for name, group in TABLE[entry.kind].groups.items():
        slot, size = entry.slots[group.down], entry.ranks[name] * entry.in_features * entry.experts
        if slot.rows is None and slot.made is None and prod(layout.header.tensors[slot.key].shape) != size:
            return False
    return True


def _numbers(checkpoint: Checkpoint, entry: AdapterLayout) -> Numbers:
    """Of all experts together, as one block-diagonal matrix."""
    updates = [checkpoint.adapter(entry.module, expert).update() for expert in range(entry.experts)]
    spectra = [update.singular_values() for update in updates if update is not None]
    if len(spectra) < len(updates):
        return {}
    found = ranks(torch.cat(spectra))
    numbers: Numbers = {name: int(x) if name.startswith("energy_rank_") else x for name, x in found.items()}
    unscaled: Numbers = {name: None for name in numbers if name.endswith("_norm") and entry.scaling is None}
    return numbers | unscaled


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())
