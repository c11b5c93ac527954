"""Drift against fifty digits and numpy's long double, down to updates of 1e-4; the null of ΔM–ΔD by Monte Carlo."""

from math import isnan, pi, sqrt
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from kinds import KINDS_AND_AXES, effective, make, normal
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.errors import D2SurgeryError
from d2surgery.measures import delta as tiling
from d2surgery.measures import drift as module
from d2surgery.measures.drift import Drift, correlation, delta_drift, entries, thin_triple

AXES: tuple[Axis, Axis] = ("out_features", "in_features")
SIZES = [1e-1, 1e-2, 1e-3, 1e-4]


def by_hand(adapter: Adapter, W: Tensor, along: Axis) -> dict[str, Any]:
    """Drift and 1 − cos per vector with 50 digits, from W' and W themselves."""
    with mpmath.workdps(50):
        base, tuned = fifty_digits(adapter, W)
        if along == "in_features":
            base, tuned = base.T, tuned.T
        rows = [([base[i, j] for j in range(base.cols)], [tuned[i, j] for j in range(base.cols)])
                for i in range(base.rows)]  # fmt: skip
        lengths = [(mpmath.norm(w), mpmath.norm(v)) for w, v in rows]
        cosines = [mpmath.fdot(w, v) / (a * b) for (w, v), (a, b) in zip(rows, lengths, strict=True)]
        difference = mpmath.mnorm(tuned - base, "f")
        return {
            "drift": np.array([float(b / a - 1) for a, b in lengths]),
            "one_minus_cosine": np.array([float(1 - c) for c in cosines]),
            "angle": np.array([float(mpmath.acos(c)) for c in cosines]),
            "frobenius_norm": float(difference),
            "relative_update": float(difference / mpmath.mnorm(base, "f")),
            "delta_magnitude": float(sum(abs(b - a) for a, b in lengths) / len(lengths)),
            "delta_direction": float(sum(1 - c for c in cosines) / len(cosines)),
        }


def fifty_digits(adapter: Adapter, W: Tensor) -> Any:
    """W and W' by the formulas of docs/mathematics.md#the-four-kinds."""
    m = {name: mpmath.matrix(slot.double().reshape(len(slot), -1).tolist()) for name, slot in adapter.slots().items()}
    base, s = mpmath.matrix(W.double().tolist()), mpmath.mpf(adapter.scaling)
    rows = adapter.along != "in_features"

    def scaled(matrix: Any, target: Any) -> Any:
        matrix = matrix if rows else matrix.T
        result = mpmath.matrix(matrix.rows, matrix.cols)
        for i in range(matrix.rows):
            factor = target[i] / mpmath.norm(matrix[i, :])
            for j in range(matrix.cols):
                result[i, j] = matrix[i, j] * factor
        return result if rows else result.T

    if isinstance(adapter, D2LoRA):
        update = s * (m["B_plus"] * m["A_plus"] - mpmath.mpf(adapter.tau) * (m["B_minus"] * m["A_minus"]))
        vectors = base if rows else base.T
        star = scaled(base + update, [mpmath.norm(vectors[i, :]) for i in range(vectors.rows)])
        return base, star if adapter.form == "projected" else star + update
    whole = base + s * (m["B"] * m["A"])
    return base, scaled(whole, list(m["magnitude"])) if isinstance(adapter, DoRA) else whole


def relative(found: Any, true: Any) -> float:
    """Error in the 2-norm over vectors."""
    return float(np.linalg.norm(np.asarray(found) - true) / np.linalg.norm(true))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("along", AXES)
