"""What a remedy says is true: who follows it gets the trained model."""

import json
from pathlib import Path

import pytest
import torch
from models import Built, Case, llama
from peft import LoraConfig, get_peft_model

from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.merging import merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def is_true(adapter: Path) -> Path:
    """As a person sets init_lora_weights by hand."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    return adapter


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_merges_into_the_changed_base(tmp_path: Path, init: str) -> None:
    case = Built(Case(base=llama, lora={"target_modules": ["q_proj"], "r": 2, "lora_alpha": 3}), tmp_path)
    model = get_peft_model(
        case.load(case.base), LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=init)
    )
    model.save_pretrained(tmp_path / "first")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    answer = case.forward(model.eval())
    model.save_pretrained(tmp_path / "trained")
    model.unload().save_pretrained(tmp_path / "residual")

    with pytest.raises(D2SurgeryError, match="MUTATED_BASE"):
        merge(tmp_path / "residual", tmp_path / "trained", tmp_path / "merged")
    trained, first = is_true(tmp_path / "trained"), is_true(tmp_path / "first")
    merge(tmp_path / "residual", trained, tmp_path / "merged")
    assert main(["combine", str(trained), f"{first}:-1", "--out", str(tmp_path / "plain")]) == 0
    merge(case.base, tmp_path / "plain", tmp_path / "merged plain")
    for merged in ("merged", "merged plain"):
        got = case.forward(case.load(tmp_path / merged))
        assert float((got - answer).abs().max() / answer.abs().max()) < 1e-6
