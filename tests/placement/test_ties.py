"""modules_to_save that names what holds one side of a tie: PEFT's unmerged forward is the oracle, the audit agrees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from longer import one_in
from models import SIZES, Built, Case, bart, bert, gpt2, llama, t5
from safetensors.torch import load_file, save_file

from d2surgery import audit
from d2surgery.formats import open_layout
from d2surgery.formats.layout import About

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

SMALL = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}


def bert_masked() -> Any:
    return bert(T.BertForMaskedLM)


def roberta() -> Any:
    return T.RobertaForMaskedLM(T.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1))


def albert() -> Any:
    return T.AlbertForMaskedLM(T.AlbertConfig(**SMALL, embedding_size=8))


def distilbert(kind: Any = T.DistilBertForSequenceClassification) -> Any:
    return kind(T.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=32))


def tied_llama() -> Any:
    return llama(tied=True)


Named = tuple[Callable[[], Any], str, str, list[str], str, str | None]
NAMED: dict[str, Named] = {  # (model, inputs, target, modules_to_save, input embedding, the side that is another now)
    **{
        f"bert {name}": (bert_masked, "tokens", "query", [name], "bert.embeddings.word_embeddings",
                         "cls.predictions.decoder")
        for name in ("cls", "predictions", "decoder", "redictions", "cls.predictions", "ord_embeddings")
    },
    "bert bert": (bert_masked, "tokens", "transform.dense", ["bert"], "bert.embeddings.word_embeddings",
                  "cls.predictions.decoder"),
    **{
        f"roberta {name}": (roberta, "tokens", "query", [name], "roberta.embeddings.word_embeddings", "lm_head.decoder")
        for name in ("lm_head", "head", "decoder")
    },
    "roberta roberta": (roberta, "tokens", "lm_head.dense", ["roberta"], "roberta.embeddings.word_embeddings",
                        "lm_head.decoder"),
    **{
        f"albert {name}": (albert, "tokens", "query", [name], "albert.embeddings.word_embeddings",
                           "predictions.decoder")
        for name in ("predictions", "decoder")
    },
    "albert albert": (albert, "tokens", "predictions.dense", ["albert"], "albert.embeddings.word_embeddings",
                      "predictions.decoder"),
    **{
        f"t5 {name}": (t5, "seq2seq", "q", [name], "shared", side)
        for name, side in (("decoder", "decoder.embed_tokens"), ("encoder", "encoder.embed_tokens"),
                           ("head", "lm_head"), ("shared", "lm_head"))
    },
    "bart decoder": (bart, "seq2seq", "q_proj", ["decoder"], "model.shared", "model.decoder.embed_tokens"),
    "bart model": (bart, "seq2seq", "lm_head", ["model"], "model.shared", "lm_head"),
    **{
        f"llama {name}": (tied_llama, "tokens", "q_proj", [name], "model.embed_tokens", "lm_head")
        for name in ("head", "tokens", "m_head")
    },
    "llama model": (tied_llama, "tokens", "lm_head", ["model"], "model.embed_tokens", "lm_head"),
    "gpt2 transformer": (gpt2, "tokens", "lm_head", ["transformer"], "transformer.wte", "lm_head"),
    "distilbert head": (lambda: distilbert(T.DistilBertForMaskedLM), "tokens", "q_lin", ["projector"],
                        "distilbert.embeddings.word_embeddings", "vocab_projector"),
    "distilbert classifier": (distilbert, "tokens", "q_lin", ["classifier"],
                              "distilbert.embeddings.word_embeddings", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, str, str | None]:
    model, inputs, target, saved, embedding, side = NAMED[request.param]
    lora = {"target_modules": [target], "r": 2, "lora_alpha": 3, "modules_to_save": saved}
    case = Case(base=model, inputs=inputs, lora=lora)
    return Built(case, tmp_path_factory.mktemp(request.param.replace(" ", "-"))), embedding, side


@pytest.mark.parametrize("named", one_in(2, NAMED), indirect=True)
def test_a_container_of_one_side_of_a_tie_has_its_own_weights(named: tuple[Built, str, str | None]) -> None:
    case, embedding, side = named
    answer = case.forward(case.load(case.merged))
    assert float((answer - case.unmerged).abs().max() / case.unmerged.abs().max()) < 1e-6
    assert [p.code for p in open_layout(case.adapter).problems] == []
    assert audit(case.base, case.adapter, case.merged).verdict == "pass"
    if side is not None:
        weights = load_file(case.merged / "model.safetensors")
        assert not torch.equal(weights[f"{embedding}.weight"], weights[f"{side}.weight"])


WRONG = ["bert cls", "bert ord_embeddings", "roberta lm_head", "albert predictions", "t5 head", "llama head"]


@pytest.mark.parametrize("named", WRONG, indirect=True)
@pytest.mark.parametrize("winner", ["embedding", "side"])
def test_the_audit_fails_where_one_side_was_loaded_over_both(
    named: tuple[Built, str, str | None], tmp_path: Path, winner: str
) -> None:
    case, embedding, side = named
    wrong = tmp_path / "wrong"
    shutil.copytree(case.merged, wrong, ignore=lambda *_: ["d2surgery_merge.json"])
    weights = load_file(wrong / "model.safetensors")
    of_side = weights.pop(f"{side}.weight")
    if winner == "side":
        weights[f"{embedding}.weight"] = of_side
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wrong / "config.json").read_text()) | {"tie_word_embeddings": True}
    (wrong / "config.json").write_text(json.dumps(config))
    assert audit(case.base, case.adapter, wrong).verdict == "fail"


@pytest.mark.parametrize(
    ("saved", "tensor", "whether"),
    [
        ("classifier", "classifier.weight", True),
        ("classifier", "pre_classifier.bias", True),
        ("classifier", "distilbert.classifier.out.weight", True),
        ("classifier", "classifiers.weight", False),
        ("lm_head.decoder", "lm_head.bias", False),
        ("weight", "score.weight", False),
        ("head.decoder", "lm_head.decoder.weight", True),
    ],
)
def test_saved_modules_are_ends_of_names_of_modules(saved: str, tensor: str, whether: bool) -> None:
    assert About(saved_modules=(saved,)).saves(tensor) is whether
