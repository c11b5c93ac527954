"""kohya's LoRA: what sd-scripts, musubi-tuner and most tools for images write.

    <any name>.safetensors, no config beside it; the header's ss_… say how it was trained
    key := name "." leaf;  name is the module's path with "_" for ".", after a prefix (see `flat`)

    leaf               shape                                meaning
    lora_down.weight   (r, in) | (r, in, *kernel)           A; a convolution's carries the kernel
    lora_up.weight     (out, r) | (out, r, 1…)              B
    alpha              ()                                   ΔW = alpha/r · B·A

r is the first size of lora_down.  Without an alpha the scaling is 1, as in sd-scripts' networks; with alpha 0 too
(its merge script takes 0).  The header's ss_network_alpha says nothing: the tensor does.  Names with dots, as ComfyUI
writes them (`diffusion_model.…`), are read as they stand.

A name is looked up: in the list that a file written here carries, in the parts of Stable Diffusion, in the base.  Read
in no list, it stands as it is, and needs a base to be merged or converted.
Source: kohya-ss/sd-scripts.  Of LyCORIS's further leaves see `lycoris`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header
from d2surgery.formats.families import TURNED
from d2surgery.formats.flat import collisions, flat_name, known, parts
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import About, AdapterLayout, Layout, Stored, lies_transposed
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.rows import cut, other_half_first, reordered

if TYPE_CHECKING:
    from torch import Tensor

    from d2surgery.adapters import Adapter

NAME = "kohya"
TITLE, READS = "kohya: sd-scripts, musubi-tuner, most tools for images", "LoRA and convolutions, alpha per module"
WEIGHTS = "lora.safetensors"
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
LEAVES = (DOWN, UP, ALPHA)
METADATA = "d2surgery"  # our key in the header: JSON {"modules": {name: path}}, or {name: [[path, rows], …]}

Add = Callable[[Pairs, str, Group, str], None]  # one module's group, by its path; the last is its name in the file


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    tensors, names = header.tensors, [key for key in header.tensors if key.endswith((f".{DOWN}", f".{UP}"))]
    ups = {name: name.removesuffix(DOWN) + UP for name in names if name.endswith(f".{DOWN}")}
    pairs = ((tensors[down].shape, tensors[up].shape) for down, up in ups.items() if up in tensors)
    return f"keys end in .{DOWN}" if names and not lies_transposed(pairs) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    found = read(header, values, NAME, LEAVES, add)
    return replace(found, problems=(*found.problems, *_split_qkv(found)))


def read(header: Header, values: Values, format: str, leaves: Iterable[str], add: Add) -> Layout:
    """The layout of a file of flattened names, whose modules `add` takes one by one."""
    pairs, listed = Pairs(header, values), _listed(header)
    for name, group in pairs.groups({leaf: leaf for leaf in leaves}).items():
        add(pairs, listed.get(name) or known(name) or name, group, name)
    base = header.metadata.get("ss_base_model_version") or header.metadata.get("ss_sd_model_name")
    found = pairs.layout(format, About(base_model=base or None))
    return replace(found, adapters={part.module: part for part in _taken_apart(found)})


def network_args(header: Header) -> Mapping[str, Any]:
    """The header's ss_network_args, which are JSON in a string; their values may be words."""
    try:
        found = json.loads(header.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _split_qkv(layout: Layout) -> Iterator[Problem]:
    """sd-scripts' split_qkv: the saved rank is that of all parts, the alpha that of one."""
    dim = layout.header.metadata.get("ss_network_dim", "")
    if str(network_args(layout.header).get("split_qkv")).lower() != "true" or not dim.isdecimal() or not int(dim):
        return
    for module, entry in layout.adapters.items():
        parts, rest = divmod(entry.ranks["update"], int(dim))
        if parts in (3, 4) and not rest and entry.scaling is not None:
            got = f"scaling {entry.scaling:g}, trained with {entry.scaling * parts:g}"
            yield Problem(code="ALPHA_OF_SPLIT_QKV", message="the alpha of one part", severity="warning",
                          file=layout.path.name, module=module, got=got)  # fmt: skip


def add(pairs: Pairs, module: str, group: Group, name: str) -> None:
    if missing := {DOWN, UP} - group.keys():
        lacks(pairs, group, missing, name)
    elif (scaling := scaling_of(pairs, group, name, pairs.shape(group[DOWN])[:1])) is not None:
        pairs.add(module, group, pairs.factor(group[DOWN]), pairs.factor(group[UP]), scaling=scaling)


def lacks(pairs: Pairs, group: Group, missing: Iterable[str], name: str) -> None:
    pairs.lacks(name, group, *missing)


def scaling_of(pairs: Pairs, group: Group, name: str, rank: Iterable[int]) -> float | None:
    """alpha/r; 1 without an alpha and for an alpha of 0. None, the group being unread then, where it is no number."""
    if ALPHA not in group:
        return 1.0
    if (alpha := pairs.number(group[ALPHA], name)) is None:
        pairs.unread += group.values()
        return None
    if alpha == 0:
        pairs.say("ALPHA_ZERO", "read as the rank: scaling 1", severity="warning", module=name)
    return alpha / next(iter(rank), 1) if alpha else 1.0


def _listed(header: Header) -> dict[str, str]:
    """The paths that a file written here carries, where they flatten to its names."""
    try:
        found = json.loads(header.metadata[METADATA])["modules"].items()
        pairs = {name: path for name, path in found if isinstance(path, str)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    components = {path.partition(".")[0] for path in pairs.values()}
    return {name: path for name, path in pairs.items() if parts(name) and name == _named_as(name, path, components)}


def _taken_apart(found: Layout) -> Iterator[AdapterLayout]:
    """Modules that a file written here joined, as their parts, where their rows are those together."""
    try:
        listed = json.loads(found.header.metadata[METADATA])["modules"]
        lists = {name: [(str(path), int(rows)) for path, rows in parts] for name, parts in listed.items()
                 if isinstance(parts, list)}  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        lists = {}
    for module, entry in found.adapters.items():
        parts = lists.get(module, [])
        if not parts or sum(rows for _, rows in parts) != entry.out_features or min(rows for _, rows in parts) < 1:
            yield entry
        elif len(parts) == 1:
            path = parts[0][0]
            turned = reordered(entry, other_half_first) if path.startswith(TURNED) else entry
            yield replace(turned, module=path.removeprefix(TURNED))
        else:
            yield from cut(entry, parts)


def _named_as(name: str, path: str, components: Iterable[str]) -> str:
    otherwise = "lycoris_" if name.startswith("lycoris_") else "lora_te_"
    return flat_name(path, components, otherwise=otherwise)


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear", "conv")) if kind == "lora" else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """lora.safetensors, an alpha per module. Raises FORMAT_CANNOT_HOLD before anything is written."""
    write_file(checkpoint, directory, NAME, {"ss_network_module": "networks.lora"}, otherwise="lora_te_")


def write_file(
    checkpoint: Holding, directory: Path, format: str, metadata: Mapping[str, str], *, otherwise: str
) -> None:
    from d2surgery.formats.saving import held_whole, saving  # torch

    entries = checkpoint.layout.adapters
    components = {module.partition(".")[0] for module in entries}
    names = {module: flat_name(module, components, otherwise=otherwise) for module in entries}
    raise_errors([*held_whole(checkpoint.layout, format), *_collisions(names)])

    def parts() -> "Iterator[tuple[str, Tensor]]":
        for module, entry in entries.items():
            for leaf, tensor in leaves(checkpoint.adapter(module), entry.kernel).items():
                yield f"{names[module]}.{leaf}", tensor

    rank = max(entry.ranks["update"] for entry in entries.values())
    scaling = float(next(iter(entries.values())).scaling or 0)
    base = checkpoint.layout.base_model
    said = {
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{scaling * rank:g}",
        METADATA: json.dumps({"modules": {name: module for module, name in names.items()}}),
        **({"ss_sd_model_name": base} if base else {}),
    }
    with saving(directory / WEIGHTS, parts, {"format": "pt"} | dict(metadata) | said):
        pass


def _collisions(names: Mapping[str, str]) -> Iterator[Problem]:
    for name, modules in collisions(names).items():
        message = f"flattened, two modules are {name}"
        yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=" and ".join(modules))


def leaves(adapter: "Adapter", kernel: tuple[int, ...]) -> "dict[str, Tensor]":
    """One module's tensors by leaf. An alpha is stored in float32 where that gives the scaling again."""
    import torch

    slots, scaling, ones = adapter.slots(), float(adapter.scaling), (1,) * len(kernel[1:])
    rank = slots["A"].shape[0]
    alpha = torch.tensor(scaling * rank, dtype=torch.float32)
    if scaling == 0:
        slots["B"], alpha = torch.zeros_like(slots["B"]), torch.tensor(float(rank))  # an alpha of 0 is read as 1
    elif float(alpha) / rank != scaling:
        alpha = torch.tensor(scaling * rank, dtype=torch.float64)
    found = {DOWN: slots["A"].reshape(rank, *kernel) if kernel else slots["A"],
             UP: slots["B"].reshape(*slots["B"].shape, *ones), ALPHA: alpha}  # fmt: skip
    if (magnitude := slots.get("magnitude")) is not None:
        by_row = adapter.along == "out_features"
        found["dora_scale"] = magnitude.reshape(-1, 1, *ones) if by_row else magnitude.reshape(1, -1)
    return found
