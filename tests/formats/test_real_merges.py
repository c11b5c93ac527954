"""Merges by the tools themselves, as the audit judges them: right ones by the recipe, wrong ones by the cause."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations.world import llama
from safetensors.torch import load_file, save_file
from tools import needs
from torch import Tensor

import d2surgery
from d2surgery.auditing.findings import Audit

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def audited(directory: Path, merged: dict[str, Tensor], strength: float = 1.0) -> Audit:
    """Of a base at base/ and an adapter at adapter/."""
    (directory / "merged").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, directory / "merged/model.safetensors")
    base, adapter, out = (directory / name for name in ("base", "adapter", "merged"))
    found: Audit = d2surgery.audit(base, adapter, out, files=False, strength=strength)
    return found


def by_lycoris(
    directory: Path, dtype: str, algo: str, multiplier: float = 1.0, precise: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Trained, here: randomised, saved, and merged by `merge_to`."""
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(0)
    model = llama().to(DTYPES[dtype])
    model.save_pretrained(directory / "base")
    LycorisNetwork.apply_preset({"target_module": ["LlamaAttention", "LlamaMLP"]})
    wrapper = create_lycoris(model, 1.0, algo=algo, **{"linear_dim": 4, "linear_alpha": 3.0} | options)
    wrapper.apply_to()
    for parameter in wrapper.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    (directory / "adapter").mkdir()
    tensors = {key: value.detach().clone() for key, value in wrapper.state_dict().items()}
    save_file(tensors, directory / "adapter/x.safetensors", metadata={"ss_network_module": "lycoris.kohya"})
    for module in wrapper.loras:
        module.restore()
        module.merge_to(multiplier, precise=precise)
    held = load_file(directory / "base/model.safetensors")
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name in held}


@needs("lycoris")
@pytest.mark.parametrize(
    ("dtype", "options", "recipe"),
    [
        ("F32", {}, "peft"),
        ("BF16", {}, "peft-low-autocast-bfloat16"),
        ("F16", {}, "peft-low-autocast-float16"),
        ("BF16", {"precise": True}, "d2surgery"),
        ("F32", {"dora_wd": True}, "lycoris-dora"),
        ("F32", {"dora_wd": True, "wd_on_output": False}, "lycoris-dora"),
    ],
)
def test_a_merge_by_lycoris_is_replayed(tmp_path: Path, dtype: str, options: dict[str, Any], recipe: str) -> None:
    found = audited(tmp_path, by_lycoris(tmp_path, dtype, "lora", **options))
    assert (found.verdict, found.recipe) == ("pass", recipe)
    assert all(module.status == "replayed" for module in found.modules.values())


@needs("lycoris")
@pytest.mark.parametrize(
    ("dtype", "algo", "options", "code", "says"),
    [
        ("F32", "loha", {}, "WRONG_STRENGTH", "the scaling squared"),
        ("F32", "lokr", {"factor": 4, "linear_dim": 2}, "WRONG_STRENGTH", "the scaling squared"),
        ("BF16", "lora", {"dora_wd": True}, "MAGNITUDE_DROPPED", "a 16-bit epsilon"),
        ("BF16", "lora", {"dora_wd": True, "wd_on_output": False}, "MAGNITUDE_DROPPED", "a 16-bit epsilon"),
        ("F32", "lora", {"dora_wd": True, "multiplier": 0.5}, "STRENGTH_OF_A_PART", "the magnitude's gain alone"),
    ],
)
def test_what_lycoris_merges_wrongly_is_named(
    tmp_path: Path, dtype: str, algo: str, options: dict[str, Any], code: str, says: str
) -> None:
    merged = by_lycoris(tmp_path, dtype, algo, **options)
    found = audited(tmp_path, merged, options.get("multiplier", 1.0))
    assert found.verdict == "fail"
    assert {module.code for module in found.modules.values()} == {code}
    assert all(says in module.message for module in found.modules.values())


@needs("diffusers")
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_a_fuse_by_diffusers_is_replayed_and_its_scale_of_a_dora_named(
    tmp_path: Path, dora: bool, scale: float, safe: bool
) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=4, attention_head_dim=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_v"], use_dora=dora, init_lora_weights=False)
    model.add_adapter(config)
    said = {f"unet.{k}": v for k, v in config.to_dict().items() if isinstance(v, str | int | float | dict)}
    tensors = {f"unet.{key}": value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter/pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(said)})
    model.fuse_lora(lora_scale=scale, safe_fusing=safe)
    fused = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()
             if "lora_" not in name}  # fmt: skip
    found = audited(tmp_path, fused, scale)
    if dora and scale != 1:
        assert (found.verdict, {m.code for m in found.modules.values()}) == ("fail", {"STRENGTH_OF_A_PART"})
        assert all("before the norm" in module.message for module in found.modules.values())
    else:
        assert found.verdict == "pass"
        assert scale != 1 or found.recipe == "peft"
