"""Experts whose factors lie in three dimensions, (E, r, in) and (E, out, r), as adapters of transformers' parameters.

A parameter may hold several parts, gate and up: its ranks are those of its parts together, each with rows of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from d2surgery.files.header import FLOATS
from d2surgery.formats.layout import AdapterLayout, Slot
from d2surgery.formats.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # transformers' parameter -> parts


class Part(NamedTuple):
    """The factors of one part, and which of the parameter's it is."""

    at: int
    down: str
    up: str


def add_experts(
    pairs: Pairs, module: str, parts: int, found: Sequence[Part], scaling: Callable[[int], float | None]
) -> None:
    """The adapter of a parameter of `parts` parts, or what is wrong with it. A factor that all experts share has 1 for
    E. scaling: of a rank."""
    keys = [key for part in found for key in (part.down, part.up)]
    downs, ups = ([pairs.shape(key) for key in each] for each in ([p.down for p in found], [p.up for p in found]))
    fits = all(len(a) == len(b) == 3 and a[1] == b[2] for a, b in zip(downs, ups, strict=True))
    experts = {shape[0] for shape in (*downs, *ups) if shape[:1] != (1,)} or {1}
    if not fits or max(map(len, (experts, {a[2] for a in downs}, {b[1] for b in ups}))) > 1:
        got = "; ".join(map(str, (*downs, *ups)))
        pairs.skip(keys, "RANK_MISMATCH", "the experts' factors do not multiply", module=module, got=got)
        return
    if wrong := [key for key in keys if pairs.header.tensors[key].dtype not in FLOATS]:
        got = pairs.header.tensors[wrong[0]].dtype
        pairs.skip(keys, "DTYPE_UNEXPECTED", "a factor of experts", module=module, wanted=", ".join(FLOATS), got=got)
        return
    (count,), scalings = experts, {scaling(a[1]) for a in downs}
    A, B = [part.down for part in found], [part.up for part in found]
    made = partial(_up, count, parts, tuple(part.at for part in found), False)
    pairs.adapters[module] = AdapterLayout(
        module=module,
        kind="lora",
        stored="experts",
        slots={"A": Slot(A[0], also=tuple(A[1:]), made=partial(_down, count)),
               "B": Slot(B[0], also=tuple(B[1:]), made=made)},
        ranks={"update": sum(a[1] for a in downs)},
        out_features=parts * ups[0][1],
        in_features=downs[0][2],
        dtype=pairs.header.tensors[A[0]].dtype,
        scaling=scalings.pop() if len(scalings) == 1 else None,
        experts=count,
        blocked=("A", "B"),
        divisor=downs[0][1],
        numbers=(*A[1:], *B[1:]),
    )  # fmt: skip


def alternating(entry: AdapterLayout) -> AdapterLayout:
    """The entry with the rows of its parts in turn, gate, up, gate, up …, as gpt-oss has them."""
    slot = entry.slots["B"]
    assert isinstance(slot.made, partial)
    count, parts, where, _ = slot.made.args
    made = partial(_up, count, parts, where, True)
    return replace(entry, slots={**entry.slots, "B": slot._replace(made=made)})


def _down(experts: int, *each: "Tensor") -> "Tensor":
    """(E·Σr, in) of (E, r, in)."""
    return _together([factor.expand(experts, -1, -1) for factor in each], 1).flatten(0, 1)


def _up(experts: int, parts: int, where: Sequence[int], in_turn: bool, *each: "Tensor") -> "Tensor":
    """(parts·out, E·Σr) of (E, out, r): each in the rows of its own part, the others zero."""
    _, out, _ = each[0].shape
    padded = []
    for at, up in zip(where, each, strict=True):
        whole = up.new_zeros(experts, parts, out, up.shape[2])
        whole[:, at] = up
        padded.append((whole.transpose(1, 2) if in_turn else whole).flatten(1, 2))
    return _together(padded, 2).transpose(0, 1).flatten(1)


def _together(each: "Sequence[Tensor]", along: int) -> "Tensor":
    import torch

    return torch.cat(list(each), along)


def by_parameter(groups: Mapping[str, Mapping[str, Part]]) -> Iterator[tuple[str, int, list[Part]]]:
    """Block of experts -> its parts by name, as parameters: name, how many parts it has, those that are there."""
    for block, parts in groups.items():
        for parameter, leaves in PARTS.items():
            if found := [parts[leaf]._replace(at=at) for at, leaf in enumerate(leaves) if leaf in parts]:
                yield f"{block}.{parameter}", len(leaves), found
