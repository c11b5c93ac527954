"""What models say: healthy merges of every kind pass, each fault is seen and its first module named."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from longer import one_in
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import merge
from d2surgery.errors import D2SurgeryError
from d2surgery.evaluating.behaviour import compare_outputs, compare_scores, compare_tasks
from d2surgery.evaluating.forms import Item
from d2surgery.evaluating.items import Task
from d2surgery.evaluating.tasks import Score
from d2surgery.files.plain import plain

if TYPE_CHECKING:
    from models import Built
    from speaking import Speaker

PROMPTS = ["The river rises in the hills", "def mean(numbers):", "1, 2, 4, 8,", "Q: why? A:"]
KINDS = ("lora", "dora", "d2lora", "duallora")
Speakers = Callable[[str, str], "Speaker"]


def changed(merged: Path, out: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """A copy of a merged checkpoint with other tensors."""
    shutil.copytree(merged, out)
    file = out / "model.safetensors"
    save_file(dict(change(load_file(file))), file, metadata={"format": "pt"})
    return out


def codes(found: Any) -> set[tuple[str, str]]:
    return {(problem.code, problem.severity) for problem in found.problems}


# Healthy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", one_in(2, ["BF16", "F32"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_merge_says_the_same(speaker: Speakers, kind: str, dtype: str) -> None:
    case = speaker(kind, dtype)
    steps: list[tuple[int, int]] = []
    found = compare_outputs(*case, prompts=PROMPTS, progress=lambda *step: steps.append(step))
    assert found.problems == ()
    assert found.first_deviating is None
    assert found.not_checked == ()
    assert found.logits is not None
    assert found.logits.strength == pytest.approx(1, abs=1e-3)
    assert found.logits.kl_mean == pytest.approx(found.logits.rounding_floor, rel=0.05)
    assert found.logits.effect is not None
    assert found.logits.effect > 20 * found.logits.kl_mean  # the adapter is heard
    assert found.logits.flips == 0
    assert [layer.module for layer in found.layers[:3]] == [
        "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj",
    ]  # fmt: skip
    assert steps[-1] == (20, 20)
    json.dumps(plain(found), allow_nan=False)


@pytest.mark.parametrize("name", ["llama", "llama dora", "gpt2 dora", "llama embeddings", "tied saved head"])
@pytest.mark.parametrize("dtype", one_in(2, [torch.bfloat16, torch.float32]))
def test_what_peft_merges_rightly_is_right(
    built: Callable[[str], "Built"], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from peft import PeftModel

    case = built(name)
    base = tmp_path / "base"
    case.load(case.base, dtype=dtype).save_pretrained(base)
    PeftModel.from_pretrained(case.load(base, dtype=dtype), case.adapter).merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    found = compare_outputs(base, case.adapter, tmp_path / "merged")
    assert [str(problem) for problem in found.problems] == []
    assert found.not_checked == ("prompts: there is no tokenizer, so random tokens were used",)


@pytest.mark.parametrize("name", ["mixtral", "t5", "bert classifier", "bert bias all", "llama tokens", "mamba"])
def test_other_architectures_are_compared_too(built: Callable[[str], "Built"], name: str) -> None:
    case = built(name)
    found = compare_outputs(case.base, case.adapter, case.merged)
    assert [str(problem) for problem in found.problems] == []
    assert found.layers
    has_logits = name != "bert bias all"
    assert (found.logits is not None) == has_logits
    assert any("has none" in note for note in found.not_checked) != has_logits


def test_what_does_not_read_tokens_is_not_checked(built: Callable[[str], "Built"]) -> None:
    case = built("convnext")
    found = compare_outputs(case.base, case.adapter, case.merged)
    assert found.not_checked == ("outputs and logits: a ConvNextForImageClassification does not read tokens",)
    assert found.logits is None


# Broken ----------------------------------------------------------------------------------------------------------

ONE = "model.layers.1.self_attn.v_proj"


def forget(module: str) -> Callable[[Path], Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """The base's weight in the place of the merged one."""
    return lambda base: (
        lambda tensors: tensors | {module + ".weight": load_file(base / "model.safetensors")[module + ".weight"]}
    )


