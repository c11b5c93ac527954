"""ComfyUI's own names: modules that are one there are joined, and read back as they were."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_llama import numbers

import d2surgery
from d2surgery.adapters import DoRA, LoRA
from d2surgery.cli import main
from d2surgery.errors import D2SurgeryError
from d2surgery.files.header import TensorInfo
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import About

H, FF = 16, 64
ATTENTION = ("to_q", "to_k", "to_v")
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.7"
FLUX: dict[str, tuple[int, int]] = {
    **{f"{DOUBLE}.attn.{leaf}": (H, H) for leaf in (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")},
    f"{DOUBLE}.ff.net.0.proj": (FF, H), f"{DOUBLE}.norm1.linear": (6 * H, H),
    **{f"{SINGLE}.attn.{leaf}": (H, H) for leaf in ATTENTION},
    f"{SINGLE}.proj_mlp": (FF, H), f"{SINGLE}.proj_out": (H, H + FF), "norm_out.linear": (2 * H, H),
    "x_embedder": (H, 8), "proj_out": (8, H),
}  # fmt: skip
THERE = {
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}.attn.{leaf}" for leaf in ATTENTION],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}.attn.add_{leaf}_proj" for leaf in "qkv"],
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.0.img_mod.lin": [f"{DOUBLE}.norm1.linear"],
    "single_blocks.7.linear1": [*(f"{SINGLE}.attn.{leaf}" for leaf in ATTENTION), f"{SINGLE}.proj_mlp"],
    "single_blocks.7.linear2": [f"{SINGLE}.proj_out"], "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "img_in": ["x_embedder"], "final_layer.linear": ["proj_out"],
}  # fmt: skip


def adapters(shapes: Mapping[str, tuple[int, int]]) -> dict[str, LoRA]:
    """Of ranks and scalings that differ."""
    return {
        name: LoRA(A=torch.from_numpy(numbers(3 + at % 2, inside, seed=2 * at)), scaling=0.5 * (1 + at % 3),
                   B=torch.from_numpy(numbers(out, 3 + at % 2, seed=2 * at + 1)))
        for at, (name, (out, inside)) in enumerate(shapes.items())
    }  # fmt: skip


def written(made: Mapping[str, Any], directory: Path, class_name: str = "") -> dict[str, torch.Tensor]:
    about = About(model={"_class_name": class_name} if class_name else {})
    found = d2surgery.save(d2surgery.from_adapters(made, about), directory, format="comfyui")
    assert max(found.values()) < 1e-7
    tensors: dict[str, torch.Tensor] = load_file(directory / "lora.safetensors")
    return tensors


def update(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """As ComfyUI has it: alpha over the rank, times up·down."""
    down, up = (tensors[f"diffusion_model.{name}.lora_{side}.weight"].double() for side in ("down", "up"))
    return float(tensors[f"diffusion_model.{name}.alpha"]) / down.shape[0] * up @ down


def wanted(made: Mapping[str, LoRA], parts: list[str], component: str = "transformer.") -> torch.Tensor:
    """The parts below each other; norm_out's scale and shift change places."""
    rows = [float(made[component + p].scaling) * made[component + p].B.double() @ made[component + p].A.double()
            for p in parts]  # fmt: skip
    return torch.cat(rows[0].chunk(2)[::-1] if parts == ["norm_out.linear"] else rows)


@pytest.mark.parametrize("component", ["transformer.", "", "diffusion_model."])
def test_flux_has_comfyuis_names_and_its_fused_modules(tmp_path: Path, component: str) -> None:
    made = {component + name: lora for name, lora in adapters(FLUX).items()}
    tensors = written(made, tmp_path / "out")
    assert {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name} == {
        f"diffusion_model.{n}" for n in THERE
    }
    for name, parts in THERE.items():
        torch.testing.assert_close(update(tensors, name), wanted(made, parts, component), atol=1e-7, rtol=1e-6)
    assert set(d2surgery.load(tmp_path / "out").layout.adapters) == set(made)


def test_without_the_list_in_its_header_the_base_takes_it_apart(tmp_path: Path) -> None:
    made = {f"transformer.{name}": lora for name, lora in adapters(FLUX).items()}
    save_file(written(made, tmp_path / "out"), tmp_path / "bare.safetensors")
    tensors = {f"{name}.weight": TensorInfo(Path("base"), "F32", shape, 0, 0) for name, shape in FLUX.items()}
    layout = with_base(open_layout(tmp_path / "bare.safetensors"), tensors, {})
    assert (layout.problems, set(layout.adapters)) == ((), set(FLUX))
    for name, adapter in d2surgery.checkpoint.Checkpoint(layout).items():
        right = (
            float(made[f"transformer.{name}"].scaling) * made[f"transformer.{name}"].B @ made[f"transformer.{name}"].A
        )
        torch.testing.assert_close(adapter.delta(torch.zeros(right.shape)), right, atol=1e-6, rtol=1e-6)


def test_parts_that_share_their_down_factor_keep_its_rank(tmp_path: Path) -> None:
    A = torch.from_numpy(numbers(4, H, seed=1))
    made = {
        part: LoRA(A=A, B=torch.from_numpy(numbers(FLUX[part][0], 4, seed=at)), scaling=2.0)
        for at, part in enumerate(THERE["single_blocks.7.linear1"])
    }
    tensors = written(made, tmp_path / "out")
    assert torch.equal(tensors["diffusion_model.single_blocks.7.linear1.lora_down.weight"], A)
    back = d2surgery.load(tmp_path / "out")
    assert set(d2surgery.checkpoint.differences(d2surgery.from_adapters(made), back).values()) == {0.0}


