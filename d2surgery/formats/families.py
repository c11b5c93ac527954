"""Image models' own names of modules, for which diffusers has others: looked up in the base, fused modules taken apart.

    family                original                                     diffusers
    SDXL, SD (sgm)        input_blocks.4.1.…, middle_block.1.…         down_blocks.1.attentions.0.… (see `flat.sgm`)
    FLUX, HunyuanVideo    double_blocks.N.img_attn.qkv                 transformer_blocks.N.attn.to_q, to_k, to_v
                          single_blocks.N.linear1: q | k | v | mlp     single_transformer_blocks.N.attn.to_q …, proj_mlp
                          final_layer.adaLN_modulation.1               norm_out.linear, its halves the other way round
    FLUX.2                single_blocks.N.linear1                      ….attn.to_qkv_mlp_proj, which stays fused
    Wan                   blocks.N.self_attn.q, ffn.0                  blocks.N.attn1.to_q, ffn.net.0.proj
    Z-Image, Lumina2      layers.N.attention.qkv, out                  ….attention.to_q …, ….attn.to_q …

Nothing is guessed from a name: the original names are made from the paths that the base has, and a module goes where
all its parts are there and have its rows together. A base with the original names keeps them.
Source: diffusers 0.42, loaders/lora_conversion_utils.py.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache

from d2surgery.errors import Problem
from d2surgery.files.header import TensorInfo
from d2surgery.formats.flat import flatten, parts, sgm
from d2surgery.formats.layout import AdapterLayout, Layout
from d2surgery.formats.rows import cut, other_half_first, reordered

Targets = tuple[str, ...]

TURNED = "~"  # before a target whose halves lie the other way round
_RULES = """
D.img_attn.qkv D.img_attn_qkv: T.attn.to_q T.attn.to_k T.attn.to_v
D.txt_attn.qkv D.txt_attn_qkv: T.attn.add_q_proj T.attn.add_k_proj T.attn.add_v_proj
D.img_attn.proj D.img_attn_proj: T.attn.to_out.0
D.txt_attn.proj D.txt_attn_proj: T.attn.to_add_out
D.img_mlp.0 D.img_mlp.fc1: T.ff.net.0.proj
D.img_mlp.2 D.img_mlp.fc2: T.ff.net.2
D.txt_mlp.0 D.txt_mlp.fc1: T.ff_context.net.0.proj
D.txt_mlp.2 D.txt_mlp.fc2: T.ff_context.net.2
D.img_mlp.0: T.ff.linear_in
D.img_mlp.2: T.ff.linear_out
D.txt_mlp.0: T.ff_context.linear_in
D.txt_mlp.2: T.ff_context.linear_out
D.img_mod.lin D.img_mod.linear: T.norm1.linear
D.txt_mod.lin D.txt_mod.linear: T.norm1_context.linear
S.linear1: U.attn.to_q U.attn.to_k U.attn.to_v U.proj_mlp
S.linear1: U.attn.to_qkv_mlp_proj
S.linear2: U.proj_out
S.linear2: U.attn.to_out
S.modulation.lin S.modulation.linear: U.norm.linear
img_in: x_embedder
txt_in: context_embedder
final_layer.linear head.head: proj_out
final_layer.adaLN_modulation.1: ~norm_out.linear
time_in.in_layer time_in.mlp.0: time_text_embed.timestep_embedder.linear_1
time_in.out_layer time_in.mlp.2: time_text_embed.timestep_embedder.linear_2
vector_in.in_layer: time_text_embed.text_embedder.linear_1
vector_in.out_layer: time_text_embed.text_embedder.linear_2
guidance_in.in_layer guidance_in.mlp.0: time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer guidance_in.mlp.2: time_text_embed.guidance_embedder.linear_2
time_in.in_layer: time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer: time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer: time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer: time_guidance_embed.guidance_embedder.linear_2
blocks.#.self_attn.q: blocks.#.attn1.to_q
blocks.#.self_attn.k: blocks.#.attn1.to_k
blocks.#.self_attn.v: blocks.#.attn1.to_v
blocks.#.self_attn.o: blocks.#.attn1.to_out.0
blocks.#.cross_attn.q: blocks.#.attn2.to_q
blocks.#.cross_attn.k: blocks.#.attn2.to_k
blocks.#.cross_attn.v: blocks.#.attn2.to_v
blocks.#.cross_attn.o: blocks.#.attn2.to_out.0
blocks.#.cross_attn.k_img: blocks.#.attn2.add_k_proj
blocks.#.cross_attn.v_img: blocks.#.attn2.add_v_proj
blocks.#.ffn.0: blocks.#.ffn.net.0.proj
blocks.#.ffn.2: blocks.#.ffn.net.2
time_projection.1: condition_embedder.time_proj
time_embedding.0: condition_embedder.time_embedder.linear_1
time_embedding.2: condition_embedder.time_embedder.linear_2
text_embedding.0: condition_embedder.text_embedder.linear_1
text_embedding.2: condition_embedder.text_embedder.linear_2
img_emb.proj.1: condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3: condition_embedder.image_embedder.ff.net.2
L.attention.qkv: L.attention.to_q L.attention.to_k L.attention.to_v
L.attention.out: L.attention.to_out.0
L.attention.qkv: L.attn.to_q L.attn.to_k L.attn.to_v
L.attention.out: L.attn.to_out.0
N.attention.qkv: N.attention.to_q N.attention.to_k N.attention.to_v
N.attention.out: N.attention.to_out.0
N.attention.qkv: N.attn.to_q N.attn.to_k N.attn.to_v
N.attention.out: N.attn.to_out.0
C.attention.qkv: C.attention.to_q C.attention.to_k C.attention.to_v
C.attention.out: C.attention.to_out.0
C.attention.qkv: C.attn.to_q C.attn.to_k C.attn.to_v
C.attention.out: C.attn.to_out.0
"""
"""Original names: where that is in diffusers. # is the number of a block; the letters are those of _SHORT."""
_SHORT = {
    "D": "double_blocks.#", "S": "single_blocks.#", "T": "transformer_blocks.#", "U": "single_transformer_blocks.#",
    "L": "layers.#", "N": "noise_refiner.#", "C": "context_refiner.#",
}  # fmt: skip
BLOCK = re.compile(r"^([a-z_]+)\.(\d+)\.")
_ROOTS = ("diffusion_model.", "transformer.", "unet.", "model.diffusion_model.")


