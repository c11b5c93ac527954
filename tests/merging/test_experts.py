"""Experts as PEFT has packed them, and target_parameters as PEFT writes them."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from models import f64, mixtral, qwen3_moe, scatter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2surgery import D2SurgeryError, audit, merge

E, R = 3, 2  # experts, rank
DOWN = {"target_parameters": ["experts.down_proj"], "target_modules": None}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Path:
    path.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / f"{name}.safetensors")
    (path / ("config.json" if name == "model" else "adapter_config.json")).write_text(json.dumps(config))
    return path


def adapter(path: Path, A: Tensor, B: Tensor, version: str, parameter: str = "down_proj") -> Path:
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "peft_version": version, "target_modules": None}
    tensors = {f"base_model.model.mlp.experts.lora_{slot}.weight": value for slot, value in (("A", A), ("B", B))}
    return write(path, tensors, {**config, "target_parameters": [f"experts.{parameter}"]}, "adapter_model")


@pytest.mark.parametrize("version", ["0.17.0", "0.17.1", "0.18.0", "0.18.1"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (5, 5)])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_of_peft_0_17_and_0_18_lie_the_other_way_round(
    tmp_path: Path, version: str, rows: int, columns: int, model_type: str
) -> None:
    """ΔW[e, i, o] = s·Σ_r B[o, r, e] A[e, r, i] in both, whatever the model: A runs along the parameter's rows."""
    W, A, B = numbers(E, rows, columns), numbers(E * R, rows), numbers(columns, R * E, seed=1)
    base = write(tmp_path / "base", {"mlp.experts.down_proj": W}, {"model_type": model_type}, "model")
    merge(base, adapter(tmp_path / "a", A, B, version), tmp_path / "out")
    delta = np.einsum("ore,eri->eio", f64(B).reshape(columns, R, E), f64(A).reshape(E, R, rows))
    got = f64(load_file(tmp_path / "out" / "model.safetensors")["mlp.experts.down_proj"])
    np.testing.assert_allclose(got, f64(W) + 2 * delta, rtol=0, atol=1e-6)


def test_experts_of_an_older_peft_that_are_separate_tensors_on_disk(tmp_path: Path) -> None:
    A, B = numbers(E * R, 12), numbers(4, R * E, seed=1)  # gate above up, 6 rows each
    tensors = {f"mlp.experts.{e}.{p}.weight": numbers(6, 4, seed=e) for e in range(E) for p in ("gate_proj", "up_proj")}
    base = write(tmp_path / "base", tensors, {"architectures": ["Qwen3MoeForCausalLM"]}, "model")
    merge(base, adapter(tmp_path / "a", A, B, "0.18.1", "gate_up_proj"), tmp_path / "out")
    delta = 2 * np.einsum("ore,eri->eio", f64(B).reshape(4, R, E), f64(A).reshape(E, R, 12))
    got = load_file(tmp_path / "out" / "model.safetensors")
    for e in range(E):
        for part, rows in (("gate_proj", slice(0, 6)), ("up_proj", slice(6, 12))):
            name = f"mlp.experts.{e}.{part}.weight"
            np.testing.assert_allclose(f64(got[name]), f64(tensors[name]) + delta[e, rows], rtol=0, atol=1e-6)


def test_an_older_adapter_in_today_s_shape_is_a_misfit(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"mlp.experts.down_proj": numbers(E, 6, 4)}, {}, "model")
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        merge(base, adapter(tmp_path / "a", numbers(E * R, 4), numbers(6, R * E), "0.18.1"), tmp_path / "out")


def nemotron_h() -> Any:
    config = T.NemotronHConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, layers_block_type=["moe", "attention"],
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, n_routed_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=12, moe_shared_expert_intermediate_size=12, n_group=1, topk_group=1, mamba_num_heads=2,
        mamba_head_dim=8, ssm_state_size=8, n_groups=1, max_position_embeddings=64,
    )  # fmt: skip
    return T.NemotronHForCausalLM(config)


ALL_LINEAR = {"target_parameters": ["gate_up_proj", "gate.weight", "down_proj"]}


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (mixtral, ALL_LINEAR | {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 8}}),
        (qwen3_moe, ALL_LINEAR),
        (nemotron_h, {"target_parameters": ["up_proj", "down_proj", "gate.weight"]}),
        (nemotron_h, {"target_parameters": ["experts.up_proj", "experts.down_proj"]}),
    ],
    ids=["mixtral", "qwen3_moe", "nemotron_h", "nemotron_h named"],
)
def test_target_parameters_as_all_linear_writes_them(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    scatter(model)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, config)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        trained.save_pretrained(tmp_path / "a")
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
        tokens = torch.arange(3, 15)[None]
        base = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
        unmerged = PeftModel.from_pretrained(base, tmp_path / "a").eval()
        merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = unmerged(tokens).logits, merged(tokens).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    adapted = unmerged.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, adapted[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"], ["k_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_are_rows_of_one_tensor_on_disk(targets: list[str], dora: bool, tmp_path: Path) -> None:
    """NomicBERT's attention is one tensor on disk and three layers in the model; rows between are the base's."""
    torch.manual_seed(0)
    config = T.AutoConfig.for_model(
        "nomic_bert", vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = T.AutoModel.from_config(config).eval()
    scatter(model)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, LoraConfig(r=2, target_modules=targets, use_dora=dora))
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        trained.save_pretrained(tmp_path / "a")
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert any("Wqkv" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    merged = T.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    adapted = trained.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, adapted[name], rtol=0, atol=1e-6, msg=name)
    assert audit(tmp_path / "base", tmp_path / "a", tmp_path / "out").verdict == "pass"
