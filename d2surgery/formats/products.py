"""Products of more than two stored matrices as one of two thin ones, exactly: LyCORIS's algorithms, some of which PEFT
has too (see `lycoris` for the formulas and the rank that each needs).

A product has the factors of the LoRA that it is, by names and shapes; their numbers are made when they are asked for.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from d2surgery.formats.kohya import DOWN, UP
from d2surgery.formats.layout import Slot
from d2surgery.formats.pairs import Factor, Group, Pairs

if TYPE_CHECKING:
    from torch import Tensor

MID = "lora_mid.weight"
HADA = tuple(f"hada_{leaf}" for leaf in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR = tuple(f"lokr_{leaf}" for leaf in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))


class Product(NamedTuple):
    """ΔW as two factors, the rank that divides alpha (None: the scaling is 1), and the leaves that it is made of."""

    down: Factor
    up: Factor
    rank: int | None
    leaves: tuple[str, ...]


class Misfit(Exception):
    """A code, and what is wrong with one module's tensors."""


# Algorithms ------------------------------------------------------------------------------------------------------


def _locon(pairs: Pairs, group: Group) -> Product:
    need(group, DOWN, UP)
    down, up = pairs.factor(group[DOWN]), pairs.factor(group[UP])
    if MID not in group:
        return Product(down, up, down.shape[0], (DOWN, UP))
    return Product(_tucker_factor(pairs, group[DOWN], group[MID]), up, down.shape[0], (DOWN, UP, MID))


def _loha(pairs: Pairs, group: Group) -> Product:
    """The rows of the two downs, and the columns of the two ups, multiplied in all pairs."""
    leaves = HADA[:4] if not {"hada_t1", "hada_t2"} & group.keys() else HADA
    need(group, *leaves)
    keys = [group[leaf] for leaf in leaves]
    shapes = [pairs.shape(key) for key in keys]
    turned = len(leaves) > 4
    ups, downs = ([shape[::-1] if turned else shape for shape in shapes[0:4:2]]), shapes[1:4:2]
    fit(all(len(shape) == 2 for shape in shapes[:4]), shapes)
    fit(all(up[1] == down[0] for up, down in zip(ups, downs, strict=True)), shapes)
    fit(ups[0][0] == ups[1][0] and downs[0][1] == downs[1][1], shapes)
    kernel: tuple[int, ...] = ()
    if turned:
        kernel = shapes[4][2:]
        squares = [(up[1], down[0], *kernel) for up, down in zip(ups, downs, strict=True)]
        fit(squares == shapes[4:] and bool(kernel), shapes)
    rank = ups[0][1] * ups[1][1]
    (w1a, w1b, w2a, w2b), cores = keys[:4], tuple(keys[4:])
    return Product(
        Factor(Slot(w1b, also=(w2b, *cores), made=_rows_multiplied), (rank, downs[0][1], *kernel)),
        Factor(Slot(w1a, also=(w2a,), made=partial(_columns_multiplied, turned)), (ups[0][0], rank)),
        downs[0][0],
        leaves,
    )


def _lokr(pairs: Pairs, group: Group) -> Product:
    first, second = (_half(pairs, group, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2))
    keys = (*first.keys, *second.keys)
    fit(len(first.shape) == 2, [first.shape])
    rank, made = first.rank * second.rank, partial(_kronecker, len(first.keys))
    out, inside = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return Product(
        Factor(Slot(keys[0], also=keys[1:], made=partial(made, 0)), (rank, inside, *second.shape[2:])),
        Factor(Slot(keys[0], also=keys[1:], made=partial(made, 1)), (out, rank)),
        second.divisor or first.divisor,
        (*first.leaves, *second.leaves),
    )


def _full(pairs: Pairs, group: Group) -> Product:
    need(group, "diff")
    key, shape = group["diff"], pairs.shape(group["diff"])
    if len(shape) < 2:
        raise Misfit("UNSUPPORTED_VARIANT", "a difference of a vector, such as a norm's weight")
    rank = min(shape[0], prod(shape[1:]))
    return Product(
        Factor(Slot(key, made=partial(_side, 0)), (rank, *shape[1:])),
        Factor(Slot(key, made=partial(_side, 1)), (shape[0], rank)),
        None,
        ("diff",),
    )