def apart(layout: Layout, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The layout with modules of other names, dotted or flattened, as the base has them: a fused one as its parts."""
    if all(f"{module}.weight" in tensors for module in layout.adapters):
        return layout
    index = _Index(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    adapters: dict[str, AdapterLayout] = {}
    problems: list[Problem] = []
    for module, entry in layout.adapters.items():
        for part in _placed(entry, index, tensors, problems) or [entry]:
            if part.module in adapters:
                problems.append(
                    Problem(code="AMBIGUOUS_NAME", message="two names of one module", module=part.module, got=module)
                )
            adapters[part.module] = part
    return replace(layout, adapters=adapters, problems=(*layout.problems, *problems))


@cache
def rules() -> dict[str, list[tuple[str, Targets]]]:
    """First target -> originals and all their targets."""
    found: dict[str, list[tuple[str, Targets]]] = {}
    for line in _RULES.strip().splitlines():
        originals, targets = (
            [re.sub(r"^[A-Z](?=\.)", lambda short: _SHORT[short[0]], name) for name in side.split()]
            for side in line.split(":")
        )
        rules = ((original, tuple(targets)) for original in originals)
        found.setdefault(targets[0].removeprefix(TURNED), []).extend(rules)
    return found


class _Index:
    """Where a base has what other tools call otherwise."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.by_name: dict[str, list[Targets]] = {}
        held = dict.fromkeys(paths)  # in the base's order
        known = rules()
        is_flux_2 = any(path.endswith(".to_qkv_mlp_proj") for path in held)  # of whose halves nothing was read
        for path in held:
            number = BLOCK.match(path)
            template = f"{number[1]}.#.{path[number.end() :]}" if number else path
            for original, targets in known.get(template, ()):
                self._add(original, targets, number[2] if number else "", held, turned=not is_flux_2)
            for name in sgm(path):
                self.by_name.setdefault(name, []).append((path,))
        for name, ways in list(self.by_name.items()):
            self.by_name.setdefault(flatten(name), []).extend(way for way in ways if "." in name)

    def _add(self, original: str, targets: Targets, number: str, held: Collection[str], *, turned: bool) -> None:
        filled = tuple(target.replace("#", number) for target in targets)
        if all(target.removeprefix(TURNED) in held for target in filled) and (turned or TURNED not in filled[0]):
            self.by_name.setdefault(original.replace("#", number), []).append(filled)

    def ways(self, module: str) -> list[Targets]:
        """Where a module may be: of each list the parts follow each other in its rows."""
        found = parts(module)
        name = found[1] if found else module
        for root in _ROOTS if found is None else ():
            name = name.removeprefix(root)
        return list(dict.fromkeys(self.by_name.get(name, ())))


def _placed(
    entry: AdapterLayout, index: _Index, tensors: Mapping[str, TensorInfo], problems: list[Problem]
) -> list[AdapterLayout]:
    """The entry under the names that the base has; [] where that is not clear."""
    if f"{entry.module}.weight" in tensors or any(slot.transposed for slot in entry.slots.values()):
        return []
    fitting = [parts for way in index.ways(entry.module) if (parts := _parts(way, entry, tensors))]
    if len(fitting) != 1:
        return []
    (sizes,) = fitting
    first, *others = sizes
    if first.startswith(TURNED):
        return [replace(reordered(entry, other_half_first), module=first.removeprefix(TURNED))]
    if not others:
        return [replace(entry, module=first)]
    if entry.settings.get("along") == "in_features":
        message = "a magnitude per input of a module that is several in the base"
        problems.append(Problem(code="UNSUPPORTED_VARIANT", message=message, module=entry.module))
        return []
    return list(cut(entry, list(sizes.items())))


def _parts(way: Targets, entry: AdapterLayout, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Target -> its rows, where they are those of the entry together."""
    sizes = {target: tensors[f"{target.removeprefix(TURNED)}.weight"].shape[0] for target in way}
    return sizes if sum(sizes.values()) == entry.out_features else {}
