"""NVlabs' DoRA, as its fork of PEFT 0.3 saves it.

    adapter_model.bin + adapter_config.json with peft_type "DORA"
    key := "base_model.model." module "." leaf

    leaf                        shape       meaning
    lora_A.weight               (r, in)     A
    lora_B.weight               (out, r)    B
    weight_m_wdecomp.weight     (out, 1)    DoRA; an adapter's name may stand before .weight

scaling = lora_alpha/r.  Modules of Wdecompose_target_modules have a magnitude alone, W' = m ⊙ W/‖W‖: how wide they are
the base says, and their factors are zeros of rank 1.
Source: NVlabs/DoRA 7e2f10a, peft/tuners/dora.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from d2surgery.errors import Problem
from d2surgery.files.header import Header, TensorInfo
from d2surgery.formats.format import Values, holds_nothing, not_written
from d2surgery.formats.layout import AdapterLayout, Layout, Slot
from d2surgery.formats.pairs import Group, Pairs
from d2surgery.formats.peft.config import Config
from d2surgery.formats.peft.keys import bare

if TYPE_CHECKING:
    from torch import Tensor

NAME = "nvlabs"
TITLE, READS = "NVlabs' DoRA", "DoRA, magnitudes without factors"
_MAGNITUDE = "weight_m_wdecomp"
_LEAVES = {"lora_A.weight": "A", "lora_B.weight": "B", f"{_MAGNITUDE}.weight": "m", f"{_MAGNITUDE}.default.weight": "m"}

holds, write = holds_nothing, not_written


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return f"keys have {_MAGNITUDE} in them" if any(f".{_MAGNITUDE}." in key for key in header.tensors) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    said, pairs = Config(config or {}, {}), Pairs(header, values)
    pairs.say.all += (problem for problem in said.problems(pairs.say.file) if problem.code == "BAD_CONFIG")
    for module, group in pairs.groups(_LEAVES, bare).items():
        _add(pairs, module, group, said)
    if any(entry.scaling is None for entry in pairs.adapters.values()):
        pairs.say("SCALING_UNKNOWN", "no lora_alpha in an adapter_config.json")
    if said.get("enable_lora"):
        pairs.say("MERGED_LINEAR", f"enable_lora is {said.get('enable_lora')}")
    return pairs.layout(NAME, replace(said.about(), settings={}))


def _add(pairs: Pairs, module: str, group: Group, said: Config) -> None:
    if group.keys() == {"m"}:
        message = "a magnitude and no factors: how wide the module is"
        pairs.skip(group.values(), "BASE_NEEDED", message, module=module)
    elif not pairs.lacks(module, group, "A", "B", "m") and not pairs.no_column(module, group, "m"):
        down, up = (pairs.factor(group[which]) for which in "AB")
        ranks = {"update": down.shape[0] if down.shape else 0}
        wanted, scaling = said.ranks(module, "dora"), None
        if wanted not in (None, ranks):
            got = str(ranks["update"])
            pairs.say("RANK_DISAGREES", "rank", module=module, wanted=str(said.rank(module)), got=got)
        elif ranks["update"]:
            scaling = said.scaling(module, "dora", ranks)
        pairs.add(module, group, down, up, scaling=scaling, magnitude=group["m"])


def with_base(layout: Layout, tensors: Mapping[str, TensorInfo], model: Mapping[str, Any]) -> Layout:
    """Magnitudes without factors as DoRA whose factors are zeros."""
    keys = {bare(key).partition(f".{_MAGNITUDE}")[0]: key for key in layout.unread}
    adapters, problems, read = dict(layout.adapters), [], set[str]()
    for problem in layout.problems:
        info, key = tensors.get(f"{problem.module}.weight"), keys.get(problem.module, "")
        if problem.code != "BASE_NEEDED" or info is None or len(info.shape) != 2 or not key:
            problems.append(problem)
            continue
        made = _zeros(layout, problem, key, info.shape)
        read |= {key} if isinstance(made, AdapterLayout) else set()
        if isinstance(made, AdapterLayout):
            adapters[made.module] = made
        else:
            problems.append(made)
    unread = tuple(key for key in layout.unread if key not in read)
    return replace(layout, adapters=adapters, unread=unread, problems=tuple(problems))


def _zeros(layout: Layout, problem: Problem, key: str, shape: tuple[int, ...]) -> AdapterLayout | Problem:
    out, inside = shape
    info = layout.header.tensors[key]
    if prod(info.shape) != out:
        got, wanted = str(info.shape), f"{out} numbers"
        return replace(problem, code="SHAPE_UNEXPECTED", message="magnitude", wanted=wanted, got=got)
    return AdapterLayout(
        module=problem.module,
        kind="dora",
        stored="linear",
        slots={"A": Slot(key, made=partial(_zero, (1, inside))), "B": Slot(key, made=partial(_zero, (out, 1))),
               "magnitude": Slot(key)},
        ranks={"update": 1},
        out_features=out,
        in_features=inside,
        dtype=info.dtype,
        scaling=1.0,
        settings={"along": "out_features"},
    )  # fmt: skip


def _zero(shape: tuple[int, int], magnitude: "Tensor") -> "Tensor":
    return magnitude.new_zeros(shape)
