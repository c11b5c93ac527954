"""Ranks and spectra against numpy, against fifty digits, and their standard errors against the truth."""

from math import isnan, log, sqrt

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS_AND_AXES, effective, make, normal
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, LoRA
from d2surgery.adapters.forwards import Axis
from d2surgery.errors import D2SurgeryError
from d2surgery.measures import delta as tiling
from d2surgery.measures import dense
from d2surgery.measures import spectrum as module
from d2surgery.measures.delta import Delta
from d2surgery.measures.dense import head_tail
from d2surgery.measures.ranks import NUMBERS, Method, Spectrum, numerical_rank, rank_above_noise, ranks
from d2surgery.measures.spectrum import cancellation, delta_spectrum, matrix_spectrum, update_spectrum

DENSE = [pair for pair in KINDS_AND_AXES if pair[0] != "lora"]


def true_singular_values(adapter: Adapter, W: Tensor) -> Tensor:
    delta = (effective(adapter, W) - W.double().numpy()).astype(np.float64)
    return torch.from_numpy(np.linalg.svd(delta, compute_uv=False))


# Numbers from singular values ------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_their_definitions() -> None:
    sigma = [4.0, 2.0, 1.0, 1.0]
    p, q = [x / 8 for x in sigma], [x * x / 22 for x in sigma]
    found = ranks(torch.tensor(sigma))
    expected = {
        "entropy_rank": np.exp(-sum(x * log(x) for x in p)),
        "energy_entropy_rank": np.exp(-sum(x * log(x) for x in q)),
        "stable_rank": 22 / 16,
        "participation_ratio": 22**2 / (256 + 16 + 1 + 1),
        "energy_rank_90": 2,  # 20/22 = 0.909
        "energy_rank_95": 3,  # 21/22 = 0.954
        "energy_rank_99": 4,
        "frobenius_norm": sqrt(22),
        "spectral_norm": 4,
        "nuclear_norm": 8,
    }
    assert list(found) == list(NUMBERS) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-14), name


def test_an_energy_that_is_just_reached_is_reached() -> None:
    found = ranks(torch.ones(10))
    assert [found[f"energy_rank_{share}"] for share in (90, 95, 99)] == [9, 10, 10]


def test_a_value_that_stands_for_several_is_as_if_they_were_written_out() -> None:
    few = ranks(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0]))
    many = ranks(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]))
    for name in NUMBERS:
        if not name.startswith("energy_rank"):  # in part where one value stands for many
            assert few[name] == pytest.approx(many[name], rel=1e-14), name
    assert [few[f"energy_rank_{k}"] for k in (90, 95, 99)] == pytest.approx([3.7, 4.35, 4.87])


@given(st.lists(st.floats(0, 1e150), min_size=1, max_size=12), st.floats(1e-100, 1))
def test_the_ranks_are_in_order(values: list[float], scale: float) -> None:
    sigma = torch.tensor(values, dtype=torch.float64) * scale
    found = ranks(sigma)
    slack = 1 + 1e-9
    assert found["stable_rank"] <= found["participation_ratio"] * slack
    assert found["participation_ratio"] <= found["energy_entropy_rank"] * slack
    assert found["energy_entropy_rank"] <= found["entropy_rank"] * slack
    assert found["entropy_rank"] <= int((sigma > 0).sum()) * slack
    assert (found["stable_rank"] >= 1) == bool((sigma > 0).any())
    assert found["energy_rank_90"] <= found["energy_rank_95"] <= found["energy_rank_99"] <= len(sigma)
    assert found["spectral_norm"] <= found["frobenius_norm"] * slack <= found["nuclear_norm"] * slack * slack


def test_the_numbers_do_not_overflow_or_vanish_with_the_scale() -> None:
    sigma = normal(9, seed=1).abs()
    for scale in (1e-300, 1e300):
        for name, value in ranks(sigma * scale).items():
            unit = scale if name.endswith("norm") else 1
            assert value / unit == pytest.approx(ranks(sigma)[name], rel=1e-12), name


