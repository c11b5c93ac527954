"""Divergences from logits: against mpmath where they are tiny, against the formula in numpy everywhere else."""

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from d2surgery.evaluating.divergence import CLEAR, LogitSums, kl_divergence


def exact(z: Any, y: Any) -> float:
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(float(v))) for v in row] for row in (z, y))
        return float(sum(a / sum(p) * mpmath.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 10.0, 300.0])
def test_kl_is_sure_at_any_size(size: float) -> None:
    generator = np.random.default_rng(0)
    z = generator.normal(size=(3, 40)) * 3
    y = z + size * generator.normal(size=z.shape) + 5
    found = kl_divergence(torch.tensor(z), torch.tensor(y))
    assert found.tolist() == pytest.approx([exact(a, b) for a, b in zip(z, y, strict=True)], rel=1e-5)


def test_a_shift_of_all_logits_is_no_difference() -> None:
    z = torch.randn(4, 9, dtype=torch.float64)
    assert float(kl_divergence(z, z + 7).max()) < 1e-28


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_every_number_is_the_formula_again() -> None:
    generator = np.random.default_rng(1)
    prompts, positions, words = 5, 6, 12
    z = generator.normal(size=(prompts, positions, words)) * 2
    base = z - 0.5 * generator.normal(size=z.shape)
    right = z + 0.01 * generator.normal(size=z.shape)
    served = z + 0.03 * generator.normal(size=z.shape)
    merged = base + 1.1 * (right - base)
    merged[2, 3, 4] += 9  # a flip that no noise explains
    tokens = generator.integers(words, size=(prompts, 1, positions))

    sums = LogitSums(list(torch.tensor(z)), list(torch.tensor(base)), list(torch.tensor(tokens)))
    for name, values in (("served", served), ("right", right), ("merged", merged)):
        for at in range(prompts):
            sums.add(name, at, torch.tensor(values[at]))
    found = sums.record()

    def kl(y: Any) -> Any:
        p, q = softmax(z), softmax(y)
        return (p * np.log(p / q)).sum(-1)

    def centred(d: Any) -> Any:
        return d - d.mean(-1, keepdims=True)

    assert found.positions == prompts * positions
    assert found.kl_mean == pytest.approx(kl(merged).mean())
    assert found.kl_max == pytest.approx(kl(merged).max())
    assert found.kl_p99 == pytest.approx(np.quantile(kl(merged), 0.99))
    assert found.noise_floor == pytest.approx(kl(served).mean())
    assert found.rounding_floor == pytest.approx(kl(right).mean())
    assert found.effect == pytest.approx(kl(base).mean())
    assert found.relative_to_effect == pytest.approx(kl(merged).mean() / kl(base).mean())
    assert found.max_abs == pytest.approx(np.abs(centred(merged - z)).max())
    assert found.rms == pytest.approx(np.sqrt((centred(merged - z) ** 2).mean()))
    assert found.noise_max_abs == pytest.approx(np.abs(centred(served - z)).max())
    assert found.rounding_rms == pytest.approx(np.sqrt((centred(right - z) ** 2).mean()))
    top = z.argmax(-1)
    ordered = np.sort(z, -1)
    sure = ordered[..., -1] - ordered[..., -2] > CLEAR * found.rounding_rms
    assert found.top1_agreement == pytest.approx((merged.argmax(-1) == top).mean())
    assert found.noise_top1_agreement == pytest.approx((served.argmax(-1) == top).mean())
    assert found.flips == ((merged.argmax(-1) != top) & sure).sum() >= 1

    direction = centred(z - base)
    above, below = ([((y - base) * direction)[at].sum() for at in range(prompts)] for y in (merged, right))
    strength = sum(above) / sum(below)
    assert found.strength == pytest.approx(strength)
    residuals = np.array(above) - strength * np.array(below)
    assert found.strength_error == pytest.approx(np.sqrt(prompts / (prompts - 1) * (residuals**2).sum()) / sum(below))

    losses = [
        [-np.log(softmax(y)[at, range(positions - 1), tokens[at, 0, 1:]]) for at in range(prompts)] for y in (z, merged)
    ]
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses[0])))
    assert found.perplexity_merged == pytest.approx(np.exp(np.mean(losses[1])))
    changes = np.mean(losses[1], -1) - np.mean(losses[0], -1)
    assert found.log_perplexity_change == pytest.approx(changes.mean())
    wanted = stats.t.interval(0.95, prompts - 1, changes.mean(), stats.sem(changes))
    assert found.log_perplexity_ci == pytest.approx(wanted)


def test_the_strengths_error_covers_the_truth() -> None:
    """Noise of a prompt's own on both: the true strength lies within 3 errors in nearly all of 200 draws."""
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        z = generator.normal(size=(12, 4, 30))
        base = z - generator.normal(size=z.shape)
        right, merged = z + 0.3 * generator.normal(size=z.shape), base + 1.05 * (z - base)
        merged = merged + 0.3 * generator.normal(size=z.shape)
        sums = LogitSums(list(torch.tensor(z)), list(torch.tensor(base)), None)
        for name, values in (("served", right), ("right", right), ("merged", merged)):
            for at in range(12):
                sums.add(name, at, torch.tensor(values[at]))
        found = sums.record()
        assert found.perplexity is None
        assert found.strength is not None
        assert found.strength_error is not None
        inside += abs(found.strength - 1.05) < 3 * found.strength_error
    assert inside >= 190


def test_vocabularies_of_two_sizes_are_compared_where_they_overlap() -> None:
    z, base, y = torch.randn(3, 10), torch.randn(3, 8), torch.randn(3, 9)
    sums = LogitSums([z], [base], None)
    for name in ("served", "right", "merged"):
        sums.add(name, 0, y)
    found = sums.record()
    assert found.kl_mean == pytest.approx(float(kl_divergence(z[:, :9], y).mean()))
    assert found.effect == pytest.approx(float(kl_divergence(z[:, :8], base).mean()))
