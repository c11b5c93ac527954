"""What a trainer saved whole beside the factors, as LLaVA and its followers do: they load it with strict=False."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from models import SIZES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from d2surgery import audit, load, merge
from d2surgery.errors import D2SurgeryError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
IDS = torch.tensor([[1, 5, 9, 30, 2]])
NAMES = ("non_lora_trainables.bin", "non_lora_state_dict.bin")


def trained(folder: Path, second: str, safe: bool) -> Tensor:
    """base/ and adapter/ with norms and an adapted module's own weight in a second file; the unmerged logits."""
    torch.manual_seed(0)
    base = T.LlamaForCausalLM(T.LlamaConfig(**SIZES))
    base.save_pretrained(folder / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    whole = {}
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "norm" in name or "layers.0.self_attn.q_proj.base_layer" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
            if "lora_" not in name:
                whole[name] = parameter.data.clone()
    peft.save_pretrained(folder / "adapter", safe_serialization=safe)
    torch.save(whole, folder / "adapter" / second)
    again = PeftModel.from_pretrained(T.LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    assert not again.load_state_dict(torch.load(folder / "adapter" / second), strict=False).unexpected_keys
    with torch.no_grad():
        return again.eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("second", "safe"), [(NAMES[0], True), (NAMES[1], True), (NAMES[0], False)])
def test_it_is_merged_and_audited_with_the_factors(tmp_path: Path, second: str, safe: bool) -> None:
    wanted = trained(tmp_path, second, safe)
    assert len(load(tmp_path / "adapter").layout.replacements) == 2 * SIZES["num_hidden_layers"] + 2
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").verdict == "pass"
    with torch.no_grad():
        found = T.LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_merge_without_it_fails_the_audit(tmp_path: Path) -> None:
    trained(tmp_path, NAMES[0], True)
    alone = shutil.copytree(tmp_path / "adapter", tmp_path / "alone", ignore=shutil.ignore_patterns("non_*"))
    merge(tmp_path / "base", alone, tmp_path / "out")
    assert audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").verdict == "fail"


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda file: file.write_bytes(b""), "PICKLE"),
        (lambda file: torch.save({"model.norm.weight": torch.nn.Linear(1, 1)}, file), "PICKLE"),
        (lambda file: torch.save(dict(load(file.parent / "adapter_model.safetensors").layout.header.tensors), file),
         "PICKLE"),
    ],
)  # fmt: skip
def test_a_second_file_that_cannot_be_read_is_an_error(tmp_path: Path, break_it: Any, code: str) -> None:
    trained(tmp_path, NAMES[0], True)
    break_it(tmp_path / "adapter" / NAMES[0])
    with pytest.raises(D2SurgeryError) as error:
        load(tmp_path / "adapter")
    assert {problem.code for problem in error.value.problems} == {code}


@pytest.mark.parametrize("safe", [True, False])
def test_a_tensor_in_both_files_is_an_error(tmp_path: Path, safe: bool) -> None:
    trained(tmp_path, NAMES[0], safe)
    key = next(iter(load(tmp_path / "adapter").layout.header.tensors))
    torch.save({key: torch.zeros(2, 16)}, tmp_path / "adapter" / NAMES[0])
    with pytest.raises(D2SurgeryError) as error:
        load(tmp_path / "adapter")
    ((problem),) = error.value.problems
    assert (problem.code, problem.module) == ("DUPLICATE_KEY", key)
