"""Training on bases in 4 and 8 bit: the base is what transformers makes of it, and the file is what was trained."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trained as T
from launched import ACCELERATE, two_processes
from models import byte_tokenizer, llama
from trained import config_of, lines, same, write_items
from training.test_loop import killed, to
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from d2surgery import KINDS, load, merge
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.live.attaching import adapted, attach
from d2surgery.live.loading import unmerged
from d2surgery.training.config import to_toml
from d2surgery.training.loop import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="quantised bases need bitsandbytes"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("quantization", ["4bit", "8bit"])
IDS = torch.arange(40, 60)[None]
HELD: dict[str, Any] = {  # what bitsandbytes itself is told
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that bitsandbytes would pack on CPUs with AVX512-BF16: sizes in whole blocks of 64."""
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    llama(vocab_size=258, max_position_embeddings=256, **sizes).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    write_items(folder / "items.json")
    write_items(folder / "others.json", start=100)
    return folder


@pytest.fixture
def folder(material: Path, tmp_path: Path) -> Path:
    for name in ("base", "items.json", "others.json"):
        (tmp_path / name).symlink_to(material / name)
    return tmp_path


def held(base: Path, quantization: str) -> Any:
    """By transformers, without a word of ours."""
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**HELD[quantization]))


def stored(folder: Path, quantization: str, name: str = "base") -> Path:
    """The base saved as it is in memory, in the place of the other."""
    out = folder / f"stored-{quantization}"
    held(folder / name, quantization).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that training loads, with their adapters still in."""
    models: list[Any] = []
    whole = AutoModelForCausalLM.from_pretrained

    def loaded(*arguments: Any, **options: Any) -> Any:
        models.append(whole(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    return models


@both
@every_kind
def test_the_file_is_what_was_trained_on_the_quantised_base(
    folder: Path, trained: list[Any], kind: str, quantization: str
) -> None:
    """The loss falls, and the same base made by transformers answers with the loaded file bit for bit the same."""
    config = config_of(folder, kind, optimizer={"steps": 16}, run={"quantization": quantization, "eval_every": 16})
    report = train(config)
    assert report.quantization == quantization
    assert report.first_eval_loss is not None
    assert report.last_eval_loss is not None
    assert report.last_eval_loss < report.first_eval_loss - 0.05
    again = held(folder / "base", quantization)
    assert type(again.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    attach(again, load(config.output))
    assert torch.equal(logits(again), logits(trained[0]))
    assert not torch.equal(logits(again), logits(held(folder / "base", quantization)))
    whole = AutoModelForCausalLM.from_pretrained(folder / "base")
    attach(whole, load(config.output))
    assert not torch.equal(logits(again), logits(whole)), "the base was not quantised"


@both
@every_kind
def test_merged_into_the_dequantised_base_it_is_what_was_trained(folder: Path, kind: str, quantization: str) -> None:
    """transformers' own dequantize(); on the unquantised base what is merged differs by the base's rounding."""
    config = config_of(folder, kind, run={"quantization": quantization})
    train(config)
    live = held(folder / "base", quantization)
    attach(live, load(config.output))
    held(folder / "base", quantization).dequantize(dtype=torch.float32).save_pretrained(folder / "dequantised")
    off = {}
    for name in ("dequantised", "base"):
        merge(folder / name, config.output, folder / f"{name}-merged")
        merged = logits(AutoModelForCausalLM.from_pretrained(folder / f"{name}-merged"))
        off[name] = float((merged - logits(live)).abs().max() / logits(live).abs().max())
    assert off["dequantised"] < 1e-5
    assert off["base"] > 1e-3


@both
def test_a_base_that_is_stored_quantised_is_trained_as_one_that_is_loaded_so(folder: Path, quantization: str) -> None:
    """Bit for bit; packed rows, dropout and all; and activations computed again."""
    config = config_of(
        folder, "d2lora", adapter={"dropout": 0.1}, data={"batching": "packed"}, run={"quantization": quantization}
    )
    train(config)
    base = str(stored(folder, quantization))
    report = train(to(replace(config, base=base, run=replace(config.run, quantization=None)), "stored"))
    assert report.quantization == quantization
    assert same(folder / "out", folder / "stored")
    train(to(replace(config, run=replace(config.run, gradient_checkpointing=True)), "memory"))
    assert same(folder / "out", folder / "memory")


@both
def test_layers_without_an_adapter_stay_differentiable_after_an_evaluation(folder: Path, quantization: str) -> None:
    """bitsandbytes would pack 4-bit layers on some CPUs in their first evaluation, and cut the gradient."""
    quiet = config_of(
        folder, "lora", adapter={"targets": ["q_proj"]}, run={"quantization": quantization},
        data={"held_out": [str(folder / "others.json")], "held_out_limit": 0},
    )  # fmt: skip
    assert train(to(quiet, "quiet")).last_eval_loss is None
    assert train(replace(quiet, data=replace(quiet.data, held_out_limit=8))).last_eval_loss is not None
    assert same(folder / "out", folder / "quiet")


def test_what_a_run_was_trained_on_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(folder, "duallora", run={"quantization": "4bit"})
    (folder / "run.toml").write_text(to_toml(config))
    assert main(["train", str(folder / "run.toml")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"training duallora on 14 modules of {folder / 'base'} in 4 bit: rank 2 + 2")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    slots = sum(tensor.numel() for tensor in T.tensors(folder / "out").values())
    entries = slots + sum(parameter.numel() for parameter in model.parameters())
    assert f"  parameters  {slots:,} of {entries:,} (" in text
    assert "--quantization 4bit --tasks FILE" in text
    assert "this merges into the unquantised base" in text
    assert load(folder / "out").layout.about.training["quantization"] == "4bit"
    assert 'quantization = "4bit"' in (folder / "out" / "train.toml").read_text()
    arguments = ["--adapter", str(folder / "out"), "--out", str(folder / "merged")]
    assert main(["merge", "--base", str(stored(folder, "4bit")), *arguments]) == 2
    assert "Merge into the unquantised base" in capsys.readouterr().err
    assert main(["merge", "--base", str(folder / "base"), *arguments]) == 0


@every_kind
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_adapter(folder: Path, kind: str) -> None:
    config = config_of(folder, kind, adapter={"dropout": 0.1}, run={"quantization": "4bit"})
    train(to(config, "whole"))
    killed(T.die_after_step, config, 5)
    assert train(config, resume=True).resumed_from == 3
    assert same(folder / "out", folder / "whole")
    assert lines(folder / "out") == lines(folder / "whole")
    with pytest.raises(D2SurgeryError, match=r"RESUME_MISMATCH .*run\.quantization.*wanted '4bit'; got '8bit'"):
        train(replace(config, run=replace(config.run, quantization="8bit")), resume=True)


def test_two_processes_of_accelerate_train_what_one_does_with_twice_the_batch(folder: Path) -> None:
    """Float32 sums in another order, as in test_training_loop."""
    config = config_of(folder, "d2lora", run={"quantization": "4bit"})
    train(config)
    halves = replace(to(config, "halves"), optimizer=replace(config.optimizer, batch=2))
    (folder / "halves.toml").write_text(to_toml(halves))
    command = ("-m", "d2surgery", "train", str(folder / "halves.toml"), "--json")
    assert json.loads(two_processes(*command, launcher=ACCELERATE))["quantization"] == "4bit"
    one, two = ([line["loss"] for line in lines(folder / name) if "loss" in line] for name in ("out", "halves"))
    assert two == pytest.approx(one, rel=1e-5)
    for name, tensor in T.tensors(folder / "out").items():
        torch.testing.assert_close(T.tensors(folder / "halves")[name], tensor, rtol=1e-3, atol=1e-4)


@both
def test_eval_answers_on_the_base_that_was_trained_on(
    folder: Path, capsys: pytest.CaptureFixture[str], quantization: str
) -> None:
    """Held so on loading and stored so: the same log-likelihoods, which are those of the library's own model."""
    train(config_of(folder, "dora", run={"quantization": quantization}))
    base = stored(folder, quantization)
    for name, arguments in (("loaded", ["--base", folder / "base", "--quantization", quantization]),
                            ("stored", ["--base", base])):  # fmt: skip
        more = ["--adapter", folder / "out", "--tasks", folder / "others.json", "--template", "plain", "--limit", 8]
        assert main(["eval", *map(str, [*arguments, *more, "--items", folder / name, "--quiet"])]) == 0
    assert (folder / "loaded").read_text() == (folder / "stored").read_text()
    model = unmerged(base, load(folder / "out"))
    again = held(folder / "base", quantization)
    attach(again, load(folder / "out"))
    assert torch.equal(logits(model), logits(again))
    alone = ["eval", "--base", str(base), "--tasks", str(folder / "others.json"), "--limit", "4", "--quiet"]
    assert main(alone) == 0
    assert main([*alone, "--merged", str(folder / "base"), "--quantization", quantization]) == 2
    assert "--quantization has no effect" in capsys.readouterr().err


