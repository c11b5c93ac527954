"""How merges go wrong: for each usual fault, the weight that it makes of a base weight and an adapter.

In the form of recipes: a fault that gives the file's bits is the fault that was made. An entry may give None where it
does not apply (a rectangular weight has no transposed delta) and several weights where it has several sizes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.vectors import Triple
from d2surgery.files.tensors import rounded
from d2surgery.formats.layout import AdapterLayout
from d2surgery.kinds import TABLE


@dataclass(frozen=True)
class Case:
    """One weight, or a block of it, laid out (out_features, in_features), in the dtype of the work."""

    module: str
    base: Tensor
    adapter: Adapter  # of the whole weight
    part: Callable[[Adapter], Adapter]  # what of such an adapter lands in the block
    triple: Callable[[Adapter], Triple | None]  # of vectors that reach beyond the block; None: there are none
    strength: float
    entry: AdapterLayout
    base_config: Mapping[str, Any]
    dtype: torch.dtype  # of the merged file
    repacked: Adapter | None = None  # where experts share factors: the same with its columns taken in the other order

    @cached_property
    def delta(self) -> Tensor:
        return self.delta_of(self.adapter)

    @cached_property
    def right(self) -> Tensor:
        """The weight that a right merge rounds."""
        return self.base + self.delta

    def delta_of(self, adapter: Adapter) -> Tensor:
        return self.part(adapter).delta(self.base, self.triple(adapter)) * self.strength

    def with_(self, adapter: Adapter) -> Tensor:
        return self.base + self.delta_of(adapter)


class Named(NamedTuple):
    """One hypothesis about a weight: its code, in words what was done, and the effective weight that it would give."""

    code: str
    what: str
    weight: Callable[[], Tensor]


Fault = Callable[[Case], Iterator[Named]]


def hypotheses(case: Case) -> Iterator[Named]:
    """Every fault that could have been made here, the plainest first."""
    for fault in GENERAL + FAULTS.get(case.adapter.kind, (_scaled_again, _scaling)) + LAST:
        yield from fault(case)


def _strength(case: Case) -> Iterator[Named]:
    yield Named("DELTA_NOT_APPLIED", "the base, without the adapter", lambda: case.base)
    yield Named("SIGN_FLIPPED", "the delta was subtracted", lambda: case.base - case.delta)
    yield Named("DELTA_APPLIED_TWICE", "the delta counts twice", lambda: case.base + 2 * case.delta)


def _merged_twice(case: Case) -> Iterator[Named]:
    """A merged checkpoint taken for the base: its values were rounded once in between."""

    def again() -> Tensor:
        return _again(case, rounded(case.right, case.dtype).to(case.base.dtype))

    yield Named("DELTA_APPLIED_TWICE", "merged onto a checkpoint that held the delta already", again)


def _again(case: Case, once: Tensor) -> Tensor:
    return once + case.part(case.adapter).delta(once) * case.strength


def scalings(case: Case) -> dict[str, float]:
    """What usually stands in the place of the scaling, and which factor too much that is."""
    s = float(case.adapter.scaling)
    wrong = dict(case.entry.misread) | {"1, no scaling": 1.0, "the scaling squared": s * s}
    wrong["1/the scaling"] = 1 / s if s else 0.0
    return {what: value / s for what, value in wrong.items() if s and abs(value / s - 1) > 1e-6}


def _scaling(case: Case) -> Iterator[Named]:
    for what, factor in scalings(case).items():
        other = replace(case.adapter, scaling=case.adapter.scaling * factor)
        yield Named("WRONG_STRENGTH", what, lambda other=other: case.with_(other))  # type: ignore[misc]


def _scaled_again(case: Case) -> Iterator[Named]:
    """The kinds that are not linear in their scaling."""
    for code, what, factor in (
        ("SIGN_FLIPPED", "negated", -1.0),
        ("DELTA_APPLIED_TWICE", "doubled", 2.0),
        ("WRONG_STRENGTH", "halved", 0.5),
    ):
        other = replace(case.adapter, scaling=case.adapter.scaling * factor)
        yield Named(code, f"the update was {what}", lambda other=other: case.with_(other))  # type: ignore[misc]


def _transposed(case: Case) -> Iterator[Named]:
    adapter = case.adapter
    if adapter.out_features != adapter.in_features:
        return
    slots, turned = adapter.slots(), dict[str, Any]()
    for group in TABLE[adapter.kind].groups.values():
        turned |= {group.down: slots[group.up].T, group.up: slots[group.down].T}
    other = replace(adapter, **turned)
    yield Named("DELTA_TRANSPOSED", "the update was transposed", lambda: case.with_(other))


def _packing(case: Case) -> Iterator[Named]:
    if (other := case.repacked) is not None:
        was, read = ("grouped", "interleaved") if case.entry.packed == "interleaved" else ("interleaved", "grouped")
        yield Named("EXPERT_LAYOUT", f"lora_B was merged {was}; here it is read {read}", lambda: case.with_(other))


# DoRA ------------------------------------------------------------------------------------------------------------


def _magnitude(case: Case) -> Iterator[Named]:
    dora = case.adapter
    assert isinstance(dora, DoRA)
    plain = LoRA(A=dora.A, B=dora.B, scaling=dora.scaling)
    yield Named("MAGNITUDE_DROPPED", "merged as LoRA, without its magnitude", lambda: case.with_(plain))
    bare = replace(dora, B=torch.zeros_like(dora.B))
    yield Named("BRANCH_MISSING", "the magnitude alone, without the low-rank update", lambda: case.with_(bare))
    other: Axis = "in_features" if dora.along == "out_features" else "out_features"
    if dora.out_features == dora.in_features:
        turned = replace(dora, along=other)
        yield Named("WRONG_AXIS", f"magnitude and norm along {other}", lambda: case.with_(turned))

    def by_base_norm() -> Tensor:
        here = case.part(dora)
        assert isinstance(here, DoRA)
        dim, shape = (1, (-1, 1)) if dora.along == "out_features" else (0, (1, -1))
        norms: Tensor = case.base.norm(dim=dim, keepdim=True)
        return case.with_(plain) * here.magnitude.to(case.base.dtype).view(shape) / norms

    def untrained() -> Tensor:
        here, sums = case.part(dora), case.triple(dora)
        assert isinstance(here, DoRA)
        norms = sums.base.sqrt() if sums else case.base.norm(dim=1 if dora.along == "out_features" else 0)
        return (
            case.base + replace(here, magnitude=norms.to(here.magnitude.dtype)).delta(case.base, sums) * case.strength
        )

    yield Named("MAGNITUDE_DROPPED", "divided by the norm of the base, not of base plus update", by_base_norm)
    yield Named("MAGNITUDE_DROPPED", "its magnitudes are the norms of the base, as before training", untrained)


def _dora_twice(case: Case) -> Iterator[Named]:
    def again() -> Tensor:
        return _again(case, case.right)

    yield Named("DELTA_APPLIED_TWICE", "merged onto the merged weight", again)


# D2-LoRA ---------------------------------------------------------------------------------------------------------


def _branches(case: Case) -> Iterator[Named]:
    d2 = case.adapter
    assert isinstance(d2, D2LoRA)
    no_plus = replace(d2, B_plus=torch.zeros_like(d2.B_plus))
    other: Axis = "in_features" if d2.along == "out_features" else "out_features"
    changes = (
        ("BRANCH_MISSING", "the minus branch is missing", replace(d2, tau=0.0)),
        ("BRANCH_MISSING", "the plus branch is missing", no_plus),
        ("SIGN_FLIPPED", "the minus branch was added", replace(d2, tau=-d2.tau)),
        ("WRONG_STRENGTH", "tau was ignored (1)", replace(d2, tau=1.0)),
        ("WRONG_AXIS", f"projected along {other}", replace(d2, along=other)),
        *(
            ("PROJECTION_MISSING", _FORMS[form], replace(d2, form=form))  # type: ignore[arg-type]
            for form in _FORMS
            if form != d2.form
        ),
    )
    for code, what, changed in changes:
        yield Named(code, what, lambda changed=changed: case.with_(changed))  # type: ignore[misc]
    if d2.form == "projected_plus_update":
        doubled = replace(d2, form="update", scaling=2 * d2.scaling)
        yield Named("PROJECTION_MISSING", "the update counts twice, unprojected", lambda: case.with_(doubled))


_FORMS = {
    "projected": "the projected weight alone, without the update after it",
    "update": "the update alone, without the projection",
    "projected_plus_update": "projected, and the update added once more",
}


# Dual LoRA -------------------------------------------------------------------------------------------------------


def _direction(case: Case) -> Iterator[Named]:
    dual = case.adapter
    assert isinstance(dual, DualLoRA)
    ones = {"C": torch.ones_like(dual.C[:1]), "D": torch.ones_like(dual.D[:, :1])}
    unsigned = replace(dual, **ones)  # type: ignore[arg-type]
    yield Named("DIRECTION_MISSING", "every sign is +1: the direction group is missing", lambda: case.with_(unsigned))
    swapped = replace(dual, A=dual.C, B=dual.D, C=dual.A, D=dual.B)
    yield Named("DIRECTION_MISSING", "magnitude and direction group are swapped", lambda: case.with_(swapped))
    dead_rows, dead_columns = ~dual.D.any(1), ~dual.C.any(0)
    if dead_rows.any() or dead_columns.any():
        B, A = dual.B.masked_fill(dead_rows[:, None], 0), dual.A.masked_fill(dead_columns[None], 0)
        zeroed = replace(dual, A=A, B=B)
        yield Named("DIRECTION_MISSING", "torch.sign, which is 0 at 0, instead of −1", lambda: case.with_(zeroed))
    plain = LoRA(A=dual.A, B=dual.B, scaling=dual.scaling)
    yield Named("DIRECTION_MISSING", "merged as LoRA, without ReLU and sign", lambda: case.with_(plain))
    yield Named("DIRECTION_MISSING", "the ReLU is missing", lambda: case.base + _unclipped(case, dual))


def _unclipped(case: Case, dual: DualLoRA) -> Tensor:
    """s·BA ⊙ sign(DC) = s·ReLU(BA) ⊙ sign − s·ReLU(−BA) ⊙ sign."""
    return case.delta_of(dual) - case.delta_of(replace(dual, B=-dual.B))


# Rows in another order -------------------------------------------------------------------------------------------


def _heads(case: Case) -> Iterator[Named]:
    """Rotary embeddings in halves (transformers) or interleaved (the original Llama): rows of q and k, per head."""
    size = head_size(case)
    if size is None or case.base.shape[0] % size or size % 2:
        return
    rows = torch.arange(case.base.shape[0])
    order = rows.view(-1, 2, size // 2).transpose(1, 2).reshape(-1)
    for turned, words in ((order, "from halves to interleaved"), (order.argsort(), "from interleaved to halves")):
        what = f"rows of each head permuted {words}"
        yield Named(
            "HEADS_PERMUTED", f"{what}, in the delta",
            lambda turned=turned: case.base + case.delta[turned],  # type: ignore[misc]
        )  # fmt: skip
        yield Named(
            "HEADS_PERMUTED", f"{what}, in base and delta",
            lambda turned=turned: case.right[turned],  # type: ignore[misc]
        )  # fmt: skip


def head_size(case: Case) -> int | None:
    """Rows per attention head of a query or key weight; None for another module."""
    if not case.module.endswith(("q_proj", "k_proj", "query", "key", ".q", ".k", "wq", "wk")):
        return None
    text = case.base_config.get("text_config")
    config = {**case.base_config, **(text if isinstance(text, Mapping) else {})}
    size, heads, hidden = (config.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if not size and heads and hidden:
        size = hidden // heads
    return size if isinstance(size, int) else None


GENERAL: tuple[Fault, ...] = (_strength, _merged_twice)
FAULTS: dict[str, tuple[Fault, ...]] = {  # of a kind; what is not listed may be wrong by its scaling
    "lora": (_packing, _scaling),
    "dora": (_magnitude, _scaled_again, _scaling, _dora_twice),
    "duallora": (_direction, _scaling),
    "d2lora": (_branches, _scaled_again, _scaling, _dora_twice),
}
LAST: tuple[Fault, ...] = (_transposed, _heads)
