"""Survival: sums over tiles against numpy in float64, the closed form of rounding, and what merge then does."""

from math import inf, isnan, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from d2surgery import KINDS, BaseWeights, from_adapters, merge, plan, save
from d2surgery.files.tensors import rounded
from d2surgery.measures.fidelity import Comparison, Survival, compare, measured, strength_of, survival, ulps

GENERATOR = torch.Generator().manual_seed(5)


def base_and_delta(ratio: float, shape: tuple[int, int] = (256, 384)) -> tuple[torch.Tensor, torch.Tensor]:
    """A bfloat16 base with entries of 0.02 and a delta of `ratio` of its size, in float32."""
    base = (0.02 * torch.randn(shape, generator=GENERATOR)).bfloat16().float()
    return base, ratio * 0.02 * torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_survival_is_what_numpy_finds_in_the_rounded_sum(dtype: torch.dtype) -> None:
    base, delta = base_and_delta(0.01)
    applied = ((base + delta).to(dtype).double() - base.to(dtype).double()).numpy()
    wanted = delta.double().numpy()
    found = survival(base, delta, dtype)
    assert found.elements == base.numel()
    assert found.changed == np.count_nonzero(applied)
    assert found.gain == pytest.approx((applied * wanted).sum() / (wanted**2).sum(), rel=1e-6)
    assert found.relative_error == pytest.approx(np.linalg.norm(applied - wanted) / np.linalg.norm(wanted), rel=1e-5)
    cosine = (applied * wanted).sum() / np.linalg.norm(applied) / np.linalg.norm(wanted)
    assert found.cosine == pytest.approx(cosine, rel=1e-6)


def test_survival_adds_up_over_tiles() -> None:
    base, delta = base_and_delta(0.01)
    parts = [survival(base[i : i + 60], delta[i : i + 60], torch.bfloat16) for i in range(0, 256, 60)]
    whole, added = survival(base, delta, torch.bfloat16), sum(parts, Survival())
    assert (added.elements, added.changed) == (whole.elements, whole.changed)
    assert added.gain == pytest.approx(whole.gain, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.002, 0.005, 0.01])
def test_the_share_of_changed_entries_is_the_closed_form(ratio: float) -> None:
    """P(unchanged) = erf(t/(2√2)), t the spacing of bfloat16 at the entry over the delta's size
    (docs/mathematics.md#rounding)."""
    base, delta = base_and_delta(ratio, (1024, 1024))
    exponents = torch.frexp(base[base != 0])[1].double()
    spacing = torch.exp2(exponents - 8) / (ratio * 0.02)
    unchanged = float(torch.erf(spacing / (2 * sqrt(2))).mean())
    assert 1 - survival(base, delta, torch.bfloat16).changed_share == pytest.approx(unchanged, abs=0.02)


def test_a_zero_delta_has_no_gain_and_nothing_has_no_share() -> None:
    zero = torch.zeros(4, 4)
    assert isnan(survival(torch.ones(4, 4), zero, torch.bfloat16).gain)
    assert isnan(Survival().changed_share)
    assert isnan(survival(torch.ones(4, 4), zero, torch.bfloat16).cosine)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_forecasts_what_merge_does(kind: str, tmp_path: Path) -> None:
    weight = (0.02 * torch.randn(96, 160, generator=GENERATOR)).bfloat16()
    (tmp_path / "base").mkdir()
    save_file({"up.weight": weight}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    fresh = KINDS[kind].init(weight.float(), rank=2, scaling=0.5, generator=GENERATOR).slots()
    slots = {s: t if t.any() else 0.01 * torch.randn(t.shape, generator=GENERATOR) for s, t in fresh.items()}
    adapter = KINDS[kind](scaling=0.5, **slots)
    save(from_adapters({"up": adapter}), tmp_path / "adapter")
    forecast = plan(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    applied = BaseWeights(tmp_path / "out")["up.weight"].double() - weight.double()
    delta = adapter.delta(weight.double())
    gain = float((applied * delta).sum() / delta.square().sum())
    assert forecast.survival["up"]["BF16"].gain == pytest.approx(gain, rel=1e-5)


# Comparison ------------------------------------------------------------------------------------------------------


def merged_at(strength: float, base: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rounded(base.double() + strength * delta.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 0.98, 1.005, 1.04, 2.0])
def test_the_strength_is_found_within_its_error(strength: float, dtype: torch.dtype) -> None:
    base, delta = base_and_delta(0.01)
    sums = compare(base, delta, merged_at(1, base, delta, dtype), merged_at(strength, base, delta, dtype))
    kept = survival(base, strength * delta, dtype).gain / survival(base, delta, dtype).gain  # rounding takes its share
    wanted = strength * kept if strength else 0.0
    assert abs(sums.strength - wanted) <= 5 * sums.strength_error + 1e-5
    assert sums.strength_error < 0.002


def test_a_right_merge_that_rounding_nearly_loses_has_strength_one() -> None:
    base, delta = base_and_delta(0.0005)
    right = merged_at(1, base, delta, torch.bfloat16)
    assert survival(base, delta, torch.bfloat16).gain < 0.5
    assert compare(base, delta, right, right).strength == 1
    twice = compare(base, delta, right, merged_at(2, base, delta, torch.bfloat16))
    assert twice.strength > 1.5 + 5 * twice.strength_error


@pytest.mark.parametrize("ratio", [0.01, 0.0005])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 0.98, 1.0, 1.005, 2.0, 30.0])
def test_a_strength_is_solved_for_however_much_rounding_keeps(
    strength: float, dtype: torch.dtype, ratio: float
) -> None:
    base, delta = base_and_delta(ratio)
    found, error = strength_of(base, delta, merged_at(strength, base, delta, dtype))
    assert abs(found - strength) <= 5 * error + 1e-6 * max(abs(strength), 1)
    assert error < 0.02 * max(abs(strength), 1)  # near 0 bfloat16 shows little of a small delta


