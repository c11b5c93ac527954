"""The four kinds against their formulas written by hand in float64 numpy, values and gradients."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError, install_import_hook
from jaxtyping import config as jaxtyping_config
from torch import Tensor

from d2surgery.errors import D2SurgeryError

with install_import_hook(
    ["d2surgery.adapters", "d2surgery.adapters.forwards", "d2surgery.adapters.lowrank"], "beartype.beartype"
):
    from d2surgery.adapters import KINDS, Adapter, D2LoRA, DoRA, DualLoRA, LoRA
    from d2surgery.adapters.adapter import Part
    from d2surgery.adapters.duallora import Formed
    from d2surgery.adapters.thin import Streamed
    from d2surgery.adapters.vectors import Triple

Slots = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
Array = np.ndarray[Any, np.dtype[np.float64]]
F32, F64 = torch.float32, torch.float64

SLOTS = {
    "lora": ("A", "B"),
    "dora": ("A", "B", "magnitude"),
    "duallora": ("A", "B", "C", "D"),
    "d2lora": ("A_plus", "B_plus", "A_minus", "B_minus"),
}
AXES = ("out_features", "in_features")
FORMS = ("projected_plus_update", "projected", "update")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "duallora": ("duallora", {}),
    **{f"dora-{axis}": ("dora", {"along": axis}) for axis in AXES},
    **{f"d2lora-{axis}-{form}": ("d2lora", {"along": axis, "form": form}) for axis in AXES for form in FORMS},
}
NORMALISING = [name for name in CASES if name.startswith("dora") or (name.startswith("d2lora") and "projected" in name)]
every_case = pytest.mark.parametrize("case", CASES)


# ---- the formulas by hand -------------------------------------------------------------------------------------------


def norms(M: Array, along: str) -> Array:
    """One norm per row, kept as a column, or one per column, kept as a row."""
    squares: Array = (M * M).sum(axis=1 if along == "out_features" else 0, keepdims=True)
    return np.sqrt(squares)


def product(kind: str, slots: Slots, s: float, tau: float = 0.5) -> Array:
    if kind == "d2lora":
        return s * (slots["B_plus"] @ slots["A_plus"] - tau * (slots["B_minus"] @ slots["A_minus"]))
    return s * (slots["B"] @ slots["A"])


def by_hand(
    kind: str,
    W0: Array,
    slots: Slots,
    s: float,
    along: str = "",
    form: str = "",
    tau: float = 0.5,
    frozen: Slots | None = None,
) -> Array:
    """The effective weight W'; `frozen` are the slots by which norms and signs are taken (detached ones)."""
    frozen = slots if frozen is None else frozen
    if kind == "duallora":
        sign = np.where(frozen["D"] @ frozen["C"] > 0, 1.0, -1.0)
        return W0 + s * np.maximum(slots["B"] @ slots["A"], 0) * sign
    V = W0 + product(kind, slots, s, tau)
    V_frozen = W0 + product(kind, frozen, s, tau)
    if kind == "lora" or form == "update":
        return V
    if kind == "dora":
        m = slots["magnitude"]
        return (m[:, None] if along == "out_features" else m[None, :]) * V / norms(V_frozen, along)
    projected = V * norms(W0, along) / norms(V_frozen, along)
    return projected if form == "projected" else projected + product(kind, slots, s, tau)


# ---- adapters with random slots -------------------------------------------------------------------------------------


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def base(out: int = 7, in_: int = 11, seed: int = 1) -> Tensor:
    return random(out, in_, seed=seed)


def make(case: str, out: int = 7, in_: int = 11, rank: int = 3, size: float = 0.5, **fields: Any) -> Adapter:
    """An adapter with every slot random; the second branch one rank higher, so that no rank is taken for another."""
    kind, chosen = CASES[case]
    slots: dict[str, Any] = {}
    for seed, name in enumerate(SLOTS[kind], start=2):
        r = rank + (name in ("C", "D") or name.endswith("minus"))
        shape = (r, in_) if name[0] in "AC" else (out, r)
        if name == "magnitude":
            slots[name] = 1 + random(out if chosen["along"] == "out_features" else in_, seed=seed).abs()
        else:
            slots[name] = random(*shape, seed=seed, size=size)
    return KINDS[kind](**slots, **{"scaling": 0.75, **chosen, **fields})


def arrays(adapter: Adapter) -> Slots:
    return {name: slot.detach().double().numpy() for name, slot in adapter.slots().items()}


def expected(case: str, adapter: Adapter, W0: Tensor, **changes: Any) -> Tensor:
    kind, chosen = CASES[case]
    s = adapter.scaling
    tau = adapter.tau if isinstance(adapter, D2LoRA) else 0.5
    return torch.from_numpy(
        by_hand(
            kind, W0.detach().double().numpy(), **{"slots": arrays(adapter), "s": s, "tau": tau, **chosen, **changes}
        )
    )


def learning(adapter: Adapter) -> Adapter:
    return replace(adapter, **{k: v.detach().clone().requires_grad_() for k, v in adapter.slots().items()})


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


