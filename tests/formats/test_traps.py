"""The traps of the formats read here, by their numbers in the project's notes on formats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_llama
from safetensors.torch import load_file
from toy_llama import numbers, save, save_base, toy

import d2surgery
from d2surgery.checkpoint import Checkpoint, differences
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import TensorInfo
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import Layout

KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"
PROJ_IN = "unet.down_blocks.0.attentions.0.proj_in"
DOWN, UP = "lora_down.weight", "lora_up.weight"


def pair(name: str = KOHYA, *, rank: int = 4, inside: int = 32, out: int = 32, **beside: Any) -> dict[str, Any]:
    found = {f"{name}.{DOWN}": numbers(rank, inside, seed=1), f"{name}.{UP}": numbers(out, rank, seed=2)}
    return found | {f"{name}.{leaf.replace('__', '.')}": value for leaf, value in beside.items()}


def read(tmp_path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Layout:
    return open_layout(save(tensors, tmp_path / "x.safetensors", metadata))


def of(*names: str) -> dict[str, TensorInfo]:
    """A base's tensors by their names."""
    return {name: TensorInfo(Path(), "F32", (32, 32), 0, 0) for name in names}


def codes(layout: Layout, *severities: str) -> list[str]:
    return [problem.code for problem in layout.problems if problem.severity in (severities or ("error",))]


def scaling(layout: Layout, module: str = PROJ_IN) -> float | None:
    return layout.adapters[module].scaling


# The magnitude ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "inside", "shape", "along"),
    [(32, 32, (32, 1), "out_features"), (32, 32, (1, 32), "in_features"), (1, 32, (1, 32), "in_features")],
)
def test_trap_2_the_size_that_is_1_tells_the_axis_and_not_the_weights(
    tmp_path: Path, out: int, inside: int, shape: tuple[int, ...], along: str
) -> None:
    layout = read(tmp_path, pair(out=out, inside=inside, dora_scale=numbers(*shape, seed=3)))
    assert codes(layout) == []
    assert layout.adapters[PROJ_IN].settings["along"] == along


@pytest.mark.parametrize("shape", [(32,), (1, 1), (32, 32)])
def test_trap_2_what_does_not_tell_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    layout = read(tmp_path, pair(dora_scale=numbers(*shape, seed=3)))
    assert codes(layout) == ["SHAPE_UNEXPECTED"]
    assert not layout.adapters


def test_trap_3_the_name_tells_what_a_convolutions_magnitude_of_one_shape_means(tmp_path: Path) -> None:
    """(1, 8, 1, 1) is a number per output in PEFT and diffusers, per input channel in LyCORIS."""
    A, B, m = numbers(2, 8, 3, 3, seed=1), numbers(8, 2, 1, 1, seed=2), numbers(1, 8, 1, 1, seed=3)
    theirs = read(tmp_path, {"unet.c.lora_A.weight": A, "unet.c.lora_B.weight": B, "unet.c.lora_magnitude_vector": m})
    assert theirs.adapters["unet.c"].settings["along"] == "out_features"
    name = "lora_unet_conv_in"
    lycoris = read(tmp_path, {f"{name}.{DOWN}": A, f"{name}.{UP}": B, f"{name}.dora_scale": m})
    assert codes(lycoris) == ["UNSUPPORTED_VARIANT"]
    assert "per input channel" in lycoris.problems[0].message


def test_trap_4_the_magnitude_of_an_embedding_is_per_token_in_mlx_and_per_dimension_in_peft(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.lora_a": numbers(20, 4, seed=1), "model.embed_tokens.lora_b": numbers(4, 8, seed=2)}
    for size, found in ((20, []), (8, ["SHAPE_UNEXPECTED"])):
        save(tensors | {"model.embed_tokens.m": numbers(size, seed=3)}, tmp_path / str(size) / "adapters.safetensors")
        config = {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 1.0}}
        (tmp_path / str(size) / "adapter_config.json").write_text(json.dumps(config))
        assert codes(open_layout(tmp_path / str(size))) == found
    checkpoint = d2surgery.load(tmp_path / "20")
    with pytest.raises(d2surgery.D2SurgeryError, match="magnitude per input feature exists for linear modules only"):
        d2surgery.save(checkpoint, tmp_path / "peft")


