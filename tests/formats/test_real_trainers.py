"""litgpt's and AdapterHub's own files, against the weights that litgpt and the adapters library make of them; and
models in GGUF against those that transformers makes of them.

Neither is in the extra formats-tests, since adapters needs transformers 4: `.ci/formats` gives them one of their
own. Where they are not installed the tests are skipped.
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


# llama.cpp's models, through transformers ------------------------------------------------------------------------


@needs("gguf")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_transformers_makes_the_same_weights_of_a_model_in_gguf(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    import gguf
    import transformers

    from d2surgery.files.base import BaseWeights

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    head = 128 if kind == "qwen3" else 8  # transformers takes its own default for Qwen3's
    q, kv = 4 * head, 2 * head
    writer.add_key_length(head)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(20)])
    writer.add_token_merges(["t 1"])
    writer.add_vocab_size(20)
    shapes = {"token_embd": (20, 32), "output": (20, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (q, 32), "blk.0.attn_k": (kv, 32), "blk.0.attn_v": (kv, 32),
              "blk.0.attn_output": (32, q), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
              "blk.0.ffn_down": (32, 48)}  # fmt: skip
    norms = {"blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,)}
    torch.manual_seed(0)
    if gemma := kind.startswith("gemma"):
        shapes |= {"blk.0.post_attention_norm": (32,), "blk.0.post_ffw_norm": (32,)}
        del shapes["output"]
        writer.add_sliding_window(16)
    for name, shape in (shapes | (norms if kind in ("qwen3", "gemma3") else {})).items():
        made = torch.randn(shape).to(dtype if len(shape) > 1 else torch.float32)
        raw = {torch.bfloat16: gguf.GGMLQuantizationType.BF16}.get(made.dtype)
        array = made.view(torch.uint8).numpy() if raw is not None else made.numpy()
        writer.add_tensor(f"{name}.weight", array, raw_dtype=raw)
    if kind == "qwen2":
        for name, size in (("q", 32), ("k", 16), ("v", 16)):
            writer.add_tensor(f"blk.0.attn_{name}.bias", torch.randn(size).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours, theirs = BaseWeights(tmp_path), model.state_dict()
    if gemma:
        assert ours.config == {}
        del theirs["lm_head.weight"]  # tied
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), theirs[name]), name
    if gemma:  # the file says too little for a config
        return
    config = transformers.AutoConfig.for_model(**ours.config)
    for field in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
                  "vocab_size", "tie_word_embeddings"):  # fmt: skip
        assert getattr(config, field) == pytest.approx(getattr(model.config, field)), field
