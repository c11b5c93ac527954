"""What is fuzzed: a small base, adapters of every form, their merge, its receipt, a journal, a run, items."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2surgery import LoRA, from_adapters, merge, save
from d2surgery.adapters import DoRA

HIDDEN, LAYERS = 8, 2
NAMES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qv"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
    "tie_word_embeddings": True, "dtype": "bfloat16", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "eos_token_id": 2,
    "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "text_config": None, "quantization_config": None,
    "_name_or_path": "org/base-1b", "torch_dtype": "bfloat16",
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base-1b", "r": 2, "lora_alpha": 4,
    "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "exclude_modules": None, "bias": "none",
    "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {"q_proj": 4},
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_to_transform": [0, 1],
    "layers_pattern": "layers", "peft_version": "0.21.2", "revision": None, "auto_mapping": None, "loftq_config": {},
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "lora_bias": False,
    "ensure_weight_tying": False, "enable_lora": None, "lora_B_layout": None, "use_qalora": False,
}  # fmt: skip
OURS = {
    "peft_type": "D2LORA", "r": 2, "lora_alpha": 4, "tau": 0.5, "along": "out_features", "form": "update",
    "format_version": 1, "target_modules": ["q_proj"], "training": {"detach_norm": True},
}  # fmt: skip
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}], "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<s>"},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<s>", "eos_token": {"content": "b"}, "bos_token": "<s>",
    "chat_template": "{{ messages }}", "model_max_length": 64, "added_tokens_decoder": {"0": {"content": "<s>"}},
}  # fmt: skip
GENERATION = {"eos_token_id": [2], "temperature": 0.6, "do_sample": True, "max_length": 20}
RUN = """
base = "base"
output = "out"
[adapter]
kind = "dora"
targets = ["q_proj"]
rank = 4
alpha = 8.0
[data]
train = "items.jsonl"
limit = 10
template = "plain"
[optimizer]
steps = 2
lr = 1e-4
lr_ratio = {B = 16.0}
schedule = "cosine"
[run]
seed = 1
precision = "fp32"
save_every = 1
"""
ITEMS = [
    {"instruction": "True?\n\nAnswer format: true/false", "input": "", "output": "it is true", "answer": "true"},
    {"question": "One?", "choices": ["one", "two"], "answer": 0},
    {"question": "Say.", "answer": "so"},
]


def safetensors_bytes(entries: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def build(folder: Path) -> Path:
    """The world, in a folder."""
    torch.manual_seed(0)
    base = folder / "base"
    base.mkdir(parents=True)
    save_file(_weights(), base / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", CONFIG), ("generation_config.json", GENERATION), ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):  # fmt: skip
        (base / name).write_text(json.dumps(content))
    _shards(folder / "shards", base)
    _adapters(folder)
    merge(base, folder / "lora", folder / "merged")
    _torn(folder)
    (folder / "run.toml").write_text(RUN)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "items.json").write_text(json.dumps(ITEMS))
    return folder


def _weights() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (16, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (16, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (HIDDEN, 16)}
        shapes |= {f"{at}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def _shards(folder: Path, base: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = _weights()
    halves = {f"model-{at + 1:05}-of-00002.safetensors": [*weights][at::2] for at in range(2)}
    for file, names in halves.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(prod(w.shape) * 2 for w in weights.values())},
             "weight_map": {name: file for file, names in halves.items() for name in names}}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapters(folder: Path) -> None:
    factors = {name: {"A": torch.randn(2, HIDDEN), "B": torch.randn(HIDDEN, 2)} for name in NAMES}
    lora = {name: LoRA(**slots, scaling=2.0) for name, slots in factors.items()}
    save(from_adapters(lora), folder / "lora")
    dora = {name: DoRA(A=s["A"], B=s["B"], magnitude=torch.rand(HIDDEN), scaling=2.0) for name, s in factors.items()}
    save(from_adapters(dora), folder / "dora")
    for name, config in (("peft", ADAPTER), ("bin", ADAPTER), ("old", ADAPTER), ("ours", OURS)):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    keys = {f"base_model.model.{name}.lora_{slot}.weight": s[slot] for name, s in factors.items() for slot in "AB"}
    save_file(keys, folder / "peft" / "adapter_model.safetensors", {"format": "pt"})
    torch.save(keys, folder / "bin" / "adapter_model.bin")
    torch.save(keys, folder / "old" / "adapter_model.bin", _use_new_zipfile_serialization=False)
    twice = {f"base_model.model.{n}.lora_{slot}_{sign}.weight": s[slot] for n, s in factors.items() if "q_" in n
             for slot in "AB" for sign in ("plus", "minus")}  # fmt: skip
    save_file({key: tensor.clone() for key, tensor in twice.items()}, folder / "ours" / "adapter_model.safetensors")


def _torn(folder: Path) -> None:
    """A merge that was killed before its last file: what `--resume` takes up."""

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done * 2 > total:
            raise Stop

    try:
        merge(folder / "base", folder / "lora", folder / "resumed", shard_size=600, progress=stop)
    except Stop:
        return
    raise AssertionError("the merge was to be killed")
