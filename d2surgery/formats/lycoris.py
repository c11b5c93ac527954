"""LyCORIS: kohya's file (see `kohya`) with further algorithms, each module with its own.

    algorithm  leaves                                          ΔW                                       rank here
    LoCon      lora_down, lora_up, lora_mid (r, r, *kernel)    up · (mid × down): a Tucker product      r
    LoHa       hada_w1_a (out, r), hada_w1_b (r, in), w2_…     (w1_a·w1_b) ⊙ (w2_a·w2_b)                r²
               with hada_t1, hada_t2: w_a (r, out), w_b (r, in), each product a Tucker product
    LoKr       lokr_w1 (a, c) or lokr_w1_a·lokr_w1_b           w1 ⊗ w2                                  r1·r2
               lokr_w2 (b, d, *kernel), or w2_a·w2_b, or with lokr_t2 w2_a (r, b), w2_b (r, d)
    full       diff (as the weight), diff_b (out,)             diff; the bias grows by diff_b           min(out, in)

Each is a product of two thin matrices, exactly: of rows and columns multiplied entry by entry (Khatri-Rao) for ⊙, of
Kronecker products for ⊗, with an identity for a full matrix.  scaling = alpha/r, r the rank of the stored factors; 1
for `diff` and for a LoKr of two full matrices, whatever its alpha: of the latter with rs_lora the file does not say it.
rs_lora is in the stored alpha; get_diff_weight of LoHa and LoKr multiplies by it twice, the forward, which is read
here, once.

DoRA: dora_scale (out, 1…), the norm of each row of W + ΔW, or (1, in), of each column (the only one before December
2024, and OneTrainer's).  Which of its sizes is 1 decides, not a comparison with the weight's.  The eps that readers
add to the norm is not added here.

Refused by name: norms (w_norm, b_norm), GLoRA, OFT, BOFT, IA3, T-LoRA; a magnitude per input channel of a convolution.
Source: LyCORIS 4.1.3.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header
from d2surgery.formats import kohya
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.kohya import DOWN, scaling_of
from d2surgery.formats.layout import Layout, Stored
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.keys import PREFIX
from d2surgery.formats.products import ALGORITHMS, HADA, LOKR, MID, Misfit, Product

NAME = "lycoris"
TITLE, READS = "LyCORIS", "LoCon, Tucker, LoHa, LoKr, full `diff`, DoRA on both axes"
MAGNITUDE = "dora_scale"
_OTHERS = {  # leaf -> the algorithm, which is refused by name
    "w_norm": "a norm's weight and bias", "b_norm": "a norm's weight and bias",
    "a1.weight": "GLoRA", "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bm.weight": "GLoRA",
    "oft_blocks": "OFT or BOFT", "rescale": "OFT or BOFT", "on_input": "IA3", "weight": "IA3",
    "q_layer.weight": "T-LoRA", "p_layer.weight": "T-LoRA", "lambda_layer": "T-LoRA",
}  # fmt: skip
LEAVES = (*kohya.LEAVES, MID, MAGNITUDE, "diff", "diff_b", *HADA, *LOKR, *_OTHERS)
_OWN = ("hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "diff", MID)  # LyCORIS's and no other's


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    keys = [key for key in header.tensors if not key.startswith(PREFIX)]  # PEFT's LoHa has its alpha in a config
    if leaf := next((leaf for leaf in _OWN if any(key.endswith(f".{leaf}") for key in keys)), ""):
        return f"keys end in .{leaf}"
    if kohya.recognise(header, config):
        if header.metadata.get("ss_network_module", "").startswith("lycoris"):
            return "ss_network_module in the header"
        if any(key.endswith(f".{MAGNITUDE}") for key in header.tensors):
            return f"keys end in .{DOWN} and .{MAGNITUDE}"
    return ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    args = kohya.network_args(header)
    add = partial(_add, str(args.get("rs_lora")).lower() == "true")
    found = kohya.read(header, values, NAME, LEAVES, add)
    return replace(found, problems=(*found.problems, *_bare(found, str(args.get("dora_wd")).lower() == "true")))


def _bare(layout: Layout, all_dora: bool) -> Iterator[Problem]:
    """Modules without a magnitude in a file of DoRA: they may be meant so, where the header does not say otherwise."""
    for module, entry in layout.adapters.items():
        if entry.kind == "lora" and (all_dora or "dora" in layout.kinds):
            message = "dora_wd is set, and there is no dora_scale" if all_dora else "no dora_scale, which others have"
            yield Problem(code="MISSING_MAGNITUDE", message=message, severity="error" if all_dora else "warning",
                          file=layout.path.name, module=module)  # fmt: skip


def _add(root: bool, pairs: Pairs, module: str, group: Group, name: str) -> None:
    try:
        product = _product(pairs, group)
        scaling = 1.0 if product.rank is None else scaling_of(pairs, group, name, [product.rank])
        if scaling is None:
            return
        along = _along(pairs, group, product.down.shape)
        if "diff_b" in group and scaling != 1:
            raise Misfit("UNSUPPORTED_VARIANT", f"a bias that is added as it is, beside a scaling of {scaling:g}")
    except Misfit as misfit:
        pairs.skip(group.values(), *misfit.args, module=name)
        return
    if unknown := root and product.rank is None and "lokr_w1" in group:
        pairs.say("SCALING_UNKNOWN", "rs_lora with two full matrices: √r, and r is not in the file", module=name)
    pairs.add(
        module,
        group,
        product.down,
        product.up,
        scaling=None if unknown else scaling,
        magnitude=group.get(MAGNITUDE, ""),
        along=along,
        bias=group.get("diff_b", ""),
    )


def _product(pairs: Pairs, group: Group) -> Product:
    if others := {_OTHERS[leaf] for leaf in group if leaf in _OTHERS}:
        raise Misfit("UNSUPPORTED_VARIANT", f"{' and '.join(sorted(others))} of LyCORIS")
    leaves = group.keys() - {"diff_b"}
    makers = [make for first, make in ALGORITHMS.items() if any(leaf.startswith(first) for leaf in leaves)]
    if len(makers) != 1:
        what = "several algorithms on one module" if makers else "no factors"
        raise Misfit("UNKNOWN_TENSOR" if makers else "MISSING_HALF", f"{what}: {', '.join(sorted(group))}")
    product = makers[0](pairs, group)
    beside = {kohya.ALPHA, MAGNITUDE} | ({"diff_b"} if MAGNITUDE not in group else set())
    if extra := group.keys() - {*product.leaves, *beside}:
        raise Misfit("UNKNOWN_TENSOR", f"{', '.join(sorted(extra))} beside {', '.join(sorted(product.leaves))}")
    return product


def _along(pairs: Pairs, group: Group, down: tuple[int, ...]) -> str:
    """The axis of a dora_scale: the one of its sizes that is not 1. One number per input channel of a convolution has
    no place here."""
    if MAGNITUDE not in group:
        return "out_features"
    shape = pairs.shape(group[MAGNITUDE])
    if pairs.header.tensors[group[MAGNITUDE]].dtype in ("F16", "BF16"):
        got = pairs.header.tensors[group[MAGNITUDE]].dtype
        pairs.say("MAGNITUDE_EPSILON", "no eps is added", severity="warning", module=group[MAGNITUDE], got=got)
    if len(shape) < 2 or prod(shape) == 1 or max(shape[:2]) != prod(shape):
        raise Misfit("SHAPE_UNEXPECTED", f"{MAGNITUDE} {shape} does not say its axis: wanted (out, 1) or (1, in)")
    if shape[0] == 1 and len(down) > 2:
        raise Misfit("UNSUPPORTED_VARIANT", "DoRA with a magnitude per input channel of a convolution")
    return "in_features" if shape[0] == 1 else "out_features"


# Writing ---------------------------------------------------------------------------------------------------------


with_base = as_read


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear", "conv")) if kind in ("lora", "dora") else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    """lora.safetensors as LoCon, DoRA on both axes. Raises FORMAT_CANNOT_HOLD before anything is written."""
    entries = checkpoint.layout.adapters
    raise_errors(_cannot_hold(checkpoint.layout))
    axes = {entry.settings["along"] for entry in entries.values() if entry.kind == "dora"}
    said = {"algo": "locon", "dora_wd": bool(axes), "wd_on_output": axes != {"in_features"}}
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(said)}
    kohya.write_file(checkpoint, directory, NAME, metadata, otherwise="lycoris_")


def _cannot_hold(layout: Layout) -> Iterator[Problem]:
    for module, entry in layout.adapters.items():
        if entry.stored == "conv" and entry.settings.get("along") == "in_features":
            message = "LyCORIS's magnitude of a convolution is per input channel, or per output"
            yield Problem(code="FORMAT_CANNOT_HOLD", message=message, module=module, got="per column of its kernel")