@pytest.mark.parametrize("there", [("attn.to_q", "attn.to_v"), ("attn.to_k",), ("proj_mlp",)])
def test_a_part_without_an_adapter_is_zeros_and_said(
    tmp_path: Path, there: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    made = adapters({f"{SINGLE}.{leaf}": FLUX[f"{SINGLE}.{leaf}"] for leaf in there})
    d2surgery.save(d2surgery.from_adapters(made), tmp_path / "in", format="diffusers")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "comfyui"]) == 0
    assert f"zeros  {4 - len(there)} module" in capsys.readouterr().out
    found = update(load_file(tmp_path / "out/lora.safetensors"), "single_blocks.7.linear1")
    parts = {f"attn.{leaf}": H for leaf in ATTENTION} | {"proj_mlp": FF}
    for leaf, rows in zip(parts, torch.split(found, [*parts.values()]), strict=True):
        lora = made.get(f"{SINGLE}.{leaf}")
        right = float(lora.scaling) * lora.B.double() @ lora.A.double() if lora else torch.zeros(rows.shape)
        torch.testing.assert_close(rows, right.double(), atol=1e-7, rtol=1e-6)


SAME = {"transformer_blocks.0.attn.to_q": (H, H), "transformer_blocks.0.attn.to_k": (H, H)}


@pytest.mark.parametrize(
    ("class_name", "names"),
    [
        ("QwenImageTransformer2DModel", set(SAME)),
        ("FluxTransformer2DModel", {"double_blocks.0.img_attn.qkv"}),
        ("SD3Transformer2DModel", None),
        ("", None),
    ],
)
def test_names_of_several_families_ask_for_the_base(tmp_path: Path, class_name: str, names: set[str] | None) -> None:
    if names is None:
        with pytest.raises(D2SurgeryError) as error:
            written(adapters(SAME), tmp_path / "out", class_name)
        assert {problem.code for problem in error.value.problems} == {"AMBIGUOUS_NAME"}
        assert not (tmp_path / "out").exists()
    else:
        tensors = written(adapters(SAME), tmp_path / "out", class_name)
        assert {
            name.rpartition(".lora_")[0].removeprefix("diffusion_model.") for name in tensors if "lora_" in name
        } == names


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"blocks.3.attn1.to_out.0": (H, H), "blocks.3.ffn.net.0.proj": (FF, H), "proj_out": (8, H)},
         {"blocks.3.self_attn.o", "blocks.3.ffn.0", "head.head"}),
        ({"layers.2.attention.to_q": (H, H), "layers.2.attention.to_v": (8, H), "layers.2.feed_forward.w1": (FF, H)},
         {"layers.2.attention.qkv", "layers.2.feed_forward.w1"}),
        ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (H, H)},
         {"input_blocks.4.1.transformer_blocks.0.attn1.to_q"}),
        ({"double_blocks.0.img_attn.qkv": (3 * H, H)}, {"double_blocks.0.img_attn.qkv"}),
    ],
    ids=["Wan", "Z-Image", "SDXL", "original"],
)  # fmt: skip
def test_other_families_have_their_own_names(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], names: set[str]
) -> None:
    tensors = written(adapters(shapes), tmp_path / "out")
    assert {
        name.rpartition(".lora_")[0].removeprefix("diffusion_model.") for name in tensors if "lora_" in name
    } == names


def test_what_it_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    lora = adapters(FLUX)[f"{SINGLE}.attn.to_q"]
    dora = DoRA(A=lora.A, B=lora.B, scaling=1.0, magnitude=torch.ones(H))
    wide = LoRA(A=torch.zeros(3, 2 * H), B=torch.zeros(H, 3), scaling=1.0)
    grouped = adapters({"layers.2.attention.to_q": (H, H)})
    for made, says in (
        ({f"{SINGLE}.attn.to_q": dora}, "no place for dora"),
        ({f"{SINGLE}.attn.to_q": lora, f"{SINGLE}.attn.to_k": wide}, "do not fit together"),
        (grouped, "of unknown rows"),
        ({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": lora}, "no list known here"),
    ):
        with pytest.raises(D2SurgeryError) as error:
            written(made, tmp_path / "out")
        assert says in str(error.value)


@pytest.mark.parametrize("edit", ["{", '{"modules": 3}', '{"modules": {"diffusion_model.img_in": [["a", "b"]]}}',
                                  '{"modules": {"diffusion_model.img_in": [["a", 3]]}}',
                                  '{"modules": {"diffusion_model.img_in": [["a", -1], ["b", 17]]}}'])  # fmt: skip
def test_a_list_that_does_not_fit_is_not_believed(tmp_path: Path, edit: str) -> None:
    tensors = written(adapters({"x_embedder": (H, 8), f"{SINGLE}.proj_out": (H, H + FF)}), tmp_path / "out")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"d2surgery": edit})
    assert set(d2surgery.load(tmp_path / "x.safetensors")) == {
        "diffusion_model.img_in", "diffusion_model.single_blocks.7.linear2"
    }  # fmt: skip
