"""Every kind as every other: the formulas again in float64 numpy, exact where the table says so."""

from typing import Any

import numpy as np
import pytest
import torch

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.errors import D2SurgeryError
from d2surgery.surgery.certificate import form
from d2surgery.surgery.choices import Keep
from d2surgery.surgery.converting import Wish, as_kind

OUT, IN, R = 48, 64, 4
KINDS = ("lora", "dora", "d2lora", "duallora")


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape)).float()


W = normal(OUT, IN, seed=1, scale=0.02)


def source(kind: str, **settings: Any) -> Adapter:
    A, C = normal(R, IN, seed=2), normal(R, IN, seed=4)
    B, D = normal(OUT, R, seed=3, scale=1e-4), normal(OUT, R, seed=5, scale=1e-4)
    if kind == "lora":
        return LoRA(A=A, B=B, scaling=2.0)
    if kind == "dora":
        along = settings.get("along", "out_features")
        lengths = W.norm(dim=1 if along == "out_features" else 0)
        return DoRA(
            A=A, B=B, scaling=2.0, magnitude=lengths * (1 + normal(len(lengths), seed=6, scale=0.01)), along=along
        )
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C, D=D, scaling=2.0)
    return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D, scaling=2.0, **settings)


def dense(adapter: Adapter) -> Any:
    """The delta by its formula, in numpy: docs/mathematics.md#the-four-kinds."""
    W0 = W.double().numpy()
    slots = {name: slot.double().numpy() for name, slot in adapter.slots().items()}
    s = float(adapter.scaling)
    axis = {"out_features": 1, "in_features": 0}.get(str(adapter.along))
    if isinstance(adapter, DualLoRA):
        return s * np.maximum(slots["B"] @ slots["A"], 0) * np.where(slots["D"] @ slots["C"] > 0, 1.0, -1.0)
    if isinstance(adapter, D2LoRA):
        u = s * (slots["B_plus"] @ slots["A_plus"] - adapter.tau * slots["B_minus"] @ slots["A_minus"])
        lengths = np.linalg.norm(W0, axis=axis, keepdims=True) / np.linalg.norm(W0 + u, axis=axis, keepdims=True)
        return {"projected_plus_update": lengths * (W0 + u) + u, "projected": lengths * (W0 + u), "update": W0 + u}[
            adapter.form
        ] - W0
    u = s * slots["B"] @ slots["A"]
    if isinstance(adapter, DoRA):
        m = slots["magnitude"][:, None] if axis == 1 else slots["magnitude"][None]
        return m * (W0 + u) / np.linalg.norm(W0 + u, axis=axis, keepdims=True) - W0
    return u


def relative(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


EVERY = [
    ("lora", {}), ("dora", {}), ("dora", {"along": "in_features"}), ("d2lora", {}),
    ("d2lora", {"along": "out_features"}), ("d2lora", {"form": "projected"}), ("d2lora", {"form": "update"}),
    ("duallora", {}),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "settings"), EVERY)
def test_the_stated_error_is_the_errors(start: str, settings: dict[str, Any], kind: str) -> None:
    adapter = source(start, **settings)
    made, loss = as_kind(adapter, W, Wish(kind=kind))
    wanted, got = dense(adapter), dense(made)
    assert made.kind == kind
    assert loss.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    assert loss.relative_error == pytest.approx(relative(got, wanted), rel=1e-3, abs=1e-7)
    difference = np.linalg.norm(got - wanted, 2) / np.linalg.norm(wanted, 2)
    assert loss.spectral_error == pytest.approx(difference, rel=1e-3, abs=1e-6)
    assert loss.exact == (loss.relative_error * loss.norm <= max(1e-6 * loss.norm, 2.0**-23 * float(W.norm())))


EXACT = [
    ("lora", {}, "dora", None), ("lora", {}, "dora", "in_features"), ("d2lora", {}, "dora", None),
    ("d2lora", {"along": "out_features"}, "dora", None), ("d2lora", {"form": "projected"}, "dora", None),
    ("d2lora", {"form": "update"}, "dora", "out_features"), ("d2lora", {"form": "update"}, "lora", None),
]  # fmt: skip


@pytest.mark.parametrize(("start", "settings", "kind", "along"), EXACT)
def test_exact_where_it_is_exact(start: str, settings: dict[str, Any], kind: str, along: Any) -> None:
    adapter = source(start, **settings)
    made, loss = as_kind(adapter, W, Wish(kind=kind, along=along))
    assert loss.exact
    assert relative(dense(made), dense(adapter)) < 2e-5  # what float32 magnitudes leave of an update of a hundredth
    assert relative(W.double().numpy() + dense(made), W.double().numpy() + dense(adapter)) < 1e-7