def test_trap_6_a_magnitude_in_16_bits_warns_of_the_eps_that_readers_add(tmp_path: Path) -> None:
    m = torch.from_numpy(numbers(32, 1, seed=3))
    assert codes(read(tmp_path, pair(dora_scale=m)), "warning") == []
    assert codes(read(tmp_path, pair(dora_scale=m.bfloat16())), "warning") == ["MAGNITUDE_EPSILON"]


def test_trap_7_alpha_stands_inside_the_norm(tmp_path: Path) -> None:
    """Another scaling turns the rows and leaves their norms, which are the magnitude."""
    adapter = toy(dora=True)
    q = "model.layers.0.self_attn.q_proj"
    W = torch.from_numpy(adapter.W[q]).double()
    made = []
    for at, scale in enumerate((0.5, 2.0)):
        checkpoint = d2surgery.load(toy_llama.mlx(adapter, tmp_path / str(at), scale=scale))
        made.append(W + checkpoint[q].delta(W))
        np.testing.assert_allclose(made[-1].norm(dim=1).numpy(), adapter.m[q], rtol=1e-6)
    assert float((made[0] - made[1]).abs().max()) > 0.01


def test_trap_8_strength_0_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    adapter = toy(dora=True)
    base = save_base(adapter, tmp_path / "base")
    d2surgery.merge(base, toy_llama.kohya(adapter, tmp_path / "a"), tmp_path / "out", strength=0)
    kept, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert all(torch.equal(kept[name], merged[name]) for name in kept)


@pytest.mark.parametrize(
    "leaf", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default", "magnitude"]
)
def test_trap_42_spellings_of_one_magnitude(tmp_path: Path, leaf: str) -> None:
    tensors = {"unet.x.lora_A.weight": numbers(4, 32, seed=1), "unet.x.lora_B.weight": numbers(16, 4, seed=2)}
    layout = read(tmp_path, tensors | {f"unet.x.{leaf}": numbers(16, seed=3)})
    assert (layout.kinds, layout.problems) == (["dora"], ())


# LyCORIS's products ----------------------------------------------------------------------------------------------


def loha(prefix: str = KOHYA, **beside: Any) -> dict[str, Any]:
    found = {f"{prefix}.hada_w{n}_{side}": numbers(*shape, seed=10 * n + at, size=0.5)
             for n in (1, 2) for at, (side, shape) in enumerate((("a", (24, 3)), ("b", (3, 32))))}  # fmt: skip
    return found | {f"{prefix}.{leaf}": value for leaf, value in beside.items()}


def delta_of(layout: Layout, module: str = PROJ_IN) -> Any:
    adapter = Checkpoint(layout).adapter(module)
    return adapter.delta(torch.zeros(adapter.out_features, adapter.in_features, dtype=torch.float64)).numpy()


