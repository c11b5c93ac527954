"""PEFT's methods that are a LoRA of some rank, as PEFT saves and merges them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from models import llama
from safetensors.torch import load_file, save_file

import d2surgery
from d2surgery.checkpoint import Checkpoint, differences, load
from d2surgery.cli import main
from d2surgery.files.base import BaseWeights

TARGETS = ["q_proj", "k_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "delora": lambda: peft.DeloraConfig(r=2, target_modules=TARGETS),
    "delora, ranks by module": lambda: peft.DeloraConfig(r=2, rank_pattern={"q_proj": 3}, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "loha, patterns": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS, rank_pattern={"q_proj": 3},
                                              alpha_pattern={"k_proj": 7}),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr, factors": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_both=True),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=TARGETS),
}  # fmt: skip


def trained(config: Any, directory: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Trained, here: randomised. The base, the adapter, and what PEFT merges it to."""
    model = llama()
    model.save_pretrained(directory / "base")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(directory / "adapter")
    return directory / "base", directory / "adapter", wrapped.merge_and_unload().state_dict()


def opened(adapter: Path, base: Path) -> Checkpoint:
    return load(adapter, base=BaseWeights(base))


@pytest.mark.parametrize("name", METHODS)
def test_it_is_a_lora_with_the_weights_that_peft_merges(tmp_path: Path, name: str) -> None:
    base, adapter, merged = trained(METHODS[name](), tmp_path)
    checkpoint, weights = opened(adapter, base), load_file(base / "model.safetensors")
    assert (checkpoint.layout.problems, checkpoint.layout.kinds) == ((), ["lora"])
    assert len(checkpoint) == sum(name.endswith(tuple(f"{t}.weight" for t in TARGETS)) for name in weights)
    for module, each in checkpoint.items():
        W = weights[f"{module}.weight"].double()
        np.testing.assert_allclose((W + each.delta(W)).numpy(), merged[f"{module}.weight"].numpy(), atol=2e-6)
        assert (W - merged[f"{module}.weight"]).abs().max() > 1e-3
    d2surgery.merge(base, adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for module in checkpoint:
        theirs = merged[f"{module}.weight"]
        torch.testing.assert_close(ours[f"{module}.weight"], theirs, atol=2e-6, rtol=2e-6)
    d2surgery.save(checkpoint, tmp_path / "plain")
    assert max(differences(checkpoint, d2surgery.load(tmp_path / "plain")).values()) < 1e-7


def test_a_head_saved_beside_it_replaces_the_bases(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base, adapter, merged = trained(config, tmp_path)
    layout = d2surgery.open_layout(adapter)
    assert (set(layout.replacements), layout.unread) == ({"lm_head.weight"}, ())
    d2surgery.merge(base, adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(ours["lm_head.weight"], merged["lm_head.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["delora", "loha", "lokr", "vera"])
def test_without_its_config_it_is_never_read_as_lora(tmp_path: Path, name: str) -> None:
    _, adapter, _ = trained(METHODS[name](), tmp_path)
    (adapter / "adapter_config.json").unlink()
    layout = d2surgery.open_layout(adapter)
    assert {problem.severity for problem in layout.problems} == {"error"}
    assert set(layout.unread) == set(layout.header.tensors)


def test_how_wide_a_module_of_vera_is_the_base_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = trained(METHODS["vera"](), tmp_path)
    assert {problem.code for problem in d2surgery.open_layout(adapter).problems} == {"BASE_NEEDED"}
    with pytest.raises(d2surgery.D2SurgeryError, match="BASE_NEEDED"):
        d2surgery.save(d2surgery.load(adapter), tmp_path / "plain")
    assert main(["inspect", str(adapter), "--base", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(m["module"].rpartition(".")[2], m["in_features"]) for m in found["modules"]} >= {("q_proj", 16)}
    assert found["tensors_accounted"] == found["tensors_total"]


def test_vera_without_its_projections_says_what_to_do(tmp_path: Path) -> None:
    base, adapter, _ = trained(peft.VeraConfig(r=3, target_modules=TARGETS, save_projection=False), tmp_path)
    layout = opened(adapter, base).layout
    assert {problem.code for problem in layout.problems} == {"UNSUPPORTED_VARIANT"}
    assert "save_projection" in layout.problems[0].message


@pytest.mark.parametrize(
    ("name", "leaf", "shape", "code"),
    [
        ("loha", "hada_w1_b", None, "MISSING_HALF"),
        ("loha", "hada_w1_b", (2, 5), "RANK_MISMATCH"),
        ("loha", "hada_w1_a", (16, 3), "RANK_MISMATCH"),
        ("lokr", "lokr_w1", None, "MISSING_HALF"),
        ("delora", "delora_w_norm", (3,), "RANK_MISMATCH"),
        ("delora", "delora_w_norm", None, "MISSING_HALF"),
        ("delora", "delora_lambda", (2,), "RANK_MISMATCH"),
        ("vera", "vera_lambda_d", (4,), "RANK_MISMATCH"),
        ("vera", "vera_lambda_b", None, "MISSING_HALF"),
    ],
)
def test_what_does_not_fit_is_named_and_the_rest_read(
    tmp_path: Path, name: str, leaf: str, shape: tuple[int, ...] | None, code: str
) -> None:
    base, adapter, _ = trained(METHODS[name](), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(f"q_proj.{leaf}"))
    del tensors[key]
    save_file(tensors | ({key: torch.ones(shape)} if shape else {}), file)
    layout = opened(adapter, base).layout
    assert {problem.code for problem in layout.problems} == {code}
    module = next(problem.module for problem in layout.problems)
    assert (module.endswith("q_proj"), module in layout.adapters, len(layout.adapters) > 0) == (True, False, True)
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(layout.header.tensors)


def test_a_rank_that_the_config_has_otherwise_is_an_error(tmp_path: Path) -> None:
    _, adapter, _ = trained(METHODS["loha"](), tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    assert {problem.code for problem in d2surgery.open_layout(adapter).problems} == {"RANK_DISAGREES"}


def test_a_module_that_the_config_does_not_target_is_an_error(tmp_path: Path) -> None:
    _, adapter, _ = trained(METHODS["lokr"](), tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    assert {problem.code for problem in d2surgery.open_layout(adapter).problems} == {"NOT_TARGETED"}
