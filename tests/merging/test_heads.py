"""A classification head that the base lacks, or with other labels: PEFT's unmerged forward is the oracle."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from models import SIZES
from peft import LoraConfig, get_peft_model
from torch import Tensor

from d2surgery import audit, load, merge
from d2surgery.errors import D2SurgeryError
from d2surgery.live.loading import unmerged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 37}
IDS = torch.tensor([[1, 5, 9, 30, 2]])
BASES: dict[str, tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = {  # base, with a head of 10, targets, saved
    "bert": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL, num_labels=9)),
        T.BertForSequenceClassification, ("query", "value"), ("classifier",),
    ),
    "bert without a head": (
        lambda: T.BertForMaskedLM(T.BertConfig(**SMALL)), T.BertForTokenClassification, ("query",), ("classifier",),
    ),
    "roberta": (
        lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SMALL, num_labels=3, pad_token_id=0)),
        T.RobertaForSequenceClassification, ("query",), ("classifier",),
    ),
    "distilbert": (
        lambda: T.DistilBertForSequenceClassification(T.DistilBertConfig(**DISTIL, num_labels=3)),
        T.DistilBertForSequenceClassification, ("q_lin",), ("pre_classifier", "classifier"),
    ),
    "llama without a head": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, pad_token_id=0)),
        T.LlamaForSequenceClassification, ("q_proj",), ("score",),
    ),
}  # fmt: skip


def trained(folder: Path, name: str, task: str | None) -> tuple[Any, Tensor]:
    """base/ and adapter/ by transformers and PEFT; the class and the unmerged logits of ten labels."""
    make, kind, targets, saved = BASES[name]
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(folder / "base", num_labels=10, ignore_mismatched_sizes=True)
        config = LoraConfig(r=2, target_modules=list(targets), modules_to_save=list(saved), task_type=task)
        peft = get_peft_model(model, config).eval()
        for key, parameter in peft.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.data.normal_(0, 0.1)
        peft.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return kind, peft(IDS).logits


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", BASES)
def test_config_and_shapes_follow_the_head(tmp_path: Path, name: str, task: str | None) -> None:
    if task and "TokenClassification" in BASES[name][1].__name__:
        task = "TOKEN_CLS"
    kind, wanted = trained(tmp_path, name, task)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    automatic = T.AutoModelForTokenClassification if "Token" in kind.__name__ else T.AutoModelForSequenceClassification
    model, info = automatic.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        assert close(model.eval()(IDS).logits, wanted)
        assert close(unmerged(tmp_path / "base", load(tmp_path / "adapter"))(IDS).logits, wanted)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config["id2label"]) == len(config["label2id"]) == 10
    assert audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").verdict == "pass"
    if task is None:
        assert config["architectures"] == [kind.__name__]


def test_half_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained(tmp_path, "bert", None)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.endswith("classifier.bias")}
    save_file(tensors, file)
    with pytest.raises(D2SurgeryError) as error:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert [problem.code for problem in error.value.problems] == ["SHAPE_MISMATCH"]
