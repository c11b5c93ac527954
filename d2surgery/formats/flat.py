"""Flattened names, with "_" for every ".": looked up in the paths that a model has, never taken apart by their letters.

    prefix         component
    lora_unet_     unet            (of other families: the one transformer, under its own paths)
    lora_te_       text_encoder    lora_te1_, lora_te2_, lora_te3_: text_encoder, text_encoder_2, text_encoder_3
    lycoris_       the model that LyCORIS wrapped

The paths of Stable Diffusion's UNets, under diffusers' names and their own, and of CLIP's text model are known here;
those of any other model are its base's.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache

from d2surgery.errors import Problem
from d2surgery.formats.layout import AdapterLayout, Layout

PREFIXES = {
    "lora_unet_": "unet.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
    "lora_transformer_": "transformer.",
    "lycoris_": "",
}
_ROOTS = ("model.", "language_model.", "model.language_model.", "transformer.", "text_model.")


def flatten(path: str) -> str:
    return path.replace(".", "_")


def parts(name: str) -> tuple[str, str] | None:
    """A flattened name as its prefix and the rest; None for a name that is not flattened."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return None if prefix is None or "." in name else (prefix, name.removeprefix(prefix))


class Paths:
    """A model's paths by their flattening, also of what is left without a root that tools start below."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.by_flat: dict[str, list[str]] = {}
        for path in paths:
            for root in ("", *(root for root in _ROOTS if path.startswith(root))):
                self.by_flat.setdefault(flatten(path.removeprefix(root)), []).append(path)

    def fitting(self, flat: str) -> list[str]:
        """Every path with this flattening: a whole path goes before one that has lost its root."""
        found = self.by_flat.get(flat, [])
        return [path for path in found if flatten(path) == flat] or found


def known(name: str) -> str | None:
    """The dotted path of a name in Stable Diffusion's own parts, component first; None where no list has it."""
    if (found := parts(name)) is None:
        return None
    prefix, rest = found
    component = PREFIXES[prefix]
    fitting = _known_paths(component.rstrip("_.123")).fitting(rest)
    return component + fitting[0] if len(fitting) == 1 else None


def with_paths(layout: Layout, paths: Iterable[str]) -> Layout:
    """The layout with its flattened names as the paths of a model that they fit; AMBIGUOUS_NAME where none or several
    do."""
    if not any(map(parts, layout.adapters)):
        return layout
    known_paths, renamed, problems = Paths(paths), dict[str, AdapterLayout](), [*layout.problems]
    for module, entry in layout.adapters.items():
        found = parts(module)
        fitting = known_paths.fitting(found[1]) if found else [module]
        if len(fitting) != 1:
            got = ", ".join(fitting) or "none"
            problems.append(Problem(code="AMBIGUOUS_NAME", message="in the base", module=module, got=got))
        name = fitting[0] if len(fitting) == 1 else module
        if name in renamed:
            problems.append(Problem(code="AMBIGUOUS_NAME", message="two names of one module", module=name, got=module))
        renamed[name] = replace(entry, module=name)
    return replace(layout, adapters=renamed, problems=tuple(problems))


def flattened(layout: Layout) -> Iterator[Problem]:
    """Names that formats with dotted names cannot hold."""
    for module in layout.adapters:
        if parts(module):
            message = "its path is in no list known here"
            yield Problem(
                code="AMBIGUOUS_NAME", message=message, module=module, wanted="--base, whose paths are looked up"
            )


def flat_name(path: str, components: Iterable[str], *, otherwise: str = "lora_te_") -> str:
    """The flattened name of a module: its component's prefix, where it has one, then its path.

    components: those of the whole file, for with a second text encoder the first is `lora_te1_`. otherwise: the prefix
    of a model without components.
    """
    if parts(path) is not None:
        return path
    component, _, rest = path.partition(".")
    several = "1" if "text_encoder_2" in components else ""
    prefixes = {"text_encoder": f"lora_te{several}_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    prefixes |= dict.fromkeys(("unet", "diffusion_model"), "lora_unet_")
    if not rest.startswith("h."):  # transformer.h. is GPT-2's
        prefixes["transformer"] = "lora_unet_"
    return prefixes[component] + flatten(rest) if component in prefixes else otherwise + flatten(path)


def collisions(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Flattened name -> the modules, where there are several."""
    by_flat: dict[str, list[str]] = {}
    for module, name in names.items():
        by_flat.setdefault(name, []).append(module)
    return {name: modules for name, modules in by_flat.items() if len(modules) > 1}


@cache
def _known_paths(component: str) -> Paths:
    lists = {"unet": _unet, "text_encoder": _clip}
    found = Paths(lists[component]() if component in lists else ())
    if component == "unet":
        for path in _unet():
            for name in sgm(path):
                found.by_flat.setdefault(flatten(name), []).append(path)
    return found


def sgm(path: str) -> Iterator[str]:
    """What a module of a UNet is called in the original Stable Diffusion, as SDXL's adapters of sd-scripts have it: of
    an upsampler both names that it may have; nothing for what is no such module."""
    if path in _SGM_TOP:
        yield _SGM_TOP[path]
        return
    found = _UNET_PART.fullmatch(path)
    if found is None:
        return
    side, block, kind, layer, rest = found.groups()
    number, first = int(layer), 3 * int(block or 0)
    if kind == "resnets":
        rest = _SGM_RESNET.get(rest, "")
    if (side, kind, rest) == ("down_blocks", "downsamplers", "conv"):
        yield f"input_blocks.{first + 3}.0.op"
    elif (side, kind, rest) == ("up_blocks", "upsamplers", "conv"):
        yield from (f"output_blocks.{first + 2}.{at}.conv" for at in (1, 2))
    elif rest and kind in ("resnets", "attentions"):
        inside = int(kind == "attentions")
        if side == "mid_block" and number < 2 - inside:
            yield f"middle_block.{1 if inside else 2 * number}.{rest}"
        elif side == "down_blocks" and number < 2:
            yield f"input_blocks.{first + number + 1}.{inside}.{rest}"
        elif side == "up_blocks":
            yield f"output_blocks.{first + number}.{inside}.{rest}"


_SGM_TOP = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_SGM_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"
}  # fmt: skip
_UNET_PART = re.compile(
    r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def _unet() -> Iterator[str]:
    """Modules of Stable Diffusion 1, 2 and XL as diffusers names them, and of UNets of the same parts."""
    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
                "add_embedding.linear_1", "add_embedding.linear_2")  # fmt: skip
    blocks = [f"{side}_blocks.{n}" for side in ("down", "up") for n in range(4)]
    for block in (*blocks, "mid_block"):
        yield from (f"{block}.{way}.0.conv" for way in ("downsamplers", "upsamplers"))
        for n in range(3):
            for leaf in ("conv1", "conv2", "time_emb_proj", "conv_shortcut"):
                yield f"{block}.resnets.{n}.{leaf}"
            attention = f"{block}.attentions.{n}"
            yield from (f"{attention}.proj_in", f"{attention}.proj_out")
            for depth in range(10):
                yield from (f"{attention}.transformer_blocks.{depth}.{leaf}" for leaf in _BLOCK)


_BLOCK = (
    *(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


def _clip() -> Iterator[str]:
    """Modules of CLIP's text model."""
    for layer in range(48):
        for leaf in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            yield f"text_model.encoder.layers.{layer}.{leaf}"
    yield "text_projection"