@pytest.mark.parametrize(("kind", "axis"), [pair for pair in KINDS_AND_AXES if pair[0] != "duallora"])
def test_drift_is_right_to_six_digits_at_any_size_of_update(kind: str, axis: Axis, along: Axis, size: float) -> None:
    W = (0.02 * normal(7, 9, seed=1)).bfloat16()
    adapter = make(kind, W, axis, size=size, gain=size)
    found, true = delta_drift(adapter, W, along), by_hand(adapter, W, along)
    for name in ("one_minus_cosine", "angle", "frobenius_norm", "relative_update", "delta_direction"):
        assert relative(getattr(found, name), true[name]) < 1e-6, name
    if kind == "projected" and along == axis:  # Proposition 2: the norms are kept
        assert found.drift.abs().max() == found.delta_magnitude == 0
    else:
        assert relative(found.drift, true["drift"]) < 1e-6
        assert relative(found.delta_magnitude, true["delta_magnitude"]) < 1e-6


@pytest.mark.parametrize("size", [1e-1, 1e-4])
@pytest.mark.parametrize("along", AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_drift_of_larger_weights_is_that_of_the_effective_weight(
    kind: str, axis: Axis, dtype: torch.dtype, along: Axis, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE", 50 * 192)
    W = (0.02 * normal(160, 192, seed=2)).to(dtype)
    adapter = make(kind, W, axis, size=size, gain=size)
    found = delta_drift(adapter, W, along)
    base, tuned = W.double().numpy().astype(np.longdouble), effective(adapter, W)
    dim = 1 if along == "out_features" else 0
    before, after = (np.sqrt((matrix**2).sum(dim)) for matrix in (base, tuned))
    delta = tuned - base
    assert relative(found.frobenius_norm, float(np.sqrt((delta**2).sum()))) < 1e-6
    across = ((tuned / after[:, None] - base / before[:, None]) if dim else (tuned / after - base / before)) ** 2
    assert relative(found.one_minus_cosine, (across.sum(dim) / 2).astype(float)) < 1e-6
    if kind != "projected" or along != axis:
        assert relative(found.drift, ((after - before) / before).astype(float)) < 1e-6


def test_the_summary_is_that_of_the_vectors() -> None:
    W = normal(30, 40, seed=1)
    found = delta_drift(make("dora", W, size=0.1, gain=0.05), W)
    ratio = (1 + found.drift).numpy()
    expected = (ratio.mean(), ratio.std(), ratio.min(), ratio.max())
    assert found.norm_ratio == pytest.approx(expected, rel=1e-12)
    assert found.mean_drift == pytest.approx(ratio.mean() - 1, rel=1e-9)
    assert found.cosine_mean == pytest.approx(1 - float(found.one_minus_cosine.mean()))
    assert found.cosine_min == pytest.approx(1 - float(found.one_minus_cosine.max()))
    assert found.delta_direction == pytest.approx(float(found.one_minus_cosine.mean()))
    change = (found.drift * found.base_norms).abs().mean()
    assert found.delta_magnitude == pytest.approx(float(change), rel=1e-12)
    assert (found.along, found.length, found.undefined) == ("out_features", 40, 0)
    assert delta_drift(make("d2lora", W, "in_features"), W).along == "in_features"
    assert delta_drift(make("lora", W), W, "in_features").length == 30


@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_tiles_add_up_to_the_whole(kind: str, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(37, 41, seed=3)
    adapter = make(kind, W, axis)
    whole = [delta_drift(adapter, W, along) for along in AXES]
    monkeypatch.setattr(tiling, "_TILE", 5 * 41)
    for along, once in zip(AXES, whole, strict=True):
        tiled = delta_drift(adapter, W, along)
        torch.testing.assert_close(tiled.drift, once.drift, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(tiled.one_minus_cosine, once.one_minus_cosine, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("along", AXES)
@pytest.mark.parametrize("kind", ["lora", "dora", "d2lora"])
def test_the_thin_triple_is_the_adapters(kind: str, along: Axis) -> None:
    W = normal(30, 20, seed=0)
    adapter = make(kind, W, along)
    update = adapter.update()
    assert update is not None
    for found, true in zip(thin_triple(update, W, along), adapter.triple(W, along), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("along", AXES)
def test_branches_that_nearly_cancel_do_not_blur_the_triple(along: Axis) -> None:
    W = (0.02 * normal(60, 80, seed=0)).bfloat16()
    B, A = normal(60, 4, seed=1), normal(4, 80, seed=2)
    near = A + 1e-6 * normal(4, 80, seed=3)
    adapter = D2LoRA(A_plus=A, B_plus=B, A_minus=near, B_minus=B, scaling=0.1, tau=1.0, along=along)
    true = LoRA(A=A - near, B=B, scaling=0.1)
    thin, exact = adapter.update(), true.triple(W.double(), along)
    for found, wanted in zip(thin_triple(thin, W, along), exact, strict=True):
        assert relative(found, wanted.numpy()) < 1e-6


# Edges -----------------------------------------------------------------------------------------------------------


def lora_of(update: Tensor) -> LoRA:
    return LoRA(B=update, A=torch.eye(update.shape[1], dtype=update.dtype), scaling=1.0)


def test_no_update_no_drift() -> None:
    W = normal(5, 6, seed=0)
    found = delta_drift(lora_of(torch.zeros(5, 6)), W)
    assert found.norm_ratio == (1, 0, 1, 1)
    assert (found.delta_magnitude, found.delta_direction, found.frobenius_norm, found.relative_update) == (0, 0, 0, 0)
    assert found.cosine_min == found.cosine_mean == 1


def test_known_vectors() -> None:
    W = torch.tensor([[3.0, 4.0], [1, 0], [1, 0], [2, 0], [1, 0]], dtype=torch.float64)
    after = torch.tensor([[6.0, 8.0], [0, 1], [-2, 0], [0, 0], [1, 1]], dtype=torch.float64)
    found = delta_drift(lora_of(after - W), W)
    assert found.drift.tolist() == pytest.approx([1, 0, 1, -1, sqrt(2) - 1], abs=1e-7)
    defined = [0, 1, 2, 4]  # a vector brought to zero points nowhere
    assert found.one_minus_cosine[defined].tolist() == pytest.approx([0, 1, 2, 1 - sqrt(0.5)], abs=1e-7)
    assert found.angle.tolist()[:3] == pytest.approx([0, pi / 2, pi], abs=1e-7)
    assert found.delta_magnitude == pytest.approx((5 + 0 + 1 + 2 + sqrt(2) - 1) / 5)


def test_a_zero_base_vector_has_no_ratio_but_counts_in_the_magnitude() -> None:
    W = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = delta_drift(lora_of(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), W)
    assert found.undefined == 1
    assert isnan(found.drift[0])
    assert isnan(found.one_minus_cosine[0])
    assert found.norm_ratio == (1, 0, 1, 1)
    assert found.delta_magnitude == pytest.approx(2.5)
    nothing = delta_drift(lora_of(torch.ones(2, 2)), torch.zeros(2, 2))
    assert nothing.undefined == 2
    assert isnan(nothing.relative_update)
    assert isnan(nothing.norm_ratio.mean)


def test_a_d2_column_whose_base_is_zero_is_its_update() -> None:
    W = normal(4, 3, seed=0)
    W[:, 1] = 0
    adapter = make("d2lora", W, "in_features")
    found, update = delta_drift(adapter, W), adapter.update()
    assert update is not None
    assert found.undefined == 1
    others = (found.drift * found.base_norms)[[0, 2]].abs().sum()
    assert found.delta_magnitude * 3 == pytest.approx(float(others + update.dense()[:, 1].norm()))


def test_a_negative_magnitude_turns_the_vector_round() -> None:
    W = normal(4, 6, seed=0)
    adapter = make("dora", W, gain=0)
    assert isinstance(adapter, DoRA)
    turned = DoRA(A=adapter.A, B=adapter.B, scaling=adapter.scaling, magnitude=-adapter.magnitude)
    found, straight = delta_drift(turned, W), delta_drift(adapter, W)
    torch.testing.assert_close(found.drift, straight.drift)
    torch.testing.assert_close(found.one_minus_cosine, 2 - straight.one_minus_cosine)
    torch.testing.assert_close(found.angle, pi - straight.angle)


@pytest.mark.parametrize("along", AXES)
@pytest.mark.parametrize("kind", ["lora", "dora", "d2lora", "duallora"])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_nan_is_a_named_error(kind: str, along: Axis, where: str) -> None:
    W = normal(8, 9, seed=0)
    adapter = make(kind, W, "out_features")
    (W if where == "base" else next(iter(adapter.slots().values())))[1, 1] = float("nan")
    with pytest.raises(D2SurgeryError, match="NOT_FINITE"):
        delta_drift(adapter, W, along)


def test_a_base_of_another_shape_is_refused() -> None:
    W = normal(8, 9, seed=0)
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        delta_drift(make("lora", W), W.T)


def test_a_vector_without_length_cannot_be_rescaled() -> None:
    W = normal(4, 6, seed=0)
    update = torch.zeros(4, 6, dtype=torch.float64)
    update[2] = -W[2]
    eye = torch.eye(6, dtype=torch.float64)
    with pytest.raises(D2SurgeryError, match="ZERO_NORM"):
        delta_drift(DoRA(A=eye, B=update, scaling=1.0, magnitude=torch.ones(4)), W)


# Over modules ----------------------------------------------------------------------------------------------------


def gaussian(layer: int, size: float, draw: int = 0) -> Drift:
    """Of an update of independent Gaussian entries."""
    W = 0.02 * normal(60, 80, seed=layer) * (1 + layer % 3)
    update = normal(60, 80, seed=1000 * (draw + 1) + layer)
    return delta_drift(lora_of(size * float(W.norm() / update.norm()) * update), W)


@pytest.mark.long
def test_the_correlation_of_random_updates_is_that_of_the_null() -> None:
    sizes = [0.01 + 0.0005 * (i * 7 % 12) for i in range(12)]
    measured = [
        correlation([gaussian(i, size, draw) for i, size in enumerate(sizes)], draws=2).pearson for draw in range(40)
    ]
    null = correlation([gaussian(i, size) for i, size in enumerate(sizes)], draws=400)
    assert null.null_mean == pytest.approx(np.mean(measured), abs=4 * null.null_sd / sqrt(40) + 0.02)
    assert null.null_sd == pytest.approx(np.std(measured), rel=0.5)
    assert abs(null.null_mean) > 0.1  # it is not zero
    assert (null.modules, null.draws) == (12, 400)


def test_the_null_moves_as_far_as_random_updates_do() -> None:
    draws = torch.Generator().manual_seed(0)
    real = gaussian(1, 0.05)
    null = np.mean([module._random_point(real, draws) for _ in range(50)], 0)
    several = [gaussian(1, 0.05, draw) for draw in range(50)]
    assert null[0] == pytest.approx(np.mean([d.delta_magnitude for d in several]), rel=0.1)
    assert null[1] == pytest.approx(np.mean([d.delta_direction for d in several]), rel=0.05)


def test_the_correlation_is_numpys() -> None:
    records = [gaussian(i, 0.01 * (i + 1)) for i in range(6)]
    points = np.array([(d.delta_magnitude, d.delta_direction) for d in records])
    assert correlation(records, draws=2).pearson == pytest.approx(np.corrcoef(points.T)[0, 1])
    assert isnan(correlation(records[:1]).pearson)


# Entries ---------------------------------------------------------------------------------------------------------


def test_sign_flips_and_zeros_are_counted() -> None:
    W = torch.tensor([[1.0, -1.0, 2.0], [0.0, 4.0, 5.0]])
    delta = torch.tensor([[-2.0, 0.0, 1.0], [0.5, 0.0, -5.0]])
    found = entries(lora_of(delta), W)
    assert found.sign_flips == pytest.approx(3 / 6)  # 1 → −1, 0 → 0.5, 5 → 0
    assert found.sparsity == pytest.approx(2 / 6)


def test_relu_leaves_half_of_a_dual_loras_entries_zero() -> None:
    W = normal(200, 300, seed=0)
    adapter = make("duallora", W, rank=8)
    found = entries(adapter, W)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    delta = effective(adapter, W) - W.numpy()
    assert found.sign_flips == pytest.approx((np.sign(W.numpy() + delta) != np.sign(W.numpy())).mean())
