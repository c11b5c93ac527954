"""Merged models on a grid (GGUF's blocks, MLX's groups): a right merge never fails, a wrong one never passes.

Files of GGUF by the package gguf, those of MLX by its formula in numpy, and by MLX-LM where it is installed.
"""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tools import needs
from torch import Tensor

import d2surgery
from d2surgery.auditing.findings import Audit, document
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights
from d2surgery.files.checkpoints import read_checkpoint_header

HEADS, KV, HIDDEN, FEED, LAYERS, RANK = 4, 2, 256, 512, 3, 4
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": 64,
          "intermediate_size": FEED, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": 64,
          "num_key_value_heads": KV, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
          "tie_word_embeddings": True, "dtype": "bfloat16"}  # fmt: skip
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (128, HIDDEN), "mlp.down_proj": (HIDDEN, FEED)}
PLAIN = {"self_attn.v_proj": (128, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FEED, HIDDEN),
         "mlp.up_proj": (FEED, HIDDEN)}  # fmt: skip
PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
Weights = dict[str, Tensor]
GGUF, MLX = ("Q8_0", "Q4_0"), ("mlx-8", "mlx-4")
STEP = {"Q8_0": 2**-7, "mlx-8": 2**-7, "Q4_0": 2**-3, "mlx-4": 2**-3}  # about, of weights of size 1
ABOVE, BELOW, HIDDEN_BELOW = 2.0, 0.02, 0.002  # rms of the delta in steps


def base_weights() -> Weights:
    torch.manual_seed(0)
    found = {"model.embed_tokens.weight": torch.randn(64, HIDDEN) / 3, "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        found |= {
            f"model.layers.{layer}.{name}.weight": torch.randn(shape) / 3 for name, shape in (SHAPES | PLAIN).items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = 1 + torch.randn(HIDDEN) / 10
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def factors(size: float, seed: int) -> Weights:
    """A and B by module, delta of this root mean square."""
    torch.manual_seed(seed)
    found = {}
    for layer in range(LAYERS):
        for name, (out, inside) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            found[f"{module}.lora_A.weight"] = torch.randn(RANK, inside)
            found[f"{module}.lora_B.weight"] = torch.randn(out, RANK) * size / RANK**0.5
    return found


def model(directory: Path, weights: Weights, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    return directory


def adapter(directory: Path, found: Weights) -> Path:
    directory.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in found.items()}, directory / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name.rpartition(".")[2] for name in SHAPES],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(base: Weights, found: Weights, strength: float = 1.0, leave: str = "") -> Weights:
    """W0 + strength·B·A in float64, rounded to bfloat16; `leave`: a layer that stays the base's."""
    made = dict(base)
    for name, B in found.items():
        module = name.removesuffix(".lora_B.weight")
        if module != name and (not leave or leave not in module):
            delta = B.double() @ found[f"{module}.lora_A.weight"].double() * strength
            made[f"{module}.weight"] = (base[f"{module}.weight"].double() + delta).float().bfloat16()
    return made


# Files on a grid --------------------------------------------------------------------------------------------------


def on_a_grid(directory: Path, weights: Weights, grid: str) -> Path:
    return mlx(directory, weights, int(grid[-1])) if grid in MLX else gguf(directory, weights, grid)


