"""litgpt, AdapterHub, loralib, NVlabs' DoRA, fsdp_qlora, Megatron, Tinker: what only they have. That a file of each
holds the toy's weights is in `test_one_adapter`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file
from toy_llama import HEADS, KV_HEADS, RANK, Toy, numbers, save, toy

import d2surgery
from d2surgery.checkpoint import Checkpoint, load
from d2surgery.errors import D2SurgeryError
from d2surgery.files.base import BaseWeights

LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{which}_proj" for which in "qkv")


def opened(adapter: Path, base: Path, alpha: float | None = None) -> Checkpoint:
    return load(adapter, base=BaseWeights(base), alpha=alpha)


def codes(checkpoint: Checkpoint) -> set[str]:
    return {problem.code for problem in checkpoint.layout.problems}


def shared(dora: bool = False) -> Toy:
    """q, k and v with one A, as a fused module has them; gate and up too."""
    A, B, W, m = {}, {}, {}, {}
    for at, name in enumerate(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ):
        (out, inside), module = toy_llama.SHAPES[name], f"{LAYER}.{name}"
        A[module], B[module] = numbers(RANK, inside, seed=at // 3), numbers(out, RANK, seed=10 + at)
        W[module] = numbers(out, inside, seed=20 + at, size=0.2)
        if dora:
            m[module] = (np.linalg.norm(W[module], axis=1) * (1 + numbers(out, seed=30 + at))).astype(np.float32)
    return Toy(A, B, W, m)


def assert_effective(checkpoint: Checkpoint, of: Toy) -> None:
    assert (set(checkpoint), codes(checkpoint)) == (set(of.A), set())
    for module in of.A:
        W = torch.from_numpy(of.W[module]).double()
        found = (W + checkpoint[module].delta(W)).numpy()
        np.testing.assert_allclose(found, of.effective(module), rtol=2e-6, atol=2e-7)


def assert_conserved(checkpoint: Checkpoint) -> None:
    layout = checkpoint.layout
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(layout.header.tensors)


# litgpt ----------------------------------------------------------------------------------------------------------


def test_trap_36_what_is_not_trained_of_qkv_is_not_there(tmp_path: Path) -> None:
    adapter = toy()
    base = toy_llama.save_base(adapter, tmp_path / "base")
    checkpoint = opened(toy_llama.litgpt(adapter, tmp_path / "lit"), base)
    assert (V in checkpoint, checkpoint.layout.format) == (False, "litgpt")
    assert_effective(checkpoint, adapter)
    assert_conserved(checkpoint)


def test_litgpt_says_what_it_needs_and_takes_it(tmp_path: Path) -> None:
    adapter = toy()
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.litgpt(adapter, tmp_path / "lit")
    (problem,) = d2surgery.open_layout(file).problems
    assert problem.code == "HEADS_UNKNOWN"
    (file / "model_config.yaml").write_text("n_head: 4\nn_query_groups: 2\nhead_size: 8\n")
    assert d2surgery.open_layout(file).problems == ()
    (file / "model_config.yaml").unlink()
    (file / "hyperparameters.yaml").unlink()
    assert codes(opened(file, base)) == {"SCALING_UNKNOWN", "HEADS_UNKNOWN"}  # q and k, or q and v
    said = opened(file, base, alpha=adapter.scaling * RANK).layout
    assert [problem.code for problem in said.problems] == ["HEADS_UNKNOWN"]
    toy_llama.litgpt(adapter, file)
    text = (file / "hyperparameters.yaml").read_text().replace("lora_alpha", "other")
    (file / "hyperparameters.yaml").write_text(text)
    assert_effective(opened(file, base, alpha=adapter.scaling * RANK), adapter)


@pytest.mark.parametrize("key", ["transformer.h.0.attn.attn", "transformer.h.0.mlp.experts.0.fc_1", "transformer.wte"])
def test_litgpts_other_modules_are_refused_by_name(tmp_path: Path, key: str) -> None:
    directory = toy_llama.litgpt(toy(), tmp_path / "lit")
    tensors = torch.load(directory / "lit_model.pth.lora")["model"]
    more = {f"{key}.lora_A": torch.ones(4, 32), f"{key}.lora_B": torch.ones(16, 4)}
    torch.save({"model": tensors | more}, directory / "lit_model.pth.lora")
    checkpoint = load(directory)
    assert "UNSUPPORTED_VARIANT" in codes(checkpoint)
    assert set(checkpoint.layout.unread) == set(more)
    assert_conserved(checkpoint)


def test_rows_of_other_models_are_not_taken_apart(tmp_path: Path) -> None:
    adapter = toy()
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.litgpt(adapter, tmp_path / "lit")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    checkpoint = opened(file, base)
    assert codes(checkpoint) == {"HEADS_UNKNOWN"}
    with pytest.raises(D2SurgeryError, match="HEADS_UNKNOWN"):
        d2surgery.merge(base, file, tmp_path / "out")


# AdapterHub, loralib ---------------------------------------------------------------------------------------------


def gpt2(directory: Path) -> tuple[Path, torch.Tensor]:
    """A base with one fused c_attn, stored (in, out)."""
    W = torch.from_numpy(numbers(32, 96, seed=1))
    save({"transformer.h.0.attn.c_attn.weight": W, "transformer.h.0.attn.c_attn.bias": np.zeros(96, np.float32)},
         directory / "model.safetensors", {"format": "pt"})  # fmt: skip
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_head": 4}))
    return directory, W


def blockwise(A: torch.Tensor, B: torch.Tensor, enabled: tuple[bool, ...]) -> torch.Tensor:
    """loralib's own: a grouped convolution, padded with zeros where nothing is trained."""
    found = torch.nn.functional.conv1d(A[None], B[..., None], groups=sum(enabled))[0]
    whole = torch.zeros(3, 32, 32)
    whole[torch.tensor(enabled)] = found.reshape(-1, 32, 32)
    return whole.reshape(96, 32)


