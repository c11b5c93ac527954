"""Several deltas as one: the definitions again in dense float64 numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from d2surgery.adapters import LoRA
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import D2SurgeryError
from d2surgery.measures import delta as delta_module
from d2surgery.surgery import combining
from d2surgery.surgery.choices import METHODS, Keep, Recipe
from d2surgery.surgery.combining import combined

OUT, IN, R = 20, 30, 3


def delta(seed: int) -> LowRank:
    generator = np.random.default_rng(seed)
    return LowRank(*(torch.from_numpy(generator.standard_normal(shape)) for shape in ((OUT, R), (R, IN))))


def dense(adapter: LoRA) -> Any:
    return adapter.update().dense().numpy()


X, Y, Z = (delta(seed) for seed in (1, 2, 3))
DX, DY, DZ = (each.dense().numpy() for each in (X, Y, Z))


def close(got: Any, wanted: Any, tolerance: float = 1e-6) -> bool:
    return bool(np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted))


def test_the_sum_is_the_sum() -> None:
    made, loss = combined([X, Y, Z], [0.5, -2.0, 1.0], Recipe())
    assert close(dense(made), 0.5 * DX - 2 * DY + DZ)
    assert made.A.shape[0] == 3 * R
    assert loss.exact


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dare", "della", "tsv", "iso-c")])
@pytest.mark.parametrize("space", ["entries", "knots", "core"])
def test_half_of_x_and_half_of_x_is_x(method: Any, space: Any) -> None:
    made, _ = combined([X, X], [0.5, 0.5], Recipe(method=method, space=space, density=1.0, keep=Keep(rank=R)))
    assert close(dense(made), DX)
    assert made.A.shape[0] == R


def test_svd_is_the_best_of_its_rank() -> None:
    made, loss = combined([X, Y], [1.0, 1.0], Recipe(method="svd", keep=Keep(rank=2)))
    s = np.linalg.svd(DX + DY, compute_uv=False)
    least = np.sqrt(np.sum(s[2:] ** 2))
    assert np.linalg.norm(dense(made) - DX - DY) == pytest.approx(least, rel=1e-6)
    assert loss.relative_error == pytest.approx(least / np.linalg.norm(s), rel=1e-6)


def test_slerp_goes_along_the_arc() -> None:
    made, _ = combined([X, Y], [0.75, 0.25], Recipe(method="slerp"))
    angle = np.arccos(np.sum(DX * DY) / np.linalg.norm(DX) / np.linalg.norm(DY))
    assert close(dense(made), (np.sin(0.75 * angle) * DX + np.sin(0.25 * angle) * DY) / np.sin(angle))
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        assert close(dense(combined([X, Y], weights, Recipe(method="slerp"))[0]), weights[0] * DX + weights[1] * DY)
    with pytest.raises(D2SurgeryError, match="two adapters"):
        combined([X, Y, Z], [1.0, 1.0, 1.0], Recipe(method="slerp"))


def top(D: Any, density: float) -> Any:
    edge = np.sort(np.abs(D).ravel())[::-1][round(density * D.size) - 1]
    return np.where(np.abs(D) >= edge, D, 0.0)


def ties(parts: list[Any], weights: list[float]) -> Any:
    weighted = [w * p for w, p in zip(weights, parts, strict=True)]
    sign = np.sign(sum(weighted))
    share = sum(abs(w) * ((np.sign(p) == sign) & (p != 0)) for w, p in zip(weights, weighted, strict=True))
    total = sum(np.where(np.sign(p) == sign, p, 0.0) for p in weighted)
    return np.divide(total * sum(map(abs, weights)), share, out=np.zeros_like(total), where=share > 0)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [1.0, -0.5]])
def test_ties_and_magnitude_among_entries(weights: list[float]) -> None:
    whole = Keep(rank=min(OUT, IN))
    parts = [top(D, 0.4) for D in (DX, DY)]
    made, _ = combined([X, Y], weights, Recipe(method="magnitude", density=0.4, keep=whole))
    assert close(dense(made), weights[0] * parts[0] + weights[1] * parts[1])
    made, _ = combined([X, Y], weights, Recipe(method="ties", density=0.4, keep=whole))
    assert close(dense(made), ties(parts, weights))


@pytest.mark.parametrize("method", ["ties", "magnitude", "dare", "della"])
def test_tiles_of_rows_give_what_the_whole_gives(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method=method, density=0.4, keep=Keep(rank=OUT))
    whole, _ = combined([X, Y], [0.3, 0.7], recipe)
    monkeypatch.setattr(delta_module, "_TILE", 4 * IN)
    assert close(dense(combined([X, Y], [0.3, 0.7], recipe)[0]), dense(whole))


@pytest.mark.parametrize("density", [1e-9, 0.25, 0.5, 1.0])
def test_of_equal_entries_at_the_edge_all_stay(density: float) -> None:
    signs = LowRank(*(torch.from_numpy(np.sign(each.numpy())) for each in (X.P[:, :1], X.Q[:1])))
    made, _ = combined([signs], [1.0], Recipe(method="magnitude", density=density))
    assert close(dense(made), signs.dense().numpy())


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.999])
def test_the_edge_is_the_last_that_stays(density: float) -> None:
    sizes = np.sort(np.abs(DX.astype(np.float32)).ravel())[::-1]
    assert combining._edge(X, density) == sizes[max(round(density * DX.size), 1) - 1]


def test_knots_chooses_among_the_rows_of_the_common_basis() -> None:
    made, _ = combined([X, Y], [0.5, 0.5], Recipe(method="ties", space="knots", density=0.4))
    U, s, Vh = np.linalg.svd(np.concatenate([DX, DY], 1), full_matrices=False)
    k = int(np.sum(s > 1e-9 * s[0]))
    parts = [top(V, 0.4) for V in np.split(Vh[:k], 2, 1)]
    assert close(dense(made), (U[:, :k] * s[:k]) @ ties(parts, [0.5, 0.5]), 1e-5)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_what_is_drawn_is_right_in_the_mean_and_repeats(method: Any) -> None:
    def draw(seed: int, module: str = "m") -> Any:
        return dense(combined([X], [1.0], Recipe(method=method, seed=seed, keep=Keep(rank=IN)), module)[0])

    assert (draw(3) == draw(3)).all()
    assert not (draw(3) == draw(4)).all()
    assert not (draw(3) == draw(3, "n")).all()
    every = np.stack([draw(seed) for seed in range(400)])
    error = np.abs(every.mean(0) - DX) / (every.std(0) / 20 + 1e-9)
    assert np.quantile(error, 0.95) < 3


def test_tsv_of_orthogonal_directions_is_their_leading_halves() -> None:
    P, Q = np.linalg.qr(np.random.default_rng(0).standard_normal((OUT, 4)))[0], np.eye(4, IN)
    one = LowRank(torch.from_numpy(P[:, :2] * [3.0, 1.0]), torch.from_numpy(Q[:2]))
    two = LowRank(torch.from_numpy(P[:, 2:] * [2.0, 1.0]), torch.from_numpy(Q[2:]))
    made, _ = combined([one, two], [1.0, 1.0], Recipe(method="tsv"))
    assert close(dense(made), 3 * np.outer(P[:, 0], Q[0]) + 2 * np.outer(P[:, 2], Q[2]))


def test_iso_makes_the_singular_values_alike() -> None:
    made, _ = combined([X, Y], [1.0, 1.0], Recipe(method="iso-c", keep=Keep(rank=2 * R)))
    s = np.linalg.svd(DX + DY, compute_uv=False)[: 2 * R]
    assert np.linalg.svd(dense(made), compute_uv=False)[: 2 * R] == pytest.approx(np.full(2 * R, s.mean()), rel=1e-5)


def test_senseless_recipes_are_refused() -> None:
    for options in ({"method": "average"}, {"method": "dare", "density": 0.0}, {"method": "ties", "density": 1.5}):
        with pytest.raises(D2SurgeryError) as error:
            Recipe(**options)
        assert {problem.code for problem in error.value.problems} == {"USAGE"}
