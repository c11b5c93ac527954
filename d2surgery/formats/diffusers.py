"""diffusers' LoRA, as its pipelines and models save and load it.

    pytorch_lora_weights.safetensors (or .bin), no config beside it
    key := [component "."] module "." leaf;  component: unet, transformer, text_encoder, text_encoder_2 …

    leaf                             shape                         before
    lora_A.weight                    (r, in) | (r, in, *kernel)    lora.down.weight, lora_linear_layer.down.weight
    lora_B.weight                    (out, r) | (out, r, 1…)       lora.up.weight, lora_linear_layer.up.weight
    lora_B.bias                      (out,)                        lora_bias
    lora_magnitude_vector[.weight]   (out,) | (1, out, 1…)         DoRA, always a number per output
    magnitude                        (out,)                        DoRA, as ai-toolkit writes it
    alpha                            ()                            beside converted files

Older still are `….processor.to_q_lora.down.weight`, and in text encoders `….to_q_lora.…` for q_proj.  ComfyUI's
`diffusion_model.…` with these leaves is read too, its modules under the names they have there.

The header's lora_adapter_metadata is the LoraConfig as JSON, each field after its component where the file has
components; it decides rank and scaling as PEFT's does.  Without it scaling = alpha/r, and 1 without an alpha: a module
that has none takes its own rank, where diffusers gives it the commonest alpha of the others.
Source: diffusers 0.42.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem, brief, raise_errors
from d2surgery.files.header import Header
from d2surgery.files.reading import parse_json
from d2surgery.formats.flat import flattened
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.kohya import scaling_of
from d2surgery.formats.layout import About, Layout, Stored
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.config import Config

if TYPE_CHECKING:
    from torch import Tensor

NAME = "diffusers"
TITLE, READS = "diffusers", "LoRA, DoRA, lora_bias; all old spellings, ComfyUI's `diffusion_model.`"
WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
A, B, BIAS, MAGNITUDE, ALPHA = "lora_A", "lora_B", "bias", "magnitude", "alpha"
_LEAVES = {
    "lora_A.weight": A, "lora.down.weight": A, "lora_linear_layer.down.weight": A, "lora_A.default.weight": A,
    "lora_B.weight": B, "lora.up.weight": B, "lora_linear_layer.up.weight": B, "lora_B.default.weight": B,
    "lora_B.bias": BIAS, "alpha": ALPHA,
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default",
                     "lora_magnitude_vector.default.weight", "magnitude"), MAGNITUDE),
}  # fmt: skip
_OLD = (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight",
        ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")  # fmt: skip
COMPONENT = re.compile(r"(unet|text_encoder\w*|transformer\w*|diffusion_model)\.(?!h\.)")  # transformer.h. is GPT-2's
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    if "peft_type" in (config or {}):
        return ""
    if METADATA in header.metadata:
        return f"{METADATA} in the header"
    for key in header.tensors:
        if key.endswith(_OLD):
            return "keys end in .lora.down.weight or an older spelling"
        if COMPONENT.match(key) and (".lora_A." in key or ".lora_B." in key):
            return f"keys begin with a component, {key.partition('.')[0]}, and end as PEFT's"
    return ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    pairs, about = Pairs(header, values), About()
    try:
        found = parse_json(header.metadata.get(METADATA, "{}").encode())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except ValueError as error:
        pairs.skip(header.tensors, "BAD_CONFIG", f"{METADATA} is no JSON object", got=brief(error))
        return pairs.layout(NAME, about)
    configs = _Configs(found)
    for module, group in pairs.groups(_LEAVES, _spelled).items():
        _add(pairs, module, group, configs)
    for each in configs.used.values():
        pairs.say.all += each.problems(pairs.say.file)
        said = each.about()
        about = About(alpha=said.alpha, dropout=said.dropout, transposed=said.transposed, base_model=said.base_model)
    return pairs.layout(NAME, about)


def _spelled(key: str) -> str:
    """An old key with today's leaf: `attn1.processor.to_q_lora.down` is `attn1.to_q.lora.down`."""
    key = key.replace(".processor.", ".")
    old = re.fullmatch(r"(.*\.)?([^.]+)_lora\.(down|up)\.weight", key)
    if old is None:
        return key
    names = _IN_TEXT if key.startswith("text_encoder") else {"to_out": "to_out.0"}
    return f"{old[1] or ''}{names.get(old[2], old[2])}.lora.{old[3]}.weight"