def test_the_numerical_rank_is_numpys() -> None:
    M = normal(20, 3, seed=0) @ normal(3, 30, seed=1)
    assert numerical_rank(torch.linalg.svdvals(M), (20, 30)) == np.linalg.matrix_rank(M.numpy()) == 3
    assert numerical_rank(torch.linalg.svdvals(M.float()), (20, 30)) == 3
    between = torch.tensor([1, 1.5e-13], dtype=torch.float64)  # 2 eps < 1.5e-13 < 1000 eps
    assert numerical_rank(between, (2, 1000)) == 1
    assert numerical_rank(torch.zeros(3), (3, 3)) == numerical_rank(torch.zeros(0), (3, 0)) == 0


def test_the_rank_above_noise_is_that_of_the_update_behind_two_rounded_checkpoints() -> None:
    W = (normal(300, 400, seed=0) * 0.02).bfloat16()
    adapter = make("lora", W, rank=16, size=0.1)
    update = adapter.update()
    assert update is not None
    difference = (W.double() + update.dense()).bfloat16().double() - W.double()
    spacing = torch.exp2(W.double().abs().clamp(min=1e-30).log2().floor() - 7)
    sigma = torch.linalg.svdvals(difference)
    assert rank_above_noise(sigma, spacing / sqrt(12), (300, 400)) == 16
    assert rank_above_noise(sigma, float((spacing**2).mean().sqrt()) / sqrt(12), (300, 400)) == 16
    assert ranks(sigma)["entropy_rank"] > 20  # what the noise does to the others


def test_the_noise_edge_of_pure_noise_counts_nothing_even_in_rows() -> None:
    even = normal(200, 300, seed=3)
    uneven = torch.linspace(0.1, 3, 200, dtype=torch.float64)[:, None].expand(200, 300)
    assert rank_above_noise(torch.linalg.svdvals(even), 1.0, (200, 300)) == 0
    assert rank_above_noise(torch.linalg.svdvals(even * uneven), uneven, (200, 300)) == 0
    assert rank_above_noise(torch.linalg.svdvals(even * 1.1), 1.0, (200, 300)) > 0


# Structural ------------------------------------------------------------------------------------------------------


def fifty_digits(P: Tensor, Q: Tensor) -> Tensor:
    with mpmath.workdps(50):
        product = mpmath.matrix(P.tolist()) * mpmath.matrix(Q.tolist())
        wide = product.rows < product.cols
        values = mpmath.svd_r(product.T if wide else product, compute_uv=False)
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


def graded(rows: int, columns: int, condition: float, seed: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(normal(rows, columns, seed=seed), full_matrices=False)
    ends = torch.from_numpy(np.geomspace(1, 1 / condition, min(rows, columns)))
    matrix: Tensor = (U * ends) @ Vh
    return matrix


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_small_singular_values_of_an_update_are_right_to_nine_digits(condition: float) -> None:
    adapter = LoRA(B=graded(14, 5, condition, 1), A=graded(5, 11, condition, 2), scaling=0.25)
    found = update_spectrum(adapter)
    exact = 0.25 * fifty_digits(adapter.B, adapter.A)[:5]
    meant = exact > 1e-6 * exact[0]
    error = (found.singular_values - exact).abs()
    assert (error / exact)[meant].max() < 1e-9
    assert error.max() <= found.error_bound * exact[0] < 1e-12 * exact[0]
    assert (found.of, found.method, found.cancellation) == ("update", "structural", None)
    assert set(found.quality.values()) == {"exact"}
    assert found.standard_errors == {}
    assert found.nuclear_norm_bound == found.nuclear_norm


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-6])
def test_branches_that_nearly_cancel_keep_their_singular_values(epsilon: float) -> None:
    B, A = graded(12, 3, 10, 1), graded(3, 10, 10, 2)
    near = A + epsilon * normal(3, 10, seed=3)
    adapter = D2LoRA(A_plus=A, B_plus=B, A_minus=near, B_minus=B, scaling=2.0, tau=1.0)
    found = update_spectrum(adapter)
    update = adapter.update()
    exact = fifty_digits(update.P, update.Q)[:6]
    error = (found.singular_values - exact).abs()
    meant = exact > 1e-6 * exact[0]
    assert (error / exact)[meant].max() < 1e-9
    assert error.max() <= found.error_bound * exact[0]
    assert found.cancellation is not None
    assert found.cancellation == pytest.approx(
        float((2 * B @ A).norm() + (2 * B @ near).norm()) / float(exact.norm()), rel=1e-9
    )
    assert found.cancellation > 0.1 / epsilon


