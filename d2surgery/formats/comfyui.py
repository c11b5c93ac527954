"""ComfyUI's LoRA: the original model's own names, with dots.

    lora.safetensors, no config beside it
    key := "diffusion_model." module "." leaf;  leaf: lora_down.weight, lora_up.weight, alpha, as kohya's

The modules of a checkpoint in diffusers' names get those that `families` knows; which family, its base's _class_name
says, or names that only one family has. Modules that are one there (qkv, FLUX's linear1) are joined: the factors below
each other, B block by block, exactly; with one A for all parts, as where such a file was taken apart, the rank stays. A
part without an adapter gets rows of zeros in B.

It is read as `kohya` is; the header's list of parts takes joined modules apart again.  DoRA, which ComfyUI divides by
the norm of the base, and text encoders are not in it.
Source: ComfyUI comfy/lora.py; diffusers 0.42, loaders/lora_conversion_utils.py.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header
from d2surgery.formats import kohya
from d2surgery.formats.families import BLOCK, TURNED, rules
from d2surgery.formats.flat import flattened, sgm
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import AdapterLayout, Layout, Stored

if TYPE_CHECKING:
    from torch import Tensor

NAME = "comfyui"
TITLE, READS = "ComfyUI", "as `diffusers`, `kohya` and `lycoris`, with dots"
ROOT = "diffusion_model."
_FLUX, _WAN, _LUMINA, _UNET, _SAME = "FLUX", "Wan", "Lumina", "a UNet", "the same names"
_CLASSES = {
    "FluxTransformer2DModel": _FLUX, "Flux2Transformer2DModel": _FLUX, "ChromaTransformer2DModel": _FLUX,
    "HunyuanVideoTransformer3DModel": _FLUX, "WanTransformer3DModel": _WAN, "ZImageTransformer2DModel": _LUMINA,
    "Lumina2Transformer2DModel": _LUMINA, "QwenImageTransformer2DModel": _SAME, "LTXVideoTransformer3DModel": _SAME,
    "UNet2DConditionModel": _UNET,
}  # fmt: skip
_ORIGINALS = {  # how original names of a family begin
    _FLUX: ("double_blocks.", "single_blocks.", "img_in", "txt_in", "final_layer.", "time_in.", "vector_in.",
            "guidance_in."),
    _WAN: ("blocks.", "head.", "time_projection.", "time_embedding.", "text_embedding.", "img_emb."),
    _LUMINA: ("layers.", "noise_refiner.", "context_refiner."),
}  # fmt: skip
_ONLY = {  # names that one family has
    _FLUX: re.compile(r"single_transformer_blocks\.\d+\.(attn\.to_(q|k|v|qkv_mlp_proj|out)|proj_mlp|proj_out)$"),
    _WAN: re.compile(r"blocks\.\d+\.(attn1|attn2)\.to_"),
    _LUMINA: re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|attn)\.to_(q|k|v|out\.0)$"),
}
_ORIGINAL = re.compile(
    r"(double_blocks|single_blocks|joint_blocks|input_blocks|output_blocks|middle_block)\.\d|"
    r"blocks\.\d+\.(self_attn\.|cross_attn\.|ffn\.\d)|layers\.\d+\.attention\.(qkv|out)$"
)
_COMPONENT = re.compile(r"(unet|transformer|diffusion_model)\.")


@dataclass(frozen=True)
class Part:
    """Rows of a module there: those of a module here, or zeros in the place of one (`module` not in the adapter)."""

    module: str
    rows: int
    turned: bool = False  # its halves lie the other way round


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return ""  # it is kohya's form


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    return kohya.layout(header, config, values)


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear", "conv")) if kind == "lora" else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """lora.safetensors. Raises FORMAT_CANNOT_HOLD and AMBIGUOUS_NAME before anything is written."""
    from d2surgery.formats.saving import held_whole, saving  # torch

    found = checkpoint.layout
    raise_errors([*held_whole(found, NAME), *flattened(found)])
    problems: list[Problem] = []
    plan = planned(found, problems)
    raise_errors(problems)

    def tensors() -> "Iterator[tuple[str, Tensor]]":
        for name, parts in plan.items():
            for leaf, tensor in _joined(checkpoint, parts).items():
                yield f"{ROOT}{name}.{leaf}", tensor

    listed = {
        f"{ROOT}{name}": [[TURNED * part.turned + part.module, part.rows] for part in parts]
        for name, parts in plan.items()
    }
    metadata = {"format": "pt", kohya.METADATA: json.dumps({"modules": listed})}
    with saving(directory / kohya.WEIGHTS, tensors, metadata):
        pass


def planned(layout: Layout, problems: list[Problem]) -> dict[str, list[Part]]:
    """ComfyUI's module -> the parts whose rows follow each other in it."""
    bare = {_COMPONENT.sub("", module, count=1): entry for module, entry in layout.adapters.items()}
    family = _family(layout, bare)
    plan: dict[str, list[Part]] = {}
    for path, entry in bare.items():
        way = _way(path, family, bare)
        if way is None:
            message = f"no list known here says what ComfyUI calls it in {family or 'a family that is not known'}"
            wanted = "" if family else "--base, whose config names the family"
            problems.append(Problem(code="AMBIGUOUS_NAME", message=message, module=entry.module, wanted=wanted))
        elif way[0] not in plan:
            plan[way[0]] = list(_parts(way[1], family, bare, layout, problems))
    return plan


