"""A model in GGUF is a base: names, rows and config as transformers has them; merged and audited as any other."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file
from toy_llama import HEADS, HIDDEN, KV_HEADS, gguf_bytes, toy

import d2surgery
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights
from d2surgery.files.gguf_base import read_gguf_base

FIELDS: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": 32.0, "llama.feed_forward_length": 48.0,
    "llama.block_count": 1.0, "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's permute."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def as_gguf(directory: Path, out: Path, fields: dict[str, Any] | None = None) -> Path:
    """A safetensors base as llama.cpp's converter has it, by hand."""
    arrays: dict[str, Any] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, rows = name.removesuffix(".weight"), tensor.numpy()
        inside = module.removeprefix("model.layers.0.")
        for end, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            rows = interleaved(rows, heads) if inside.endswith(end) else rows
        arrays[f"{'blk.0.' * (inside != module)}{NAMES[inside]}.weight"] = rows
    out.mkdir()
    whole = {"llama.attention.head_count": "4", "llama.attention.head_count_kv": "2"}
    (out / "model.gguf").write_bytes(gguf_bytes(FIELDS | whole | (fields or {}), arrays))
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same base in both forms, and an adapter."""
    adapter = toy()
    base = toy_llama.save_base(adapter, tmp_path / "base")
    return base, as_gguf(base, tmp_path / "gguf"), toy_llama.mlx(adapter, tmp_path / "adapter")


def test_it_is_read_with_transformers_names_and_rows(pair: tuple[Path, Path, Path]) -> None:
    base, gguf, _ = pair
    one, other = BaseWeights(base), BaseWeights(gguf)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name
        for start, stop in ((0, 1), (1, 4), (5, len(tensor)), (3, 3)):
            if stop <= len(tensor):
                assert torch.equal(other.rows(name, start, stop), one.rows(name, start, stop))


def test_a_merge_onto_it_is_that_onto_safetensors(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, gguf, adapter = pair
    for name, where in (("one", base), ("other", gguf)):
        d2surgery.merge(where, adapter, tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    said = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
    assert [config[name] for name in said] == pytest.approx([toy_llama.CONFIG[name] for name in said])
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", False)
    assert d2surgery.audit(gguf, adapter, tmp_path / "other").verdict == "pass"
    assert main(["inspect", str(adapter), "--base", str(gguf)]) == 0


def test_a_merged_gguf_is_audited(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, gguf, adapter = pair
    d2surgery.merge(base, adapter, tmp_path / "merged")
    merged = as_gguf(tmp_path / "merged", tmp_path / "merged gguf")
    for which in (base, gguf):
        found = d2surgery.audit(which, adapter, merged)
        assert found.verdict == "pass", found.reasons
        assert d2surgery.audit(which, adapter, gguf, files=False).verdict == "fail"


def test_rows_that_llama_cpp_did_not_permute_fail_the_audit(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = pair
    d2surgery.merge(base, adapter, tmp_path / "merged")
    qwens = {name.replace("llama.", "qwen2."): value for name, value in FIELDS.items()}
    fields = qwens | {"general.architecture": "qwen2"}  # whose rows are read as they lie
    merged = as_gguf(tmp_path / "merged", tmp_path / "gguf merged", fields)
    assert d2surgery.audit(base, adapter, merged, files=False).verdict == "fail"


@pytest.mark.parametrize(
    ("fields", "part"),
    [({"general.architecture": "phi3"}, "not read as a base"), ({"general.type": "adapter"}, "not read as a base"),
     ({"llama.attention.head_count": "many"}, "how many heads"),
     ({"llama.attention.head_count": "5"}, "how many heads")],
)  # fmt: skip
def test_what_is_no_such_model_is_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path, fields: dict[str, Any], part: str
) -> None:
    with pytest.raises(D2SurgeryError, match=part):
        BaseWeights(as_gguf(pair[0], tmp_path / "other", fields))


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    arrays = {"blk.0.ffn_gate_exps.weight": np.ones((4, 8), np.float32), "rope_freqs.weight": np.ones(4, np.float32)}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(FIELDS, arrays))
    with pytest.raises(D2SurgeryError) as error:
        BaseWeights(tmp_path)
    assert [problem.module for problem in error.value.problems] == ["blk.0.ffn_gate_exps.weight"]


def test_no_config_is_made_where_the_file_has_what_none_of_it_can_say(tmp_path: Path) -> None:
    arrays = {"token_embd.weight": np.ones((20, HIDDEN), np.float32), "rope_freqs.weight": np.ones(4, np.float32)}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(FIELDS, arrays))
    assert BaseWeights(tmp_path).config == {}
    (tmp_path / "config.json").write_text(json.dumps(toy_llama.CONFIG))
    assert BaseWeights(tmp_path).config["model_type"] == "llama"


def test_the_file_itself_is_taken_where_it_is_alone(pair: tuple[Path, Path, Path]) -> None:
    _, gguf, adapter = pair
    assert set(BaseWeights(gguf / "model.gguf")) == set(BaseWeights(gguf))
    assert main(["inspect", str(adapter), "--base", str(gguf / "model.gguf")]) == 0
    (gguf / "other.gguf").write_bytes(b"")
    with pytest.raises(D2SurgeryError, match="among other weights"):
        BaseWeights(gguf / "model.gguf")


# Gemma and mixtures ----------------------------------------------------------------------------------------------


def gemma(directory: Path, out: Path, *, seed: int = 0, merged: Path | None = None) -> tuple[Path, Path]:
    """A Gemma with small norms in both forms; llama.cpp's has 1 added to its norms, in float32, by its converter's
    rule `name.endswith("norm.weight")`."""
    tensors = {f"model.layers.0.{name}.weight": toy_llama.numbers(*shape, seed=at)
               for at, (name, shape) in enumerate(toy_llama.SHAPES.items())}  # fmt: skip
    tensors["model.embed_tokens.weight"] = toy_llama.numbers(20, HIDDEN, seed=50)
    for at, norm in enumerate(
        ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    ):
        tensors[f"{norm}.weight"] = toy_llama.numbers(HIDDEN, seed=60 + at, size=1e-4)
    if merged is not None:
        tensors = {name: tensor.numpy() for name, tensor in load_file(merged / "model.safetensors").items()}
    config = toy_llama.CONFIG | {"model_type": "gemma", "tie_word_embeddings": True}
    if merged is None:
        toy_llama.save(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
    arrays: dict[str, Any] = {}
    for name, rows in tensors.items():
        module = name.removesuffix(".weight")
        inside = module.removeprefix("model.layers.0.")
        stored = rows + np.float32(1) if name.endswith("norm.weight") else rows
        arrays[f"{'blk.0.' * (inside != module)}{NAMES[inside]}.weight"] = stored
    fields = {name.replace("llama.", "gemma."): value for name, value in FIELDS.items()}
    whole = {"gemma.attention.head_count": "4", "gemma.attention.head_count_kv": "2"}
    out.mkdir()
    (out / "model.gguf").write_bytes(gguf_bytes(fields | whole | {"general.architecture": "gemma"}, arrays))
    return directory, out


def test_gemmas_norms_are_read_without_the_1_and_its_merges_audited(tmp_path: Path) -> None:
    base, gguf = gemma(tmp_path / "base", tmp_path / "gguf")
    one, other = BaseWeights(base), BaseWeights(gguf)
    assert set(one) == set(other)
    for name, tensor in one.items():
        wanted = (tensor + 1) - 1 if "norm" in name else tensor
        assert torch.equal(other[name], wanted), name
        assert torch.equal(other.rows(name, 3, 7).reshape(wanted[3:7].shape), wanted[3:7])
    assert other.config["hidden_act"] == "gelu_pytorch_tanh"
    adapter = toy_llama.mlx(toy(), tmp_path / "adapter")
    for where, into in ((base, "one"), (gguf, "other")):
        d2surgery.merge(where, adapter, tmp_path / into)
    _, merged = gemma(tmp_path / "unused", tmp_path / "merged", merged=tmp_path / "one")
    ours, theirs = tmp_path / "one", tmp_path / "other"  # the other's norms lack the bits that 1 took
    for which, out in ((base, ours), (base, merged), (gguf, ours), (gguf, theirs), (gguf, merged)):
        assert d2surgery.audit(which, adapter, out, files=False).verdict == "pass", (which, out)
    arrays = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "one/model.safetensors").items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"] + np.float32(1)  # added twice
    toy_llama.save(arrays, tmp_path / "one/model.safetensors", {"format": "pt"})
    _, wrong = gemma(tmp_path / "unused", tmp_path / "wrong", merged=tmp_path / "one")
    found = d2surgery.audit(base, adapter, wrong, files=False)
    assert [tensor.name for tensor in found.tensors.values() if tensor.code] == ["model.norm.weight"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_are_read_one_by_one(tmp_path: Path, family: str) -> None:
    """By the converter's rule: the experts' matrices are stacked, in their order; Mixtral is llama with experts."""
    architecture = "llama" if family == "mixtral" else family
    shapes = {"ffn_gate_exps": (3, 48, 32), "ffn_up_exps": (3, 48, 32), "ffn_down_exps": (3, 32, 48)}
    arrays = {
        f"blk.1.{name}.weight": toy_llama.numbers(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())
    }
    arrays |= {"blk.1.ffn_gate_inp.weight": toy_llama.numbers(3, 32, seed=9)}
    fields = {name.replace("llama.", f"{architecture}."): value for name, value in FIELDS.items()}
    fields |= {"general.architecture": architecture, f"{architecture}.expert_count": 3.0,
               f"{architecture}.expert_used_count": 2.0}  # fmt: skip
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(fields, arrays))
    found = BaseWeights(tmp_path)
    block = "model.layers.1." + ("block_sparse_moe" if family == "mixtral" else "mlp")
    leaves = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    wanted = {f"{block}.gate.weight": arrays["blk.1.ffn_gate_inp.weight"]}
    for name, leaf in zip(shapes, leaves, strict=True):
        wanted |= {f"{block}.experts.{e}.{leaf}.weight": arrays[f"blk.1.{name}.weight"][e] for e in range(3)}
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in wanted.items())
    assert all(np.array_equal(found.rows(name, 1, 3).numpy(), array[1:3]) for name, array in wanted.items())
    if family == "mixtral":
        assert (found.config["model_type"], found.config["num_local_experts"]) == ("mixtral", 3)


@pytest.mark.parametrize("experts", [0, 4097, 1 << 40])
def test_experts_without_elements_are_refused_at_once(tmp_path: Path, experts: int) -> None:
    """Any number of them costs a file nothing, and would cost a reader a name each."""
    arrays = {"blk.0.ffn_gate_exps.weight": np.ones((3, 0, 32), np.float32)}
    content = gguf_bytes(FIELDS | {"llama.expert_count": 3.0}, arrays)
    dims = struct.pack("<QQQ", 32, 0, 3)
    assert content.count(dims) == 1
    (tmp_path / "model.gguf").write_bytes(content.replace(dims, struct.pack("<QQQ", 32, 0, experts)))
    with pytest.raises(D2SurgeryError, match="no place in the models") as error:
        read_gguf_base(tmp_path / "model.gguf")
    assert {problem.code for problem in error.value.problems} == {"BAD_BASE"}