def test_a_delta_that_does_not_reach_the_file_has_no_strength() -> None:
    base, delta = base_and_delta(0.01)
    assert strength_of(base, 0 * delta, base.bfloat16()) == (1.0, inf)


@pytest.mark.parametrize("strength", [1.05, 0.0])
def test_comparisons_are_numpys_sums_and_add_up_over_tiles(strength: float) -> None:
    """Also of a merge that lost the adapter, of which half of the sums are known from the other half."""
    base, delta = base_and_delta(0.01)
    wanted, merged = (merged_at(each, base, delta, torch.bfloat16) for each in (1, strength))
    whole = compare(base, delta, wanted, merged)
    tiles = [slice(i, i + 50) for i in range(0, 256, 50)]
    added = sum((compare(base[t], delta[t], wanted[t], merged[t]) for t in tiles), Comparison())
    assert (added.elements, added.mismatched, added.ulps) == (whole.elements, whole.mismatched, whole.ulps)
    assert added.beyond == pytest.approx(whole.beyond, rel=0.02)  # it knows the size of a tile's delta only
    e, d = (x.double().numpy() - y.double().numpy() for x, y in ((wanted, base), (merged, wanted)))
    x = (d * delta.double().numpy()).sum() / (e * delta.double().numpy()).sum()
    assert added.strength - 1 == pytest.approx(x, rel=1e-5)
    assert added.residual == pytest.approx(np.linalg.norm(d - x * e) / np.linalg.norm(e), rel=1e-4)
    noise = (d - x * e) * delta.double().numpy()
    error = np.linalg.norm(noise) / (e * delta.double().numpy()).sum()
    assert added.strength_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_distances_count_the_numbers_between(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=dtype)
    beyond = torch.nextafter(one, torch.tensor(9.0, dtype=dtype))
    assert ulps(one, beyond).tolist() == [1, 1, 1, 1]
    assert ulps(torch.tensor([-0.0], dtype=dtype), torch.tensor([0.0], dtype=dtype)).tolist() == [0]


@given(st.lists(st.tuples(*[st.integers(0, (1 << 16) - 1)] * 2), min_size=1, max_size=40))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bins_hold_the_distances_of_all_finite_numbers(dtype: torch.dtype, patterns: list[tuple[int, int]]) -> None:
    bits = np.array(patterns, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16).copy()).view(dtype)
    kept = torch.isfinite(values).all(1) & (values[:, 0] != values[:, 1])
    if not bool(kept.any()):
        return
    a, b = values[kept].T.contiguous()[:, None]
    place = np.where(bits >> 15, -(bits & 0x7FFF).astype(np.int64), bits & 0x7FFF)[kept.numpy()]
    distances = np.abs(place[:, 0] - place[:, 1])
    bins, _ = np.histogram(distances, [1, 2, 3, 5, 17, 1 << 17])
    found = compare(torch.zeros(a.shape), torch.ones(a.shape), a, b)
    assert found.ulps == tuple(bins)


def test_one_changed_element_is_one_and_a_large_change_is_beyond_rounding() -> None:
    base, delta = base_and_delta(0.01)
    wanted = merged_at(1, base, delta, torch.bfloat16)
    near, far = wanted.clone(), wanted.clone()
    near[3, 7] = torch.nextafter(near[3, 7], torch.tensor(9.0, dtype=torch.bfloat16))
    far[3, 7] += 0.5
    small, large = (compare(base, delta, wanted, merged) for merged in (near, far))
    assert (small.mismatched, small.ulps, small.beyond) == (1, (1, 0, 0, 0, 0), 0)
    assert (large.mismatched, large.beyond) == (1, 1)
    far[3, 7] = float("nan")
    assert compare(base, delta, wanted, far).beyond == 1


def test_an_element_lies_halfway_where_another_order_of_summing_turns_it() -> None:
    base, delta = torch.ones(2, 2), torch.tensor([[2**-8, 2**-9], [2**-8 + 2**-20, 0.0]])
    wanted, merged = torch.ones(2, 2, dtype=torch.bfloat16), torch.full((2, 2), 1 + 2**-7, dtype=torch.bfloat16)
    found = compare(base, delta, wanted, merged)
    assert (found.mismatched, found.ulps[0], found.halfway) == (4, 4, 2)  # of 2⁻⁷: a half, a quarter, about a half, 0
    assert compare(base, delta, wanted, wanted).halfway == 0


def test_what_is_measured_in_the_file_is_what_was_forecast() -> None:
    base, delta = base_and_delta(0.01)
    merged = rounded(base + delta, torch.bfloat16)
    found, forecast = measured(base, delta, merged), survival(base, delta, torch.bfloat16)
    assert (found.elements, found.changed) == (forecast.elements, forecast.changed)
    assert found.gain == pytest.approx(forecast.gain, rel=1e-6)
    assert measured(base, delta, merged, torch.empty_like(base)) == found
    turned = measured(*(values.T.contiguous().T for values in (base, delta, merged)))  # as GPT-2 stores them
    assert turned.changed == found.changed
    assert turned.gain == pytest.approx(found.gain, rel=1e-6)
