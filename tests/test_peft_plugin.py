"""D2-LoRA and Dual LoRA inside PEFT: trained, saved, loaded, merged and disabled by PEFT, and read by d2surgery.

The whole file runs on every supported PEFT release (its folder first on PYTHONPATH); what was run is in CHANGELOG.md.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import gpt2, llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from d2surgery import load, merge, save, set_warmup
from d2surgery.errors import D2SurgeryError
from d2surgery.peft_plugin import D2LoraConfig, DualLoraConfig, _check_release

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
Q0 = "model.layers.0.self_attn.q_proj"
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "d2lora": (D2LoraConfig, {"r": 3, "tau": 0.25}),
    "d2lora rows": (D2LoraConfig, {"r": 2, "along": "out_features", "form": "projected"}),
    "d2lora patterns": (D2LoraConfig, {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 3}}),
    "duallora": (DualLoraConfig, {"r1": 3, "r2": 2, "training": {"ste": "mask", "sigma": 0.1}}),
    "duallora patterns": (DualLoraConfig, {"rank_pattern": {r"layers\.1\..*": [2, 5]}, "alpha_pattern": {"q_proj": 3}}),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """PEFT speaks of missing keys and unknown fields in warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def config(name: str, targets: tuple[str, ...] = ("q_proj", "down_proj"), **options: Any) -> Any:
    kind, fields = CONFIGS[name]
    return kind(**{"lora_alpha": 6, "target_modules": list(targets), **fields, **options})


def base(directory: Path, make: Callable[[], Any] = llama) -> Any:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory).eval()


def in_bfloat16() -> Any:
    return llama().to(torch.bfloat16)


def tied() -> Any:
    return llama(tied=True)


def trained(model: Any, config: Any, steps: int = 3) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@every_config
def test_training_moves_every_slot_and_nothing_else(tmp_path: Path, name: str) -> None:
    start = get_peft_model(base(tmp_path), config(name))
    before = {key: value.clone() for key, value in start.state_dict().items()}
    torch.manual_seed(1)
    after = trained(base(tmp_path), config(name)).state_dict()
    assert after.keys() == before.keys()
    moved = {key for key in after if ".lora_" in key}
    assert len(moved) == 4 * 4
    for key in after:
        assert torch.equal(after[key], before[key]) == (key not in moved), key


@every_config
def test_what_peft_saves_is_read_merged_and_given_back(tmp_path: Path, name: str) -> None:
    model = trained(base(tmp_path / "base"), config(name))
    live = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = load(tmp_path / "adapter")
    assert checkpoint.layout.problems == ()
    assert len(checkpoint) == 4
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(llama().from_pretrained(tmp_path / "merged")), live)
    save(checkpoint, tmp_path / "again")
    for directory in ("adapter", "again"):
        loaded = PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / directory).eval()
        assert torch.equal(logits(loaded), live)
    assert not close(logits(base(tmp_path / "base")), live), "the adapter does nothing"


@every_config
def test_pefts_merge_is_ours_and_unmerging_gives_the_base_back_to_the_bit(tmp_path: Path, name: str) -> None:
    model = trained(base(tmp_path / "base"), config(name))
    live, W0 = logits(model), layer(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    assert close(logits(model), live)
    assert not torch.equal(layer(model).base_layer.weight, W0)
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, W0)
    assert torch.equal(logits(model), live)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = llama().from_pretrained(tmp_path / "merged").state_dict(), model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        torch.testing.assert_close(values, ours[key], rtol=1e-6, atol=1e-8)


def layer(model: Any, name: str = Q0) -> Any:
    return model.get_submodule(f"base_model.model.{name}")


@every_config
def test_a_disabled_adapter_is_the_base_and_comes_back(tmp_path: Path, name: str) -> None:
    model = trained(base(tmp_path), config(name))
    live, plain = logits(model), logits(base(tmp_path))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), live)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ["d2lora", "duallora"])
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone_also_when_merged(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie
        model = trained(base(tmp_path, tied), config(name, ("lm_head",)))
        live = logits(model)
        merged = model.merge_and_unload()
    assert close(logits(merged), live)
    assert torch.equal(merged.model.embed_tokens.weight, base(tmp_path, tied).model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["d2lora", "duallora"])
def test_a_conv1d_is_merged_as_it_is_stored(tmp_path: Path, name: str) -> None:
    model = trained(base(tmp_path, gpt2), config(name, ("c_attn", "mlp.c_proj")))
    live = logits(model)
    merged = model.merge_and_unload()
    assert merged.transformer.h[0].attn.c_attn.weight.is_contiguous()
    assert close(logits(merged), live)


@pytest.mark.parametrize("name", ["d2lora", "duallora"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_slots_stay_float32_on_a_bfloat16_base(tmp_path: Path, name: str, low_cpu_mem_usage: bool) -> None:
    model = trained(base(tmp_path / "base", in_bfloat16), config(name))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(tmp_path / "base", in_bfloat16), tmp_path / "adapter",
                                       low_cpu_mem_usage=low_cpu_mem_usage).eval()  # fmt: skip
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.merge_and_unload().model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_warm_up_reaches_adapters_inside_peft(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path), config("duallora")).eval()
    plain = logits(base(tmp_path))
    assert not torch.equal(logits(model), plain)
    set_warmup(model, 0.0)
    assert torch.equal(logits(model), plain)


def test_choices_of_training_reach_the_value(tmp_path: Path) -> None:
    d2 = layer(get_peft_model(base(tmp_path), config("d2lora", training={"detach_norm": True}))).adapter("default")
    dual = layer(get_peft_model(base(tmp_path), config("duallora"))).adapter("default")
    assert (d2.detach_norm, d2.tau, d2.scaling) == (True, 0.25, 2.0)
    assert (dual.ste, dual.scaling) == ("mask", pytest.approx(6 / 6**0.5))


def test_dropout_is_the_updates_and_trains_repeatably(tmp_path: Path) -> None:
    one, two = (trained(base(tmp_path), config("d2lora", lora_dropout=0.3)) for _ in "12")
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(trained(base(tmp_path), config("d2lora"))))