# What goes wrong -------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, find = str(stored(folder, "8bit")), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for config in (config_of(folder, run={"quantization": "4bit"}), replace(config_of(folder), base=base)):
        with pytest.raises(D2SurgeryError, match="NO_BITSANDBYTES") as error:
            train(config)
        assert "d2surgery[quantized]" in error.value.problems[0].remedy
    assert not list((folder / "out").glob("*"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", None])
def test_a_base_that_something_else_quantised_is_refused_by_name(folder: Path, method: str | None) -> None:
    base = folder / "other"
    base.mkdir()
    for file in (folder / "base").iterdir():
        (base / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    named = {} if method is None else {"quant_method": method}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4, **named}}))
    with pytest.raises(D2SurgeryError, match=r"OTHER_QUANTIZATION") as error:
        train(replace(config_of(folder, run={"quantization": "4bit"}), base=str(base)))
    assert error.value.problems[0].got == (method or "a method without a name")
    train(config_of(folder))
    with pytest.raises(D2SurgeryError, match=r"OTHER_QUANTIZATION"):
        unmerged(base, load(folder / "out"))


def test_a_stored_quantisation_is_not_another(folder: Path) -> None:
    base = str(stored(folder, "8bit"))
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG .*stored in 8bit.*wanted 8bit, or none; got 4bit"):
        train(replace(config_of(folder, run={"quantization": "4bit"}), base=base))
    with pytest.raises(D2SurgeryError, match=r"BAD_CONFIG run\.quantization.*wanted 4bit or 8bit"):
        config_of(folder, run={"quantization": "3bit"})


def test_layers_that_were_packed_for_inference_are_refused(folder: Path) -> None:
    """Wherever bitsandbytes packs: its flag is set here by hand where this CPU would not."""
    train(config_of(folder))
    model = held(folder / "base", "4bit")
    logits(model)
    model.model.layers[1].self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(D2SurgeryError, match=r"REPACKED_BASE .*layers\.1\.self_attn\.q_proj"):
        attach(model, load(folder / "out"))
    assert adapted(model) == {}
