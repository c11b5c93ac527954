"""Image models' own names: looked up in the base, modules that are one there and several here taken apart."""

from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_llama import numbers, save

import d2surgery
from d2surgery.checkpoint import Checkpoint
from d2surgery.files.header import TensorInfo
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.flat import flatten, known, sgm

needs_diffusers = pytest.mark.skipif(
    not any(each.name == "diffusers" for each in distributions()), reason="not installed: diffusers"
)
H, FF, RANK = 16, 40, 4
FLUX: dict[str, tuple[int, ...]] = {
    **{f"transformer_blocks.0.attn.{leaf}": (H, H) for leaf in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj",
                                                               "add_k_proj", "add_v_proj", "to_add_out")},
    "transformer_blocks.0.ff.net.0.proj": (FF, H), "transformer_blocks.0.norm1.linear": (6 * H, H),
    **{f"single_transformer_blocks.0.attn.{leaf}": (H, H) for leaf in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp": (FF, H), "single_transformer_blocks.0.proj_out": (H, H + FF),
    "norm_out.linear": (2 * H, H), "proj_out": (8, H), "x_embedder": (H, 8),
    "time_text_embed.timestep_embedder.linear_1": (H, 8),
}  # fmt: skip


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {f"{name}.weight": TensorInfo(Path("base"), "F32", shape, 0, 0) for name, shape in shapes.items()}


