"""Modules that learnt nothing, of every kind, by their factors alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import write_adapter, write_base

from d2surgery import KINDS, Adapter, from_adapters, load, save
from d2surgery.adapters import DualLoRA, LoRA
from d2surgery.reporting.pages.report import report_page
from d2surgery.surveying.adapter import survey
from d2surgery.surveying.zeros import zero_problems, zero_updates


def fresh(kind: str) -> Adapter:
    """As training starts: the delta is zero, Dual LoRA's by its warm-up."""
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    return KINDS[kind].init(weight, rank=2, scaling=0.0 if kind == "duallora" else 2.0)


def lora(up: torch.Tensor, down: torch.Tensor, scaling: float = 1.0) -> LoRA:
    return LoRA(A=down, B=up, scaling=scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_as_training_starts_is_zero_and_a_moved_one_is_not(kind: str, tmp_path: Path) -> None:
    assert zero_updates(from_adapters({"q": fresh(kind), "k": fresh(kind)})) == ["q", "k"]
    assert zero_updates(load(write_adapter(tmp_path / kind, kind))) == []


@pytest.mark.parametrize(("row", "zero"), [(None, True), (0, False), (99, False)])
def test_dual_lora_is_zero_where_no_size_is_positive(row: int | None, zero: bool) -> None:
    """A single positive one, in whichever row, is an update."""
    up = -torch.ones(100, 2)
    if row is not None:
        up[row] = 1.0
    ones = torch.ones(2, 5)
    dual = DualLoRA(A=ones, B=up, C=ones, D=torch.ones(100, 2), scaling=1.0)
    assert zero_updates(from_adapters({"q": dual})) == (["q"] if zero else [])


def test_what_is_zero_is_zero_in_all_its_parts() -> None:
    ones, none = torch.ones(4, 2), torch.zeros(4, 2)
    halves = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0] * 3, [1.0] * 3])  # each column meets a row of zeros
    checkpoint = from_adapters(
        {
            "a": lora(none, torch.ones(2, 3)),
            "b": lora(ones, torch.ones(2, 3)),
            "c": lora(*halves),
            "d": lora(ones, torch.ones(2, 3), scaling=0.0),
            "e": [lora(none, torch.ones(2, 3)), lora(ones, torch.ones(2, 3))],
            "f": [lora(none, torch.ones(2, 3)), lora(none, torch.ones(2, 3))],
            "g": lora(none, torch.ones(2, 3)),
        },
        biases={"g": torch.ones(4)},
    )
    assert zero_updates(checkpoint) == ["a", "c", "d", "f"]


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("lora", {}, "its one module is zero: merged, it is the base again"),
        ("lora", {"replacements": {"head.weight": torch.ones(2)}}, "its one module is zero"),
        ("dora", {}, "its one module is zero; their magnitudes alone may differ from the base"),
    ],
)
def test_it_is_said_that_the_merge_is_the_base_where_it_is(kind: str, more: dict[str, Any], said: str) -> None:
    (problem,) = zero_problems(from_adapters({"q": fresh(kind)}, **more))
    assert (problem.code, problem.severity, problem.module, problem.message) == ("ZERO_UPDATE", "warning", "q", said)


def test_the_report_says_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    adapters = dict(load(write_adapter(tmp_path / "one")))
    first = next(iter(adapters))
    dead = adapters | {first: replace(adapters[first], B=torch.zeros_like(adapters[first].slots()["B"]))}
    save(from_adapters(dead), tmp_path / "dead")
    page = report_page(survey([str(tmp_path / "dead")], base=tmp_path / "base"))
    assert "1 of 6 modules are zero" in page