@pytest.mark.parametrize("along", ["in_features", "out_features"])
def test_d2lora_to_dora_and_back(along: Any) -> None:
    adapter = source("d2lora", along=along)
    middle, _ = as_kind(adapter, W, Wish(kind="dora"))
    assert middle.along == along
    assert isinstance(middle, DoRA)
    assert middle.A.shape[0] == 2 * R
    back, loss = as_kind(middle, W, Wish(kind="d2lora", keep=Keep(rank=R)))
    assert isinstance(back, D2LoRA)
    assert (back.along, back.A_plus.shape[0]) == (along, R)
    assert relative(dense(back), dense(adapter)) < 2e-5
    assert loss.exact


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("start", ["dora", "d2lora", "duallora", "lora"])
def test_lora_is_the_best_of_its_rank(start: str, rank: int) -> None:
    adapter = source(start)
    _, loss = as_kind(adapter, W, Wish(kind="lora", keep=Keep(rank=rank)))
    s = np.linalg.svd(dense(adapter), compute_uv=False)
    least = np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
    assert loss.relative_error == pytest.approx(least, rel=1e-5, abs=1e-6)
    if loss.curve:
        assert loss.curve[: len(s)][min(rank, len(loss.curve) - 1)] == pytest.approx(least, rel=1e-5, abs=1e-6)


def test_weights_make_the_error_in_the_outputs_least() -> None:
    adapter = source("dora")
    weights = torch.linspace(0.1, 10, IN)
    plain, _ = as_kind(adapter, W, Wish(kind="lora", keep=Keep(rank=3)))
    weighted, _ = as_kind(adapter, W, Wish(kind="lora", keep=Keep(rank=3), weights=weights))
    scale = weights.double().numpy()
    errors = [np.linalg.norm((dense(made) - dense(adapter)) * scale) for made in (plain, weighted)]
    s = np.linalg.svd(dense(adapter) * scale, compute_uv=False)
    assert errors[1] == pytest.approx(np.sqrt(np.sum(s[3:] ** 2)), rel=1e-5)
    assert errors[1] < errors[0]


def test_signs_of_a_lora_are_exact_in_a_dual_lora() -> None:
    adapter = source("lora")
    made, _ = as_kind(adapter, W, Wish(kind="duallora"))
    assert isinstance(made, DualLoRA)
    signs, wanted = (made.D.double() @ made.C.double()).numpy() > 0, dense(adapter) > 0
    assert np.mean(signs == wanted) > 0.999  # float32 factors turn entries that are nearly zero
    one = LoRA(A=adapter.A[:1].abs(), B=adapter.B[:, :1], scaling=2.0)  # type: ignore[attr-defined]
    _, loss = as_kind(one, W, Wish(kind="duallora"))
    assert loss.relative_error < 1e-6  # abs(L) has rank 1


@pytest.mark.parametrize("along", ["in_features", "out_features"])
def test_the_closed_form_of_d2lora_is_its_inverse(along: Any) -> None:
    """ΔW = W0 + L − proj(W0 + L/2), at full rank, gives L back."""
    adapter = source("lora")
    made, loss = as_kind(adapter, W, Wish(kind="d2lora", along=along, keep=Keep(rank=min(OUT, IN) // 2)))
    assert relative(dense(made), dense(adapter)) < 1e-5
    assert loss.relative_error < 1e-5


def test_what_it_is_already_stays() -> None:
    for start, settings in EVERY:
        adapter = source(start, **settings)
        made, loss = as_kind(adapter, W, Wish(kind=start))
        assert made is adapter
        assert (loss.relative_error, loss.exact) == (0.0, True)


@pytest.mark.parametrize("start", KINDS)
def test_fewer_ranks_of_the_same_kind(start: str) -> None:
    adapter = source(start)
    made, loss = as_kind(adapter, W, Wish(kind=start, keep=Keep(rank=2)))
    assert max(slot.shape[0] for name, slot in made.slots().items() if name[0] in "AC") == 2
    assert loss.relative_error == pytest.approx(relative(dense(made), dense(adapter)), rel=1e-3)
    assert loss.relative_error < 1


def test_a_dora_of_fewer_ranks_is_nearer_than_with_its_old_magnitude() -> None:
    adapter = source("dora")
    assert isinstance(adapter, DoRA)
    _, loss = as_kind(adapter, W, Wish(kind="dora", keep=Keep(rank=2)))
    U, s, Vh = np.linalg.svd(2.0 * (adapter.B.double() @ adapter.A.double()).numpy(), full_matrices=False)
    old = DoRA(A=torch.from_numpy(Vh[:2]).float(), B=torch.from_numpy(U[:, :2] * s[:2]).float(), scaling=1.0,
               magnitude=adapter.magnitude)  # fmt: skip
    assert loss.relative_error < relative(dense(old), dense(adapter))


def test_the_base_is_asked_for_where_it_is_needed() -> None:
    for start, kind in (("lora", "dora"), ("lora", "d2lora"), ("dora", "lora"), ("d2lora", "lora")):
        with pytest.raises(D2SurgeryError, match="base") as error:
            as_kind(source(start), None, Wish(kind=kind))
        assert {problem.code for problem in error.value.problems} == {"USAGE"}
    made, _ = as_kind(source("duallora"), None, Wish(kind="lora"))
    assert form(made, None).shape == (OUT, IN)
    with pytest.raises(D2SurgeryError, match="no such kind"):
        as_kind(source("lora"), W, Wish(kind="loha"))


def test_of_a_zero_delta_comes_a_zero_delta() -> None:
    nothing = LoRA(A=normal(R, IN, seed=1), B=torch.zeros(OUT, R), scaling=1.0)
    for kind in KINDS:
        made, loss = as_kind(nothing, W, Wish(kind=kind, keep=Keep(by="energy", value=0.9)))
        assert np.linalg.norm(dense(made)) <= 2.0**-23 * float(W.norm())  # of float32 magnitudes
        assert loss.exact