def scaled(name: str, factor: float) -> Callable[[Path], Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    return lambda base: lambda tensors: tensors | {name: tensors[name] * factor}


FAULTS = {  # what is broken -> (the change, the first module that differs)
    "one module forgotten": (forget(ONE), ONE),
    "the last module forgotten": (forget("model.layers.2.mlp.down_proj"), "model.layers.2.mlp.down_proj"),
    "a norm scaled": (scaled("model.layers.1.input_layernorm.weight", 1.05), "model.layers.1.input_layernorm"),
    "the head scaled": (scaled("lm_head.weight", 1.02), "lm_head"),
    "the embedding scaled": (scaled("model.embed_tokens.weight", 1.02), "model.embed_tokens"),
    "no numbers": (scaled("model.layers.2.mlp.up_proj.weight", float("nan")), "model.layers.2.mlp.up_proj"),
}


@pytest.mark.parametrize("dtype", one_in(2, ["F32", "BF16"]))
@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_module_that_differs_is_named(speaker: Speakers, fault: str, dtype: str, tmp_path: Path) -> None:
    case = speaker("lora", dtype)
    change, first = FAULTS[fault]
    broken = changed(case.merged, tmp_path / "broken", change(case.base))
    found = compare_outputs(case.base, case.adapter, broken, prompts=PROMPTS)
    assert found.first_deviating == first
    (layer,) = [layer for layer in found.layers if layer.own_excess > 2]
    assert layer.module == first  # given the same input, no other differs
    assert ("LAYER_DIFFERS", "error") in codes(found)
    assert next(p.module for p in found.problems if p.code == "LAYER_DIFFERS") == first
    assert dtype == "BF16" or ("LOGITS_DIFFER", "error") in codes(found)
    json.dumps(plain(found), allow_nan=False)


@pytest.mark.parametrize(
    ("dtype", "strength"), [("F32", 1.005), ("F32", 0.96), ("BF16", 1.3), ("BF16", 0.0), ("BF16", -1.0)]
)
@pytest.mark.parametrize("kind", one_in(2, ["dora", "lora"]))
def test_another_strength_is_measured(
    speaker: Speakers, kind: str, dtype: str, strength: float, tmp_path: Path
) -> None:
    case = speaker(kind, dtype)
    merge(case.base, case.adapter, tmp_path / "merged", strength=strength)
    found = compare_outputs(case.base, case.adapter, tmp_path / "merged", prompts=PROMPTS)
    assert ("LOGITS_DIFFER", "error") in codes(found)
    assert found.logits is not None
    assert found.logits.strength is not None
    assert found.logits.strength - 1 == pytest.approx(strength - 1, rel=0.35)


def test_other_weights_altogether_are_seen(speaker: Speakers, tmp_path: Path) -> None:
    case = speaker("lora", "BF16")
    found = compare_outputs(case.base, case.adapter, case.base, prompts=PROMPTS)
    assert found.logits is not None
    assert found.logits.kl_mean == pytest.approx(found.logits.effect, rel=1e-6)
    assert found.logits.strength == pytest.approx(0, abs=1e-6)


# What cannot be compared -----------------------------------------------------------------------------------------


def test_prompts_need_a_tokenizer(built: Callable[[str], "Built"]) -> None:
    case = built("llama")
    with pytest.raises(D2SurgeryError, match=r"NOT_RUNNABLE .*no tokenizer for the prompts"):
        compare_outputs(case.base, case.adapter, case.merged, prompts=["Why?"])


def test_prompts_without_tokens_are_refused(speaker: Speakers) -> None:
    with pytest.raises(D2SurgeryError, match="BAD_DATA"):
        compare_outputs(*speaker("lora", "F32"), prompts=[""])


def test_a_merged_model_that_does_not_run_is_refused(speaker: Speakers, tmp_path: Path) -> None:
    case = speaker("lora", "F32")
    broken = changed(case.merged, tmp_path / "broken", lambda t: {k: v for k, v in t.items() if "norm" not in k})
    with pytest.raises(D2SurgeryError, match=r"NOT_RUNNABLE .*weights are missing"):
        compare_outputs(case.base, case.adapter, broken, prompts=PROMPTS)


# Tasks -----------------------------------------------------------------------------------------------------------


def score(picked: list[int], task: str = "set") -> Score:
    return Score(task=task, by="likelihood", gold=(0,) * len(picked), picked=tuple(picked), chance=0.5)


def test_the_gap_is_mean_and_worst_over_tasks() -> None:
    before = [score([0] * 90 + [1] * 10, "a"), score([0] * 50 + [1] * 50, "b")]
    after = [score([0] * 91 + [1] * 9, "a"), score([0] * 47 + [1] * 53, "b")]
    found = compare_scores(before, after)
    assert found.gap_pp == pytest.approx((1 - 3) / 2)
    assert found.worst_task == "b"
    assert found.worst_gap_pp == pytest.approx(-3)
    assert (found.lost, found.gained) == (3, 1)
    assert found.ci_pp[0] < found.gap_pp < found.ci_pp[1]
    assert codes(found) == {("TASK_GAP", "info")}
    assert not found.equivalent
    assert repr(found).startswith("TaskGap(-1.00 points (")
    assert repr(found).endswith("worst -3.00 in b; info TASK_GAP)")


GAPS = [  # items, wrong after, right after, severity
    (1000, 0, 0, None),
    (50, 0, 0, "info"),
    (1000, 20, 0, "error"),
    (10000, 30, 2, "warning"),
]


@pytest.mark.parametrize(("items", "lost", "gained", "severity"), GAPS)
def test_a_gap_is_a_failure_when_it_is_real_and_large(items: int, lost: int, gained: int, severity: str | None) -> None:
    rest = [0] * (items - lost - gained)
    found = compare_scores([score([0] * lost + [1] * gained + rest)], [score([1] * lost + [0] * gained + rest)])
    assert codes(found) == ({("TASK_GAP", severity)} if severity else set())
    assert found.equivalent == (severity in (None, "warning"))


def test_tasks_of_a_right_merge_have_no_gap_and_of_another_model_have_one(speaker: Speakers, tmp_path: Path) -> None:
    case = speaker("lora", "F32")
    items = tuple(Item(f"Is {n} even?", "yes" if n % 2 else "no", ("yes", "no")) for n in range(40))
    steps: list[tuple[int, int]] = []
    found = compare_tasks(
        *case, [Task("even", items)], by=("likelihood", "generation"), template="plain",
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [one.by for one in found.tasks] == ["likelihood", "generation"]
    assert found.gap_pp == 0
    assert steps[-1] == (160, 160)
    assert steps == sorted(steps)
    other = changed(case.merged, tmp_path / "other", lambda t: t | {"lm_head.weight": -t["lm_head.weight"]})
    assert compare_tasks(case.base, case.adapter, other, [Task("even", items)], template="plain").tasks[0].gap.changed