def test_trap_10_lohas_scale_multiplies_once(tmp_path: Path) -> None:
    tensors = loha(alpha=torch.tensor(1.5))
    w = {leaf: tensors[f"{KOHYA}.hada_{leaf}"].astype(np.float64) for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")}
    wanted = 0.5 * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
    layout = read(tmp_path, tensors)
    assert layout.adapters[PROJ_IN].rank == 9
    np.testing.assert_allclose(delta_of(layout), wanted, rtol=1e-5, atol=1e-7)


def test_trap_11_a_tucker_core_turns_lohas_outer_factors(tmp_path: Path) -> None:
    """With cores that are the identity at one place of the kernel, the same ΔW as without."""
    plain = loha()
    turned = {key: value.T if key.endswith("_a") else value for key, value in plain.items()}
    core = np.zeros((3, 3, 3, 3), np.float32)
    core[..., 1, 1] = np.eye(3)
    layout = read(tmp_path, turned | {f"{KOHYA}.hada_t{n}": core for n in (1, 2)})
    assert layout.adapters[PROJ_IN].kernel == (32, 3, 3)
    found = delta_of(layout).reshape(24, 32, 3, 3)
    np.testing.assert_allclose(found[..., 1, 1], delta_of(read(tmp_path, plain)), rtol=1e-5, atol=1e-7)
    assert np.abs(np.delete(found.reshape(24, 32, 9), 4, axis=2)).max() == 0


def test_trap_12_lokr_of_two_full_matrices_has_scale_1_and_with_rs_lora_an_unknown_one(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {f"{KOHYA}.lokr_w1": numbers(4, 2, seed=1), f"{KOHYA}.lokr_w2": numbers(6, 8, seed=2),
               f"{KOHYA}.alpha": torch.tensor(0.25)}  # fmt: skip
    layout = read(tmp_path, tensors)
    wanted = np.kron(tensors[f"{KOHYA}.lokr_w1"].astype(np.float64), tensors[f"{KOHYA}.lokr_w2"])
    assert (scaling(layout), codes(layout)) == (1.0, [])
    np.testing.assert_allclose(delta_of(layout), wanted, rtol=1e-6)
    args = {"ss_network_args": json.dumps({"algo": "lokr", "rs_lora": "True"})}
    layout = read(tmp_path, tensors, args)
    assert (scaling(layout), codes(layout)) == (None, ["SCALING_UNKNOWN"])


@pytest.mark.parametrize(
    ("leaves", "words"),
    [({"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2), "b2.weight": (2, 32)}, "GLoRA"),
     ({"oft_blocks": (4, 8, 8)}, "OFT"), ({"weight": (32,), "on_input": (1,)}, "IA3"), ({"w_norm": (32,)}, "norm")],
)  # fmt: skip
def test_traps_13_18_and_48_other_algorithms_in_the_file_are_refused_by_name(
    tmp_path: Path, leaves: dict[str, tuple[int, ...]], words: str
) -> None:
    """Their alpha is no scaling; nothing of them is dropped silently."""
    other = {f"lora_unet_conv_in.{leaf}": numbers(*shape, seed=3) for leaf, shape in leaves.items()}
    layout = read(tmp_path, loha() | other | {"lora_unet_conv_in.alpha": torch.tensor(2.0)})
    (problem,) = layout.problems
    assert (problem.code, problem.severity) == ("UNSUPPORTED_VARIANT", "error")
    assert words in problem.message
    assert set(layout.unread) == {*other, "lora_unet_conv_in.alpha"}


# alpha -----------------------------------------------------------------------------------------------------------


def test_traps_14_to_16_an_alpha_that_is_absent_or_0_is_the_modules_own_rank(tmp_path: Path) -> None:
    second, third = "lora_unet_conv_out", "lora_unet_conv_in"
    tensors = pair(alpha=torch.tensor(1.0)) | pair(second, rank=8) | pair(third, rank=2, alpha=torch.tensor(0.0))
    layout = read(tmp_path, tensors)
    assert [scaling(layout, name) for name in (PROJ_IN, "unet.conv_out", "unet.conv_in")] == [0.25, 1.0, 1.0]
    assert codes(layout, "error", "warning") == ["ALPHA_ZERO"]


def test_trap_17_an_alpha_beside_lora_a_and_b_is_applied(tmp_path: Path) -> None:
    tensors = {
        "transformer.x.lora_A.weight": numbers(4, 32, seed=1),
        "transformer.x.lora_B.weight": numbers(8, 4, seed=2),
    }
    layout = read(tmp_path, tensors | {"transformer.x.alpha": torch.tensor(2.0)})
    assert scaling(layout, "transformer.x") == 0.5


@pytest.mark.parametrize("word", ["64", "Dynamic"])
def test_trap_19_the_tensor_says_the_alpha_and_not_the_header(tmp_path: Path, word: str) -> None:
    assert scaling(read(tmp_path, pair(alpha=torch.tensor(2.0)), {"ss_network_alpha": word})) == 0.5


def test_trap_20_the_alpha_of_a_split_qkv_is_told(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    said = {"ss_network_dim": "4", "ss_network_args": json.dumps({"split_qkv": "True"})}
    layout = read(tmp_path, pair(name, rank=12, out=96, alpha=torch.tensor(4.0)), said)
    (problem,) = layout.problems
    assert (problem.code, problem.severity) == ("ALPHA_OF_SPLIT_QKV", "warning")
    assert problem.got == "scaling 0.333333, trained with 1"


def test_trap_49_a_low_precision_alpha_is_read_as_it_is(tmp_path: Path) -> None:
    assert scaling(read(tmp_path, pair(alpha=torch.tensor(0.1, dtype=torch.float16)))) == float(np.float16(0.1)) / 4


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.ones(100)])
def test_an_alpha_that_is_no_number_leaves_its_module_unread(tmp_path: Path, alpha: torch.Tensor) -> None:
    layout = read(tmp_path, pair(alpha=alpha))
    assert len(codes(layout)) == 1
    assert (dict(layout.adapters), len(layout.unread)) == ({}, 3)


def test_trap_27_before_june_2024_mlx_multiplied_scale_by_alpha_over_rank(tmp_path: Path) -> None:
    found = open_layout(toy_llama.mlx(toy(), tmp_path / "x", scale=10.0, alpha=16.0))
    assert {entry.scaling for entry in found.adapters.values()} == {40.0}


def test_trap_33_gguf_has_one_alpha_and_no_rslora_so_the_rest_is_folded(tmp_path: Path) -> None:
    adapter = toy()
    base = BaseWeights(save_base(adapter, tmp_path / "base"))
    first = d2surgery.load(toy_llama.mlx(adapter, tmp_path / "mlx"))
    parts = {m: d2surgery.LoRA(A=a.slots()["A"], B=a.slots()["B"], scaling=16 / 2 ** (1.5 + at))
             for at, (m, a) in enumerate(first.items())}  # fmt: skip
    made = d2surgery.from_adapters(parts)
    made = Checkpoint(with_base(made.layout, base.header.tensors, base.config))
    assert max(d2surgery.save(made, tmp_path / "gguf", format="gguf").values()) < 1e-7


@pytest.mark.parametrize("alpha", [0.0, None])
def test_trap_34_an_alpha_of_0_or_none_is_scale_1_in_gguf(tmp_path: Path, alpha: float | None) -> None:
    path = toy_llama.gguf(toy(), tmp_path / "x", alpha=0.0)
    if alpha is None:
        file = path / "adapter.gguf"
        file.write_bytes(file.read_bytes().replace(b"adapter.lora.alpha", b"adapter.lora.alphx"))
    layout = with_base(open_layout(path), {}, toy_llama.CONFIG)
    assert {entry.scaling for entry in layout.adapters.values()} == {1.0}


def test_an_alora_in_gguf_and_an_unknown_way_of_tuning_in_mlx_are_refused_by_name(tmp_path: Path) -> None:
    path = toy_llama.gguf(toy(), tmp_path / "gguf")
    fields = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}
    fields["adapter.alora.invocation_tokens"] = "1"
    data = toy_llama.gguf_bytes(fields, {"blk.0.attn_q.weight.lora_a": numbers(4, 32, seed=1)})
    (path / "adapter.gguf").write_bytes(data)
    assert codes(open_layout(path)) == ["UNSUPPORTED_VARIANT"]
    path = toy_llama.mlx(toy(), tmp_path / "mlx")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"fine_tune_type": "vera"}))
    assert codes(open_layout(path)) == ["BAD_CONFIG"]


