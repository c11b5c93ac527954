"""Recipes against the mergers themselves where they install here: every bit, on PEFT's own layers."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS_AND_AXES, make
from models import llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import d2surgery
from d2surgery.adapters import KINDS, Adapter, DoRA, DualLoRA, LoRA
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import OURS, RECIPES, Recipe, bank
from d2surgery.files.tensors import rounded
from d2surgery.measures.fidelity import bits

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
LOW = (torch.bfloat16, torch.float16)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.up = nn.Linear(96, 160, bias=False)
        self.words = nn.Embedding(80, 48)
        for module in (self.up, self.words):
            module.weight.data = (0.02 * torch.randn(module.weight.shape, generator=generator)).to(dtype)


def peft_model(dtype: torch.dtype, *, dora: bool = False, **options: Any) -> tuple[Any, dict[str, Adapter], Model]:
    """A model with random adapters by PEFT, the same adapters as ours, and the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=6, lora_alpha=10, target_modules=["up", "words"], use_dora=dora)
        model = get_peft_model(Model(dtype), config, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        elif parameter.requires_grad:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    parts = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model, {module: _ours(parts, module, dora) for module in ("up", "words")}, Model(dtype)


def _ours(parts: dict[str, Tensor], module: str, dora: bool) -> Adapter:
    """PEFT's embedding keeps A (r, vocabulary) and B (dim, r) and adds (B·A)ᵀ."""
    kind, end = ("lora_embedding_", "") if module == "words" else ("lora_", ".weight")
    A, B = (parts[f"base_model.model.{module}.{kind}{side}.default{end}"] for side in "AB")
    if not dora:
        return LoRA(A=A, B=B, scaling=10 / 6)
    magnitude = parts[f"base_model.model.{module}.lora_magnitude_vector.default.weight"]
    return DoRA(A=A, B=B, scaling=10 / 6, magnitude=magnitude)


def stored(weight: Tensor, module: str) -> Tensor:
    """As (out_features, in_features)."""
    return weight.T if module == "words" else weight


def assert_same_bits(recipe: str, base: Tensor, adapter: Adapter, merged: Tensor) -> None:
    made = BY_NAME[recipe].merge(Operands(base, adapter, merged.dtype))
    assert made.dtype == merged.dtype
    assert torch.equal(bits(made.contiguous()), bits(merged.contiguous())), recipe


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_merges_a_linear_layer_as_its_recipe_does(dtype: torch.dtype, dora: bool) -> None:
    model, ours, base = peft_model(dtype, dora=dora)
    merged = model.merge_and_unload()
    assert_same_bits("peft", base.up.weight.data, ours["up"], merged.up.weight.data)


@pytest.mark.parametrize("dtype", LOW)
def test_peft_merges_safely_and_embeddings_by_the_safe_recipe(dtype: torch.dtype) -> None:
    model, ours, base = peft_model(dtype)
    merged = model.merge_and_unload(safe_merge=True)
    for module in ("up", "words"):
        before, after = (stored(getattr(m, module).weight.data, module) for m in (base, merged))
        assert_same_bits("peft-safe", before, ours[module], after)
    once = BY_NAME["peft"].merge(Operands(base.up.weight.data, ours["up"], dtype))
    assert not torch.equal(once, merged.up.weight.data), "the two recipes must differ here"


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_peft_merges_a_dora_embedding_over_the_whole_vocabulary(dtype: torch.dtype) -> None:
    model, ours, base = peft_model(dtype, dora=True)
    merged = model.merge_and_unload()
    assert_same_bits("peft", base.words.weight.data.T, ours["words"], merged.words.weight.data.T)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_without_autocast_works_in_the_low_dtype(dtype: torch.dtype, dora: bool) -> None:
    model, ours, base = peft_model(dtype, dora=dora, autocast_adapter_dtype=False)
    merged = model.merge_and_unload()
    assert ours["up"].slots()["A"].dtype == dtype
    assert_same_bits("peft-low", base.up.weight.data, ours["up"], merged.up.weight.data)


@pytest.mark.parametrize("dtype", LOW)
def test_peft_merged_unmerged_and_merged_again(dtype: torch.dtype) -> None:
    model, ours, base = peft_model(dtype)
    layer = model.base_model.model.up
    layer.merge()
    layer.unmerge()
    layer.merge()
    assert_same_bits("peft-again", base.up.weight.data, ours["up"], layer.base_layer.weight.data)


@pytest.mark.parametrize("load", LOW)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_on_a_base_cast_when_it_was_loaded(load: torch.dtype, dora: bool) -> None:
    model, ours, base = peft_model(load, dora=dora)
    wide = Model(torch.float32)
    merged = model.merge_and_unload()
    assert torch.equal(wide.up.weight.data.to(load), base.up.weight.data)
    assert_same_bits("peft-loaded", wide.up.weight.data, ours["up"], merged.up.weight.data)


@pytest.mark.parametrize(("kind", "axis"), KINDS_AND_AXES)
@settings(max_examples=12)
@given(seed=st.integers(0, 50), dtype=st.sampled_from([torch.float32, *LOW]))
def test_every_recipe_is_a_right_merge_within_rounding(kind: str, axis: Any, seed: int, dtype: torch.dtype) -> None:
    base = (0.02 * torch.randn(24, 32, generator=torch.Generator().manual_seed(seed))).bfloat16()
    adapter = make(kind, base.float(), axis, seed=seed).to(dtype=torch.float32)
    right = base.double() + adapter.delta(base.double())
    delta = float((right - base.double()).norm())
    for recipe in bank(adapter.kind, axis, base.dtype, dtype):
        made = recipe.merge(Operands(base, adapter, dtype))
        load, low, roundings = coarsenesses(recipe, base.dtype, dtype)
        once = sum(float((rounded(right, coarse).double() - right).norm()) for coarse in {load, dtype})
        size = 3 * float(right.norm()) if kind == "dora" else 3 * delta  # magnitudes too
        turned = _turned(adapter, right - base.double(), torch.finfo(low).eps) if isinstance(adapter, DualLoRA) else 0.0
        tiny = roundings * 2**-24 * right.numel() ** 0.5 * max(float(right.abs().max()), 1)  # float16's subnormals
        limit = (1 + roundings) * once + torch.finfo(low).eps * size + 1e-6 * delta + 2**-23 * float(right.norm())
        assert made.dtype == dtype, recipe.name
        assert float((made.double() - right).norm()) <= limit + tiny + turned, recipe.name


def _turned(adapter: DualLoRA, delta: Tensor, eps: float) -> float:
    """How much it costs where rounded factors may turn the sign of z = D·C: twice the delta there."""
    C, D = adapter.C.double(), adapter.D.double()
    return 2 * float(delta[(D @ C).abs() <= 1.5 * eps * (D.abs() @ C.abs())].norm())


def coarsenesses(recipe: Recipe, stored: torch.dtype, file: torch.dtype) -> tuple[torch.dtype, torch.dtype, int]:
    """What the base is held in; the coarsest of what adapter and delta are; how often a sum is rounded beside."""
    load = recipe.load(stored, file)
    if recipe.mode is None:
        return load, max(load, file, key=lambda dtype: torch.finfo(dtype).eps), 1
    mode = recipe.mode.resolved(stored, file)
    used = [dtype for dtype in (load, mode.factors, getattr(mode, "autocast", None)) if isinstance(dtype, torch.dtype)]
    low = max(used, key=lambda dtype: torch.finfo(dtype).eps)
    return load, low, getattr(mode, "safe", 0) + 3 * len(getattr(mode, "unmerged", ()))


def test_recipes_have_names_of_their_own_and_ours_is_first() -> None:
    assert RECIPES[0].name == OURS
    assert len(BY_NAME) == len(RECIPES)
    assert all(RECIPES[0].fits(kind) for kind in (*KINDS, "a kind to come"))
    assert {kind for recipe in RECIPES for kind in recipe.kinds} <= set(KINDS)
    assert all(recipe.fits(kind) == (kind in recipe.kinds) for recipe in RECIPES if recipe.kinds for kind in KINDS)


def test_a_dora_that_mlx_fused_onto_a_bfloat16_base_is_replayed(tmp_path: Path) -> None:
    """The magnitude stays in float32, and so does what is fused; the norm is mlx's: of squares in bfloat16."""
    torch.manual_seed(0)
    llama().bfloat16().save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    W = stored[f"{module}.weight"]
    A, B = torch.randn(2, W.shape[1]), 0.1 * torch.randn(W.shape[0], 2)
    dora = d2surgery.DoRA(A=A, B=B, magnitude=1.1 * W.float().norm(dim=1), scaling=2.0)
    d2surgery.save(d2surgery.from_adapters({module: dora}), tmp_path / "adapter", format="mlx")
    both = W + ((2.0 * B) @ A).to(W.dtype)
    norm = both.square().float().sum(1).to(W.dtype).sqrt()
    (tmp_path / "fused").mkdir()
    fused = stored | {f"{module}.weight": (dora.magnitude / norm)[:, None] * both}
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    found = d2surgery.audit(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", files=False)
    assert (found.verdict, found.modules[module].recipe) == ("pass", "mlx-dora")


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_on_a_cpu_rounds_each_product_before_it_is_added(dora: bool) -> None:
    """By the formula in NumPy, which fuses nothing; torch's product has other bits where the processor fuses both."""
    torch.manual_seed(0)
    W, A, B = torch.randn(64, 96), torch.randn(8, 96), torch.randn(64, 8)
    slots: dict[str, Any] = {"A": A, "B": B, "scaling": 3.0}
    adapter = DoRA(magnitude=W.norm(dim=1), **slots) if dora else LoRA(**slots)
    total = np.zeros((64, 96), np.float32)
    for k in range(8):
        total = total + (np.float32(3) * B.numpy()[:, k : k + 1]) * A.numpy()[k]
    both = W + torch.from_numpy(total)
    norm = both.square().sum(1).sqrt()
    name, other = ("mlx-cpu-dora", "mlx-dora") if dora else ("mlx-cpu", "mlx")
    wanted = (W.norm(dim=1) / norm)[:, None] * both if dora else both
    operands = Operands(W, adapter, torch.float32)
    assert torch.equal(BY_NAME[name].merge(operands), wanted)
    fuses = not torch.equal((3 * B) @ A, torch.from_numpy(total))
    assert not fuses or not torch.equal(BY_NAME[other].merge(operands), wanted)
