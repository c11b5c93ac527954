"""How experts share the columns of lora_B: PEFT's order is its own unmerged forward, unsloth's the formula in numpy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Array, Built, f64
from safetensors.torch import load_file, save_file

from d2surgery import BaseWeights, audit, load, merge, open_layout, plan, save
from d2surgery.errors import D2SurgeryError
from d2surgery.formats.layout import with_expert_layout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
GROUPED, INTERLEAVED = {"lora_B_layout": "grouped_by_expert"}, {"lora_B_layout": "rank_major"}
EXPERTS = 4


def copied(adapter: Path, target: Path, *, grouped: bool, metadata: Any = None, **config: Any) -> Path:
    """A copy of an adapter of PEFT's; `grouped`: column e·r + j of lora_B is what PEFT has at j·E + e."""
    shutil.copytree(adapter, target)
    told = json.loads((target / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(told))
    tensors = load_file(target / "adapter_model.safetensors")
    for key, B in tensors.items():
        if grouped and "mlp.experts" in key and "lora_B" in key:
            tensors[key] = B.view(B.shape[0], -1, EXPERTS).transpose(1, 2).reshape(B.shape[0], -1).contiguous()
    save_file(tensors, target / "adapter_model.safetensors", metadata)
    return target


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(BaseWeights(directory))


def said(adapter: Path, **options: Any) -> list[str]:
    return [problem.code for problem in open_layout(adapter, **options).problems]


@pytest.fixture
def moe(built: Callable[[str], Built]) -> Built:
    return built("qwen3 moe")


def test_a_marked_file_is_read_as_it_was_packed(moe: Built, tmp_path: Path) -> None:
    """To the same weights as PEFT's order of the same numbers, which other tests hold to PEFT's forward."""
    assert moe.adapter is not None
    merge(moe.base, copied(moe.adapter, tmp_path / "a", grouped=False, **INTERLEAVED), tmp_path / "wanted")
    merge(moe.base, copied(moe.adapter, tmp_path / "b", grouped=True, **GROUPED), tmp_path / "config")
    marked = copied(moe.adapter, tmp_path / "c", grouped=True, metadata={"format": "pt", **GROUPED})
    merge(moe.base, marked, tmp_path / "metadata")
    wanted = weights(tmp_path / "wanted")
    for name in ("config", "metadata"):
        found = weights(tmp_path / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert said(tmp_path / "a") == said(tmp_path / "b") == said(tmp_path / "c") == []


def test_each_expert_gets_the_columns_of_the_formula(moe: Built, tmp_path: Path) -> None:
    adapter = copied(moe.adapter, tmp_path / "a", grouped=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    grouped, plain = load(adapter, expert_layout="grouped"), load(adapter, expert_layout="interleaved")
    module = next(module for module, entry in grouped.layout.adapters.items() if entry.experts > 1)
    B: Array = f64(tensors[grouped.layout.adapters[module].slots["B"].key])
    r = grouped.layout.adapters[module].ranks["update"]
    for e in range(EXPERTS):
        assert (f64(grouped.adapter(module, e).slots()["B"]) == B.reshape(-1, EXPERTS, r)[:, e]).all()
        assert (f64(plain.adapter(module, e).slots()["B"]) == B.reshape(-1, r, EXPERTS)[:, :, e]).all()


def test_what_is_grouped_is_saved_as_peft_packs_it(moe: Built, tmp_path: Path) -> None:
    first = load(copied(moe.adapter, tmp_path / "a", grouped=True, **GROUPED))
    save(first, tmp_path / "b")
    again = load(tmp_path / "b")
    assert "lora_B_layout" not in json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    for module, entry in first.layout.adapters.items():
        for expert in range(entry.experts):
            one, other = (checkpoint.adapter(module, expert).slots() for checkpoint in (first, again))
            assert all(torch.equal(one[slot], other[slot]) for slot in one)
    stored, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "b", moe.adapter))
    assert all(torch.equal(stored[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({}, "no lora_B_layout"),
        ({"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}, "unsloth's mark"),
        ({"auto_mapping": {"unsloth_fixed": True}}, "unsloth's mark"),
    ],
)
def test_what_nothing_tells_is_said_and_settled_by_the_option(
    moe: Built, tmp_path: Path, config: dict[str, Any], part: str
) -> None:
    adapter = copied(moe.adapter, tmp_path / "a", grouped=True, **config)
    (problem,) = open_layout(adapter).problems
    assert (problem.code, problem.severity) == ("EXPERT_LAYOUT_ASSUMED", "warning")
    assert part in str(problem)
    assert said(adapter, expert_layout="grouped") == said(adapter, expert_layout="interleaved") == []
    assert [p.code for p in plan(moe.base, adapter, tmp_path / "x", expert_layout="grouped").problems] == []


def test_another_word_in_the_marker_is_refused(moe: Built, tmp_path: Path) -> None:
    adapter = copied(moe.adapter, tmp_path / "a", grouped=True, lora_B_layout="diagonal")
    with pytest.raises(D2SurgeryError, match="lora_B_layout") as error:
        merge(moe.base, adapter, tmp_path / "out")
    assert [problem.code for problem in error.value.problems] == ["BAD_CONFIG"]


def test_rank_one_and_plain_modules_leave_nothing_to_assume(built: Callable[[str], Built]) -> None:
    adapter = built("llama").adapter
    assert said(adapter) == []
    assert with_expert_layout(open_layout(adapter), "grouped").adapters == open_layout(adapter).adapters


@pytest.mark.parametrize("merged", ["grouped", "interleaved"])
def test_the_audit_names_the_other_packing(moe: Built, tmp_path: Path, merged: str) -> None:
    adapter = copied(moe.adapter, tmp_path / "a", grouped=False)
    other = {"grouped": "interleaved", "interleaved": "grouped"}[merged]
    merge(moe.base, adapter, tmp_path / "out", expert_layout=merged)
    assert audit(moe.base, adapter, tmp_path / "out", expert_layout=merged).verdict == "pass"
    found = audit(moe.base, adapter, tmp_path / "out", expert_layout=other)
    wrong = {module for module, judged in found.modules.items() if judged.code}
    assert found.verdict == "fail"
    assert wrong == {module for module, entry in open_layout(adapter).adapters.items() if entry.experts > 1}
    assert {found.modules[module].code for module in wrong} == {"EXPERT_LAYOUT"}
    assert f"merged {merged}" in str(found.reasons[0])


def test_saving_writes_pefts_order_whatever_was_read(moe: Built, tmp_path: Path) -> None:
    before = load(copied(moe.adapter, tmp_path / "a", grouped=True, **GROUPED))
    save(before, tmp_path / "b")
    after, wanted = load(tmp_path / "b"), load_file(moe.adapter / "adapter_model.safetensors")
    assert after.layout.problems == ()
    assert "lora_B_layout" not in json.loads((tmp_path / "b/adapter_config.json").read_text())
    found = load_file(tmp_path / "b/adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