def test_two_adapters_take_turns_but_do_not_add_up(tmp_path: Path) -> None:
    model = trained(base(tmp_path), config("d2lora"))
    live = logits(model)
    model.add_adapter("other", config("d2lora"))
    model.set_adapter("other")
    assert close(logits(model), logits(base(tmp_path)))
    model.set_adapter("default")
    assert torch.equal(logits(model), live)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(D2SurgeryError, match="do not add up"):
        logits(model)


def test_a_target_that_is_not_linear_is_named(tmp_path: Path) -> None:
    with pytest.raises(D2SurgeryError, match=r"TARGETS_UNMATCHED model\.layers\.0\.input_layernorm.*got LlamaRMSNorm"):
        get_peft_model(base(tmp_path), config("d2lora", ("q_proj", "input_layernorm")))


@pytest.mark.parametrize("name", ["d2lora", "duallora"])
def test_the_config_on_disk_has_the_names_of_our_form(tmp_path: Path, name: str) -> None:
    get_peft_model(base(tmp_path / "base"), config(name)).save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == name.upper()
    assert written["format_version"] == 1
    assert {"lora_alpha", "rank_pattern", "alpha_pattern", "training"} <= written.keys()
    assert type(PeftConfig.from_pretrained(tmp_path / "adapter")) is CONFIGS[name][0]


@pytest.mark.parametrize("release", ["0.18.1", "0.19.0", "0.22.0", "1.0.0", "0.22.0.dev0"])
def test_other_releases_of_peft_are_refused_with_those_that_are_supported(release: str) -> None:
    with pytest.raises(D2SurgeryError, match=r"PEFT_RELEASE.*wanted 0\.19\.1 to before 0\.22\.0; got "):
        _check_release(release)


@pytest.mark.parametrize("release", ["0.19.1", "0.20.0", "0.21.2", "0.21.3.dev0"])
def test_releases_between_are_taken(release: str) -> None:
    _check_release(release)


def test_without_the_plug_in_peft_refuses_the_file_rather_than_load_half_of_it(tmp_path: Path) -> None:
    names = ["d2lora", "duallora"]
    for name in names:
        get_peft_model(base(tmp_path / "base"), config(name)).save_pretrained(tmp_path / name)
    read = """
import sys
from peft import PeftConfig
def read():
    for name in sys.argv[1:]:
        try:
            print(PeftConfig.from_pretrained(name).peft_type.value)
        except KeyError as error:
            print("KeyError", error)
read()
import d2surgery.peft_plugin
read()
"""
    command = [sys.executable, "-c", read, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["KeyError 'D2LORA'", "KeyError 'DUALLORA'", "D2LORA", "DUALLORA"]


@every_config
def test_each_row_of_a_batch_has_its_own_adapter(name: str, tmp_path: Path) -> None:
    """As with one adapter active at a time, "__base__" as with none; PEFT's own method, through its hooks."""
    model = get_peft_model(base(tmp_path / "base"), config(name), adapter_name="one")
    model.add_adapter("two", config(name))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    ids = torch.cat([IDS, IDS.flip(0)])
    names = ["two", "__base__", "one", "two"]

    @torch.no_grad()
    def alone(row: int) -> Any:
        if names[row] == "__base__":
            with model.disable_adapter():
                return model(ids[row : row + 1]).logits
        model.set_adapter(names[row])
        return model(ids[row : row + 1]).logits

    with torch.no_grad():
        together = model(ids, adapter_names=names).logits
        torch.testing.assert_close(together, torch.cat([alone(row) for row in range(4)]), rtol=1e-5, atol=1e-5)
        short = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=2, num_beams=2, do_sample=False)
    assert short.shape[0] == 4
    with pytest.raises(D2SurgeryError, match=r"USAGE.*no such adapter.*got three"):
        model(ids, adapter_names=["one", "two", "three", "one"])
    with pytest.raises(D2SurgeryError, match=r"USAGE.*for each row"):
        model(ids, adapter_names=["one", "two", "one"])
    with pytest.raises(D2SurgeryError, match=r"USAGE.*evaluation mode"):
        model.train()(ids, adapter_names=names)


def test_a_warm_up_that_is_not_over_is_saved_with_its_factor(tmp_path: Path) -> None:
    model = get_peft_model(base(tmp_path / "base"), config("duallora")).eval()
    set_warmup(model, 0.25)
    with torch.no_grad():
        live = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    stored = load(tmp_path / "adapter")
    assert stored.layout.about.training["warmup"] == 0.25
    assert next(iter(stored.values())).scaling == pytest.approx(0.25 * 6 / 6**0.5)
    again = PeftModel.from_pretrained(
        type(model.get_base_model()).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, live, rtol=1e-6, atol=1e-6)
    set_warmup(model, 1.0)
    assert "warmup" not in model.peft_config["default"].to_dict()["training"]