# ---- values ---------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("slot_dtype", [torch.bfloat16, torch.float16, F32, F64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 5e-6), (F64, 1e-13)])
def test_base_plus_delta_is_the_formula(
    case: str, slot_dtype: torch.dtype, dtype: torch.dtype, tolerance: float
) -> None:
    adapter, W0 = make(case).to(dtype=slot_dtype), base().to(dtype)
    for tile in (W0, W0.T.contiguous().T):
        delta = adapter.delta(tile)
        assert delta.dtype == dtype
        assert delta.stride() == tile.stride()
        assert_same(tile + delta, expected(case, adapter, W0), tolerance)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("d2lora")])
def test_tau_weighs_the_negative_branch(case: str, tau: float) -> None:
    adapter, W0 = make(case, tau=tau), base()
    assert_same(W0 + adapter.delta(W0), expected(case, adapter, W0))


@every_case
def test_update_is_the_product_before_any_normalisation(case: str) -> None:
    adapter, (kind, _) = make(case), CASES[case]
    update = adapter.update()
    if kind == "duallora":
        assert update is None
    else:
        assert update is not None
        assert_same(update.dense(), torch.from_numpy(product(kind, arrays(adapter), float(adapter.scaling))))


def test_a_scaling_that_sixteen_bits_cannot_hold_is_not_rounded_into_them() -> None:
    adapter = replace(make("lora").to(dtype=torch.bfloat16), scaling=1 / 3)
    update = adapter.update()
    assert update is not None
    exact = torch.from_numpy(product("lora", arrays(adapter), 1 / 3))
    assert_same(update.dense(), exact, 1e-15)
    assert_same(adapter.delta(base()), exact, 1e-15)


def test_the_projection_returns_every_vector_to_its_norm() -> None:
    """Proposition 2 of the D2 paper: W* keeps the norms of W0."""
    W0 = base()
    for axis, dim in (("out_features", 1), ("in_features", 0)):
        projected = W0 + make(f"d2lora-{axis}-projected").delta(W0)
        torch.testing.assert_close(projected.norm(dim=dim), W0.norm(dim=dim), rtol=1e-14, atol=0)


def test_a_small_update_keeps_its_digits_through_the_projection() -> None:
    """c − 1 is formed without 1 − 1: a 1e-9 update has a delta right to eight digits, not none, in float64."""
    case = "d2lora-in_features-projected"
    adapter, W0 = make(case, size=1e-5), base()
    update = adapter.update()
    assert update is not None
    u, w = update.dense(), W0
    tangential = u - w * ((w * u).sum(0) / (w * w).sum(0))  # first order of the projection
    assert float((adapter.delta(W0) - tangential).norm() / tangential.norm()) < 1e-8


def test_sign_of_zero_is_minus_one() -> None:
    adapter = make("duallora")
    assert isinstance(adapter, DualLoRA)
    D = adapter.D.clone()
    D[2], D[4] = 0.0, -0.0
    adapter = replace(adapter, D=D)
    W0 = base()
    size = (0.75 * (adapter.B @ adapter.A)).relu()
    for delta in (adapter.delta(W0), learning(adapter).delta(W0).detach(), adapter.delta(W0.float())):
        assert_same(delta[[2, 4]], -size[[2, 4]], 1e-6)


def test_signs_are_formed_in_float64() -> None:
    """1 + 2⁻²⁵ − 1 is zero in float32 and positive in truth."""
    C = torch.tensor([[1.0], [2.0**-25], [-1.0]])
    adapter = DualLoRA(A=torch.ones(1, 1), B=torch.ones(1, 1), C=C, D=torch.ones(1, 3), scaling=1.0)
    assert adapter.delta(torch.zeros(1, 1)).item() == 1.0


def test_signs_of_random_factors_are_those_of_float64() -> None:
    adapter, W0 = make("duallora", 64, 96, 8).to(dtype=F32), base(64, 96).float()
    exact = expected("duallora", adapter, W0) - W0.double()
    assert (adapter.delta(W0).sign() == exact.sign()).all()


# ---- initial values -------------------------------------------------------------------------------------------------


def initial(case: str, W0: Tensor, **options: Any) -> Adapter:
    kind, chosen = CASES[case]
    options = {"along": chosen["along"], **options} if kind == "dora" else options
    start = KINDS[kind].init(W0, rank=4, scaling=2.0, generator=torch.Generator().manual_seed(5), **options)
    return replace(start, **chosen)


@pytest.mark.parametrize("case", [name for name in CASES if name != "duallora"])
def test_the_initial_delta_is_zero(case: str) -> None:
    """Dual LoRA is left out: zero factors would stop ReLU's gradient, so its warm-up scaling starts at zero instead."""
    W0 = base()
    assert (initial(case, W0, dtype=F64).delta(W0) == 0).all()
    assert float(initial(case, W0.float()).delta(W0.float()).abs().max()) < 3e-7


def test_dual_lora_starts_at_zero_by_its_scaling_alone() -> None:
    adapter = initial("duallora", base())
    assert (adapter.delta(base()) != 0).any()
    assert (replace(adapter, scaling=0.0).delta(base()) == 0).all()


