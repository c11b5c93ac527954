"""How many singular values are kept, and that what is kept is the best there is: numpy's SVD in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2surgery.adapters.lowrank import LowRank
from d2surgery.errors import D2SurgeryError
from d2surgery.surgery import truncation
from d2surgery.surgery.choices import ALL, Keep
from d2surgery.surgery.truncation import triplets

CRITERIA = {  # by -> (σ, value) -> the fewest, as its formula says
    "energy": lambda s, v: fewest(np.cumsum(s**2) >= v * np.sum(s**2)),
    "error": lambda s, v: fewest(np.sum(s**2) - np.cumsum(s**2) <= v**2 * np.sum(s**2)),
    "sv_fro": lambda s, v: fewest(np.sqrt(np.cumsum(s**2)) >= v * np.sqrt(np.sum(s**2))),
    "sv_cumulative": lambda s, v: fewest(np.cumsum(s) >= v * np.sum(s)),
    "sv_ratio": lambda s, v: int(np.sum(s > s[0] / v)),
    "above": lambda s, v: int(np.sum(s > v)),
}


def fewest(reached: Any) -> int:
    return int(np.argmax(reached)) + 1


def matrix(out: int, in_: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Singular values 1, decay, decay², … of random directions."""
    generator = np.random.default_rng(seed)
    side = min(out, in_)
    U, V = (np.linalg.qr(generator.standard_normal((n, side)))[0] for n in (out, in_))
    return torch.from_numpy((U * decay ** np.arange(side)) @ V.T)


@pytest.mark.parametrize(("by", "value"), [
    ("energy", 0.5), ("energy", 0.99), ("error", 0.1), ("sv_fro", 0.9), ("sv_fro", 0.99), ("sv_cumulative", 0.5),
    ("sv_cumulative", 0.9), ("sv_ratio", 3.0), ("sv_ratio", 100.0), ("above", 0.01),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("thin", [True, False])
def test_the_fewest_that_reach_it(by: Any, value: float, shape: tuple[int, int], thin: bool) -> None:
    M = matrix(*shape, 0.7)
    s = np.linalg.svd(M.numpy(), compute_uv=False)
    wanted = CRITERIA[by](s, value)
    given_ = LowRank(M, torch.eye(shape[1], dtype=torch.float64)) if thin else M
    for keep, count in ((Keep(by=by, value=value), wanted), (Keep(by=by, value=value, rank=3), min(wanted, 3)),
                        (Keep(by=by, value=value, extra=1), wanted + 1)):  # fmt: skip
        found = triplets(given_, keep)
        assert keep.count(found) == count
        A, B = found.factors(count)
        error, least = np.linalg.norm((M - B @ A).numpy()), np.sqrt(np.sum(s[count:] ** 2))
        assert error == pytest.approx(least, rel=1e-6, abs=1e-9)
        assert found.curve()[count] == pytest.approx(least / np.linalg.norm(s), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shape", [(90, 150), (150, 90)])
def test_large_matrices_are_done_by_iteration(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(truncation, "EXACT_UP_TO", 8)
    monkeypatch.setattr(truncation, "_FIRST", 4)
    M = matrix(*shape, 0.6).float()
    s = np.linalg.svd(M.double().numpy(), compute_uv=False)
    for keep in (Keep(rank=6), Keep(by="energy", value=0.999), Keep(by="sv_ratio", value=40.0)):
        found = triplets(M, keep)
        count = keep.count(found)
        assert not found.complete
        assert count == (6 if keep.rank else CRITERIA[keep.by or ""](s, keep.value))
        A, B = found.factors(count)
        least = np.sqrt(np.sum(s[count:] ** 2))
        assert np.linalg.norm((M.double() - B @ A).numpy()) == pytest.approx(least, rel=1e-6)
    keep = Keep(by="sv_cumulative", value=0.9)  # which every singular value decides
    found = triplets(M, keep)
    assert found.complete
    assert keep.count(found) == CRITERIA["sv_cumulative"](s, 0.9)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.sampled_from(["energy", "error", "sv_fro"]),
    st.floats(0, 1), st.integers(0, 10**6),
)  # fmt: skip
def test_what_is_promised_is_kept(out: int, in_: int, rank: int, by: Any, value: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(out, rank, generator=generator).double() @ torch.randn(rank, in_, generator=generator).double()
    keep = Keep(by=by, value=value)
    found = triplets(M, keep)
    count = keep.count(found)
    assert count is not None
    A, B = found.factors(count)
    left, whole = float((M - B @ A).square().sum()), float(M.square().sum())
    allowed = {"energy": 1 - value, "error": value**2, "sv_fro": 1 - value**2}[by]
    assert left <= allowed * whole + 1e-9 * whole


def test_zero_has_rank_zero_which_is_written_as_one() -> None:
    found = triplets(torch.zeros(4, 6), Keep(by="energy", value=0.9))
    assert Keep(by="energy", value=0.9).count(found) == 0
    A, B = found.factors(0)
    assert (A.shape, B.shape, float((B @ A).norm())) == ((1, 6), (4, 1), 0.0)
    assert found.curve() == [0.0]


@pytest.mark.parametrize(("by", "value", "rank"), [
    ("energy", 1.5, None), ("energy", float("nan"), None), ("sv_ratio", 0.5, None), ("error", -1.0, None),
    (None, 0.0, 0),
])  # fmt: skip
def test_a_senseless_wish_is_refused(by: Any, value: float, rank: int | None) -> None:
    with pytest.raises(D2SurgeryError) as error:
        Keep(by=by, value=value, rank=rank)
    assert {problem.code for problem in error.value.problems} == {"USAGE"}


def test_nothing_said_keeps_everything() -> None:
    M = matrix(5, 7, 0.5)
    found = triplets(M, ALL)
    A, B = found.factors(ALL.count(found) or 0)
    assert torch.allclose(B @ A, M, atol=1e-12)


def test_not_finite_is_an_error() -> None:
    with pytest.raises(D2SurgeryError, match="NaN"):
        triplets(torch.full((3, 3), float("nan")), ALL)