def gguf(directory: Path, weights: Weights, grid: str) -> Path:
    """As llama.cpp: norms in float32, rows of q and k interleaved."""
    package = pytest.importorskip("gguf")
    directory.mkdir(parents=True)
    writer = package.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(64)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    type = package.GGMLQuantizationType[grid]
    for name, tensor in weights.items():
        rows, module = tensor.float().numpy(), name.removesuffix(".weight")
        for end, heads in (("q_proj", HEADS), ("k_proj", KV)):
            if module.endswith(end):
                rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        _, _, layer, part = module.split(".", 3) if ".layers." in module else ("", "", "", module)
        there = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(
            module
        ) or f"blk.{layer}.{PARTS[part]}"
        if rows.ndim == 2:
            writer.add_tensor(f"{there}.weight", package.quants.quantize(rows, type), raw_dtype=type)
        else:
            writer.add_tensor(f"{there}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory


def mlx(directory: Path, weights: Weights, bits: int, group: int = 64) -> Path:
    """MLX's affine groups: the end of larger size lies on the grid; scales in the weights' dtype."""
    found: Weights = {}
    for name, tensor in weights.items():
        if tensor.dim() < 2:
            found[name] = tensor
            continue
        w = tensor.float().numpy().reshape(-1, group)
        low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
        below = abs(low) > abs(high)
        scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-7))
        scale = np.where(below, scale, -scale)
        edge = np.where(below, low, high)
        scale = edge / np.rint(edge / scale)
        numbers = np.rint((w - edge) / scale).clip(0, 2**bits - 1).astype(np.uint64)
        words = numbers.reshape(-1, 32 // bits) << (np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits))
        packed = words.sum(1).astype(np.uint32).reshape(len(tensor), -1)
        module = name.removesuffix(".weight")
        found[name] = torch.from_numpy(packed)
        for leaf, values in (("scales", scale), ("biases", edge)):
            found[f"{module}.{leaf}"] = torch.from_numpy(values).reshape(len(tensor), -1).to(tensor.dtype)
    said = {"group_size": group, "bits": bits}
    return model(directory, found, {"quantization": said, "quantization_config": said})


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no quantiser were known, as of llama.cpp's K-quants."""
    monkeypatch.setattr("d2surgery.auditing.grids.quantizes", lambda grid: False)


WRONG: dict[str, Callable[[Weights, Weights, Weights], Weights]] = {
    "not applied": lambda base, own, other: base,
    "half": lambda base, own, other: merged(base, own, 0.5),
    "twice": lambda base, own, other: merged(base, own, 2.0),
    "subtracted": lambda base, own, other: merged(base, own, -1.0),
    "a layer left out": lambda base, own, other: merged(base, own, leave="layers.1."),
    "another adapter": lambda base, own, other: merged(base, other),
}


def audited(tmp_path: Path, grid: str, size: float, make: str = "") -> Audit:
    base, own, other = base_weights(), factors(size * STEP[grid], 1), factors(size * STEP[grid], 2)
    made = WRONG[make](base, own, other) if make else merged(base, own)
    there = on_a_grid(tmp_path / "merged", made, grid)
    found: Audit = d2surgery.audit(model(tmp_path / "base", base), adapter(tmp_path / "adapter", own), there)
    return found


def codes(found: Audit) -> set[str]:
    return {problem.code for problem in found.reasons}


SCHEMA = json.loads(files("d2surgery").joinpath("schemas", "audit.schema.json").read_text())


@pytest.mark.parametrize("size", [ABOVE, BELOW])
@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_right_merge_passes_where_its_quantiser_is_known(tmp_path: Path, grid: str, size: float) -> None:
    found = audited(tmp_path, grid, size)
    assert found.verdict == "pass", found.reasons
    assert "SAME_BLOCKS" in codes(found)
    assert {module.status for module in found.modules.values()} == {"replayed"}
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps({"schema_version": 1} | document(found))))


@pytest.mark.parametrize("make", WRONG)
@pytest.mark.parametrize("size", [ABOVE, BELOW])
@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_wrong_merge_fails_where_its_quantiser_is_known(tmp_path: Path, grid: str, size: float, make: str) -> None:
    found = audited(tmp_path, grid, size, make)
    if make == "half" and size == BELOW:  # which bfloat16 loses most of: an imatrix may do as much
        assert found.verdict != "pass"
        return
    assert found.verdict == "fail", found.reasons
    named = {"not applied": "DELTA_NOT_APPLIED", "a layer left out": "PARTIAL_MERGE"}.get(make)
    assert named is None or named in codes(found)


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("size", [ABOVE, BELOW, HIDDEN_BELOW])
@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_right_merge_stays_open_where_it_is_not(tmp_path: Path, grid: str, size: float) -> None:
    found = audited(tmp_path, grid, size)
    assert found.verdict == "inconclusive", found.reasons
    (said,) = {
        problem.message for problem in found.reasons if problem.code == "ON_A_GRID" and "together" in problem.message
    }
    ends = {ABOVE: ("as a right merge",), HIDDEN_BELOW: ("too coarse", "rounding to 16 bits")}.get(size, ("",))
    assert any(end in said for end in ends), said
    for module in found.modules.values():
        assert abs(module.strength - 1) < max(5 * module.strength_error, 0.02) or size != ABOVE


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("make", WRONG)
@pytest.mark.parametrize("size", [ABOVE, BELOW, HIDDEN_BELOW])
@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_wrong_merge_never_passes_there(tmp_path: Path, grid: str, size: float, make: str) -> None:
    found = audited(tmp_path, grid, size, make)
    told = {"half": "WRONG_STRENGTH", "twice": "DELTA_APPLIED_TWICE", "subtracted": "SIGN_FLIPPED",
            "not applied": "DELTA_NOT_APPLIED", "a layer left out": "PARTIAL_MERGE",
            "another adapter": "DELTA_UNEXPLAINED"}[make]  # fmt: skip
    if size == ABOVE:
        assert (found.verdict, told in codes(found)) == ("fail", True), found.reasons
    else:
        assert found.verdict in ("fail", "inconclusive")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_changed_tensor_that_no_adapter_touches_fails(
    tmp_path: Path, grid: str, known: bool, request: pytest.FixtureRequest
) -> None:
    if not known:
        request.getfixturevalue("unknown")
    base, own = base_weights(), factors(STEP[grid], 1)
    made = merged(base, own)
    made["model.layers.1.mlp.up_proj.weight"] = made["model.layers.1.mlp.gate_proj.weight"]
    there = on_a_grid(tmp_path / "merged", made, grid)
    found = d2surgery.audit(model(tmp_path / "base", base), adapter(tmp_path / "adapter", own), there)
    assert found.verdict == "fail"
    assert found.tensors["model.layers.1.mlp.up_proj.weight"].code == "TENSOR_CHANGED"
    assert [name for name, tensor in found.tensors.items() if tensor.code] == ["model.layers.1.mlp.up_proj.weight"]


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_are_read_as_gguf_reads_them(tmp_path: Path, grid: str) -> None:
    package = pytest.importorskip("gguf")
    weights, type = base_weights(), package.GGMLQuantizationType[grid]
    there = BaseWeights(gguf(tmp_path / "m", weights, grid), dequantized=True)
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            want = torch.from_numpy(
                package.quants.dequantize(package.quants.quantize(tensor.float().numpy(), type), type)
            )
            assert torch.equal(there[name], want), name
            assert torch.equal(there.rows(name, 3, 7), want[3:7])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_is_read_by_its_definition(tmp_path: Path, bits: int) -> None:
    weights = base_weights()
    directory = mlx(tmp_path / "m", weights, bits)
    there, stored = BaseWeights(directory, dequantized=True), read_checkpoint_header(directory)
    assert set(there) == set(weights)
    from safetensors.torch import load_file

    raw = load_file(directory / "model.safetensors")
    for name in (name for name in weights if weights[name].dim() == 2):
        module = name.removesuffix(".weight")
        words = raw[name].numpy().astype(np.uint64)
        shifts = np.arange(0, 32, bits, dtype=np.uint64)
        numbers = ((words[..., None] >> shifts) & np.uint64(2**bits - 1)).reshape(len(words), -1, 64).astype(np.float32)
        scale, bias = (raw[f"{module}.{leaf}"].float().numpy()[..., None] for leaf in ("scales", "biases"))
        want = torch.from_numpy((numbers * scale + bias).reshape(len(words), -1))
        assert torch.equal(there[name], want)
        assert torch.equal(there.rows(name, 2, 9), want[2:9])
    assert all(info.grid is None or info.grid.bits == bits for info in stored.tensors.values())