def test_initial_factors_have_the_stated_distributions() -> None:
    W0 = base(300, 400)
    lora, d2, dual = (
        initial("lora", W0),
        initial("d2lora-in_features-projected", W0),
        initial("duallora", W0, sigma=0.1),
    )
    assert isinstance(lora, LoRA)
    assert isinstance(d2, D2LoRA)
    assert isinstance(dual, DualLoRA)
    for A in (lora.A, d2.A_plus):
        kaiming = torch.nn.init.kaiming_uniform_(torch.empty(4, 400), a=5**0.5)
        assert 0.99 / 20 < float(A.abs().max()) <= 1 / 20
        assert float(A.std() / kaiming.std()) == pytest.approx(1, abs=0.08)
    assert float(d2.A_minus.std()) == pytest.approx(0.02, rel=0.08)
    for slot in dual.slots().values():
        assert float(slot.std()) == pytest.approx(0.1, rel=0.08)
    assert (lora.B == 0).all()
    assert (d2.B_plus == 0).all()
    assert (d2.B_minus == 0).all()


@every_case
def test_the_same_generator_gives_the_same_start(case: str) -> None:
    W0 = base()
    one, two = initial(case, W0), initial(case, W0)
    assert all(torch.equal(slot, two.slots()[name]) for name, slot in one.slots().items())
    assert all(slot.dtype == F32 for slot in one.slots().values())
    assert (one.out_features, one.in_features) == (7, 11)


# ---- forward --------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(11,), (5, 11), (2, 3, 11), (0, 11)])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_is_the_linear_map_of_the_effective_weight(case: str, shape: tuple[int, ...], biased: bool) -> None:
    adapter, W0, x = make(case), base(), random(*shape, seed=20)
    bias = random(7, seed=21) if biased else None
    for weight in (W0, W0.T.contiguous().T):
        y = adapter.forward(x, weight, bias)
        torch.testing.assert_close(y, F.linear(x, W0 + adapter.delta(W0), bias), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, F.linear(x, expected(case, adapter, W0), bias), rtol=1e-12, atol=1e-12)


@every_case
def test_the_update_alone_sees_the_update_input(case: str) -> None:
    """W' = (W' − b⊙ΔW) + b⊙ΔW: the first sees x, the second the dropped-out input."""
    kind, chosen = CASES[case]
    adapter, W0, bias = make(case), base(), random(7, seed=21)
    x, u = random(5, 11, seed=20), random(5, 11, seed=22)
    W, whole = W0.numpy(), expected(case, adapter, W0).numpy()
    if kind == "duallora" or not adapter.normalises:
        on_base = W
    else:
        V = W + product(kind, arrays(adapter), float(adapter.scaling))
        m = adapter.slots()["magnitude"].numpy() if kind == "dora" else norms(W, chosen["along"]).ravel()
        gain = m / norms(V, chosen["along"]).ravel()
        on_base = (gain[:, None] if chosen["along"] == "out_features" else gain) * W
    by_parts = x.numpy() @ on_base.T + u.numpy() @ (whole - on_base).T + bias.numpy()
    assert_same(adapter.forward(x, W0, bias, u), torch.from_numpy(by_parts))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_forward_keeps_the_dtype_of_the_model(case: str, dtype: torch.dtype) -> None:
    adapter, W0, x = make(case, size=0.1).to(dtype=F32), base().to(dtype), random(5, 11, seed=20).to(dtype)
    y = adapter.forward(x, W0, None, x)
    assert y.dtype == adapter.forward(x, W0).dtype == dtype
    exact = x.double() @ expected(case, adapter, W0).T
    assert_same(y, exact, 2e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- tiles ----------------------------------------------------------------------------------------------------------

TILES = {
    "rows": [(slice(0, 32), slice(None)), (slice(32, 70), slice(None))],
    "columns": [(slice(None), slice(0, 1)), (slice(None), slice(1, 64)), (slice(None), slice(64, 90))],
    "both": [(o, i) for o in (slice(0, 40), slice(40, 70)) for i in (slice(0, 33), slice(33, 90))],
}


def transposed(W: Tensor) -> Tensor:
    return W.T.contiguous().T


@every_case
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("view", [torch.Tensor.contiguous, transposed])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 3e-6), (F64, 1e-12)])
def test_tiles_add_up_to_the_whole(
    case: str, tiles: str, view: Callable[[Tensor], Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    adapter, W0 = make(case, 70, 90).to(dtype=dtype), view(base(70, 90).to(dtype))
    along = adapter.along or "out_features"
    kept = {"out_features": 0, "in_features": 1}[along]
    summed: dict[str, Triple] = {}
    for tile in TILES[tiles]:
        triple = adapter.take(out=tile[0], in_=tile[1]).triple(W0[tile])
        key = str(tile[kept])
        summed[key] = summed[key].plus(triple) if key in summed else triple
    whole = adapter.triple(W0)
    for at, part in enumerate(whole):
        assert part.dtype == F64
        assert_same(torch.cat([triple[at] for triple in summed.values()]), part, tolerance)
    delta = adapter.delta(W0, whole)
    assert_same(W0 + delta, expected(case, adapter, W0), tolerance)
    for tile in TILES[tiles]:
        part_of = adapter.take(out=tile[0], in_=tile[1])
        assert_same(part_of.delta(W0[tile], summed[str(tile[kept])]), delta[tile], tolerance)


@every_case
def test_take_cuts_each_slot_where_it_touches_the_axis(case: str) -> None:
    part = make(case).take(out=slice(2, 5), in_=slice(1, 9))
    assert (part.out_features, part.in_features) == (3, 8)
    assert part.along == make(case).along
    if isinstance(part, DoRA):
        assert part.magnitude.shape == (3 if part.along == "out_features" else 8,)


@every_case
@pytest.mark.parametrize("along", [None, *AXES])
def test_the_triple_is_three_sums_per_vector(case: str, along: Any) -> None:
    kind, _ = CASES[case]
    adapter, W0 = make(case), base()
    W = W0.numpy()
    u = expected(case, adapter, W0).numpy() - W if kind == "duallora" else product(kind, arrays(adapter), 0.75)
    dim = 0 if (along or adapter.along) == "in_features" else 1
    for got, want in zip(adapter.triple(W0, along), ((W * W), (W * u), (u * u)), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want.sum(dim)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 4096 + 7])
@pytest.mark.parametrize("view", [torch.Tensor.contiguous, transposed])
@pytest.mark.parametrize("along", AXES)
def test_float32_norms_are_right_to_their_last_digit(size: int, view: Callable[[Tensor], Tensor], along: Any) -> None:
    shape = (40, size) if along == "out_features" else (size, 40)
    W0 = view(random(*shape, seed=3, size=0.02).float())
    got = make("lora", *shape).triple(W0, along).base
    exact = W0.double().square().sum(1 if along == "out_features" else 0)
    error = (got / exact - 1).abs()
    assert float(error.max()) < 5e-7
    if size > 4000:
        assert float(error.square().mean().sqrt()) < 1e-8


@pytest.mark.parametrize("case", NORMALISING)
@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3])
def test_float32_gains_hold_where_base_and_update_nearly_cancel(case: str, left: float) -> None:
    """u = −w + left·noise: ‖w+u‖² is 1e-6 of its terms, where float32 sums have one digit."""
    _, chosen = CASES[case]
    adapter = make(case, 6, 6, 6, size=1.0).to(dtype=F32)
    update = adapter.update()
    assert update is not None
    W0 = (left * random(6, 6, seed=30) - update.dense()).float()
    V = W0.double() + update.dense()
    exact = V.square().sum(1 if chosen["along"] == "out_features" else 0)
    triple = adapter.triple(W0)
    squares = triple.base + 2 * triple.cross + triple.update
    assert float((squares / exact - 1).abs().max()) < 1e-5


