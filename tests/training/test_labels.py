"""Classifiers: an encoder or a decoder with a head that is trained whole beside the adapters."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import TESTS, two_processes
from longer import one_in
from models import bert, byte_tokenizer, llama
from trained import config_of, lines, same, tensors

from d2surgery import load
from d2surgery.errors import D2SurgeryError
from d2surgery.live.loading import unmerged
from d2surgery.training.bases import check_fit
from d2surgery.training.config import to_toml
from d2surgery.training.data import Corpus, Encoded
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


def test_a_step_of_two_halves_is_the_step(tmp_path: Path) -> None:
    """A classifier's loss is a mean: of two forwards the mean of both, not their sum."""
    prepared(tmp_path, "llama")
    logged = {}
    for batch, accumulation in ((4, 1), (2, 2)):
        optimizer = {"batch": batch, "accumulation": accumulation, "steps": 4}
        config = config_of(tmp_path, "dora", data={"goal": "labels"}, optimizer=optimizer, run={"log_every": 1})
        train(config := replace(config, output=str(tmp_path / str(batch))))
        logged[batch] = [line for line in lines(config.output) if "loss" in line]
    for name in ("loss", "grad_norm"):
        whole, halves = ([line[name] for line in logged[batch]] for batch in (4, 2))
        assert halves == pytest.approx(whole, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama", "bert without a head"])
def test_fsdp2_trains_a_head_whole_saves_and_resumes_it(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapters, in two processes of which the second never holds the base; by DDP the same."""
    prepared(tmp_path, model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", {"llama": "LlamaDecoderLayer"}.get(model, "BertLayer"))
    config = config_of(tmp_path, "d2lora", data={"goal": "labels"}, optimizer={"batch": 2, "steps": 4},
                       run={"save_every": 2, "eval_every": 4, "log_every": 1})  # fmt: skip
    out = {name: tmp_path / name for name in ("fsdp", "ddp")}
    for name, directory in out.items():
        (tmp_path / f"{name}.toml").write_text(to_toml(replace(config, output=str(directory))))
    found = json.loads(two_processes(str(TESTS / "prepared.py"), str(tmp_path / "fsdp.toml")))
    two_processes("-m", "d2surgery", "train", str(tmp_path / "ddp.toml"))
    assert found["spread"]
    assert [set(devices) for devices in found["held"]] == [{"cpu"}, {"meta"}]
    assert found["resumed_from"] == 2
    assert same(out["fsdp"], tmp_path / "fsdp-again")
    one, other = (tensors(directory) for directory in out.values())
    heads = [name for name in one if "score" in name or "classifier" in name]
    assert heads
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)
    losses = [[line[key] for line in lines(directory) for key in ("loss", "eval_loss") if key in line]
              for directory in out.values()]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "Classification" in type(unmerged(tmp_path / "base", load(out["fsdp"]))).__name__


@pytest.mark.parametrize(("length", "fits"), [(32, True), (33, False)])
def test_a_model_that_counts_positions_from_its_padding_has_fewer(tmp_path: Path, length: int, fits: bool) -> None:
    """RoBERTa of 34 positions, two of which are no token's: transformers fails on 33 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=300, max_position_embeddings=34, **sizes)).eval()
    row = tuple(range(3, 3 + length))
    found = Corpus(train=(Encoded(row, 0, "x"),), held_out=(), prompts_cut=0, left_out=())
    config = config_of(tmp_path)
    with nullcontext() if fits else pytest.raises(D2SurgeryError, match=r"longer than the model's .*at most 32"):
        check_fit(config, model, found)
    with nullcontext() if fits else pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([row]))


def test_labels_are_shared_by_all_items_and_rows_are_not_packed(tmp_path: Path) -> None:
    prepared(tmp_path, "llama")
    items = json.loads((tmp_path / "items.json").read_text())
    items[7]["choices"] = ["good", "bad"]
    (tmp_path / "items.json").write_text(json.dumps(items))
    with pytest.raises(D2SurgeryError, match=r"BAD_DATA.*labels are choices that all items share.*item 8"):
        train(config_of(tmp_path, data={"goal": "labels"}))
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG data\.batching: a row has one label"):
        config_of(tmp_path, data={"goal": "labels", "batching": "packed"})