def test_trap_54_a_pickled_file_is_read_as_another_is(tmp_path: Path) -> None:
    adapter = toy()
    stored = load_file(toy_llama.kohya(adapter, tmp_path / "a"))
    torch.save(stored, tmp_path / "x.pt")
    layout = with_base(open_layout(tmp_path / "x.pt"), of(*(f"{module}.weight" for module in adapter.A)), {})
    assert {entry.scaling for entry in layout.adapters.values()} == {0.5}
    assert (set(layout.adapters), layout.problems) == (set(adapter.A), ())


# Names and rows --------------------------------------------------------------------------------------------------


def test_trap_22_two_paths_with_one_flattening_are_an_error(tmp_path: Path) -> None:
    tensors = pair("lora_te_layers_0_q_proj")
    layout = read(tmp_path, tensors)
    for names, found in (
        (["model.layers.0.q_proj.weight"], ["model.layers.0.q_proj"]),
        (["model.layers.0.q_proj.weight", "model.layers_0.q_proj.weight"], []),
        (["model.layers.0.k_proj.weight"], []),
    ):
        named = with_base(layout, of(*names), {})
        assert [module for module in named.adapters if "." in module] == found
        assert codes(named) == ([] if found else ["AMBIGUOUS_NAME"])
    with pytest.raises(d2surgery.D2SurgeryError, match="AMBIGUOUS_NAME"):
        d2surgery.save(d2surgery.load(tmp_path / "x.safetensors"), tmp_path / "peft")


