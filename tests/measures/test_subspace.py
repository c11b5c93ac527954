"""Subspaces, cosines, signs, amplification and intruders: against numpy, and their nulls by Monte Carlo."""

from math import acos, isnan, pi, sqrt

import numpy as np
import pytest
import torch
from kinds import KINDS_AND_AXES, effective, make, normal
from torch import Tensor

from d2surgery.adapters import LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import D2SurgeryError
from d2surgery.measures import delta as tiling
from d2surgery.measures import dense, subspace
from d2surgery.measures.delta import Delta
from d2surgery.measures.subspace import (
    Cosine,
    Similarity,
    agreement,
    amplification,
    directions,
    intruders,
    overlaps,
    principal_angles,
)

AXES: tuple[Axis, Axis] = ("out_features", "in_features")


def product(out: int, rank: int, in_: int, seed: int) -> LowRank:
    return LowRank(normal(out, rank, seed=seed), normal(rank, in_, seed=seed + 1))


def cosine(M: LowRank, N: LowRank) -> Cosine:
    return subspace.cosine(overlaps(directions(M), directions(N)))


def similarity(M: LowRank, N: LowRank, along: Axis = "in_features") -> Similarity:
    return subspace.similarity(overlaps(directions(M), directions(N)), along)


def lora_of(update: Tensor) -> LoRA:
    return LoRA(B=update, A=torch.eye(update.shape[1], dtype=update.dtype), scaling=1.0)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(normal(rows, columns, seed=seed)).Q
    return basis


# Similarity and angles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", AXES)
def test_similarity_is_that_of_the_dense_singular_vectors(along: Axis) -> None:
    M, N = product(30, 4, 20, 0), product(30, 3, 20, 5)
    M = M + 0.5 * LowRank(N.P[:, :1], N.Q[:1])  # something in common
    found = similarity(M, N, along)
    bases = [np.linalg.svd(X.dense().numpy()) for X in (M, N)]
    U, V = (b[0] if along == "out_features" else b[2].T for b in bases)
    assert found.phi.shape == (5, 3)
    for i in range(1, 6):
        for j in range(1, 4):
            expected = np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
            assert float(found.phi[i - 1, j - 1]) == pytest.approx(expected, abs=1e-12)
            assert float(found.null[i - 1, j - 1]) == pytest.approx(max(i, j) / len(U))
    inside = np.linalg.svd(U[:, :5].T @ V[:, :3], compute_uv=False)  # cosines
    across = np.linalg.svd(V[:, :3] - U[:, :5] @ (U[:, :5].T @ V[:, :3]), compute_uv=False)  # sines
    angles = np.arctan2(np.sort(across), inside)  # scipy's takes arccos of 1 ± eps here: 0 or 1.5e-8, by luck
    assert found.angles.numpy() == pytest.approx(angles, abs=1e-12)
    assert found.along == along


def test_an_update_is_similar_to_itself_and_not_to_what_is_orthogonal_to_it() -> None:
    M = product(30, 4, 20, 0)
    same = similarity(M, -2.0 * M)
    assert torch.diag(same.phi).tolist() == pytest.approx([1] * 4)
    assert same.angles.max() < 1e-14
    basis = orthonormal(20, 8, 3).T
    apart = similarity(LowRank(M.P, basis[:4]), LowRank(M.P, basis[4:]))
    assert apart.phi.max() < 1e-25
    assert apart.angles.tolist() == pytest.approx([pi / 2] * 4)