@needs("mlx_lm")
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_a_merge_that_mlx_quantised_is_made_again_block_by_block(tmp_path: Path, bits: int) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    base, own = base_weights(), factors(0.1, 1)
    for name, weights in (("right", merged(base, own)), ("wrong", base)):
        loaded, config = load_model(model(tmp_path / f"{name} in 16 bits", weights))
        quantised, config = quantize_model(loaded, config, 64, bits)
        save_model(tmp_path / name, quantised)
        save_config(config, tmp_path / name / "config.json")
    plain, lora = model(tmp_path / "base", base), adapter(tmp_path / "adapter", own)
    found = d2surgery.audit(plain, lora, tmp_path / "right")
    assert (found.verdict, "SAME_BLOCKS" in codes(found)) == ("pass", True), found.reasons
    assert "DELTA_NOT_APPLIED" in codes(d2surgery.audit(plain, lora, tmp_path / "wrong"))


# Quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [*GGUF, *MLX])
def test_a_quantised_base_is_measured_against_and_not_merged_into(tmp_path: Path, grid: str) -> None:
    weights, own = base_weights(), factors(STEP[grid], 1)
    base, lora = on_a_grid(tmp_path / "base", weights, grid), adapter(tmp_path / "adapter", own)
    with pytest.raises(D2SurgeryError, match="QUANTIZED_BASE"):
        d2surgery.merge(base, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["drift", str(lora), "--base", str(base), "--json"]) == 0
    plain = dict(BaseWeights(base, dequantized=True))
    unquantised = model(tmp_path / "dequantised", plain)
    d2surgery.merge(unquantised, lora, tmp_path / "merged")
    assert d2surgery.audit(base, lora, tmp_path / "merged", files=False).verdict == "pass"
    assert d2surgery.audit(base, lora, unquantised, files=False).verdict == "fail"


@pytest.mark.parametrize("grid", ["Q4_0", "mlx-4"])
def test_what_rounding_back_to_the_bases_grid_loses_is_said(tmp_path: Path, grid: str) -> None:
    weights, own = base_weights(), factors(BELOW * STEP[grid], 1)
    base, lora = on_a_grid(tmp_path / "base", weights, grid), adapter(tmp_path / "adapter", own)
    plain = {n: t.to(weights[n].dtype) for n, t in BaseWeights(base, dequantized=True).items()}
    d2surgery.merge(model(tmp_path / "dequantised", plain), lora, tmp_path / "merged")
    made = dict(BaseWeights(tmp_path / "merged"))
    there = on_a_grid(tmp_path / "again", made, grid)
    found = d2surgery.audit(tmp_path / "dequantised", lora, there)
    assert "LOW_SURVIVAL" in codes(found) or found.verdict != "pass", found.reasons


def test_without_the_package_gguf_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, own = base_weights(), factors(1.0, 1)
    there = gguf(tmp_path / "merged", merged(base, own), "Q4_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(D2SurgeryError, match="NO_GGUF") as error:
        d2surgery.audit(model(tmp_path / "base", base), adapter(tmp_path / "adapter", own), there)
    assert "pip install" in error.value.problems[0].remedy