# ---- vectors without length -----------------------------------------------------------------------------------------


def vector(M: Tensor, axis: str, at: int) -> Tensor:
    """A view of one vector along the axis."""
    return M.select(0 if axis == "out_features" else 1, at)


def with_zero(W0: Tensor, axis: str, at: int) -> Tensor:
    W0 = W0.clone()
    vector(W0, axis, at).zero_()
    return W0


def without_update(adapter: Adapter, axis: str, at: int) -> Adapter:
    """The update's vector `at` along the axis is zero."""
    cut: dict[str, Any] = adapter.slots()
    touched = [name for name in cut if name[0] == ("B" if axis == "out_features" else "A")]
    return replace(adapter, **cut | {name: with_zero(cut[name], axis, at) for name in touched})


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_dora_vector_of_length_zero_stays_zero_or_is_an_error_that_names_it(axis: Any, dtype: torch.dtype) -> None:
    adapter, W0 = without_update(make(f"dora-{axis}"), axis, 5), with_zero(base(), axis, 5).to(dtype)
    assert isinstance(adapter, DoRA)
    with pytest.raises(D2SurgeryError, match=rf"ZERO_NORM.*{axis}: 5") as raised:
        adapter.delta(W0)
    assert raised.value.problems[0].code == "ZERO_NORM"
    magnitude = adapter.magnitude.clone()
    magnitude[5] = 0
    effective = W0 + replace(adapter, magnitude=magnitude).delta(W0)
    assert (vector(effective, axis, 5) == 0).all()
    assert effective.isfinite().all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("form", ["projected_plus_update", "projected"])
def test_a_zero_vector_of_the_base_has_gain_zero_in_d2(axis: Any, form: str) -> None:
    adapter, W0 = make(f"d2lora-{axis}-{form}"), with_zero(base(), axis, 5)
    update = adapter.update()
    assert update is not None
    left = vector(update.dense(), axis, 5) * (form == "projected_plus_update")
    assert_same(vector(W0 + adapter.delta(W0), axis, 5), left)
    both_zero = without_update(adapter, axis, 5)
    assert (vector(both_zero.delta(W0), axis, 5) == 0).all()


@pytest.mark.parametrize("case", NORMALISING)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_an_update_that_cancels_the_base_is_an_error_that_names_it(case: str, dtype: torch.dtype) -> None:
    """Slots of small integers, so that both dtypes hold the update exactly."""
    axis, W0 = CASES[case][1]["along"], base()
    whole: dict[str, Any] = {name: slot.mul(4).round() for name, slot in make(case).slots().items()}
    adapter = replace(make(case, scaling=1.0), **whole)
    update = adapter.update()
    assert update is not None
    for at in (1, 4):
        vector(W0, axis, at).copy_(-vector(update.dense(), axis, at))
    with pytest.raises(D2SurgeryError, match=rf"ZERO_NORM.*{axis}: 1, 4"):
        adapter.delta(W0.to(dtype))


@pytest.mark.parametrize("case", NORMALISING)
def test_training_goes_on_past_a_vector_of_length_zero(case: str) -> None:
    axis = CASES[case][1]["along"]
    adapter, W0 = learning(without_update(make(case), axis, 5)), with_zero(base(), axis, 5)
    y = adapter.forward(random(4, 11, seed=20), W0)
    torch.autograd.backward(y.square().sum())
    assert y.isfinite().all()
    for slot in adapter.slots().values():
        assert slot.grad is not None
        assert slot.grad.isfinite().all()