def test_cancellation_is_one_without_a_minus_branch_and_nothing_for_other_kinds() -> None:
    W = normal(6, 8, seed=0)
    d2 = make("d2lora", W)
    assert isinstance(d2, D2LoRA)
    alone = D2LoRA(A_plus=d2.A_plus, B_plus=d2.B_plus, A_minus=d2.A_minus, B_minus=0 * d2.B_minus, scaling=1.0)
    assert cancellation(alone) == pytest.approx(1)
    assert cancellation(make("lora", W)) is None
    nothing = D2LoRA(A_plus=d2.A_plus, B_plus=0 * d2.B_plus, A_minus=d2.A_minus, B_minus=0 * d2.B_minus, scaling=1.0)
    assert cancellation(nothing) is None


def test_the_update_of_dora_is_its_product_and_the_delta_is_not() -> None:
    W = normal(20, 30, seed=0)
    adapter = make("dora", W, gain=0.05)
    update = update_spectrum(adapter)
    assert update.numerical_rank == 3
    delta = delta_spectrum(adapter, W)
    assert delta.method == "exact"
    assert delta.numerical_rank is None
    assert delta.entropy_rank > 5 > 3 > update.entropy_rank


def test_what_has_no_structure_says_so() -> None:
    W = normal(6, 8, seed=0)
    with pytest.raises(D2SurgeryError, match="USAGE"):
        update_spectrum(make("duallora", W))
    asked: list[tuple[str, Tensor | None, Method | None]] = [
        ("duallora", W, "structural"),
        ("dora", W, "structural"),
        ("dora", None, None),
        ("d2lora", None, "exact"),
    ]
    for kind, base, method in asked:
        with pytest.raises(D2SurgeryError, match="USAGE"):
            delta_spectrum(make(kind, W), base, method)
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        delta_spectrum(make("dora", W), W.T)


# Exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_the_exact_spectrum_is_that_of_the_effective_weight_minus_the_base(
    kind: str, axis: Axis, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE", 7 * 24)  # several tiles
    monkeypatch.setattr(dense, "_BLOCK", 10)
    W = normal(*shape, seed=5)
    adapter = make(kind, W, axis, gain=0.02)
    true = true_singular_values(adapter, W)
    found = delta_spectrum(adapter, W, "exact")
    assert found.method == "exact"
    torch.testing.assert_close(found.singular_values, true, rtol=1e-10, atol=found.error_bound * float(true[0]))
    assert found.numerical_rank is None
    for name, value in ranks(true).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name


def test_the_gram_floor_is_what_is_claimed() -> None:
    sigma = torch.from_numpy(np.geomspace(1, 1e-10, 60))
    U, V = (torch.linalg.qr(normal(n, 60, seed=n)).Q for n in (80, 70))
    found = matrix_spectrum((U * sigma) @ V.T)
    assert found.singular_values.shape == (70,)
    assert (found.singular_values[:60] - sigma).abs().max() < found.error_bound
    large = sigma > 1e-4
    assert ((found.singular_values[:60] - sigma).abs() / sigma)[large].max() < 1e-7