def test_trap_22_a_writer_refuses_two_modules_of_one_flattening(tmp_path: Path) -> None:
    part = {"A": torch.ones(2, 8), "B": torch.ones(4, 2), "scaling": 1.0}
    made = d2surgery.from_adapters({"a.b_c": d2surgery.LoRA(**part), "a_b.c": d2surgery.LoRA(**part)})
    with pytest.raises(d2surgery.D2SurgeryError, match="flattened, two modules are lora_te_a_b_c"):
        d2surgery.save(made, tmp_path / "kohya", format="kohya")


def test_trap_23_sd1_and_sdxl_names_are_looked_up_and_others_stand_as_they_are(tmp_path: Path) -> None:
    names = {
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0":
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_down_blocks_1_resnets_0_time_emb_proj": "unet.down_blocks.1.resnets.0.time_emb_proj",
        "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj":
            "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "lora_unet_input_blocks_4_1_proj_in": "unet.down_blocks.1.attentions.0.proj_in",
        "lora_unet_joint_blocks_4_x_block_attn_qkv": "lora_unet_joint_blocks_4_x_block_attn_qkv",
    }  # fmt: skip
    tensors = {key: value for name in names for key, value in pair(name).items()}
    assert set(read(tmp_path, tensors).adapters) == set(names.values())


