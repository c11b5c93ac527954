"""Models with an adapter live in them or merged in memory: PEFT's unmerged forward is the oracle for every case."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from longer import one_in
from models import CASES, byte_tokenizer, llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import load
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights
from d2surgery.live.loading import (
    _load,
    _own_module,
    load_model,
    load_tokenizer,
    merged_in_memory,
    model_kind,
    stored_dtype,
    unmerged,
)

if TYPE_CHECKING:
    from models import Built

Build = Callable[[str], "Built"]


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("name", one_in(2, CASES))
def test_the_live_model_says_what_pefts_says(built: Build, name: str) -> None:
    case = built(name)
    model = unmerged(case.base, load(case.adapter), dtype=torch.float32, kind=case.kind)
    assert close(case.forward(model), case.unmerged)


@pytest.mark.parametrize("name", one_in(3, CASES))
def test_merged_in_memory_is_what_merge_writes(built: Build, name: str) -> None:
    case = built(name)
    found = merged_in_memory(case.base, load(case.adapter), to=torch.float32, dtype=torch.float64, kind=case.kind)
    wanted = case.load(case.merged, dtype=torch.float64)
    wanted.set_experts_implementation("eager")  # grouped products know no float64
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}
    with torch.no_grad():
        assert close(found(**inputs)[0], wanted(**inputs)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2 classifier", "bert classifier", "t5"])
def test_the_class_is_the_one_the_adapter_was_trained_in(built: Build, name: str) -> None:
    case = built(name)
    assert model_kind(case.base, load(case.adapter).layout.about) is case.kind
    assert close(case.forward(unmerged(case.base, load(case.adapter), dtype=torch.float32)), case.unmerged)


def test_rounding_is_that_of_the_dtype_merged_into(built: Build) -> None:
    case = built("llama dora")
    found = merged_in_memory(case.base, load(case.adapter), to=torch.bfloat16, dtype=torch.float32)
    parameters = list(found.parameters())
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in parameters)


def test_an_embedding_under_two_names_is_adapted_under_one() -> None:
    """As T5's in transformers 4: one module as `shared` and in the encoder."""
    model = torch.nn.Module()
    model.shared = model.encoder = torch.nn.Embedding(3, 2)
    own = _own_module(model, "encoder")
    assert own is model.encoder is not model.shared
    assert torch.equal(own.weight, model.shared.weight)
    assert own.weight is not model.shared.weight


# What cannot be run ----------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(D2SurgeryError) as error:
        call()
    assert {problem.code for problem in error.value.problems} == {"NOT_RUNNABLE"}
    return str(error.value)


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "lm_head.weight"}, path, metadata={"format": "pt"})
    assert "weights are missing (got lm_head.weight)" in refused(lambda: load_model(directory))


def test_an_adapter_beside_the_weights_is_not_loaded_by_surprise(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    assert "would load that adapter on top" in refused(lambda: load_model(directory))


def test_an_unknown_architecture_is_named(directory: Path) -> None:
    change_config(directory, architectures=["NoSuchForCausalLM"])
    assert "no such architecture (got NoSuchForCausalLM)" in refused(lambda: load_model(directory))
    change_config(directory, architectures=None)
    assert "names no architecture" in refused(lambda: load_model(directory))


def test_what_transformers_refuses_is_refused(directory: Path) -> None:
    change_config(directory, hidden_size=24)
    refused(lambda: load_model(directory))


def test_loading_leaves_transformers_as_it_was(directory: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    load_model(directory)
    assert logging.get_verbosity() == logging.WARNING
    logging.set_verbosity_error()


def test_a_live_model_needs_all_weights_but_those_replaced(built: Build, tmp_path: Path) -> None:
    case = built("llama")
    base = Path(shutil.copytree(case.base, tmp_path / "base"))
    path = base / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "norm" not in k}, path, metadata={"format": "pt"})
    assert "weights are missing" in refused(lambda: unmerged(base, load(case.adapter)))


# Tokenizers and dtypes -------------------------------------------------------------------------------------------


def test_the_first_tokenizer_is_taken(tmp_path: Path, directory: Path) -> None:
    assert load_tokenizer(directory) is None
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(directory, tmp_path / "tokenizer")("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    (directory / "tokenizer.json").write_text("{")
    refused(lambda: load_tokenizer(directory))


def test_the_stored_dtype_is_that_of_most_tensors(directory: Path) -> None:
    assert stored_dtype(BaseWeights(directory).header) == torch.float32
    path = directory / "model.safetensors"
    tensors = {k: v if "norm" in k else v.bfloat16() for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert stored_dtype(BaseWeights(directory).header) == torch.bfloat16


@pytest.mark.parametrize(
    ("release", "word"),
    [("4.50.0", "torch_dtype"), ("4.55.4", "torch_dtype"), ("4.56.0.dev0", "dtype"), ("5.23.0", "dtype")],
)
def test_the_dtype_is_asked_for_by_the_word_that_this_transformers_knows(
    release: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    class Kind:
        @staticmethod
        def from_pretrained(_: Path, **options: Any) -> Any:
            raise ValueError(" ".join(sorted({"dtype", "torch_dtype"} & set(options))))

    monkeypatch.setattr(transformers, "__version__", release)
    with pytest.raises(D2SurgeryError, match=rf": {word}( |$)"):
        _load(tmp_path, Kind, None, {})