@every_case
@pytest.mark.parametrize(("out", "in_"), [(1, 9), (9, 1), (1, 1)])
def test_a_single_row_column_or_number(case: str, out: int, in_: int) -> None:
    adapter, W0 = make(case, out, in_, rank=1), base(out, in_)
    assert_same(W0 + adapter.delta(W0), expected(case, adapter, W0))
    assert_same(adapter.forward(W0[:1], W0), W0[:1] @ expected(case, adapter, W0).T)


# ---- gradients ------------------------------------------------------------------------------------------------------


def numerical_gradient(loss: Callable[[Slots], float], slots: Slots, step: float = 1e-5) -> Slots:
    """Central differences, entry by entry."""

    def moved(name: str, at: tuple[int, ...], by: float) -> Slots:
        changed = slots[name].copy()
        changed[at] += by
        return {**slots, name: changed}

    return {
        name: np.array(
            [
                (loss(moved(name, at, step)) - loss(moved(name, at, -step))) / (2 * step)
                for at in np.ndindex(*slot.shape)
            ]
        ).reshape(slot.shape)
        for name, slot in slots.items()
    }


def gradients(adapter: Adapter, loss: Callable[[Adapter], Tensor]) -> dict[str, Tensor]:
    adapter = learning(adapter)
    torch.autograd.backward(loss(adapter))
    found = {name: slot.grad for name, slot in adapter.slots().items()}
    assert all(grad is not None for grad in found.values()), "a slot no gradient reaches"
    return {name: grad for name, grad in found.items() if grad is not None}


def the_two_losses(W0: Tensor, G: Tensor) -> Iterator[Callable[[Adapter], Tensor]]:
    """Σ G ⊙ W', through delta and through forward (the rows of the identity as x)."""
    yield lambda adapter: (G * (W0 + adapter.delta(W0))).sum()
    yield lambda adapter: (G.T * adapter.forward(torch.eye(W0.shape[1], dtype=F64), W0)).sum()


GRADIENT_CASES = [(case, False) for case in CASES if case != "duallora"]
GRADIENT_CASES += [(case, True) for case in CASES if case.startswith("d2lora")]


@pytest.mark.parametrize(("case", "detach_norm"), GRADIENT_CASES)
def test_gradients_are_those_of_the_formula(case: str, detach_norm: bool) -> None:
    """DoRA's norm is frozen (section 4.3 of its paper), D2's is differentiated unless detached."""
    kind, chosen = CASES[case]
    adapter = make(case, 4, 5, 2, **({"detach_norm": True} if detach_norm else {}))
    W0, G = base(4, 5), random(4, 5, seed=40)
    frozen = arrays(adapter) if detach_norm or kind == "dora" else None

    def loss(slots: Slots) -> float:
        return float(
            (G.numpy() * by_hand(kind, W0.numpy(), slots, float(adapter.scaling), frozen=frozen, **chosen)).sum()
        )

    wanted = numerical_gradient(loss, arrays(adapter))
    for ours in the_two_losses(W0, G):
        for name, grad in gradients(adapter, ours).items():
            assert_same(grad, torch.from_numpy(wanted[name]), 1e-8)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("d2lora")])
def test_a_detached_minus_branch_is_a_constant_of_the_same_value(case: str) -> None:
    adapter, W0, G = make(case, 4, 5, 2, detach_minus=True), base(4, 5), random(4, 5, seed=40)
    kind, chosen = CASES[case]
    slots = arrays(adapter)
    constant = {name: slot for name, slot in slots.items() if name in adapter.frozen}

    def loss(plus: Slots) -> float:
        return float((G.numpy() * by_hand(kind, W0.numpy(), {**constant, **plus}, 0.75, **chosen)).sum())

    wanted = numerical_gradient(loss, {name: slot for name, slot in slots.items() if name not in constant})
    assert set(constant) == {"A_minus", "B_minus"}
    assert torch.equal(adapter.delta(W0), make(case, 4, 5, 2).delta(W0))
    for ours in the_two_losses(W0, G):
        learnt = learning(adapter)
        torch.autograd.backward(ours(learnt))
        for name, slot in learnt.slots().items():
            if name in constant:
                assert slot.grad is None
            else:
                assert slot.grad is not None
                assert_same(slot.grad, torch.from_numpy(wanted[name]), 1e-8)


