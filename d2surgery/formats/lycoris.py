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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from d2surgery.errors import Problem, raise_errors
from d2surgery.files.header import Header
from d2surgery.formats import kohya
from d2surgery.formats.format import Holding, Values
from d2surgery.formats.kohya import DOWN, UP, scaling_of
from d2surgery.formats.layout import Layout, Slot, Stored
from d2surgery.formats.pairs import Factor, Group, Pairs
from d2surgery.formats.peft.keys import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

NAME = "lycoris"
TITLE, READS = "LyCORIS", "LoCon, Tucker, LoHa, LoKr, full `diff`, DoRA on both axes"
MID, MAGNITUDE = "lora_mid.weight", "dora_scale"
_HADA = tuple(f"hada_{leaf}" for leaf in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = tuple(f"lokr_{leaf}" for leaf in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_OTHERS = {  # leaf -> the algorithm, which is refused by name
    "w_norm": "a norm's weight and bias", "b_norm": "a norm's weight and bias",
    "a1.weight": "GLoRA", "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bm.weight": "GLoRA",
    "oft_blocks": "OFT or BOFT", "rescale": "OFT or BOFT", "on_input": "IA3", "weight": "IA3",
    "q_layer.weight": "T-LoRA", "p_layer.weight": "T-LoRA", "lambda_layer": "T-LoRA",
}  # fmt: skip
LEAVES = (*kohya.LEAVES, MID, MAGNITUDE, "diff", "diff_b", *_HADA, *_LOKR, *_OTHERS)
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


class _Product(NamedTuple):
    """ΔW as two factors, the rank that divides alpha (None: the scaling is 1), and the leaves that it is made of."""

    down: Factor
    up: Factor
    rank: int | None
    leaves: tuple[str, ...]


class _Misfit(Exception):
    """A code, and what is wrong with one module's tensors."""


def _add(root: bool, pairs: Pairs, module: str, group: Group, name: str) -> None:
    try:
        product = _product(pairs, group)
        scaling = 1.0 if product.rank is None else scaling_of(pairs, group, name, [product.rank])
        if scaling is None:
            return
        along = _along(pairs, group, product.down.shape)
        if "diff_b" in group and scaling != 1:
            raise _Misfit("UNSUPPORTED_VARIANT", f"a bias that is added as it is, beside a scaling of {scaling:g}")
    except _Misfit as misfit:
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


def _product(pairs: Pairs, group: Group) -> _Product:
    if others := {_OTHERS[leaf] for leaf in group if leaf in _OTHERS}:
        raise _Misfit("UNSUPPORTED_VARIANT", f"{' and '.join(sorted(others))} of LyCORIS")
    leaves = group.keys() - {"diff_b"}
    makers = [make for first, make in _ALGORITHMS.items() if any(leaf.startswith(first) for leaf in leaves)]
    if len(makers) != 1:
        what = "several algorithms on one module" if makers else "no factors"
        raise _Misfit("UNKNOWN_TENSOR" if makers else "MISSING_HALF", f"{what}: {', '.join(sorted(group))}")
    product = makers[0](pairs, group)
    beside = {kohya.ALPHA, MAGNITUDE} | ({"diff_b"} if MAGNITUDE not in group else set())
    if extra := group.keys() - {*product.leaves, *beside}:
        raise _Misfit("UNKNOWN_TENSOR", f"{', '.join(sorted(extra))} beside {', '.join(sorted(product.leaves))}")
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
        raise _Misfit("SHAPE_UNEXPECTED", f"{MAGNITUDE} {shape} does not say its axis: wanted (out, 1) or (1, in)")
    if shape[0] == 1 and len(down) > 2:
        raise _Misfit("UNSUPPORTED_VARIANT", "DoRA with a magnitude per input channel of a convolution")
    return "in_features" if shape[0] == 1 else "out_features"


# Algorithms ------------------------------------------------------------------------------------------------------


def _locon(pairs: Pairs, group: Group) -> _Product:
    _need(group, DOWN, UP)
    down, up = pairs.factor(group[DOWN]), pairs.factor(group[UP])
    if MID not in group:
        return _Product(down, up, down.shape[0], (DOWN, UP))
    return _Product(_tucker_factor(pairs, group[DOWN], group[MID]), up, down.shape[0], (DOWN, UP, MID))


def _loha(pairs: Pairs, group: Group) -> _Product:
    """The rows of the two downs, and the columns of the two ups, multiplied in all pairs."""
    leaves = _HADA[:4] if not {"hada_t1", "hada_t2"} & group.keys() else _HADA
    _need(group, *leaves)
    keys = [group[leaf] for leaf in leaves]
    shapes = [pairs.shape(key) for key in keys]
    turned = len(leaves) > 4
    ups, downs = ([shape[::-1] if turned else shape for shape in shapes[0:4:2]]), shapes[1:4:2]
    _fit(all(len(shape) == 2 for shape in shapes[:4]), shapes)
    _fit(all(up[1] == down[0] for up, down in zip(ups, downs, strict=True)), shapes)
    _fit(ups[0][0] == ups[1][0] and downs[0][1] == downs[1][1], shapes)
    kernel: tuple[int, ...] = ()
    if turned:
        kernel = shapes[4][2:]
        squares = [(up[1], down[0], *kernel) for up, down in zip(ups, downs, strict=True)]
        _fit(squares == shapes[4:] and bool(kernel), shapes)
    rank = ups[0][1] * ups[1][1]
    (w1a, w1b, w2a, w2b), cores = keys[:4], tuple(keys[4:])
    return _Product(
        Factor(Slot(w1b, also=(w2b, *cores), made=_rows_multiplied), (rank, downs[0][1], *kernel)),
        Factor(Slot(w1a, also=(w2a,), made=partial(_columns_multiplied, turned)), (ups[0][0], rank)),
        downs[0][0],
        leaves,
    )


def _lokr(pairs: Pairs, group: Group) -> _Product:
    first, second = (_half(pairs, group, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2))
    keys = (*first.keys, *second.keys)
    _fit(len(first.shape) == 2, [first.shape])
    rank, made = first.rank * second.rank, partial(_kronecker, len(first.keys))
    out, inside = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return _Product(
        Factor(Slot(keys[0], also=keys[1:], made=partial(made, 0)), (rank, inside, *second.shape[2:])),
        Factor(Slot(keys[0], also=keys[1:], made=partial(made, 1)), (out, rank)),
        second.divisor or first.divisor,
        (*first.leaves, *second.leaves),
    )


def _full(pairs: Pairs, group: Group) -> _Product:
    _need(group, "diff")
    key, shape = group["diff"], pairs.shape(group["diff"])
    if len(shape) < 2:
        raise _Misfit("UNSUPPORTED_VARIANT", "a difference of a vector, such as a norm's weight")
    rank = min(shape[0], prod(shape[1:]))
    return _Product(
        Factor(Slot(key, made=partial(_side, 0)), (rank, *shape[1:])),
        Factor(Slot(key, made=partial(_side, 1)), (shape[0], rank)),
        None,
        ("diff",),
    )


_ALGORITHMS: dict[str, Callable[[Pairs, Group], _Product]] = {
    "lora_": _locon, "hada_": _loha, "lokr_": _lokr, "diff": _full
}  # fmt: skip


class _Half(NamedTuple):
    """One matrix of a Kronecker product: as it is, of two factors, or of two and a core."""

    keys: tuple[str, ...]
    leaves: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int
    divisor: int | None  # the rank that divides alpha; None where the matrix is full


def _half(pairs: Pairs, group: Group, whole: str, core: str) -> _Half:
    if whole in group:
        shape = pairs.shape(group[whole])
        _fit(len(shape) >= 2, [shape])
        return _Half((group[whole],), (whole,), shape, min(shape[0], prod(shape[1:])), None)
    leaves = (f"{whole}_a", f"{whole}_b", *([core] if core in group else []))
    _need(group, *leaves)
    keys = tuple(group[leaf] for leaf in leaves)
    (a, b), cores = (pairs.shape(key) for key in keys[:2]), [pairs.shape(key) for key in keys[2:]]
    _fit(len(a) == len(b) == 2, [a, b])
    if not cores:
        _fit(a[1] == b[0], [a, b])
        return _Half(keys, leaves, (a[0], b[1]), b[0], b[0])
    _fit(len(cores[0]) > 2 and cores[0][:2] == (a[0], b[0]), [a, b, *cores])
    return _Half(keys, leaves, (a[1], b[1], *cores[0][2:]), a[0], b[0])


def _tucker_factor(pairs: Pairs, down: str, mid: str) -> Factor:
    a, core = pairs.shape(down), pairs.shape(mid)
    _fit(len(core) > 2 and len(a) >= 2 and core[1] == a[0] and prod(a[2:]) == 1, [a, core])
    return Factor(Slot(down, also=(mid,), made=_tucker), (core[0], a[1], *core[2:]))


def _need(group: Group, *leaves: str) -> None:
    if missing := sorted(set(leaves) - group.keys()):
        raise _Misfit("MISSING_HALF", f"has {', '.join(sorted(group))} but no {', '.join(missing)}")


def _fit(right: bool, shapes: list[tuple[int, ...]]) -> None:
    if not right:
        raise _Misfit("RANK_MISMATCH", f"{', '.join(map(str, shapes))} do not multiply")


# Factors made of stored tensors, in float32 or more --------------------------------------------------------------


def _wide(tensor: "Tensor") -> "Tensor":
    return tensor if tensor.itemsize > 4 else tensor.float()


def _tucker(down: "Tensor", mid: "Tensor") -> "Tensor":
    """Σ_j mid[i, j, …] down[j, in]: (i, in, …)."""
    product = _wide(mid).flatten(2).transpose(1, 2) @ _wide(down).flatten(1)
    return product.transpose(1, 2).reshape(mid.shape[0], -1, *mid.shape[2:])


def _rows_multiplied(first: "Tensor", second: "Tensor", *cores: "Tensor") -> "Tensor":
    """(r1·r2, in, …): row i of one times row j of the other, entry by entry."""
    a, b = (
        (_tucker(each, core) for each, core in zip((first, second), cores, strict=True)) if cores else (first, second)
    )
    return (_wide(a)[:, None] * _wide(b)[None]).flatten(0, 1)


def _columns_multiplied(turned: bool, first: "Tensor", second: "Tensor") -> "Tensor":
    """(out, r1·r2), of (out, r) or, `turned`, (r, out)."""
    a, b = (_wide(each.T if turned else each) for each in (first, second))
    return (a[:, :, None] * b[:, None]).flatten(1)


def _kronecker(count: int, side: int, *tensors: "Tensor") -> "Tensor":
    """The down (0) or up (1) factor of a Kronecker product, whose first matrix is made of `count` tensors."""
    a, b = (_side(side, *each).flatten(1) for each in (tensors[:count], tensors[count:]))
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], -1)


def _side(side: int, *tensors: "Tensor") -> "Tensor":
    """The down (0) or up (1) factor of a full matrix, of a product a·b, or of a Tucker product of a, b and a core."""
    first = _wide(tensors[0])
    if len(tensors) == 3:
        return _tucker(tensors[1], tensors[2]) if side == 0 else first.T
    if len(tensors) == 2:
        return first if side else _wide(tensors[1])
    rows, columns = first.shape[0], first[0].numel()
    if (rows <= columns) == (side == 0):
        return first
    whole = first.new_ones(min(rows, columns)).diag()
    return whole if side else whole.reshape(-1, *first.shape[1:])


# Writing ---------------------------------------------------------------------------------------------------------


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