@pytest.mark.parametrize("along", AXES)
def test_the_null_of_similarity_is_what_unrelated_updates_give(along: Axis) -> None:
    draws = [similarity(product(24, 4, 36, 2 * s), product(24, 3, 36, 2 * s + 1001), along) for s in range(200)]
    phi = torch.stack([draw.phi for draw in draws])
    error = (phi.mean(0) - draws[0].null) / (phi.std(0) / sqrt(200))
    assert error.abs().max() < 4


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.1, 0.785, 0.786, 1.5, pi / 2])
def test_principal_angles_keep_their_digits(angle: float) -> None:
    basis = orthonormal(20, 4, 0)
    U = basis[:, :2]
    V = torch.stack([np.cos(angle) * basis[:, 0] + np.sin(angle) * basis[:, 2], basis[:, 3]], 1)
    found = principal_angles(U, V, U.T @ V).tolist()
    assert found == pytest.approx([angle, pi / 2], rel=1e-12, abs=3e-16)
    assert principal_angles(V, U[:, :1], V.T @ U[:, :1]).tolist() == pytest.approx([angle], rel=1e-12, abs=3e-16)


def test_directions_are_orthonormal_however_the_factors_are_conditioned() -> None:
    """Two columns of P that differ by 1e-4: U from the inverse of their triangle would be off by 1e-12 and more."""
    M = product(300, 3, 200, 0)
    nearly = LowRank(torch.cat([M.P, M.P + 1e-4 * normal(300, 3, seed=9)], 1), normal(6, 200, seed=8))
    found = directions(nearly)
    assert (found.U.T @ found.U - torch.eye(6)).abs().max() < 1e-14
    assert (found.V.T @ found.V - torch.eye(6)).abs().max() < 1e-14
    assert ((found.U * found.sigma) @ found.V.T - nearly.dense()).abs().max() < 1e-13 * found.sigma[0]


def test_singular_vectors_of_rounding_are_left_out() -> None:
    M = product(30, 3, 20, 0)
    assert directions(M + M).V.shape == (20, 3)
    assert directions(M + -1.0 * M).U.shape == (30, 0)
    empty = similarity(M, M + -1.0 * M)
    assert empty.phi.shape == (3, 0)
    assert empty.angles.shape == (0,)


def test_updates_of_different_shape_are_refused() -> None:
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        similarity(product(5, 2, 6, 0), product(5, 2, 7, 0))
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        agreement(product(5, 2, 6, 0), product(5, 2, 7, 0))


# Cosine and signs ------------------------------------------------------------------------------------------------


def test_the_cosine_is_that_of_the_dense_matrices() -> None:
    M, N = product(30, 4, 20, 0), product(30, 3, 20, 5)
    mixed = M + 0.7 * N
    a, b = mixed.dense(), N.dense()
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert cosine(mixed, N).value == pytest.approx(expected, rel=1e-12)
    assert agreement(mixed, N).cosine.value == pytest.approx(expected, rel=1e-12)
    assert agreement(mixed, N).norms == pytest.approx((float(a.norm()), float(b.norm())))
    assert cosine(M, -3.0 * M).value == pytest.approx(-1, rel=1e-15)  # sums in other orders
    assert isnan(cosine(M, 0.0 * M).value)


def test_the_null_of_the_cosine_is_what_unrelated_updates_give() -> None:
    values = [cosine(product(24, 3, 36, 4 * s), product(24, 3, 36, 4 * s + 2)).value for s in range(300)]
    assert np.std(values) == pytest.approx(cosine(product(24, 3, 36, 0), product(24, 3, 36, 1)).null_sd, rel=0.16)
    assert abs(np.mean(values)) < 4 * np.std(values) / sqrt(300)


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.7, -0.5])
def test_the_null_of_sign_agreement_is_that_of_gaussian_entries(wanted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_TILE", 50 * 400)
    X, Y = normal(300, 400, seed=1), normal(300, 400, seed=2)
    M, N = lora_of(X).update(), lora_of(wanted * X + sqrt(1 - wanted**2) * Y).update()
    found = agreement(M, N)
    assert found.signs.null == pytest.approx(1 - acos(wanted) / pi, abs=0.003)
    assert found.signs.share == pytest.approx(found.signs.null, abs=4 * 0.5 / sqrt(120_000))


def test_the_signs_of_dual_loras_deltas_are_compared_entry_by_entry() -> None:
    W = normal(40, 50, seed=0)
    first, second = make("duallora", W, seed=1), make("duallora", W, seed=2)
    a, b = (effective(x, W) - W.numpy() for x in (first, second))
    found = agreement(Delta(first, None), Delta(second, None))
    assert found.signs.share == pytest.approx((np.sign(a) == np.sign(b)).mean(), abs=1e-3)
    assert found.cosine.value == pytest.approx(float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())))