@pytest.mark.parametrize("case", [case for case in CASES if case != "duallora"])
def test_a_small_update_across_the_base_counts_as_often_as_is_said(case: str) -> None:
    """At the start of training, DoRA's magnitudes those of the base, and along each vector of it."""
    adapter, W0, axis = initial(case, W := base(), dtype=F64), W, CASES[case][1].get("along", "out_features")
    moved: dict[str, Any] = {name: 1e-7 * random(*slot.shape, seed=3) for name, slot in adapter.slots().items()
                             if name.startswith("B")}  # fmt: skip
    adapter = replace(adapter, **moved)
    update, delta = adapter.update(), adapter.delta(W0)
    assert update is not None
    dim = 1 if axis == "out_features" else 0
    across = [M - W0 * (M * W0).sum(dim, keepdim=True) / W0.square().sum(dim, keepdim=True)
              for M in (update.dense(), delta)]  # fmt: skip
    torch.testing.assert_close(across[1], adapter.first_order * across[0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("ste", ["clip", "mask", "identity"])
def test_dual_lora_passes_the_gradient_straight_through_its_sign(ste: Any) -> None:
    """dL/dD = z'·Cᵀ, dL/dC = Dᵀ·z', z' the incoming gradient dL/dsign = G ⊙ s·ReLU(BA) as `ste` lets it through."""
    adapter = make("duallora", 4, 5, 2, size=1.0, ste=ste)
    W0, G = base(4, 5), random(4, 5, seed=40, size=3.0)
    slots = arrays(adapter)
    z = slots["D"] @ slots["C"]
    incoming = G.numpy() * 0.75 * np.maximum(slots["B"] @ slots["A"], 0)
    through = {
        "clip": np.minimum(np.maximum(incoming, -1), 1),
        "mask": np.where(np.abs(z) <= 1, incoming, 0),
        "identity": incoming,
    }
    assert len({through[choice].tobytes() for choice in through}) == 3, "the example tells the choices apart"

    def loss(moved: Slots) -> float:
        return float((G.numpy() * by_hand("duallora", W0.numpy(), moved, 0.75, frozen=slots)).sum())

    wanted = numerical_gradient(loss, slots) | {"D": through[ste] @ slots["C"].T, "C": slots["D"].T @ through[ste]}
    for ours in the_two_losses(W0, G):
        for name, grad in gradients(adapter, ours).items():
            assert_same(grad, torch.from_numpy(wanted[name]), 1e-8)


@every_case
def test_no_gradient_is_lost_between_forward_and_delta(case: str) -> None:
    adapter, W0, bias = make(case), base(), random(7, seed=21)
    x, G = random(5, 11, seed=20), random(5, 7, seed=41)
    thin = gradients(adapter, lambda a: (G * a.forward(x, W0, bias)).sum())
    dense = gradients(adapter, lambda a: (G * F.linear(x, W0 + a.delta(W0), bias)).sum())
    for name, grad in thin.items():
        assert_same(grad, dense[name], 1e-12)


@every_case
def test_training_starts_with_finite_gradients(case: str) -> None:
    """At B = 0 the gradient of a QR would be NaN."""
    W0, x = base(), random(5, 11, seed=20)
    for name, grad in gradients(initial(case, W0, dtype=F64), lambda a: a.forward(x, W0).square().sum()).items():
        assert grad.isfinite().all()
        if name.startswith(("B", "magnitude", "D")):
            assert (grad != 0).any()


@pytest.mark.parametrize("case", NORMALISING)
def test_a_given_triple_changes_nothing(case: str) -> None:
    adapter, W0 = make(case), base()
    assert_same(adapter.delta(W0, adapter.triple(W0)), adapter.delta(W0), 1e-13)
    assert_same(learning(adapter).delta(W0).detach(), adapter.delta(W0), 1e-13)


@every_case
def test_mixed_precision_training_does_not_reach_norms_and_signs(case: str) -> None:
    adapter, W0 = make(case).to(dtype=F32), base().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter.forward(torch.ones(2, 11), W0).dtype == torch.bfloat16
        inside, triple = learning(adapter).delta(W0).detach(), adapter.triple(W0)
    assert_same(inside, adapter.delta(W0), 1e-6)
    for ours, theirs in zip(triple, adapter.triple(W0), strict=True):
        assert torch.equal(ours, theirs)


COMPILING = """
import sys, torch
from d2surgery.adapters import KINDS

torch.manual_seed(0)
W0, x = torch.randn(7, 11), torch.randn(5, 11)
for kind in KINDS:
    start = KINDS[kind].init(W0, rank=3, scaling=0.75)
    slots = {name: (slot + torch.randn_like(slot)).requires_grad_() for name, slot in start.slots().items()}
    forward = lambda slots, x: KINDS[kind](**slots, scaling=0.75).forward(x, W0)
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    results = []
    for function in (forward, compiled):
        y = function(slots, x)
        results.append([y, *torch.autograd.grad(y.square().sum(), slots.values())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    print(kind)
"""


def test_building_the_value_and_its_forward_compile_in_one_graph() -> None:
    """In its own process: the checks of this file's import hook cannot be traced."""
    run = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=False)
    assert run.stdout.split() == list(KINDS), run.stderr


# ---- another implementation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_agrees_with_peft(use_dora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32)
    W0 = linear.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=use_dora, use_rslora=True)
    model = peft.get_peft_model(torch.nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B, std=0.1)
    scaling = 6 / 4**0.5
    adapter: Adapter = LoRA(A=A.detach(), B=B.detach(), scaling=scaling)
    if use_dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            magnitude *= 1 + 0.1 * torch.randn(32)
        adapter = DoRA(A=A.detach(), B=B.detach(), magnitude=magnitude.detach().clone(), scaling=scaling)
    x = torch.randn(5, 48)
    with torch.no_grad():
        unmerged = model(x)
        y = adapter.forward(x, W0, linear.bias)
        merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(y, unmerged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(W0 + adapter.delta(W0), merged, rtol=1e-6, atol=3e-7)


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without beartype, which would speak first: users do not have it."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


Z = torch.zeros
MISFITS: dict[str, tuple[Callable[[], Adapter], list[str]]] = {
    "rank": (lambda: LoRA(A=Z(2, 5), B=Z(4, 3), scaling=1.0), [r"B does not fit.*\(4, 3\)"]),
    "a vector for a factor": (lambda: LoRA(A=Z(5), B=Z(4, 3), scaling=1.0), [r"A does not fit.*\(5,\)"]),
    "magnitude on the other axis": (
        lambda: DoRA(A=Z(2, 5), B=Z(4, 2), magnitude=Z(5), scaling=1.0),
        [r"magnitude does not fit.*wanted \(out_features\) = \(4\); got \(5,\)"],
    ),
    "magnitude as PEFT's convolutions keep it": (
        lambda: DoRA(A=Z(2, 5), B=Z(4, 2), magnitude=Z(1, 4), scaling=1.0),
        ["magnitude does not fit"],
    ),
    "two at once": (
        lambda: D2LoRA(A_plus=Z(2, 5), B_plus=Z(4, 3), A_minus=Z(2, 6), B_minus=Z(4, 2), scaling=1.0),
        ["B_plus does not fit", r"A_minus does not fit.*wanted \(rank_minus, in_features\) = \(rank_minus, 5\)"],
    ),
    "groups of different sizes": (
        lambda: DualLoRA(A=Z(2, 5), B=Z(4, 2), C=Z(3, 5), D=Z(5, 3), scaling=1.0),
        [r"D does not fit.*got \(5, 3\)"],
    ),
    "an axis by another word": (
        lambda: replace(make("dora-out_features"), along="rows"),  # type: ignore[call-arg]
        ["BAD_CONFIG: No such along.*wanted out_features or in_features; got 'rows'"],
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("misfit", MISFITS)
def test_slots_that_do_not_fit_are_all_named(misfit: str) -> None:
    build, messages = MISFITS[misfit]
    with pytest.raises(D2SurgeryError) as raised:
        build()
    assert len(raised.value.problems) == len(messages)
    for problem, message in zip(raised.value.problems, messages, strict=True):
        assert re.search(message, str(problem)), problem


def test_annotations_are_checked_while_these_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        make("lora").delta(base(8, 11))


@every_case
def test_an_adapter_is_a_value(case: str) -> None:
    adapter, (kind, chosen) = make(case), CASES[case]
    assert adapter.kind == kind
    assert tuple(adapter.slots()) == SLOTS[kind]
    assert adapter.normalises == (case in NORMALISING)
    assert adapter.along == chosen.get("along")
    half = adapter.to(dtype=torch.float16)
    assert all(slot.dtype == torch.float16 for slot in half.slots().values())
    assert all(slot.dtype == F64 for slot in adapter.slots().values())
    assert half.scaling == adapter.scaling
    with pytest.raises(AttributeError):
        adapter.scaling = 1.0  # type: ignore[misc]


def test_the_kinds_are_four() -> None:
    assert {kind: cls.kind for kind, cls in KINDS.items()} == {kind: kind for kind in SLOTS}


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
def test_branches_that_nearly_cancel_keep_their_singular_values(epsilon: float) -> None:
    """B₋A₋ ≈ B₊A₊ at τ = 1: all eight values against fifty digits."""
    A, B = random(4, 12, seed=50), random(10, 4, seed=51)
    slots: dict[str, Any] = {"A_plus": A, "B_plus": B, "A_minus": A + epsilon * random(4, 12, seed=52)}
    slots["B_minus"] = B + epsilon * random(10, 4, seed=53)
    adapter = D2LoRA(**slots, scaling=2.0, tau=1.0)
    with mpmath.workdps(50):
        left, right, other_left, other_right = (
            mpmath.matrix(slots[name].tolist()) for name in ("B_plus", "A_plus", "B_minus", "A_minus")
        )
        difference = 2 * (left * right - other_left * other_right)
        exact = [float(value) for value in mpmath.svd_r(difference.T, compute_uv=False)][:8]
    values = adapter.update().singular_values().tolist()
    for close, value in zip(values, exact, strict=True):
        assert value < 1e-6 * exact[0] or close == pytest.approx(value, rel=1e-9, abs=0)
    assert exact[0] < 100 * epsilon
    squares = adapter.triple(base(10, 12)).update.sum()
    assert float(squares) == pytest.approx(sum(value**2 for value in exact), rel=1e-8, abs=0)


# Streamed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["out_features", "in_features"])
@pytest.mark.parametrize("cut", ["out", "in_"])
@pytest.mark.parametrize("kind", ["dora", "d2lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_tiles_are_the_deltas_of_the_parts(kind: str, along: str, cut: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(70, 90, generator=generator).to(dtype)
    slots = KINDS[kind].init(W.float(), rank=4, scaling=0.7, generator=generator).slots()
    slots = {s: t if t.any() else 0.1 * torch.randn(t.shape, generator=generator) for s, t in slots.items()}
    if kind == "dora":
        slots["magnitude"] = 1 + torch.rand(70 if along == "out_features" else 90, generator=generator)
    adapter = KINDS[kind](scaling=0.7, along=along, **slots)  # type: ignore[call-arg]
    parts: list[Part] = [{cut: held} for held in (slice(0, 33), slice(33, 64), slice(64, None))]  # type: ignore[misc]
    tiles = [W[part.get("out", slice(None)), part.get("in_", slice(None))] for part in parts]
    whole_vectors = (cut == "out") == (along == "out_features")
    streamed = adapter.over_tiles(dtype)
    if not whole_vectors:
        streamed.sum_over(lambda: zip(tiles, parts, strict=True))
    triple = None if whole_vectors else adapter.triple(W)
    for tile, part in zip(tiles, parts, strict=True):
        wanted = adapter.take(**part).delta(tile, triple)
        found = streamed.delta(tile, **part)
        torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_formed_tiles_are_numpys_delta_and_add_to_their_base(
    transposed: bool, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2surgery.adapters.duallora.FORMED", 1000)
    generator = torch.Generator().manual_seed(5)
    A, C = torch.randn(3, 90, generator=generator), torch.randn(2, 90, generator=generator)
    B, D = torch.randn(70, 3, generator=generator), torch.randn(70, 2, generator=generator)
    W = torch.randn(90, 70, generator=generator).T if transposed else torch.randn(70, 90, generator=generator)
    formed = Formed(DualLoRA(A=A, B=B, C=C, D=D, scaling=0.7), torch.float32, strength)
    b, a, c, d = (slot.double().numpy() for slot in (B, A, C, D))
    wanted = strength * np.maximum(0.7 * (b @ a), 0) * np.where(d @ c > 0, 1, -1)
    for part in ({"out": slice(0, 33)}, {"out": slice(33, 70)}, {"in_": slice(7, 90)}):
        cut = part.get("out", slice(None)), part.get("in_", slice(None))
        tile = W[cut].clone(memory_format=torch.preserve_format)
        np.testing.assert_allclose(formed.delta(tile, **part), wanted[cut], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(formed.merged(tile, **part), W[cut].numpy() + wanted[cut], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole_vectors", [True, False])
def test_streamed_norms_that_nearly_cancel_are_summed_in_float64(whole_vectors: bool) -> None:
    """W0 + s·BA = 1e-4·(something) for every vector: float32 products alone would lose the norm."""
    generator = torch.Generator().manual_seed(4)
    B, A = torch.randn(64, 4, generator=generator), torch.randn(4, 96, generator=generator)
    rest = 1e-4 * torch.randn(64, 96, generator=generator)
    W = rest - B @ A
    adapter = DoRA(A=A, B=B, magnitude=torch.ones(64), scaling=1.0)
    streamed = Streamed(adapter, torch.float32)
    asked = []

    def tiles() -> Iterator[tuple[torch.Tensor, Part]]:
        asked.append("all")
        return ((W[:, part], {"in_": part}) for part in parts)

    parts = [slice(0, 40), slice(40, 96)]
    if not whole_vectors:
        streamed.sum_over(tiles)
        assert asked == ["all", "all"]
    found = streamed.delta(W) if whole_vectors else torch.cat([streamed.delta(W[:, p], in_=p) for p in parts], 1)
    norms = (W.double() + B.double() @ A.double()).square().sum(1).sqrt()
    squares = streamed.base + 2 * (streamed.P.T * streamed.products).sum(0) + streamed.norms
    torch.testing.assert_close(squares, norms**2, rtol=1e-6, atol=0)
    assert torch.isfinite(found).all()


# Words ---------------------------------------------------------------------------------------------------------------

REPRS = {
    "lora": "LoRA(90 → 70, rank 4, scaling 0.7, float32)",
    "dora": "DoRA(90 → 70, rank 4, scaling 0.7, along out_features, float32)",
    "duallora": "DualLoRA(90 → 70, rank 4+4, scaling 0.7, float32)",
    "d2lora": "D2LoRA(90 → 70, rank 4+4, scaling 0.7, tau 0.5, along in_features, form projected_plus_update, float32)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_said_in_one_line_without_its_numbers(kind: str) -> None:
    adapter = KINDS[kind].init(torch.randn(70, 90, generator=torch.Generator().manual_seed(0)), rank=4, scaling=0.7)
    assert repr(adapter) == REPRS[kind]
    update = adapter.update()
    assert update is None or repr(update) == f"LowRank(70 × 90, rank at most {8 if kind == 'd2lora' else 4})"


def test_a_negative_scaling_of_dual_lora_is_outside_its_relu() -> None:
    """s·ReLU(B·A) ⊙ sign(D·C), also where s < 0; sign(0) stays −1."""
    generator = np.random.default_rng(0)
    A, B, C, D = (generator.standard_normal(shape) for shape in ((2, 6), (4, 2)) * 2)
    D[0] = 0
    slots = [torch.from_numpy(factor) for factor in (A, B, C, D)]
    adapter = DualLoRA(A=slots[0], B=slots[1], C=slots[2], D=slots[3], scaling=-0.7)
    wanted = -0.7 * np.maximum(B @ A, 0) * np.where(D @ C > 0, 1.0, -1.0)
    W = torch.from_numpy(generator.standard_normal((4, 6)))
    x = torch.from_numpy(generator.standard_normal((3, 6)))
    for learnt in (adapter, replace(adapter, B=adapter.B.clone().requires_grad_())):
        assert np.allclose(learnt.delta(W).detach().numpy(), wanted, rtol=1e-12, atol=1e-15)
        y = learnt.forward(x, W).detach().numpy()
        assert np.allclose(y, x.numpy() @ (W.numpy() + wanted).T, rtol=1e-6, atol=1e-6)
    assert np.allclose(adapter.over_tiles(torch.float64, 0.5).merged(W.clone()).numpy(), W.numpy() + 0.5 * wanted)