def _family(layout: Layout, paths: Iterable[str]) -> str:
    """By the base's class, or by names that only one family has; "" where neither says."""
    if (family := _CLASSES.get(str(layout.about.model.get("_class_name")))) is not None:
        return family
    if any(module.startswith("unet.") for module in layout.adapters):
        return _UNET
    found = {family for family, names in _ONLY.items() if any(map(names.match, paths))}
    if not found and all(map(_ORIGINAL.match, paths)):
        return _SAME
    return found.pop() if len(found) == 1 else ""


def _way(path: str, family: str, paths: Mapping[str, AdapterLayout]) -> tuple[str, list[str]] | None:
    """A module's name there, and all modules here whose rows are in it."""
    if family == _SAME or _ORIGINAL.match(path):
        return path, [path]
    if family == _UNET:
        names = list(sgm(path))
        return (names[0], [path]) if len(names) == 1 else None
    number = BLOCK.match(path)
    template = f"{number[1]}.#.{path[number.end() :]}" if number else path
    of_flux_2 = any(".to_qkv_mlp_proj" in other or ".ff.linear_" in other for other in paths)  # its halves: not known
    for original, targets in _inverse().get(template, ()):
        if original.startswith(_ORIGINALS.get(family, ())) and not (of_flux_2 and targets[0].startswith(TURNED)):
            filled = [target.replace("#", number[2] if number else "") for target in targets]
            return original.replace("#", number[2] if number else ""), filled
    return (path, [path]) if family == _LUMINA else None  # whose other modules have one name in both


def _inverse() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Target -> originals and all their targets, the usual spelling first."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for ways in rules().values():
        for original, targets in ways:
            for target in targets:
                found.setdefault(target.removeprefix(TURNED), []).append((original, targets))
    return found


def _parts(
    targets: list[str], family: str, bare: Mapping[str, AdapterLayout], layout: Layout, problems: list[Problem]
) -> Iterator[Part]:
    """The rows of every target, and what is wrong with them together."""
    names = [target.removeprefix(TURNED) for target in targets]
    present = [bare[name] for name in names if name in bare]
    here = present[0].module.removesuffix(next(name for name in names if name in bare))
    if len(names) > 1 and (len({e.in_features for e in present}) > 1 or {e.stored for e in present} != {"linear"}):
        got = ", ".join(f"{e.stored} of {e.in_features}" for e in present)
        problems.append(Problem(code="FORMAT_CANNOT_HOLD", message="parts of one module that do not fit together",
                                module=present[0].module, got=got))  # fmt: skip
        return
    for target, name in zip(targets, names, strict=True):
        rows = bare[name].out_features if name in bare else _rows_of(name, family, bare, present[0].in_features)
        if rows is None:
            problems.append(Problem(code="FORMAT_CANNOT_HOLD", message="a part without an adapter, of unknown rows",
                                    module=here + name, wanted="an adapter on it"))  # fmt: skip
            return
        yield Part(here + name, rows, turned=target.startswith(TURNED))


def _rows_of(name: str, family: str, bare: Mapping[str, AdapterLayout], width: int) -> int | None:
    """Of a part that has no adapter: FLUX's are as wide as its inputs, its MLP as another block's or 4 times that; of
    grouped heads the key is as the value."""
    block, _, leaf = name.rpartition(".")
    if leaf == "proj_mlp":
        others = (entry.out_features for path, entry in bare.items() if path.endswith(".proj_mlp"))
        return next(others, 4 * width)
    if family == _FLUX or leaf == "to_q":
        return width
    other = bare.get(f"{block}.{'to_v' if leaf == 'to_k' else 'to_k'}")
    return other.out_features if other else None


def _joined(checkpoint: Holding, parts: list[Part]) -> "dict[str, Tensor]":
    """Leaf -> tensor of a module whose rows are those of parts."""
    import torch

    from d2surgery.adapters import LoRA
    from d2surgery.formats.rows import other_half_first
    from d2surgery.formats.saving import brought_to

    entries = checkpoint.layout.adapters
    held = {part.module: checkpoint.adapter(part.module) for part in parts if part.module in entries}
    if len(parts) == 1 and not parts[0].turned:
        return kohya.leaves(held[parts[0].module], entries[parts[0].module].kernel)
    first = next(iter(held.values()))
    scaling, A = float(first.scaling), first.slots()["A"]
    shared = all(torch.equal(adapter.slots()["A"], A) for adapter in held.values())
    slots = {name: brought_to(adapter, adapter.slots()["A"].shape[0], scaling) for name, adapter in held.items()}
    rank = A.shape[0] if shared else sum(slot["A"].shape[0] for slot in slots.values())
    dtype = reduce(torch.promote_types, (slot["B"].dtype for slot in slots.values()))
    B, row, column = A.new_zeros(sum(part.rows for part in parts), rank, dtype=dtype), 0, 0
    for part in parts:
        if part.module in slots:
            up = slots[part.module]["B"]
            B[row : row + part.rows, column : column + up.shape[1]] = other_half_first(up) if part.turned else up
            column += 0 if shared else up.shape[1]
        row += part.rows
    whole = A if shared else torch.cat([slot["A"] for slot in slots.values()])
    return kohya.leaves(LoRA(A=whole, B=B, scaling=scaling), ())
