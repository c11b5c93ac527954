"""LowRank against dense float64, and its singular values against fifty digits."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook
from torch import Tensor

from d2surgery.errors import D2SurgeryError

with install_import_hook("d2surgery.adapters.lowrank", "beartype.beartype"):
    from d2surgery.adapters.lowrank import LowRank

EPS = torch.finfo(torch.float64).eps


def random(out: int, rank: int, in_: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    P = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    Q = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    return LowRank(P.to(dtype), Q.to(dtype))


def graded(rows: int, columns: int, condition: float, seed: int) -> Tensor:
    """A (rows, columns) matrix whose singular values fall evenly from 1 to 1/condition."""
    noise = np.random.default_rng(seed).normal(size=(rows, columns))
    U, _, Vh = np.linalg.svd(noise, full_matrices=False)
    return torch.from_numpy(U * np.geomspace(1, 1 / condition, min(rows, columns)) @ Vh)


def singular_values_to_fifty_digits(P: Tensor, Q: Tensor) -> Tensor:
    """Of the exact product of the two stored factors."""
    with mpmath.workdps(50):
        product = mpmath.matrix(P.tolist()) * mpmath.matrix(Q.tolist())
        wide = product.rows < product.cols
        values = mpmath.svd_r(product.T if wide else product, compute_uv=False)
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


sizes = st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(0, 4), st.integers(0, 4), st.floats(-8, 8), st.integers(0, 10**6))
def test_sums_and_multiples_are_those_of_the_dense_matrices(
    out: int, in_: int, rank: int, other_rank: int, scalar: float, seed: int
) -> None:
    M, N = random(out, rank, in_, seed), random(out, other_rank, in_, seed + 1)
    M_dense, N_dense = M.dense(), N.dense()
    for thin, dense in (
        (M + N, M_dense + N_dense),
        (scalar * M, scalar * M_dense),
        (M * scalar, scalar * M_dense),
        (scalar * (M + N), scalar * M_dense + scalar * N_dense),
    ):
        torch.testing.assert_close(thin.dense(), dense, rtol=1e-12, atol=1e-12)
    assert (M + N).shape == (out, in_)
    assert (M + N).rank == min(rank + other_rank, out, in_)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(0, 4), st.integers(0, 4), st.integers(0, 10**6))
def test_norms_products_and_singular_values_are_those_of_the_dense_matrices(
    out: int, in_: int, rank: int, other_rank: int, seed: int
) -> None:
    M, N = random(out, rank, in_, seed), random(out, other_rank, in_, seed + 1)
    M_dense, N_dense = M.dense().numpy(), N.dense().numpy()
    scale = float(1 + np.linalg.norm(M_dense) * (1 + np.linalg.norm(N_dense)))
    assert abs(float(M.inner(N)) - float((M_dense * N_dense).sum())) < 1e-13 * scale
    assert abs(float(M.frobenius_norm()) - np.linalg.norm(M_dense)) < 1e-13 * scale
    values = M.singular_values()
    assert values.dtype == torch.float64
    expected = torch.from_numpy(np.linalg.svd(M_dense, compute_uv=False)[: M.rank])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("out_in", [(14, 10), (10, 14)])
@pytest.mark.parametrize(("cond_P", "cond_Q"), [(1, 1), (1e3, 1e3), (1e6, 1), (1, 1e6), (1e6, 1e6)])
def test_singular_values_hold_at_any_condition_of_the_factors(
    out_in: tuple[int, int], cond_P: float, cond_Q: float
) -> None:
    out, in_ = out_in
    P, Q = graded(out, 6, cond_P, seed=1), graded(6, in_, cond_Q, seed=2)
    exact = singular_values_to_fifty_digits(P, Q)[:6]
    close = LowRank(P, Q).singular_values()
    meant = exact > 1e-6 * exact[0]
    assert ((close - exact).abs() / exact)[meant].max() < 1e-9
    assert (close - exact).abs().max() < 1e-14 * exact[0]


def test_a_column_of_another_size_does_not_blur_the_others() -> None:
    """P·D and D⁻¹·Q is the same matrix, whatever the diagonal D."""
    M = random(20, 4, 30)
    D = torch.tensor([1e-9, 1.0, 1e5, 1e9], dtype=torch.float64)
    skewed = LowRank(M.P * D, M.Q / D[:, None])
    torch.testing.assert_close(skewed.singular_values(), M.singular_values(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6])
def test_a_sum_that_nearly_cancels_keeps_its_singular_values(epsilon: float) -> None:
    M, noise = random(16, 4, 12, seed=3), random(16, 4, 12, seed=4)
    near = LowRank(M.P + epsilon * noise.P, M.Q + epsilon * noise.Q)
    difference = M + -1.0 * near
    exact = singular_values_to_fifty_digits(difference.P, difference.Q)[:8]
    meant = exact > 1e-6 * exact[0]
    close = difference.singular_values()
    assert ((close - exact).abs() / exact)[meant].max() < 1e-9
    norm = exact.square().sum().sqrt()
    assert abs(float(difference.frobenius_norm() / norm) - 1) < 1e-9
    assert abs(float(difference.inner(difference) / norm**2) - 1) < 1e-9
    assert difference.frobenius_norm() < 10 * epsilon * M.frobenius_norm()


def test_recompressed_is_the_same_matrix_with_the_fewest_columns() -> None:
    M = random(20, 3, 30)
    for thick, rank in ((M + M, 3), (M + 0.0 * M, 3), (M + -1.0 * M, 0), (M + random(20, 2, 30, seed=9), 5), (M, 3)):
        thin = thick.recompressed()
        assert thin.rank == rank
        assert thin.P.dtype == thin.Q.dtype == torch.float64
        torch.testing.assert_close(thin.dense(), thick.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [4096, 4097, 9000])
def test_of_tall_factors_small_singular_values_are_not_lost(rows: int) -> None:
    """Their QR is made of those of pieces. σ of graded·orthonormal are the graded ones."""
    P, Q = graded(rows, 6, 1e9, seed=1), torch.linalg.qr(torch.randn(5000, 6, dtype=torch.float64)).Q.T
    torch.testing.assert_close(
        LowRank(P, Q).singular_values(), torch.from_numpy(np.geomspace(1, 1e-9, 6)), rtol=0, atol=50 * EPS
    )


def test_recompressed_keeps_what_a_near_cancellation_leaves() -> None:
    M = random(20, 3, 30)
    left = M + LowRank(-M.P * (1 + 1e-10), M.Q)
    assert left.recompressed().rank == 3
    torch.testing.assert_close(left.recompressed().dense(), left.dense(), rtol=0, atol=50 * EPS)


@pytest.mark.parametrize(("out", "rank", "in_"), [(1, 1, 9), (9, 1, 1), (1, 1, 1), (3, 8, 5), (1, 4, 6)])
def test_thin_shapes_of_every_proportion(out: int, rank: int, in_: int) -> None:
    M = random(out, rank, in_)
    expected = np.linalg.svd(M.dense().numpy(), compute_uv=False)[: M.rank]
    np.testing.assert_allclose(M.singular_values(), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(M.recompressed().dense(), M.dense(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_zero_is_a_matrix_like_any_other(rank: int) -> None:
    zero = LowRank(torch.zeros(4, rank), torch.zeros(rank, 5))
    assert zero.dense().shape == (4, 5)
    assert zero.frobenius_norm() == zero.inner(random(4, 2, 5)) == 0
    assert zero.singular_values().tolist() == [0.0] * rank
    assert zero.recompressed().rank == 0
    torch.testing.assert_close((zero + random(4, 2, 5)).dense(), random(4, 2, 5).dense())


def test_sixteen_bit_factors_are_read_into_float64() -> None:
    M = random(6, 2, 7, dtype=torch.bfloat16)
    exact = M.P.double() @ M.Q.double()
    assert torch.equal(M.dense(), exact)
    assert torch.equal((0.3 * M).dense(), (0.3 * M.P.double()) @ M.Q.double())
    np.testing.assert_allclose(M.singular_values(), np.linalg.svd(exact.numpy(), compute_uv=False)[:2], rtol=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    M = random(4, 2, 5)
    M.Q[1, 3] = bad
    for call in (M.singular_values, M.frobenius_norm, M.recompressed, lambda: random(4, 2, 5).inner(M)):
        with pytest.raises(D2SurgeryError, match="NOT_FINITE"):
            call()


def test_factors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)  # else beartype speaks first
    with pytest.raises(D2SurgeryError, match=r"SHAPE_UNEXPECTED.*\(4, 2\), \(3, 5\)"):
        LowRank(torch.zeros(4, 2), torch.zeros(3, 5))
    with pytest.raises(D2SurgeryError, match="SHAPE_UNEXPECTED"):
        random(4, 2, 5) + random(5, 2, 4)