ALGORITHMS: dict[str, Callable[[Pairs, Group], Product]] = {
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
        fit(len(shape) >= 2, [shape])
        return _Half((group[whole],), (whole,), shape, min(shape[0], prod(shape[1:])), None)
    leaves = (f"{whole}_a", f"{whole}_b", *([core] if core in group else []))
    need(group, *leaves)
    keys = tuple(group[leaf] for leaf in leaves)
    (a, b), cores = (pairs.shape(key) for key in keys[:2]), [pairs.shape(key) for key in keys[2:]]
    fit(len(a) == len(b) == 2, [a, b])
    if not cores:
        fit(a[1] == b[0], [a, b])
        return _Half(keys, leaves, (a[0], b[1]), b[0], b[0])
    fit(len(cores[0]) > 2 and cores[0][:2] == (a[0], b[0]), [a, b, *cores])
    return _Half(keys, leaves, (a[1], b[1], *cores[0][2:]), a[0], b[0])


def _tucker_factor(pairs: Pairs, down: str, mid: str) -> Factor:
    a, core = pairs.shape(down), pairs.shape(mid)
    fit(len(core) > 2 and len(a) >= 2 and core[1] == a[0] and prod(a[2:]) == 1, [a, core])
    return Factor(Slot(down, also=(mid,), made=_tucker), (core[0], a[1], *core[2:]))


def need(group: Group, *leaves: str) -> None:
    if missing := sorted(set(leaves) - group.keys()):
        raise Misfit("MISSING_HALF", f"has {', '.join(sorted(group))} but no {', '.join(missing)}")


def fit(right: bool, shapes: list[tuple[int, ...]]) -> None:
    if not right:
        raise Misfit("RANK_MISMATCH", f"{', '.join(map(str, shapes))} do not multiply")


# Factors made of stored tensors, in float32 or more --------------------------------------------------------------


def wide(tensor: "Tensor") -> "Tensor":
    return tensor if tensor.itemsize > 4 else tensor.float()


def _tucker(down: "Tensor", mid: "Tensor") -> "Tensor":
    """Σ_j mid[i, j, …] down[j, in]: (i, in, …)."""
    product = wide(mid).flatten(2).transpose(1, 2) @ wide(down).flatten(1)
    return product.transpose(1, 2).reshape(mid.shape[0], -1, *mid.shape[2:])


def _rows_multiplied(first: "Tensor", second: "Tensor", *cores: "Tensor") -> "Tensor":
    """(r1·r2, in, …): row i of one times row j of the other, entry by entry."""
    a, b = (
        (_tucker(each, core) for each, core in zip((first, second), cores, strict=True)) if cores else (first, second)
    )
    return (wide(a)[:, None] * wide(b)[None]).flatten(0, 1)


def _columns_multiplied(turned: bool, first: "Tensor", second: "Tensor") -> "Tensor":
    """(out, r1·r2), of (out, r) or, `turned`, (r, out)."""
    a, b = (wide(each.T if turned else each) for each in (first, second))
    return (a[:, :, None] * b[:, None]).flatten(1)


def _kronecker(count: int, side: int, *tensors: "Tensor") -> "Tensor":
    """The down (0) or up (1) factor of a Kronecker product, whose first matrix is made of `count` tensors."""
    a, b = (_side(side, *each).flatten(1) for each in (tensors[:count], tensors[count:]))
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], -1)


def _side(side: int, *tensors: "Tensor") -> "Tensor":
    """The down (0) or up (1) factor of a full matrix, of a product a·b, or of a Tucker product of a, b and a core."""
    first = wide(tensors[0])
    if len(tensors) == 3:
        return _tucker(tensors[1], tensors[2]) if side == 0 else first.T
    if len(tensors) == 2:
        return first if side else wide(tensors[1])
    rows, columns = first.shape[0], first[0].numel()
    if (rows <= columns) == (side == 0):
        return first
    whole = first.new_ones(min(rows, columns)).diag()
    return whole if side else whole.reshape(-1, *first.shape[1:])