@pytest.mark.parametrize("matrices", [["q", "v"], ["v"], ["q", "k", "v"], ["k", "q"]])
def test_adapterhubs_fused_c_attn_is_one_product_of_the_ranks_sum(tmp_path: Path, matrices: list[str]) -> None:
    base, W = gpt2(tmp_path / "base")
    n = len(matrices)
    A, B = torch.from_numpy(numbers(4 * n, 32, seed=2)), torch.from_numpy(numbers(32 * n, 4, seed=3))
    save({"h.0.attn.c_attn.loras.x.lora_A": A, "h.0.attn.c_attn.loras.x.lora_B": B},
         tmp_path / "a" / "adapter.safetensors")  # fmt: skip
    config = {"config": {"architecture": "lora", "r": 4, "alpha": 8, "attn_matrices": matrices}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    d2surgery.merge(base, tmp_path / "a", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    wanted = W + 2 * blockwise(A, B, tuple(which in matrices for which in "qkv")).T
    torch.testing.assert_close(merged, wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("changes", "more", "code"),
    [
        ({"composition_mode": "scale"}, {}, "UNSUPPORTED_VARIANT"),
        ({}, {"gate.weight": (1, 32)}, "UNSUPPORTED_VARIANT"),
        ({}, {"vera_D": (4, 4)}, "UNSUPPORTED_VARIANT"),
        ({"r": 5}, {}, "RANK_DISAGREES"),
        ({"r": None}, {}, "SCALING_UNKNOWN"),
        ({"use_dora": True}, {}, "MISSING_HALF"),
        ({"use_dora": True, "alpha": 8}, {"m.weight": (32, 1)}, "UNSUPPORTED_VARIANT"),
        ({}, {"surprise": (3,)}, "UNKNOWN_TENSOR"),
    ],
)
def test_what_is_no_lora_of_adapterhubs_is_refused(
    tmp_path: Path, changes: Mapping[str, Any], more: Mapping[str, tuple[int, ...]], code: str
) -> None:
    adapter = toy_llama.adapterhub(toy(), tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({"config": config["config"] | changes}))
    file, name = adapter / "adapter.safetensors", "layers.0.self_attn.q_proj.loras.toy"
    save(load_file(file) | {f"{name}.{leaf}": torch.ones(shape) for leaf, shape in more.items()}, file)
    assert code in codes(load(adapter))
    assert_conserved(load(adapter))


def loralib(directory: Path, parts: int) -> tuple[Path, torch.Tensor, torch.Tensor]:
    A, B = torch.from_numpy(numbers(4 * parts, 32, seed=2)), torch.from_numpy(numbers(32 * parts, 4, seed=3))
    directory.mkdir(exist_ok=True)
    name = "transformer.h.0.attn.c_attn"
    torch.save({f"{name}.lora_A": A, f"{name}.lora_B": B}, directory / "x.pt")
    return directory / "x.pt", A, B


def test_loralibs_products_of_all_parts_are_one(tmp_path: Path) -> None:
    base, W = gpt2(tmp_path / "base")
    file, A, B = loralib(tmp_path, 3)
    d2surgery.merge(base, file, tmp_path / "out", alpha=8)
    merged = load_file(tmp_path / "out" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    wanted = W + 2 * blockwise(A, B, (True, True, True)).T
    torch.testing.assert_close(merged, wanted, atol=2e-6, rtol=2e-6)


def test_loralibs_parts_that_nobody_names_are_refused(tmp_path: Path) -> None:
    base, _ = gpt2(tmp_path / "base")
    file, _, _ = loralib(tmp_path, 2)
    assert codes(load(file)) == {"BASE_NEEDED", "SCALING_UNKNOWN"}
    assert codes(opened(file, base, alpha=8)) == {"MERGED_LINEAR"}
    with pytest.raises(D2SurgeryError, match="MERGED_LINEAR"):
        d2surgery.merge(base, file, tmp_path / "out", alpha=8)


def test_one_product_that_lies_transposed_is_not_taken_for_two(tmp_path: Path) -> None:
    torch.save({"h.0.q.lora_A": torch.ones(96, 8), "h.0.q.lora_B": torch.ones(8, 48)}, tmp_path / "x.pt")
    (entry,) = load(tmp_path / "x.pt").layout.adapters.values()
    assert (entry.rank, entry.in_features, entry.out_features) == (8, 96, 48)


def test_trap_37_factors_of_a_convolution_of_loralibs_are_never_read_as_kohyas(tmp_path: Path) -> None:
    save({"conv.weight": torch.ones(8, 6, 3, 3)}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text("{}")
    torch.save({"conv.lora_A": torch.ones(2 * 3, 6 * 3), "conv.lora_B": torch.ones(8 * 3, 2 * 3)}, tmp_path / "x.pt")
    with pytest.raises(D2SurgeryError, match="SHAPE_MISMATCH"):
        d2surgery.merge(tmp_path / "base", tmp_path / "x.pt", tmp_path / "out", alpha=2)


# NVlabs, fsdp_qlora ----------------------------------------------------------------------------------------------


def test_trap_43_a_magnitude_without_factors_rescales_the_base(tmp_path: Path) -> None:
    adapter = toy(dora=True)
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.nvlabs(adapter, tmp_path / "a")
    weights = file / "adapter_model.safetensors"
    lone = {key: tensor for key, tensor in load_file(weights).items() if "q_proj.lora" not in key}
    save(lone, weights)
    assert codes(load(file)) == {"BASE_NEEDED"}
    checkpoint = opened(file, base)
    assert_conserved(checkpoint)
    assert_effective(checkpoint, Toy(adapter.A, {**adapter.B, Q: 0 * adapter.B[Q]}, adapter.W, adapter.m))
    d2surgery.merge(base, file, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{Q}.weight"].double().norm(dim=1)
    np.testing.assert_allclose(merged.numpy(), adapter.m[Q], rtol=2e-6)
    assert d2surgery.audit(base, file, tmp_path / "out").verdict == "pass"


@pytest.mark.parametrize("spelling", ["weight_m_wdecomp.default.weight", "weight_m_wdecomp.weight"])
def test_trap_42_an_adapters_name_in_a_magnitudes_key_means_nothing(tmp_path: Path, spelling: str) -> None:
    adapter = toy(dora=True)
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.nvlabs(adapter, tmp_path / "a")
    weights = file / "adapter_model.safetensors"
    save({key.replace("weight_m_wdecomp.weight", spelling): t for key, t in load_file(weights).items()}, weights)
    assert_effective(opened(file, base), adapter)


def test_trap_44_fsdp_qloras_dora_has_no_alpha_and_its_lora_asks_for_one(tmp_path: Path) -> None:
    adapter = toy()
    base = toy_llama.save_base(adapter, tmp_path / "base")
    tensors = {f"{module}.lora_AB.{at}.weight": factor for module in adapter.A
               for at, factor in enumerate((adapter.A[module], adapter.B[module]))}  # fmt: skip
    file = save(tensors, tmp_path / "a" / "model_state_dict.safetensors")
    assert codes(opened(file, base)) == {"SCALING_UNKNOWN"}
    assert_effective(opened(file, base, alpha=adapter.scaling * RANK), adapter)
    dora = toy(dora=True)
    layout = load(toy_llama.fsdp_qlora(dora, tmp_path / "b")).layout
    assert {entry.scaling for entry in layout.adapters.values()} == {1.0}


# Megatron --------------------------------------------------------------------------------------------------------


def grouped(parts: list[toy_llama.Array]) -> toy_llama.Array:
    """Megatron's rows: for each key-value head its queries, its key, its value, one after another."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (part.reshape(n, 8, *part.shape[1:]) for part, n in zip(parts, heads, strict=True))
    each = HEADS // KV_HEADS
    rows = [row for g in range(KV_HEADS) for row in (*q[g * each : (g + 1) * each], k[g], v[g])]
    return np.concatenate(rows)


def fused_file(t: Toy, path: Path) -> Path:
    modules = list(t.A)
    qkv, mlp = "decoder.layers.0.self_attention.linear_qkv.adapter", "decoder.layers.0.mlp.linear_fc1.adapter"
    tensors: dict[str, Any] = {
        f"{qkv}.linear_in.weight": t.A[Q], f"{qkv}.linear_out.weight": grouped([t.B[m] for m in modules[:3]]),
        f"{mlp}.linear_in.weight": t.A[modules[3]],
        f"{mlp}.linear_out.weight": np.concatenate([t.B[m] for m in modules[3:]]),
    }  # fmt: skip
    if t.m:
        tensors[f"{qkv}.weight_magnitude"] = grouped([t.m[m] for m in modules[:3]])
        tensors[f"{mlp}.weight_magnitude"] = np.concatenate([t.m[m] for m in modules[3:]])
    return save(tensors, path)


@pytest.mark.parametrize("dora", [False, True])
def test_trap_39_megatrons_groups_are_undone_in_factors_and_magnitudes(tmp_path: Path, dora: bool) -> None:
    adapter = shared(dora)
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), fused_file(adapter, tmp_path / "a" / "x.safetensors")
    alpha = adapter.scaling * RANK
    assert codes(load(file)) == {"SCALING_UNKNOWN", "HEADS_UNKNOWN"}
    checkpoint = opened(file, base, alpha=alpha)
    assert_effective(checkpoint, adapter)
    assert_conserved(checkpoint)
    d2surgery.merge(base, file, tmp_path / "out", alpha=alpha)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in adapter.A:
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), adapter.effective(module), rtol=2e-6, atol=2e-7)
    assert d2surgery.audit(base, file, tmp_path / "out", alpha=alpha).verdict == "pass"
    if not dora:
        d2surgery.save(checkpoint, tmp_path / "peft")
        assert set(d2surgery.checkpoint.differences(checkpoint, load(tmp_path / "peft")).values()) == {0.0}


@pytest.mark.parametrize("dora", [False, True])
def test_megatrons_canonical_adapters_have_factors_of_their_own(tmp_path: Path, dora: bool) -> None:
    adapter = toy(dora)
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), toy_llama.megatron(adapter, tmp_path / "a")
    assert_effective(opened(file, base, alpha=adapter.scaling * RANK), adapter)


@pytest.mark.parametrize(
    "name",
    ["decoder.layers.0.mlp.experts.linear_fc1.adapter", "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_x"],
)
def test_megatrons_other_modules_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, name = toy_llama.megatron(toy(), tmp_path / "a"), f"decoder.layers.0.{name}"
    more = {f"{name}.linear_in.weight": torch.ones(4, 32), f"{name}.linear_out.weight": torch.ones(16, 4)}
    save(load_file(file) | more, file)
    assert "UNSUPPORTED_VARIANT" in codes(load(file))
    assert set(load(file).layout.unread) == set(more)


def test_a_fused_module_and_one_of_its_parts_are_two_adapters(tmp_path: Path) -> None:
    adapter = shared()
    base, file = toy_llama.save_base(adapter, tmp_path / "base"), fused_file(adapter, tmp_path / "a" / "x.safetensors")
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q"
    more = {f"{name}.linear_in.weight": torch.ones(4, 32), f"{name}.linear_out.weight": torch.ones(32, 4)}
    save(load_file(file) | more, file)
    assert "TWO_ADAPTERS" in codes(opened(file, base, alpha=2))


# Tinker ----------------------------------------------------------------------------------------------------------

E, FF, WIDTH = 3, 12, 16
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": "all-linear"}


def tinker(directory: Path, block: str = "model.layers.0.mlp") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Experts whose outer factor is shared, and the head; by w1, w2, w3."""
    shapes = {"w1": ((1, RANK, WIDTH), (E, FF, RANK)), "w3": ((1, RANK, WIDTH), (E, FF, RANK)),
              "w2": ((E, RANK, FF), (1, WIDTH, RANK))}  # fmt: skip
    made = {name: (torch.from_numpy(numbers(*a, seed=at)), torch.from_numpy(numbers(*b, seed=9 + at)))
            for at, (name, (a, b)) in enumerate(shapes.items())}  # fmt: skip
    tensors = {f"base_model.model.{block}.experts.{name}.lora_{which}.weight": factor
               for name, pair in made.items() for which, factor in zip("AB", pair, strict=True)}  # fmt: skip
    tensors |= {"base_model.model.model.unembed_tokens.lora_A.weight": torch.ones(RANK, WIDTH),
                "base_model.model.model.unembed_tokens.lora_B.weight": torch.ones(20, RANK)}  # fmt: skip
    save(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG))
    return made


def test_trap_40_a_factor_that_experts_share_is_expanded_and_not_divided(tmp_path: Path) -> None:
    made = tinker(tmp_path)
    checkpoint = load(tmp_path)
    assert (checkpoint.layout.format, codes(checkpoint)) == ("tinker", set())
    assert_conserved(checkpoint)
    both, down = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert set(checkpoint) == {both, down, "lm_head"}
    for expert in range(E):
        deltas = {name: 2 * B.expand(E, -1, -1)[expert] @ A.expand(E, -1, -1)[expert] for name, (A, B) in made.items()}
        for module, wanted in ((both, torch.cat([deltas["w1"], deltas["w3"]])), (down, deltas["w2"])):
            found = checkpoint.adapter(module, expert).delta(torch.zeros(wanted.shape))
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


def test_trap_41_gpt_osss_gate_and_up_take_turns(tmp_path: Path) -> None:
    made = tinker(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "openai/gpt-oss-20b"})
    )
    checkpoint = load(tmp_path)
    for expert in range(E):
        zeros = torch.zeros(2 * FF, WIDTH)
        found = checkpoint.adapter("model.layers.0.mlp.experts.gate_up_proj", expert).delta(zeros)
        for start, name in ((0, "w1"), (1, "w3")):
            A, B = made[name]
            torch.testing.assert_close(found[start::2], 2 * B[expert] @ A[0], atol=2e-6, rtol=2e-6)


def test_tinkers_attention_of_gpt_oss_and_its_head_have_transformers_names(tmp_path: Path) -> None:
    names = ("model.layers.3.attn.q_proj", "model.unembed_tokens")
    tensors = {f"base_model.model.{n}.lora_{w}.weight": torch.ones(*s) for n in names
               for w, s in (("A", (RANK, 8)), ("B", (8, RANK)))}  # fmt: skip
    save(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert set(load(tmp_path)) == {"model.layers.3.self_attn.q_proj", "lm_head"}


@pytest.mark.parametrize("key", ["w1.lora_A", "w2.lora_B"])
def test_tinkers_experts_that_do_not_fit_are_refused(tmp_path: Path, key: str) -> None:
    tinker(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.model.layers.0.mlp.experts.{key}.weight"
    save(tensors | {name: torch.ones(2, *tensors[name].shape[1:])}, file)
    assert "RANK_MISMATCH" in codes(load(tmp_path))
    assert_conserved(load(tmp_path))
