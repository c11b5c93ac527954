"""Which models answer, one after the other, in what dtype."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from d2surgery import load
from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.scoring import Models, scores
from d2surgery.evaluating.tasks import Progress, Score

if TYPE_CHECKING:
    from speaking import Speaker

Speakers = Callable[[str, str], "Speaker"]


def named(model: nn.Module, tokenizer: Any, progress: Progress) -> list[Score]:
    """One item, whose answer is in the name: the dtype of the model."""
    progress(1, 2)
    progress(2, 2)
    dtype = str(next(model.parameters()).dtype)
    return [Score(task=dtype, by=type(tokenizer).__name__, gold=(0,), picked=(0,), chance=None)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((), ["base"]),
        (("merged",), ["merged"]),
        (("adapter",), ["unmerged"]),
        (("adapter", "merged"), ["unmerged", "merged"]),
    ],
)
def test_the_models_that_are_given_answer_in_turn(speaker: Speakers, given: tuple[str, ...], names: list[str]) -> None:
    case = speaker("lora", "F32")
    told: list[tuple[int, int]] = []
    found = scores(
        Models(base=case.base, **{name: getattr(case, name) for name in given}), named, lambda *at: told.append(at)
    )
    assert list(found) == names
    assert told == [(at, 2 * len(names)) for at in range(1, 2 * len(names) + 1)]


def test_a_cpu_computes_in_float32_unless_told_otherwise(speaker: Speakers) -> None:
    case = speaker("lora", "BF16")
    adapter = load(case.adapter)
    for dtype, wanted in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)):
        models = Models(base=case.base, adapter=adapter, merged=case.merged, dtype=dtype)
        assert [one.task for each in scores(models, named).values() for one in each] == 2 * [str(wanted)]


def test_a_device_that_is_not_here_is_refused(speaker: Speakers) -> None:
    with pytest.raises(D2SurgeryError, match="USAGE"):
        scores(Models(base=speaker("lora", "F32").base, device="nonsense"), named)