def test_the_default_method_follows_the_kind_and_the_smaller_side(monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(310, 330, seed=0)
    assert delta_spectrum(make("lora", W), None).method == "structural"
    assert delta_spectrum(make("dora", W), W).method == "exact"
    assert delta_spectrum(make("duallora", W), None).method == "exact"
    monkeypatch.setattr(module, "EXACT_UP_TO", 300)
    assert delta_spectrum(make("lora", W), None).method == "structural"
    assert delta_spectrum(make("dora", W), W).method == "head-tail"
    assert delta_spectrum(make("dora", W[:280]), W[:280]).method == "exact"
    assert delta_spectrum(make("dora", W[:280]), W[:280], "head-tail").method == "exact"  # too small for a tail


# Head and tail ---------------------------------------------------------------------------------------------------


def small_delta(case: int) -> Tensor:
    shape = [(200, 320), (320, 200), (256, 256)][case % 3]
    W = 0.02 * normal(*shape, seed=case)
    if case % 2:
        W = W * (0.5 * normal(shape[1], seed=case + 1)).exp()
    kind, axis = DENSE[case % len(DENSE)]
    gain = [0.0, 0.0005, 0.002, 0.01][case % 4]
    return Delta(make(kind, W, axis, rank=4, gain=gain, seed=10 * case), W).dense(torch.float32)


@pytest.mark.long
def test_twice_the_standard_error_covers_the_truth_in_95_of_100_cases() -> None:
    """The share that is covered is checked per number; its own standard deviation is 1.3 % of so many matrices (of a
    thousand 0.7 %, which takes a minute)."""
    cases = 300
    inside = dict.fromkeys(NUMBERS, 0)
    far = dict.fromkeys(NUMBERS, 0)
    with single_thread():
        for case in range(cases):
            delta = small_delta(case)
            true = matrix_spectrum(delta)
            found = head_tail(delta, head=24, generator=torch.Generator().manual_seed(case))
            for name in NUMBERS:
                error = abs(getattr(found, name) - getattr(true, name))
                limit = found.standard_errors.get(name, 1e-7 * getattr(true, name))
                inside[name] += error <= 2 * limit
                far[name] += error > 5 * limit
            assert true.nuclear_norm <= found.nuclear_norm_bound * (1 + 1e-6)
            head = found.singular_values
            assert (head - true.singular_values[: len(head)]).abs().max() <= found.error_bound * head[0]
    assert found.standard_errors.keys() == {name for name in NUMBERS if found.quality[name] == "estimate"}
    for name in NUMBERS:
        assert inside[name] / cases > 0.93, (name, inside[name] / cases)
        assert far[name] <= 3, name
    assert inside["nuclear_norm"] / cases < 0.99  # not so wide that it says nothing


class single_thread:
    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@pytest.mark.parametrize(("kind", "axis"), [("dora", "out_features"), ("d2lora", "in_features")])
@pytest.mark.parametrize("spectrum", ["flat", "power law"])
def test_entropy_ranks_from_head_and_tail_are_within_two_per_cent(kind: str, axis: Axis, spectrum: str) -> None:
    W = 0.02 * normal(400, 560, seed=1)
    if spectrum == "power law":
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * sigma[0] * torch.arange(1, 401) ** -0.5) @ Vh
    adapter = make(kind, W, axis, rank=16, gain=0.002)
    true, found = (delta_spectrum(adapter, W.bfloat16(), method) for method in ("exact", "head-tail"))
    assert (true.method, found.method) == ("exact", "head-tail")
    for name in ("entropy_rank", "energy_entropy_rank", "nuclear_norm", "stable_rank", "participation_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02), name
    assert found.frobenius_norm == pytest.approx(true.frobenius_norm, rel=1e-7)
    assert found.spectral_norm == pytest.approx(true.spectral_norm, rel=1e-6)


def test_head_and_tail_of_a_low_rank_matrix_is_its_rank() -> None:
    M = (normal(400, 6, seed=0) @ normal(6, 500, seed=1)).float()
    found = head_tail(M)
    assert found.singular_values.shape == (6,)
    true = ranks(torch.linalg.svdvals(M.double())[:6])
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(true[name], rel=1e-3), name


def test_a_tail_whose_energy_is_known_has_it() -> None:
    theta, nodes = torch.tensor([3.0, 2.0]), normal(4, 5, seed=0).abs()
    tail = dense._Tail(theta, nodes, torch.full((4, 5), 2.0), energy=7.0)
    assert tail.ranks(range(4))["frobenius_norm"] == pytest.approx(sqrt(9 + 4 + 7))
    assert tail.ranks([2])["frobenius_norm"] == pytest.approx(sqrt(9 + 4 + 7))
    free = dense._Tail(theta, nodes, torch.full((4, 5), 2.0), energy=None)
    assert free.ranks([2])["frobenius_norm"] == pytest.approx(sqrt(13 + 2 * float(nodes[2].square().sum())))


def test_what_follows_an_unconverged_value_is_not_counted_as_converged() -> None:
    theta, residual = torch.tensor([3.0, 2.0, 1.0, 1e-7]), torch.tensor([1e-4, 0.5, 0.0, 0.0])
    assert dense._Head(theta, torch.eye(4), residual).converged() == 1
    assert dense._Head(theta, torch.eye(4), 0 * residual).converged() == 3  # the last is float32's rounding


def test_head_and_tail_is_the_same_twice_and_another_with_another_seed() -> None:
    M = normal(300, 320, seed=0).float()
    first, again = head_tail(M), head_tail(M)
    other = head_tail(M, generator=torch.Generator().manual_seed(7))
    assert first.entropy_rank == again.entropy_rank != other.entropy_rank
    assert first.quality["frobenius_norm"] == "exact"
    assert first.quality["entropy_rank"] == "estimate"
    assert first.standard_errors["entropy_rank"] > 0


# Edges -----------------------------------------------------------------------------------------------------------


def of_matrix(M: Tensor, method: Method) -> Spectrum:
    """LoRA with B = M and A = I has the delta M."""
    adapter = LoRA(B=M, A=torch.eye(M.shape[1], dtype=M.dtype), scaling=1.0)
    return delta_spectrum(adapter, None, method)


@pytest.mark.parametrize("method", ["structural", "exact", "head-tail"])
def test_edges_have_defined_results(method: Method) -> None:
    n = 30 if method == "structural" else 300
    zero, one = torch.zeros(n, n + 10), torch.outer(normal(n, seed=0), normal(n + 10, seed=1))
    assert {getattr(of_matrix(zero, method), name) for name in NUMBERS} == {0}
    rank_one = of_matrix(one, method)
    equal = of_matrix(torch.full((n, n + 10), 0.5), method)
    row, column = of_matrix(normal(1, 40, seed=2), method), of_matrix(normal(40, 1, seed=2), method)
    for found in (rank_one, equal, row, column):
        for name in NUMBERS:
            wanted = found.frobenius_norm if name.endswith("norm") else 1
            assert getattr(found, name) == pytest.approx(wanted, rel=2e-3), (name, method)
        assert not any(isnan(error) for error in found.standard_errors.values())
    assert equal.spectral_norm == pytest.approx(0.5 * sqrt(n * (n + 10)), rel=1e-6)
    same = of_matrix(torch.eye(n, dtype=torch.float64), method)  # all singular values equal
    assert same.entropy_rank == pytest.approx(n, rel=1e-3)
    assert same.stable_rank == pytest.approx(n, rel=1e-3)


@pytest.mark.parametrize("method", ["structural", "exact", "head-tail"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_named_error(method: Method, bad: float) -> None:
    M = normal(300, 310, seed=0)
    M[3, 4] = bad
    with pytest.raises(D2SurgeryError, match="NOT_FINITE"):
        of_matrix(M, method)


def test_nan_in_the_base_is_a_named_error() -> None:
    W = normal(20, 30, seed=0)
    adapter = make("d2lora", W, "in_features")
    W[2, 3] = float("nan")
    with pytest.raises(D2SurgeryError, match="NOT_FINITE"):
        delta_spectrum(adapter, W)


def test_a_delta_without_entries_is_zero() -> None:
    found = delta_spectrum(LoRA(A=torch.zeros(0, 5), B=torch.zeros(4, 0), scaling=1.0), None)
    assert (found.entropy_rank, found.numerical_rank, found.error_bound) == (0, 0, 0)


@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
def test_tiles_of_a_delta_are_the_delta(kind: str, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(23, 37, seed=0)
    adapter = make(kind, W, axis)
    true = torch.from_numpy((effective(adapter, W) - W.numpy()).astype(np.float64))
    monkeypatch.setattr(tiling, "_TILE", 5 * 37)
    delta = Delta(adapter, W)
    torch.testing.assert_close(delta.dense(torch.float64), true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat(list(delta.tiles()), 1), true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(delta.tile(out=slice(3, 9), in_=slice(2, 8)), true[3:9, 2:8], rtol=1e-9, atol=1e-12)


def test_a_doras_magnitude_of_the_wrong_sign_is_measured_as_it_is() -> None:
    W = normal(10, 12, seed=0)
    adapter = make("dora", W)
    assert isinstance(adapter, DoRA)
    flipped = DoRA(A=adapter.A, B=adapter.B, magnitude=-adapter.magnitude, scaling=adapter.scaling)
    found = delta_spectrum(flipped, W)
    torch.testing.assert_close(found.singular_values, true_singular_values(flipped, W), rtol=1e-9, atol=1e-9)
