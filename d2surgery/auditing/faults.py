"""How merges go wrong: for each usual fault, the weight that it makes of a base weight and an adapter.

In the form of recipes: a fault that gives the file's bits is the fault that was made. An entry may give None where it
does not apply (a rectangular weight has no transposed delta) and several weights where it has several sizes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from d2surgery.adapters import D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.auditing.case import Case, Fault, Named
from d2surgery.auditing.orders import fused, heads, misplaced
from d2surgery.files.tensors import rounded
from d2surgery.formats.layout import alpha_divisor
from d2surgery.kinds import TABLE
from d2surgery.measures.fidelity import bits

_RANKS = 8  # of other modules, each a rank by which a merger may have divided alpha
_JOINED = (3, 4)  # query, key and value; those and an MLP: sd-scripts multiplies the rank, not alpha


def hypotheses(case: Case) -> Iterator[Named]:
    """Every fault that could have been made here, the plainest first."""
    for fault in GENERAL + FAULTS.get(case.adapter.kind, (_scaled_again, _scaling)) + LAST:
        yield from fault(case)


def _strength(case: Case) -> Iterator[Named]:
    for what, factor in strengths(case).items():
        yield Named("WRONG_STRENGTH", what, lambda factor=factor: case.base + factor * case.delta)  # type: ignore[misc]
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


def _cut_off(case: Case) -> Iterator[Named]:
    """The lower bits of a float32 dropped, as where its upper half is taken for a bfloat16.

    Of 16 bits only: in float32 norms of a DoRA that are half a unit too large, as sums in another order may be, do the
    same to every value of a row, and all rows of a small weight may err alike.
    """
    if case.dtype.itemsize > 2:
        return

    def toward_zero() -> Tensor:
        near = rounded(case.right, case.dtype)
        above = near.to(case.right.dtype).abs() > case.right.abs()
        nearer = bits(near) - above.to(bits(near).dtype)  # sign and size: one less is the next toward zero
        return nearer.view(case.dtype).to(case.right.dtype)

    yield Named("BITS_CUT_OFF", "every value is rounded toward zero", toward_zero)


def scalings(case: Case) -> dict[str, float]:
    """What usually stands in the place of the scaling, and which factor too much that is."""
    s, rank = float(case.adapter.scaling), float(case.entry.divisor or alpha_divisor(case.entry.ranks))
    if not s:
        return {}
    none = "1, no scaling: its alpha of 1 was forgotten" if abs(s * rank - 1) < 1e-6 and rank > 1 else "1, no scaling"
    alpha = {} if "alpha" in case.entry.misread else {"alpha, not divided by the rank": s * rank}
    wrong = {**case.entry.misread, none: 1.0, **alpha, "1/r, an alpha of 1": 1 / rank, "the scaling squared": s * s}
    wrong |= {f"alpha over another module's rank, {other}": s * rank / other for other in sorted(case.ranks)[:_RANKS]}
    wrong |= {f"alpha over {n} times the rank, as of joined modules": s / n for n in _JOINED}
    alike: dict[str, dict[str, float]] = {}
    for what, value in (wrong | {"1/the scaling": 1 / s}).items():
        if abs(value / s - 1) > 1e-6:
            alike.setdefault(f"{value / s:.9g}", {})[what] = value / s
    return {" or ".join(words): next(iter(words.values())) for words in alike.values()}


def strengths(case: Case) -> dict[str, float]:
    """What became of a strength other than 1, and which factor too much that is."""
    if case.strength in (0, 1):
        return {}
    return {"the strength counts twice, once per factor": case.strength, "the strength was ignored": 1 / case.strength}


def _scaling(case: Case) -> Iterator[Named]:
    for what, factor in scalings(case).items():
        yield Named("WRONG_STRENGTH", what, lambda factor=factor: _scaled(case, factor))  # type: ignore[misc]


def _scaled(case: Case, factor: float) -> Tensor:
    if not case.adapter.normalises:
        return case.base + factor * case.delta
    return case.with_(replace(case.adapter, scaling=case.adapter.scaling * factor))


def _inside_the_norm(case: Case) -> Iterator[Named]:
    if case.strength == 1:
        return
    weaker = replace(case.adapter, scaling=case.adapter.scaling * case.strength)
    what = "the strength scaled the update before the norm, as PEFT and diffusers do"
    yield Named("STRENGTH_OF_A_PART", what, lambda: case.base + case.whole(weaker))
    if (dora := case.adapter).kind == "dora":
        plain = _without_magnitude(case)
        what = "the strength scaled the magnitude's gain alone, as LyCORIS does"
        yield Named(
            "STRENGTH_OF_A_PART",
            what,
            lambda: case.base + torch.lerp(case.whole(plain), case.whole(dora), case.strength),
        )


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
    dora, plain = case.adapter, _without_magnitude(case)
    assert isinstance(dora, DoRA)
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

    what = "divided by the norm of the base, not of base plus update, as ComfyUI does"
    yield Named("MAGNITUDE_DROPPED", what, by_base_norm)
    yield Named("MAGNITUDE_DROPPED", "its magnitudes are the norms of the base, as before training", untrained)


def _without_magnitude(case: Case) -> LoRA:
    dora = case.adapter
    assert isinstance(dora, DoRA)
    return LoRA(A=dora.A, B=dora.B, scaling=dora.scaling)


def _unscaled(case: Case) -> Iterator[Named]:
    other = replace(case.adapter, scaling=1.0)
    if case.adapter.scaling != 1:
        yield Named("WRONG_STRENGTH", "1, no scaling, as AdapterHub merges DoRA", lambda: case.with_(other))


def _low_norm(case: Case) -> Iterator[Named]:
    """LyCORIS adds the epsilon of the dtype in which it merges to the norm: in bfloat16 1/128, much of a row."""
    dora, low = case.part(case.adapter), case.dtype
    assert isinstance(dora, DoRA)
    if case.triple(case.adapter) is not None or low.itemsize > 2:
        return

    def merged() -> Tensor:
        dim = 1 if dora.along == "out_features" else 0
        both = case.base.to(low) + (dora.B.to(low) @ dora.A.to(low)) * dora.scaling
        norm = both.norm(dim=dim, keepdim=True) + torch.finfo(low).eps
        gain: Tensor = dora.magnitude.to(low).view_as(norm) / norm
        return (both * gain).to(case.base.dtype)

    yield Named("MAGNITUDE_DROPPED", "a 16-bit epsilon was added to its norm, as LyCORIS merges in 16 bits", merged)


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


GENERAL: tuple[Fault, ...] = (_strength, _merged_twice, _cut_off)
FAULTS: dict[str, tuple[Fault, ...]] = {  # of a kind; what is not listed may be wrong by its scaling
    "lora": (_packing, _scaling),
    "dora": (_magnitude, _low_norm, _scaled_again, _unscaled, _scaling, _inside_the_norm, _dora_twice),
    "duallora": (_direction, _scaling),
    "d2lora": (_branches, _scaled_again, _scaling, _inside_the_norm, _dora_twice),
}
LAST: tuple[Fault, ...] = (_transposed, heads, fused, misplaced)