class _Configs:
    """The config of each component, from fields that stand after its name; of all, where they stand after none."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata, self.used = metadata, dict[str, Config]()

    def of(self, module: str) -> tuple[Config | None, str]:
        """The config that speaks of a module, and the module's name in it."""
        component, _, rest = module.partition(".")
        if component not in self.used:
            before = f"{component}."
            own = {k.removeprefix(before): v for k, v in self.metadata.items() if k.startswith(before)}
            if not own and "r" not in self.metadata:
                return None, module
            component, rest = (component, rest) if own else ("", module)
            self.used.setdefault(component, Config(own or self.metadata, {}))
        return (self.used[component], rest)


def _add(pairs: Pairs, module: str, group: Group, configs: _Configs) -> None:
    missing = {A, B} - group.keys()
    config, name = configs.of(module)
    if not missing and MAGNITUDE not in group and config is not None and config.get("use_dora"):
        missing = {MAGNITUDE}
    if missing:
        code = "MISSING_MAGNITUDE" if missing == {MAGNITUDE} else "MISSING_HALF"
        message = f"has {', '.join(sorted(group))} but no {', '.join(sorted(missing))}"
        pairs.skip(group.values(), code, message, module=module)
        return
    down = pairs.factor(group[A])
    kind = "dora" if MAGNITUDE in group else "lora"
    if config is None:
        if (scaling := scaling_of(pairs, group, module, down.shape[:1])) is None:
            return
    else:
        ranks = {"update": down.shape[0] if down.shape else 0}
        said, scaling = config.ranks(name, kind), config.scaling(name, kind, ranks)
        if said is not None and said != ranks:
            wanted, got = str(said["update"]), str(ranks["update"])
            pairs.say("RANK_DISAGREES", "rank", module=module, wanted=wanted, got=got)
            scaling = None
    pairs.add(module, group, down, pairs.factor(group[B]), scaling=scaling, magnitude=group.get(MAGNITUDE, ""),
              bias=group.get(BIAS, ""))  # fmt: skip


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear", "conv")) if kind in ("lora", "dora") else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """pytorch_lora_weights.safetensors with the config in its header. Raises FORMAT_CANNOT_HOLD before anything is
    written."""
    from d2surgery.formats.peft.writer import made_config, shaped  # torch
    from d2surgery.formats.saving import held_whole, saving

    layout, leaves = (
        checkpoint.layout,
        {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    )
    components = _components(layout)
    raise_errors([*held_whole(layout, NAME), *flattened(layout), *_cannot_hold(layout, components)])

    def tensors() -> "Iterator[tuple[str, Tensor]]":
        for module, entry in layout.adapters.items():
            for slot, tensor in checkpoint.adapter(module).slots().items():
                yield f"{module}.{leaves[slot]}", shaped(tensor, slot, entry)

    said: dict[str, Any] = {}
    for component in components:
        before = f"{component}." if component else ""
        own = {m.removeprefix(before): replace(e, module=m.removeprefix(before))
               for m, e in layout.adapters.items() if m.startswith(before)}  # fmt: skip
        about = About(base_model=layout.base_model, transposed=layout.about.transposed)
        config = made_config(replace(layout, adapters=own, about=about))
        said |= {f"{before}{field}": value for field, value in config.items()}
    metadata = {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}
    with saving(directory / WEIGHTS, tensors, metadata):
        pass


def _components(layout: Layout) -> list[str]:
    found = {match[1] if (match := COMPONENT.match(module)) else "" for module in layout.adapters}
    return sorted(found)


def _cannot_hold(layout: Layout, components: list[str]) -> Iterator[Problem]:
    def cannot(message: str, **details: str) -> Problem:
        return Problem(code="FORMAT_CANNOT_HOLD", message=message, **details)  # type: ignore[arg-type]

    if "" in components and len(components) > 1:
        yield cannot("modules of a component, and others of none", got=", ".join(filter(None, components)))
    for module, entry in layout.adapters.items():
        if entry.kind == "dora" and entry.settings["along"] != "out_features":
            yield cannot("diffusers' magnitude is per output", module=module, got="per input")
    for component in components:
        kinds = {e.kind for m, e in layout.adapters.items() if not component or m.startswith(f"{component}.")}
        if len(kinds) > 1:
            yield cannot("a component is of one kind", module=component, got=" and ".join(sorted(kinds)))
