"""Classifiers: an encoder or a decoder with a head that is trained whole beside the adapters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from longer import one_in
from models import bert, byte_tokenizer, llama
from trained import config_of, lines, same

from d2surgery import load
from d2surgery.errors import D2SurgeryError
from d2surgery.live.loading import unmerged
from d2surgery.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def prepared(folder: Path, model: str) -> None:
    from transformers import BertForMaskedLM, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 258, "max_position_embeddings": 256, "initializer_range": 0.2}
    made = {
        "llama": lambda: llama(**sizes),
        "bert without a head": lambda: bert(BertForMaskedLM, **sizes),
        "bert with a head": lambda: bert(BertForSequenceClassification, **sizes),
    }[model]()
    made.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    items = [{"question": "ab"[n % 2] * (3 + n // 2), "choices": ["bad", "good"], "answer": n % 2} for n in range(40)]
    (folder / "items.json").write_text(json.dumps(items))


@pytest.mark.parametrize("model", ["llama", "bert without a head", "bert with a head"])
@pytest.mark.parametrize("kind", one_in(2, ["dora", "duallora"]))
def test_a_classifier_learns_and_is_loaded_with_its_head(tmp_path: Path, model: str, kind: str) -> None:
    prepared(tmp_path, model)
    config = config_of(tmp_path, kind, data={"goal": "labels"}, optimizer={"steps": 24}, run={"eval_every": 24})
    report = train(config)
    assert report.first_eval_loss is not None
    assert report.last_eval_loss is not None
    assert report.last_eval_loss < report.first_eval_loss
    last = [line for line in lines(config.output) if "eval_loss" in line][-1]
    assert {"accuracy", "matthews", "macro_f1"} <= set(last)
    stored = load(config.output)
    assert stored.layout.about.task == "SEQ_CLS"
    assert stored.layout.replacements
    loaded: Any = unmerged(tmp_path / "base", stored)
    assert "Classification" in type(loaded).__name__
    losses, tokenizer = [], byte_tokenizer()
    for item in json.loads((tmp_path / "items.json").read_text()):
        ids = torch.tensor([tokenizer(item["question"])["input_ids"]])
        with torch.no_grad():
            losses.append(float(loaded(ids, labels=torch.tensor([item["answer"]])).loss))
    assert sum(losses) / len(losses) < 0.75 * 0.6931, "far below a coin's, which the base's is"


def test_a_classifier_that_is_resumed_is_the_same(tmp_path: Path) -> None:
    prepared(tmp_path, "bert without a head")
    config = config_of(tmp_path, "d2lora", data={"goal": "labels"})

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(config, progress=stop)
    assert train(config, resume=True).resumed_from == 3
    train(replace(config, output=str(tmp_path / "whole")))
    assert same(tmp_path / "out", tmp_path / "whole")


def test_labels_are_shared_by_all_items_and_rows_are_not_packed(tmp_path: Path) -> None:
    prepared(tmp_path, "llama")
    items = json.loads((tmp_path / "items.json").read_text())
    items[7]["choices"] = ["good", "bad"]
    (tmp_path / "items.json").write_text(json.dumps(items))
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA.*labels are choices that all items share.*item 8"):
        train(config_of(tmp_path, data={"goal": "labels"}))
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG data\.batching: a row has one label"):
        config_of(tmp_path, data={"goal": "labels", "batching": "packed"})
