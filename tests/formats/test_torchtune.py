"""torchtune's .pt: rows as its convert_weights has them, a scaling that is asked for, and what is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file

import d2surgery
from d2surgery.checkpoint import Checkpoint
from d2surgery.cli import main
from d2surgery.files.base import BaseWeights
from d2surgery.formats import with_base

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dora", [False, True])
def test_it_merges_onto_its_base_and_passes_the_audit_once_its_alpha_is_told(tmp_path: Path, dora: bool) -> None:
    adapter = toy_llama.toy(dora=dora)
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.torchtune(adapter, tmp_path / "adapter")
    with pytest.raises(d2surgery.D2SurgeryError, match="SCALING_UNKNOWN"):
        d2surgery.merge(base, file, tmp_path / "out")
    alpha = adapter.scaling * toy_llama.RANK
    d2surgery.merge(base, file, tmp_path / "out", alpha=alpha)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in adapter.A:
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), adapter.effective(module), rtol=2e-6, atol=2e-7)
    assert d2surgery.audit(base, file, tmp_path / "out", alpha=alpha).verdict == "pass"
    assert d2surgery.audit(base, file, tmp_path / "out", alpha=2 * alpha).verdict == "fail"
    options = ["--base", str(base), "--adapter", str(file), "--merged", str(tmp_path / "out")]
    assert main(["audit", *options, "--alpha", str(alpha)]) == 0


def opened(file: Path, base: Path) -> d2surgery.Layout:
    weights = BaseWeights(base)
    return with_base(d2surgery.load(file, alpha=2.0).layout, weights.header.tensors, weights.config)


def test_qwens_rows_are_as_in_transformers(tmp_path: Path) -> None:
    adapter = toy_llama.toy()
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.torchtune(adapter, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    stored = torch.load(file)["layers.0.attn.q_proj.lora_b.weight"]
    assert torch.equal(Checkpoint(opened(file, base))[Q].slots()["B"], stored)
    assert not np.array_equal(stored.numpy(), adapter.B[Q])


@pytest.mark.parametrize(
    "changes", [{"model_type": "falcon"}, {"num_attention_heads": 7}, {"num_attention_heads": "4"}]
)
def test_rows_whose_order_no_base_tells_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    adapter = toy_llama.toy()
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.torchtune(adapter, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    found = opened(file, base)
    assert {problem.code for problem in found.problems} == {"HEADS_UNKNOWN"}
    assert Q in {problem.module for problem in found.problems}


def test_without_a_base_it_is_inspected_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toy_llama.torchtune(toy_llama.toy(dora=True), tmp_path)
    assert main(["inspect", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["kinds"], found["tensors_accounted"]) == ("torchtune", ["dora"], 9)
    assert {problem["code"] for problem in found["problems"]} == {"HEADS_UNKNOWN", "SCALING_UNKNOWN"}


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("layers.0.mlp.experts.lora_gate_a", "UNKNOWN_TENSOR"),
        ("layers.0.attn.qkv_proj.lora_a.weight", "MISSING_HALF"),
        ("layers.0.attn.q_proj.lora_b.bias", "UNKNOWN_TENSOR"),
        ("tok_embeddings.lora_a.weight", "MISSING_HALF"),
    ],
)
def test_what_has_no_place_is_named(tmp_path: Path, key: str, code: str) -> None:
    file = toy_llama.torchtune(toy_llama.toy(), tmp_path)
    torch.save(torch.load(file) | {key: torch.zeros(4, 4)}, file)
    found = d2surgery.open_layout(file)
    assert (code, key in found.unread) == (next(p.code for p in found.problems if p.code == code), True)


@pytest.mark.parametrize("part", ["attn.qkv_proj", "attn.w1", "moe.w1"])
def test_modules_of_other_decoders_are_refused(tmp_path: Path, part: str) -> None:
    pair = {"lora_a": torch.zeros(2, 4), "lora_b": torch.zeros(4, 2)}
    torch.save(
        {f"layers.0.{part}.{leaf}.weight": factor for leaf, factor in pair.items()}, tmp_path / "adapter_model.pt"
    )
    assert [p.code for p in d2surgery.open_layout(tmp_path / "adapter_model.pt").problems] == ["UNSUPPORTED_VARIANT"]
