"""Survival: sums over tiles against numpy in float64, the closed form of rounding, and what merge then does."""

from math import isnan, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d2surgery import KINDS, BaseWeights, from_adapters, merge, plan, save
from d2surgery.measures.fidelity import Survival, survival

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
    """P(unchanged) = erf(t/(2√2)), t the spacing of bfloat16 at the entry over the delta's size (MATH, section 4)."""
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
