"""PEFT's other methods whose update is a function of their own tensors: each as the LoRA that it is, exactly.

    adapter_config.json + adapter_model.safetensors (or .bin), keys as PEFT's (see `peft`)

    peft_type   leaves                                          ΔW                                            rank
    LOHA        hada_w1_a, hada_w1_b, hada_w2_a, …, hada_t1     alpha/r · (w1_a·w1_b) ⊙ (w2_a·w2_b)           r²
    LOKR        lokr_w1 or lokr_w1_a·lokr_w1_b, lokr_w2 …       alpha/r · w1 ⊗ w2                             r1·r2
    DELORA      delora_A (r, in), delora_B (out, r),            B · diag(λ/(r ‖A_i‖ ‖B_i‖)) · A · diag(w)     r
                delora_lambda (1,), delora_w_norm (in,)         norms of less than 1e-4 count as 1e-4
    VERA        vera_lambda_b (out,), vera_lambda_d (r,)        diag(b) · vera_B · diag(d) · vera_A           r
                for the file: vera_A (r, widest in), vera_B (widest out, r), of which each takes its part

LoKr's alpha/r multiplies two full matrices, too, where LyCORIS takes 1.  How wide a module of VeRA's is, its base says;
a file without its projections (save_projection false) is refused: they are random numbers of PEFT's.

What multiplies the base's weights (IA³, HiRA, OFT, BOFT) or has no low rank (RandLoRA, FourierFT) `peft` refuses.
Source: PEFT 0.21.2.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import Layout, Slot
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.peft.config import Config
from d2surgery.formats.peft.keys import bare, target_of
from d2surgery.formats.products import ALGORITHMS, HADA, LOKR, Misfit, fit, need, wide

if TYPE_CHECKING:
    from torch import Tensor

NAME = "peft-methods"
TITLE, READS = "PEFT's DeLoRA, LoHa, LoKr, VeRA", "as the LoRA of the rank that each needs"
_DELORA = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_VERA = ("vera_lambda_b", "vera_lambda_d")
_LEAVES = {"LOHA": HADA, "LOKR": LOKR, "DELORA": _DELORA, "VERA": _VERA}
_SHARED = re.compile(r"(?:.*\.)?(vera_[AB])(?:\.[^.]+)?")  # of the whole file
_Shape = tuple[int, ...]
_SMALLEST = 1e-4  # norm that DeLoRA divides by

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    method = (config or {}).get("peft_type")
    leaves = _LEAVES.get(method, ()) if isinstance(method, str) else ()
    found = any(key.endswith(tuple(f".{leaf}" for leaf in leaves)) for key in header.tensors) if leaves else False
    return f"peft_type {method} in adapter_config.json" if found else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    found = dict(config or {})
    method = found["peft_type"]
    said = Config(found | ({"lora_alpha": found["alpha"]} if "alpha" in found else {}), {})
    shared = {match[1]: key for key in header.tensors if (match := _SHARED.fullmatch(key))}
    whole = {target_of(bare(key)): key for key in header.tensors if said.declares(bare(key))}
    apart = {*shared.values(), *whole.values()}
    rest = {key: info for key, info in header.tensors.items() if key not in apart}
    pairs = Pairs(replace(header, tensors=rest), values)
    pairs.say.all += (problem for problem in said.problems(pairs.say.file) if problem.code == "BAD_CONFIG")
    projections = [(key, header.tensors[key].shape) for name in ("vera_A", "vera_B") if (key := shared.get(name))]
    for module, group in pairs.groups({leaf: leaf for leaf in _LEAVES[method]}, bare).items():
        try:
            _add(pairs, module, group, said, projections)
        except Misfit as misfit:
            pairs.skip(group.values(), *misfit.args, module=module)
    for module in pairs.adapters:
        if not said.targeted(module):
            pairs.say("NOT_TARGETED", "has factors but is not in target_modules", module=module)
    if not pairs.adapters or method != "VERA":
        for key in shared.values():
            pairs.skip([key], "UNKNOWN_TENSOR", "projections that no module takes", module=key)
    about = said.about()
    made = pairs.layout(NAME, replace(about, settings={}, alpha=about.alpha if "alpha" in found else None))
    return replace(made, header=header, replacements=whole)


def _add(pairs: Pairs, module: str, group: Group, said: Config, projections: list[tuple[str, _Shape]]) -> None:
    method = str(said.found["peft_type"])
    if method in ("LOHA", "LOKR"):
        product = ALGORITHMS["hada_" if method == "LOHA" else "lokr_"](pairs, group)
        if extra := group.keys() - {*product.leaves}:
            raise Misfit("UNKNOWN_TENSOR", f"{', '.join(sorted(extra))} beside {', '.join(sorted(product.leaves))}")
        _check_rank(pairs, module, said, product.rank)
        scaling = said.scaling(module, "lora", {"update": said.rank(module)})
        pairs.add(module, group, product.down, product.up, scaling=scaling)
    elif method == "DELORA":
        need(group, *_DELORA)
        A, B, size, norm = (group[leaf] for leaf in _DELORA)
        down, up = pairs.shape(A), pairs.shape(B)
        fit(len(down) == 2 and pairs.shape(norm) == down[1:], [down, pairs.shape(norm)])
        fit(prod(pairs.shape(size)) == 1, [pairs.shape(size)])
        _check_rank(pairs, module, said, down[0])
        pairs.add(module, group, Factor(Slot(A, also=(norm,), made=_delora_down), down),
                  Factor(Slot(B, also=(A, size), made=_delora_up), up), scaling=1.0)  # fmt: skip
    else:
        _add_vera(pairs, module, group, said, projections)


def _add_vera(pairs: Pairs, module: str, group: Group, said: Config, projections: list[tuple[str, _Shape]]) -> None:
    need(group, *_VERA)
    if len(projections) < 2:
        message = "its projections are not in the file: load it with PEFT and save it with save_projection"
        raise Misfit("UNSUPPORTED_VARIANT", message)
    (A, down), (B, up) = projections
    b, d = (pairs.shape(group[leaf]) for leaf in _VERA)
    fit(len(b) == len(d) == 1 and len(down) == len(up) == 2 and down[0] == up[1] == d[0], [b, d, down, up])
    fit(b[0] <= up[0], [b, up])
    _check_rank(pairs, module, said, d[0])
    pairs.say("BASE_NEEDED", f"how many of {down[1]} columns it takes", module=module)
    down_slot, up_slot = (
        Slot(group[leaf], also=(key,), made=partial(_vera, shape[1]))
        for leaf, (key, shape) in zip(reversed(_VERA), projections, strict=True)
    )
    pairs.add(module, group, Factor(down_slot, down), Factor(up_slot, (b[0], d[0])), scaling=1.0)
    if module in pairs.adapters:
        pairs.adapters[module] = replace(pairs.adapters[module], numbers=(A, B))


def _check_rank(pairs: Pairs, module: str, said: Config, rank: int | None) -> None:
    if rank is not None and "r" not in said.unusable and said.rank(module) != rank:
        pairs.say("RANK_DISAGREES", "rank", module=module, wanted=str(said.rank(module)), got=str(rank))


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """VeRA's modules as wide as the base has them."""
    adapters, settled = dict(layout.adapters), set()
    for problem in layout.problems:
        entry, info = layout.adapters.get(problem.module), tensors.get(f"{problem.module}.weight")
        elements = prod(info.shape) if info and len(info.shape) == 2 else 0
        width, rest = divmod(elements, entry.out_features) if entry else (0, 0)
        if problem.code == "BASE_NEEDED" and entry and not rest and 0 < width <= entry.in_features:
            A = entry.slots["A"]._replace(made=partial(_vera, width))
            adapters[entry.module] = replace(entry, in_features=width, slots={**entry.slots, "A": A})
            settled.add(problem)
    return replace(layout, adapters=adapters, problems=tuple(p for p in layout.problems if p not in settled))


# Factors made of stored tensors, in float32 or more ------------------------------------------------------------------


def _delora_down(A: "Tensor", norm: "Tensor") -> "Tensor":
    return wide(A) * wide(norm)


def _delora_up(B: "Tensor", A: "Tensor", size: "Tensor") -> "Tensor":
    norms = wide(A).norm(dim=1).clamp(min=_SMALLEST) * wide(B).norm(dim=0).clamp(min=_SMALLEST)
    scales: Tensor = wide(size) / A.shape[0] / norms
    return wide(B) * scales


def _vera(columns: int, scales: "Tensor", projection: "Tensor") -> "Tensor":
    """The part of a projection that a module takes, each row times its own number."""
    return wide(projection[: len(scales), :columns]) * wide(scales)[:, None]
