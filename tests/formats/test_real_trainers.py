"""litgpt's and AdapterHub's own files, against the weights that litgpt and the adapters library make of them.

Neither is in the extra formats-tests: adapters needs transformers 4, litgpt much else. Where they are not installed the
tests are skipped.
"""

import json
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import d2surgery


def needs(package: str) -> pytest.MarkDecorator:
    absent = not any(each.name == package for each in distributions())
    return pytest.mark.skipif(absent, reason=f"not installed: {package}")


def randomise(module: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)


def assert_merges_to(base: Path, adapter: Path, merged: dict[str, Tensor], directory: Path) -> None:
    d2surgery.merge(base, adapter, directory / "out")
    ours, before = (load_file(path / "model.safetensors") for path in (directory / "out", base))
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {name for name in before if not torch.equal(before[name], ours[name])}
    assert changed
    for name in changed:
        torch.testing.assert_close(ours[name], merged[name], atol=2e-6, rtol=2e-6)
    save_file({n: t.contiguous().clone() for n, t in merged.items()}, directory / "out" / "model.safetensors")
    assert d2surgery.audit(base, adapter, directory / "out").verdict == "pass"


# litgpt ----------------------------------------------------------------------------------------------------------

TRAINED: list[dict[str, bool]] = [
    {"lora_query": True, "lora_value": True},
    {"lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True, "lora_mlp": True},
    {"lora_key": True, "lora_head": True},
]


@needs("litgpt")
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("trained", TRAINED, ids=str)
def test_litgpt_makes_the_same_weights_of_its_file(tmp_path: Path, trained: dict[str, bool], groups: int) -> None:
    import lightning
    from litgpt.finetune.lora import save_lora_checkpoint
    from litgpt.lora import GPT, Config, merge_lora_weights
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from litgpt.utils import save_config

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_query_groups": groups, "intermediate_size": 48}
    kind = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "parallel_residual": False}
    config = Config(vocab_size=20, padded_vocab_size=20, rotary_percentage=1.0, lora_r=4, lora_alpha=6,
                    **sizes, **kind, **trained)  # fmt: skip
    model = GPT(config)
    randomise(model, 1)
    directory, fabric = _made(tmp_path / "a"), lightning.Fabric(accelerator="cpu", devices=1)
    save_lora_checkpoint(fabric, model, directory / "lit_model.pth.lora")
    parts = {name: trained.get(name, False) for name in ("lora_query", "lora_key", "lora_value")}
    said = {"lora_alpha": 6, "lora_r": 4} | {name: str(value).lower() for name, value in parts.items()}
    (directory / "hyperparameters.yaml").write_text("".join(f"{name}: {value}\n" for name, value in said.items()))
    save_config(config, tmp_path / "a")

    def as_transformers() -> dict[str, Tensor]:
        lit = {key.replace(".linear.weight", ".weight"): value for key, value in model.state_dict().items()
               if "lora" not in key}  # fmt: skip
        found: dict[str, Tensor] = {}
        copy_weights_llama(config, found, dict(lit))
        return {name: tensor.clone() for name, tensor in found.items()}

    base = _made(tmp_path / "base")
    save_file(as_transformers(), base / "model.safetensors", metadata={"format": "pt"})
    of_base = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": groups}
    (base / "config.json").write_text(json.dumps(of_base))
    merge_lora_weights(model)
    assert_merges_to(base, tmp_path / "a", as_transformers(), tmp_path)
    (tmp_path / "a" / "model_config.yaml").unlink()  # then the base says it
    assert_merges_to(base, tmp_path / "a", as_transformers(), _made(tmp_path / "again"))


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


# AdapterHub ------------------------------------------------------------------------------------------------------


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                vocab_size=20))  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=20))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=20,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


@needs("adapters")
@pytest.mark.parametrize("build", [_bert, _gpt2, _llama])
@pytest.mark.parametrize(
    "options",
    [{"alpha": 6}, {"alpha": 6, "attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True},
     {"alpha": 6, "attn_matrices": ["k"]}, {"alpha": 4, "use_dora": True, "attn_matrices": ["q"]}],
    ids=str,
)  # fmt: skip
def test_the_adapters_library_makes_the_same_weights_of_its_file(
    tmp_path: Path, build: Any, options: dict[str, Any]
) -> None:
    adapters = import_module("adapters")  # tests/adapters has its name

    if build is _gpt2 and options.get("use_dora"):
        pytest.skip("its fused layer has no DoRA")
    model = build()
    model.save_pretrained(tmp_path / "base")
    adapters.init(model)
    model.add_adapter("toy", config=adapters.LoRAConfig(r=4, **options))
    randomise(model, 1)
    model.save_adapter(str(tmp_path / "a"), "toy")
    model.merge_adapter("toy")
    held = load_file(tmp_path / "base" / "model.safetensors")
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in held}
    assert_merges_to(tmp_path / "base", tmp_path / "a", merged, tmp_path)