def pair(out: int, inside: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(numbers(RANK, inside, seed=seed)), torch.from_numpy(numbers(out, RANK, seed=seed + 1))


DOTTED = {
    "double_blocks.0.img_attn.qkv": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
                                     "transformer_blocks.0.attn.to_v"],
    "double_blocks.0.txt_attn.qkv": ["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.add_k_proj",
                                     "transformer_blocks.0.attn.add_v_proj"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k",
                                "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "img_in": ["x_embedder"], "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}  # fmt: skip


def deltas(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By diffusers' names: a fused module's rows follow each other."""
    wanted: dict[str, torch.Tensor] = {}
    for name, (A, B) in factors.items():
        whole = 0.5 * B @ A
        rows = [FLUX[target][0] for target in DOTTED[name]]
        wanted |= dict(zip(DOTTED[name], torch.split(whole, rows), strict=True))
    return wanted


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    shapes = {name: (sum(FLUX[t][0] for t in targets), FLUX[targets[0]][1]) for name, targets in DOTTED.items()}
    return {name: pair(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}


def assert_deltas(layout: d2surgery.Layout, wanted: Mapping[str, torch.Tensor]) -> None:
    assert (layout.problems, set(layout.adapters)) == ((), set(wanted))
    assert sorted([*layout.accounted(), *layout.unread]) == sorted(layout.header.tensors)
    for module, delta in wanted.items():
        found = Checkpoint(layout)[module].delta(torch.zeros(delta.shape))
        torch.testing.assert_close(found, delta, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("spelling", ["comfyui", "kohya", "bare"])
def test_fused_modules_of_flux_are_its_bases_in_diffusers(tmp_path: Path, spelling: str) -> None:
    made, tensors = factors(), dict[str, Any]()
    for name, (A, B) in made.items():
        if spelling == "kohya":
            key = f"lora_unet_{flatten(name)}"
            tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                        f"{key}.alpha": torch.tensor(RANK / 2)}  # fmt: skip
        else:
            key = f"{'diffusion_model.' * (spelling == 'comfyui')}{name}"
            tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                        f"{key}.alpha": torch.tensor(RANK / 2)}  # fmt: skip
    layout = with_base(open_layout(save(tensors, tmp_path / "x.safetensors")), infos(FLUX), {})
    assert_deltas(layout, deltas(made))


def test_a_base_with_the_original_names_keeps_them_fused(tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.qkv"
    A, B = factors()[name]
    key = f"lora_unet_{flatten(name)}"
    file = save({f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}, tmp_path / "x.safetensors")
    layout = with_base(open_layout(file), infos({name: (3 * H, H)}), {})
    assert (layout.problems, set(layout.adapters)) == ((), {name})


def test_trap_47_the_last_layers_scale_and_shift_change_places(tmp_path: Path) -> None:
    A, B = pair(2 * H, H, seed=1)
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    file = save({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "x.safetensors")
    layout = with_base(open_layout(file), infos(FLUX), {})
    shift, scale = (B @ A).chunk(2)
    assert_deltas(layout, {"norm_out.linear": torch.cat([scale, shift])})
    flux_2 = FLUX | {"single_transformer_blocks.0.attn.to_qkv_mlp_proj": (3 * H + FF, H)}
    assert set(with_base(open_layout(file), infos(flux_2), {}).adapters) == {key}  # of whose halves nothing is known


@pytest.mark.parametrize("along", ["out", "in"])
def test_a_fused_dora_is_one_of_each_part_where_its_norms_are_of_rows(tmp_path: Path, along: str) -> None:
    name = "double_blocks.0.img_attn.qkv"
    A, B = factors()[name]
    m = torch.rand(3 * H, 1) + 1 if along == "out" else torch.rand(1, H) + 1
    key = f"lora_unet_{flatten(name)}"
    tensors = {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.dora_scale": m}
    layout = with_base(open_layout(save(tensors, tmp_path / "x.safetensors")), infos(FLUX), {})
    if along == "in":
        assert "UNSUPPORTED_VARIANT" in {problem.code for problem in layout.problems}
        return
    W = torch.from_numpy(numbers(3 * H, H, seed=9))
    whole = W + B @ A
    wanted = whole * m / whole.norm(dim=1, keepdim=True)
    for target, base, part in zip(DOTTED[name], torch.split(W, H), torch.split(wanted, H), strict=True):
        found = base + Checkpoint(layout)[target].delta(base)
        np.testing.assert_allclose(found.numpy(), part.numpy(), atol=2e-6)


def test_rows_that_are_not_those_of_the_parts_are_left_as_they_are(tmp_path: Path) -> None:
    A, B = pair(3 * H + 1, H, seed=1)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    file = save({f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}, tmp_path / "x.safetensors")
    layout = with_base(open_layout(file), infos(FLUX), {})
    assert ({problem.code for problem in layout.problems}, set(layout.adapters)) == ({"AMBIGUOUS_NAME"}, {key})


def test_a_fused_module_and_one_of_its_parts_are_two_of_one_name(tmp_path: Path) -> None:
    A, B = factors()["double_blocks.0.img_attn.qkv"]
    a, b = pair(H, H, seed=5)
    names = {"diffusion_model.double_blocks.0.img_attn.qkv": (A, B), "transformer_blocks.0.attn.to_q": (a, b)}
    tensors = {
        f"{n}.{leaf}": t
        for n, p in names.items()
        for leaf, t in zip(("lora_down.weight", "lora_up.weight"), p, strict=True)
    }
    layout = with_base(open_layout(save(tensors, tmp_path / "x.safetensors")), infos(FLUX), {})
    assert "AMBIGUOUS_NAME" in {problem.code for problem in layout.problems}


WAN = {"blocks.3.self_attn.o": "blocks.3.attn1.to_out.0", "blocks.3.cross_attn.k_img": "blocks.3.attn2.add_k_proj",
       "blocks.3.ffn.0": "blocks.3.ffn.net.0.proj", "time_projection.1": "condition_embedder.time_proj",
       "text_embedding.2": "condition_embedder.text_embedder.linear_2", "head.head": "proj_out"}  # fmt: skip


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_wans_names_are_diffusers(tmp_path: Path, prefix: str) -> None:
    tensors: dict[str, Any] = {}
    for at, name in enumerate(WAN):
        A, B = pair(H, H, seed=at)
        key = prefix + (flatten(name) if prefix == "lora_unet_" else name)
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
    layout = with_base(open_layout(save(tensors, tmp_path / "x.safetensors")),
                       infos(dict.fromkeys(WAN.values(), (H, H))), {})  # fmt: skip
    assert (layout.problems, set(layout.adapters)) == ((), set(WAN.values()))


SGM = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block.1.transformer_blocks.9.ff.net.2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "output_blocks.5.1.proj_out": "up_blocks.1.attentions.2.proj_out",
    "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.3.0.skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks.0.0.emb_layers.1": "up_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
    "input_blocks.0.0": "conv_in", "out.2": "conv_out",
}  # fmt: skip


@pytest.mark.parametrize("name", SGM)
def test_trap_23_sdxls_original_names_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    path, A = SGM[name], torch.ones(RANK, H)
    assert known(f"lora_unet_{flatten(name)}") == known(f"lora_unet_{flatten(path)}") == f"unet.{path}"
    key = f"diffusion_model.{name}"
    file = save(
        {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": torch.ones(H, RANK)}, tmp_path / "x.safetensors"
    )
    assert set(with_base(open_layout(file), infos({path: (H, H)}), {}).adapters) == {path}


@needs_diffusers
def test_every_name_of_sdxls_unet_is_mapped_as_diffusers_maps_it() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    cross, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    net = UNet2DConditionModel(
        block_out_channels=(32, 32, 32), layers_per_block=2, down_block_types=("DownBlock2D", cross, cross),
        up_block_types=(up, up, "UpBlock2D"), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
    )  # fmt: skip
    paths = [name for name, module in net.named_modules() if getattr(module, "weight", torch.ones(1)).dim() > 1]
    blocks = ("input_blocks", "middle_block", "output_blocks")
    names = {f"lora_unet_{flatten(name)}": path for path in paths for name in sgm(path) if name.startswith(blocks)}
    names = {name: path for name, path in names.items() if "input_blocks_0_0" not in name}
    assert {name: known(name) for name in names} == {name: f"unet.{path}" for name, path in names.items()}
    attention = [name for name, path in names.items() if ".attentions." in path]
    theirs = _maybe_map_sgm_blocks_to_diffusers({f"{name}.x": name for name in attention}, net.config)
    renamed = (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks"), ("middle_block", "mid_block"))
    for key, name in theirs.items():
        for old, new in renamed:
            key = key.replace(old, new)
        assert known(key.partition(".")[0]) == known(name)
    assert len(theirs) == len(attention) > 100


@needs_diffusers
def test_fluxs_modules_are_taken_apart_as_diffusers_does(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    sizes = {"double_blocks_0_img_attn_qkv": (9216, 3072), "double_blocks_0_txt_attn_qkv": (9216, 3072),
             "double_blocks_0_img_attn_proj": (3072, 3072), "double_blocks_0_txt_mlp_2": (3072, 12288),
             "double_blocks_0_img_mod_lin": (18432, 3072), "single_blocks_0_linear1": (21504, 3072),
             "single_blocks_0_linear2": (3072, 15360), "single_blocks_0_modulation_lin": (9216, 3072)}  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for at, (name, shape) in enumerate(sizes.items()):
        A, B = pair(*shape, seed=at)
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B,
                    f"lora_unet_{name}.alpha": torch.tensor(2.0)}  # fmt: skip
    file = save(tensors, tmp_path / "x.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    modules = {key.partition(".lora_")[0].removeprefix("transformer.") for key in theirs}
    shapes = {m: (theirs[f"transformer.{m}.lora_B.weight"].shape[0], theirs[f"transformer.{m}.lora_A.weight"].shape[1])
              for m in modules}  # fmt: skip
    layout = with_base(open_layout(file), infos(shapes), {})
    assert (layout.problems, set(layout.adapters)) == ((), modules)
    for module, each in Checkpoint(layout).items():
        slots = each.slots()
        B, A = (theirs[f"transformer.{module}.lora_{which}.weight"] for which in "BA")
        rows, columns = slice(0, 50), slice(0, 50)
        ours = float(each.scaling) * slots["B"][rows] @ slots["A"][:, columns]
        torch.testing.assert_close(ours, B[rows] @ A[:, columns], atol=2e-6, rtol=2e-6)