def test_trap_24_names_that_hold_the_words_of_leaves(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.alpha_proj.lora_down"
    layout = read(tmp_path, pair(name, alpha=torch.tensor(8.0)))
    assert (list(layout.adapters), scaling(layout, name), layout.problems) == ([name], 2.0, ())


def test_trap_25_the_name_tells_mlxs_order_where_all_sizes_are_one(tmp_path: Path) -> None:
    a, b = numbers(4, 4, seed=1), numbers(4, 4, seed=2)
    save({"model.q.lora_a": a, "model.q.lora_b": b}, tmp_path / "adapters.safetensors")
    adapter = d2surgery.load(tmp_path, scale=1.0)["model.q"]
    np.testing.assert_allclose(adapter.delta(torch.zeros(4, 4)).numpy(), b.T @ a.T, rtol=1e-5)


def test_trap_26_experts_of_mlx_are_not_transposed_and_each_part_has_rows_of_its_own(tmp_path: Path) -> None:
    block, E = "model.layers.0.mlp", 3
    sizes = {"gate_proj": (2, 32, 8), "up_proj": (4, 32, 8), "down_proj": (2, 8, 32)}
    factors = {
        leaf: (numbers(E, r, inside, seed=r), numbers(E, out, r, seed=9)) for leaf, (r, inside, out) in sizes.items()
    }
    tensors = {f"{block}.switch_mlp.{leaf}.{side}": t for leaf, pair_ in factors.items()
               for side, t in zip(("lora_a", "lora_b"), pair_, strict=True)}  # fmt: skip
    save(tensors, tmp_path / "adapters.safetensors")
    checkpoint = d2surgery.load(tmp_path, scale=2.0)
    assert checkpoint.layout.problems == ()
    ranks = {module: (entry.rank, entry.experts) for module, entry in checkpoint.layout.adapters.items()}
    assert ranks == {f"{block}.experts.gate_up_proj": (6, E), f"{block}.experts.down_proj": (2, E)}
    for expert in range(E):
        deltas = {leaf: 2 * b[expert].astype(np.float64) @ a[expert] for leaf, (a, b) in factors.items()}
        wanted = {
            "gate_up_proj": np.concatenate([deltas["gate_proj"], deltas["up_proj"]]),
            "down_proj": deltas["down_proj"],
        }
        for parameter, delta in wanted.items():
            found = checkpoint.adapter(f"{block}.experts.{parameter}", expert).update()
            assert found is not None
            np.testing.assert_allclose(found.dense().numpy(), delta, rtol=1e-6, atol=1e-12)
    d2surgery.save(checkpoint, tmp_path / "peft")
    assert set(differences(checkpoint, d2surgery.load(tmp_path / "peft")).values()) == {0.0}
    with pytest.raises(d2surgery.D2SurgeryError, match="which rows of experts are gate and up"):
        d2surgery.save(checkpoint, tmp_path / "mlx", format="mlx")
    known = Checkpoint(with_base(checkpoint.layout, {}, {"model_type": "qwen3_moe"}))
    assert max(d2surgery.save(known, tmp_path / "mlx", format="mlx").values()) < 1e-12
    tensors[f"{block}.switch_mlp.up_proj.lora_a"] = numbers(E, 3, 32, seed=1)
    assert codes(read(tmp_path / "broken", tensors)) == ["RANK_MISMATCH", "SCALING_UNKNOWN"]


def test_trap_32_a_wrong_order_of_rows_shows_in_no_spectrum_and_not_here(tmp_path: Path) -> None:
    """Without the base, which says how many heads share them, the rows of q and k are not read at all."""
    adapter = toy()
    path = toy_llama.gguf(adapter, tmp_path / "gguf")
    layout = open_layout(path)
    assert codes(layout) == ["HEADS_UNKNOWN", "HEADS_UNKNOWN"]
    assert list(layout.adapters) == ["model.layers.0.mlp.down_proj"]
    wrong = with_base(layout, {}, toy_llama.CONFIG | {"num_attention_heads": 2, "num_key_value_heads": 1})
    right = with_base(layout, {}, toy_llama.CONFIG)
    q = "model.layers.0.self_attn.q_proj"
    one, other = (Checkpoint(each)[q].update() for each in (wrong, right))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.singular_values(), other.singular_values())
    assert differences(Checkpoint(wrong), Checkpoint(right))[q] > 0.5


