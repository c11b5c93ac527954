"""Likeness: what two adapters have in common, against their dense updates."""

from math import isnan, sqrt
from pathlib import Path

import pytest
import torch
from measuring import write_adapter

from d2surgery import Checkpoint, LoRA, load
from d2surgery.measures.likeness import Likeness, closest, difference, likeness
from d2surgery.surveying.modules import differences


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    def made(name: str, seed: int) -> Path:
        return write_adapter(tmp_path_factory.mktemp(name) / "adapter", seed=seed)

    return load(made("one", 0)), load(made("other", 5))


def test_the_similarity_of_two_adapters_is_that_of_their_dense_updates(pairs: tuple[Checkpoint, Checkpoint]) -> None:
    dense = []
    for each in pairs:
        adapters = [each[module] for module in each]
        updates = [a.scaling * a.B.double() @ a.A.double() for a in adapters if isinstance(a, LoRA)]
        dense.append(torch.cat([u.reshape(-1) for u in updates]))
    expected = float(dense[0] @ dense[1] / (dense[0].norm() * dense[1].norm()))
    found = dict(differences(*pairs))
    assert likeness(found).cosine == pytest.approx(expected, abs=1e-12)
    assert 0 < likeness(found).cosine_null < 1 / sqrt(16 * 20)
    assert likeness(found).in_words() == "unrelated"
    assert likeness(dict(differences(pairs[0], pairs[0]))).in_words() == "nearly the same"


def lora(B: torch.Tensor) -> LoRA:
    return LoRA(A=torch.eye(B.shape[1]), B=B, scaling=1.0)


def test_all_modules_count_by_their_energy() -> None:
    """One module the same, one opposed and three times as large: (1 − 9)/(1 + 9)."""
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = likeness({"a": difference(lora(one), lora(one)), "b": difference(lora(3 * one), lora(-3 * one))})
    assert found.cosine == pytest.approx(-0.8)
    assert found.modules == 2
    assert found.in_features == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cosine", "null", "words"),
    [
        (0.97, 0.01, "nearly the same"),
        (0.6, 0.01, "much alike"),
        (0.2, 0.01, "somewhat alike"),
        (0.05, 0.01, "faintly alike"),
        (0.04, 0.01, "unrelated"),
        (-0.04, 0.01, "unrelated"),
        (-0.97, 0.01, "opposed (nearly the same but for the sign)"),
        (float("nan"), 0.0, "not comparable, one of the updates is zero"),
    ],
)
def test_likeness_in_words(cosine: float, null: float, words: str) -> None:
    found = Likeness(cosine, null, 0.5, 0.1, 0.5, 0.1, 0.5, 0.5, 4)
    assert found.in_words() == words
    assert repr(found).startswith("Likeness(4 modules, cosine ")
    assert len(repr(found)) < 100


def test_nothing_in_common_is_not_a_number() -> None:
    found = likeness({})
    assert isnan(found.cosine)
    assert found.modules == 0


def test_a_difference_prints_in_a_line() -> None:
    one = torch.eye(2, 3)
    assert repr(difference(lora(one), lora(one))) == (
        "Difference(2×3, cosine 1.000, φ in_features 1.000, φ out_features 1.000)"
    )


def test_the_closest_pairs_are_those_that_agree_or_oppose_most() -> None:
    def whole(cosine: float, modules: int = 3) -> Likeness:
        return Likeness(cosine, 0.01, 0.5, 0.1, 0.5, 0.1, 0.5, 0.5, modules)

    pairs = {(0, 1): whole(0.2), (0, 2): whole(-0.9), (1, 2): whole(0.5), (1, 3): whole(float("nan")),
             (2, 3): whole(1.0, 0)}  # fmt: skip
    assert closest(pairs, 2) == [(0, 2), (1, 2)]
    assert closest(pairs, 9) == [(0, 1), (0, 2), (1, 2)]
