"""loralib's MergedLinear (microsoft/LoRA), as `lora_state_dict(model)` has it: several products in one module.

    any .pt or .bin, no config
    key := module "." leaf

    leaf     shape                 meaning
    lora_A   (n·r, in)             r rows for each of the n parts that are trained
    lora_B   (n·out/parts, r)      the parts' rows below each other: B·A is not defined

The scaling alpha/r is asked for.  Which parts are trained (enable_lora) is not in the file: where the base has as many
rows as lora_B all are, and the module is read as one product of rank n·r; else it is refused.  loralib's other layers
have one product and PEFT's older spelling: `peft` reads them, without a config.  Its convolutions' factors
((r·k, in·k), (out·k, r·k)) are no product of a kernel's rank r, and do not fit their base.
Source: microsoft/LoRA 0771c1e, loralib/layers.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from d2surgery.errors import Problem
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import AdapterLayout, Layout
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.peft.keys import PREFIX
from d2surgery.formats.rows import fused, stacked

NAME = "loralib"
TITLE, READS = "loralib (microsoft/LoRA)", "MergedLinear whose parts are all trained; the rest as `peft`"

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    if config or any(PREFIX in key for key in header.tensors):
        return ""
    merged = next((key for key in header.tensors if key.endswith(".lora_A") and _parts(header, key) > 1), "")
    return f"{merged} and its lora_B hold several products" if merged else ""


def _parts(header: Header, down: str) -> int:
    """How many products a pair of factors holds: 2 or 3 where their sizes fit no other way, else 1."""
    up = header.tensors.get(f"{down[:-1]}B")
    a, b = header.tensors[down].shape, up.shape if up else ()
    if len(a) != 2 or len(b) != 2 or not b[1] or a[1] == b[0]:  # the last may be one product that lies transposed
        return 1
    count, rest = divmod(a[0], b[1])
    return count if count in (2, 3) and not rest and b[0] % count == 0 else 1


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs = Pairs(header, values)
    for module, group in pairs.groups({"lora_A": "A", "lora_B": "B"}).items():
        _add(pairs, module, group)
    if pairs.adapters:
        pairs.say("SCALING_UNKNOWN", "no alpha in the file")
    return pairs.layout(NAME)


def _add(pairs: Pairs, module: str, group: Group) -> None:
    if pairs.lacks(module, group, "A", "B"):
        return
    down, up = (pairs.factor(group[which]) for which in "AB")
    parts = _parts(pairs.header, group["A"])
    if parts > 1:
        up = Factor(fused(group["B"]), (up.shape[0], down.shape[0]))
    pairs.add(module, group, down, up, scaling=None)
    if parts > 1 and module in pairs.adapters:
        pairs.adapters[module] = replace(pairs.adapters[module], divisor=down.shape[0] // parts)
        pairs.say("BASE_NEEDED", f"which parts its {parts} products are of", module=module)


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """Products of all of a module's parts as one."""
    adapters, problems = dict(layout.adapters), []
    for problem in layout.problems:
        entry = layout.adapters.get(problem.module)
        rows = _rows(entry, tensors) if entry and problem.code == "BASE_NEEDED" else 0
        if entry is None or not rows:
            problems.append(problem)
        elif rows != entry.out_features:
            message = f"{entry.out_features} of {rows} rows are trained, and enable_lora is not in the file"
            problems.append(Problem(code="MERGED_LINEAR", message=message, file=problem.file, module=problem.module))
        else:
            parts = entry.ranks["update"] // (entry.divisor or 1)
            made = partial(stacked, (rows // parts,) * parts, (True,) * parts)
            adapters[entry.module] = replace(entry, slots={**entry.slots, "B": entry.slots["B"]._replace(made=made)})
    return replace(layout, adapters=adapters, problems=tuple(problems))


def _rows(entry: AdapterLayout, tensors: Mapping[str, TensorInfo]) -> int:
    """The output of a base weight, however it lies; 0 where there is none or its input is another."""
    info = tensors.get(f"{entry.module}.weight")
    rows, rest = divmod(prod(info.shape), entry.in_features) if info and len(info.shape) == 2 else (0, 1)
    return rows if info and not rest and entry.in_features in info.shape else 0