def test_trap_50_a_linear_module_stored_with_a_kernel_of_one_lands_on_a_matrix(tmp_path: Path) -> None:
    adapter = toy()
    base = save_base(adapter, tmp_path / "base")
    path = toy_llama.kohya(adapter, tmp_path / "a")
    stored = load_file(path)
    save({k: v[..., None, None] if v.dim() == 2 else v for k, v in stored.items()}, path)
    d2surgery.merge(base, path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in adapter.A:
        np.testing.assert_allclose(merged[f"{module}.weight"].numpy(), adapter.effective(module), rtol=2e-6, atol=2e-7)


def test_trap_51_one_tensor_under_two_spellings_is_an_error(tmp_path: Path) -> None:
    A, B = numbers(4, 32, seed=1), numbers(8, 4, seed=2)
    tensors = {"unet.q.lora_A.weight": A, "unet.q.lora.down.weight": A, "unet.q.lora_B.weight": B}
    layout = read(tmp_path, tensors)
    assert codes(layout) == ["TWO_ADAPTERS"]
    assert "unet.q.lora" in layout.problems[0].module


def test_a_bias_that_is_added_as_it_is(tmp_path: Path) -> None:
    diff = {f"{KOHYA}.diff": numbers(8, 6, seed=1), f"{KOHYA}.diff_b": numbers(8, seed=2)}
    layout = read(tmp_path, diff)
    assert (scaling(layout), set(layout.adapters[PROJ_IN].slots), codes(layout)) == (1.0, {"A", "B", "bias"}, [])
    np.testing.assert_array_equal(delta_of(layout), diff[f"{KOHYA}.diff"])
    layout = read(tmp_path, pair(alpha=torch.tensor(2.0), diff_b=numbers(32, seed=3)) | loha("lora_unet_conv_in"))
    assert codes(layout) == ["UNSUPPORTED_VARIANT"]


def test_old_spellings_of_diffusers(tmp_path: Path) -> None:
    A, B = numbers(4, 32, seed=1), numbers(8, 4, seed=2)
    old = {
        "unet.mid_block.attentions.0.attn1.processor.to_q_lora": "unet.mid_block.attentions.0.attn1.to_q",
        "unet.mid_block.attentions.0.attn1.processor.to_out_lora": "unet.mid_block.attentions.0.attn1.to_out.0",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora":
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer":
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
        "unet.conv_in.lora": "unet.conv_in",
    }  # fmt: skip
    layout = read(tmp_path, {f"{name}.{side}.weight": t for name in old for side, t in (("down", A), ("up", B))})
    assert set(layout.adapters) == set(old.values())
    assert (layout.problems, {entry.scaling for entry in layout.adapters.values()}) == ((), {1.0})


def test_the_base_and_the_scaling_that_stand_in_the_file_are_read(tmp_path: Path) -> None:
    """Each where its tool keeps them: kohya's header, MLX-LM's config, diffusers' metadata, with components or none."""
    said = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_base_model_version": "sd_v1"}
    kohya = read(tmp_path / "kohya", pair(alpha=torch.tensor(2.0)), said)
    assert (kohya.base_model, scaling(kohya)) == ("sd_v1", 0.5)
    mlx = open_layout(toy_llama.mlx(toy(), tmp_path / "mlx", scale=20.0))
    assert (mlx.base_model, {entry.scaling for entry in mlx.adapters.values()}) == ("org/base", {20.0})
    A, B = numbers(4, 32, seed=1), numbers(32, 4, seed=2)
    for before in ("unet.", ""):
        config = {f"{before}r": 4, f"{before}lora_alpha": 16, f"{before}target_modules": ["to_q"]}
        name = f"{before}down_blocks.0.attn1.to_q"
        tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        found = read(tmp_path / f"diffusers{before}", tensors, {"lora_adapter_metadata": json.dumps(config)})
        assert (found.format, scaling(found, name), found.problems) == ("diffusers", 4.0, ())


def test_metadata_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    tensors = {"unet.q.lora_A.weight": numbers(4, 32, seed=1), "unet.q.lora_B.weight": numbers(8, 4, seed=2)}
    for config, code in (
        ('{"unet.r": 8, "unet.lora_alpha": 8}', "RANK_DISAGREES"),
        ('{"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": true}', "MISSING_MAGNITUDE"),
        ('{"unet.r": 4, "unet.lora_alpha": 8, "unet.init_lora_weights": "pissa"}', "MUTATED_BASE"),  # trap 52
        ('{"unet.r": 4, "unet.lora_alpha": "eight"}', "BAD_CONFIG"),
        ("no JSON", "BAD_CONFIG"),
    ):
        layout = read(tmp_path, tensors, {"lora_adapter_metadata": config})
        assert codes(layout) == [code]
        assert code == "MUTATED_BASE" or not layout.adapters or scaling(layout, "unet.q") is None