# Amplification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_amplification_is_that_of_the_dense_svd(
    rank: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE", 7 * 40)
    W, D = normal(30, 40, seed=0).to(dtype), product(30, 4, 40, 3)
    U, sigma, Vh = np.linalg.svd(D.dense().numpy())
    r = rank or 4
    inside = np.linalg.norm(U[:, :r].T @ W.double().numpy() @ Vh[:r].T)
    found = amplification(D, W, rank)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    size = np.linalg.norm(sigma[:r])
    assert found.factor == pytest.approx(size / inside, rel=tolerance)
    assert found.null == pytest.approx(size / float(W.double().norm()) * sqrt(1200) / r, rel=tolerance)
    assert found.rank == r


def test_the_null_of_amplification_is_what_unrelated_updates_give() -> None:
    W = normal(60, 80, seed=0)
    inverse = [1 / amplification(product(60, 8, 80, s), W).aligned for s in range(1, 100)]
    assert 1 / np.sqrt(np.mean(np.square(1 / np.array(inverse)))) == pytest.approx(1, rel=0.07)


def test_amplification_of_what_is_not_there() -> None:
    W = normal(6, 8, seed=0)
    assert amplification(0.0 * product(6, 2, 8, 0), W).rank == 0
    assert amplification(product(6, 2, 8, 0), torch.zeros(6, 8)).factor == float("inf")
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    own = LowRank(U[:, :1] * sigma[:1], Vh[:1])
    assert amplification(own, W).factor == pytest.approx(1)
    assert amplification(own, W).aligned > 5


# Intruders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_intruder_cosines_are_those_of_two_dense_svds(
    kind: str, axis: Axis, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE", 9 * 40)
    monkeypatch.setattr(dense, "_BLOCK", 16)
    W = normal(*shape, seed=0)
    adapter = make(kind, W, axis, size=0.5)
    found = intruders(adapter, W, k=6)
    old, new = (np.linalg.svd(X, full_matrices=False)[0] for X in (W.numpy(), effective(adapter, W).astype(np.float64)))
    expected = np.abs(old.T @ new[:, :6]).max(0)
    assert found.cosines.numpy() == pytest.approx(expected, abs=1e-9)
    assert found.count == (expected < 0.5).sum()
    sigma = np.linalg.svd(W.numpy(), compute_uv=False)
    top = np.linalg.svd((effective(adapter, W) - W.numpy()).astype(np.float64), compute_uv=False)[0]
    assert found.strength == pytest.approx(top / sigma[5], rel=0.1)


def test_a_planted_intruder_is_found_and_a_strengthened_direction_is_none() -> None:
    W = normal(60, 40, seed=0)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    outside = torch.linalg.qr(torch.cat([U, normal(60, 1, seed=1)], 1)).Q[:, -1:]
    planted = LoRA(B=3 * sigma[0] * outside, A=Vh[:1], scaling=1.0)
    found = intruders(planted, W)
    assert found.count == 1
    assert found.cosines[0] < 0.4
    assert found.strength > 1
    mixed = U @ normal(40, 1, seed=2) / sqrt(40)
    assert intruders(LoRA(B=3 * sigma[0] * mixed, A=Vh[:1], scaling=1.0), W).count == 1
    assert intruders(LoRA(B=sigma[0] * U[:, :1], A=Vh[:1], scaling=1.0), W).count == 0
    assert intruders(LoRA(B=0 * outside, A=Vh[:1], scaling=1.0), W).strength == 0


def test_intruders_in_nan_are_a_named_error() -> None:
    W = normal(8, 9, seed=0)
    adapter = make("lora", W)
    W[0, 0] = float("nan")
    with pytest.raises(D2SurgeryError, match="NOT_FINITE"):
        intruders(adapter, W)
