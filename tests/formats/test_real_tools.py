"""Files written by the tools whose formats they are, against the weights that the tool itself makes of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_llama
from models import llama, mixtral, qwen3_moe
from safetensors.torch import load_file, save_file
from tools import needs
from torch import Tensor, nn

import d2surgery
from d2surgery.checkpoint import Checkpoint, differences, load
from d2surgery.files.base import BaseWeights
from d2surgery.formats import with_base


def opened(adapter: Path, base: Path) -> Checkpoint:
    return load(adapter, base=BaseWeights(base))


# LyCORIS ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.wide, self.conv = nn.Linear(32, 32), nn.Linear(48, 32), nn.Conv2d(16, 32, 3)


ALGORITHMS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"rs_lora": True}),
    ("lora", {"use_tucker": True}),
    ("lora", {"dora_wd": True}),
    ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("loha", {"dora_wd": True}),
    ("lokr", {"factor": 4}),
    ("lokr", {"factor": 4, "decompose_both": True}),
    ("lokr", {"factor": 4, "use_tucker": True}),
    ("lokr", {"full_matrix": True}),
    ("full", {}),
]


def by_lycoris(algo: str, options: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Trained, here: randomised, and saved; then name, W0 and W' of each module by its own forward."""
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(0)
    net, per_input = Net(), options.get("wd_on_output") is False
    LycorisNetwork.apply_preset({"target_module": ["Linear"] + ["Conv2d"] * (not per_input)})
    sizes = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0}
    wrapper = create_lycoris(net, 1.0, algo=algo, **sizes, **options)
    wrapper.apply_to()
    for parameter in wrapper.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {key: value.detach().clone() for key, value in wrapper.state_dict().items()}
    args = {"algo": algo, **{name: str(value) for name, value in options.items()}}
    save_file(tensors, path, metadata={"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)})
    for module in wrapper.loras:
        name, layer = module.lora_name.removeprefix("lycoris_"), module.org_module[0]
        W0 = module._org_weight[0] if algo == "full" else layer.weight
        shape = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, *layer.kernel_size)
        inputs = torch.eye(int(np.prod(shape))).reshape(-1, *shape)
        outputs = module(inputs) - module(torch.zeros(1, *shape))
        yield name, W0.detach().flatten(1), outputs.detach().flatten(1).T


@needs("lycoris")
@pytest.mark.parametrize(("algo", "options"), ALGORITHMS)
def test_lycoris_makes_the_same_weights_of_its_file(tmp_path: Path, algo: str, options: dict[str, Any]) -> None:
    found = list(by_lycoris(algo, options, tmp_path / "x.safetensors"))
    checkpoint = d2surgery.load(tmp_path / "x.safetensors")
    assert checkpoint.layout.problems == ()
    assert len(checkpoint) == len(found)
    for name, W0, effective in found:
        made = W0.double() + checkpoint[f"lycoris_{name}"].delta(W0.double())
        np.testing.assert_allclose(made.numpy(), effective.numpy(), atol=2e-6)


@needs("lycoris")
@pytest.mark.parametrize("dora", [False, True])
def test_lycoris_reads_what_is_written_here(tmp_path: Path, dora: bool) -> None:
    from lycoris import create_lycoris_from_weights

    torch.manual_seed(0)
    net = Net()
    modules = {"fc": net.fc, "wide": net.wide}
    made = {}
    for name, layer in modules.items():
        assert isinstance(layer, nn.Linear)
        A, B = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4) / 10
        m = layer.weight.detach().norm(dim=1) * 1.1
        made[name] = (
            d2surgery.DoRA(A=A, B=B, magnitude=m, scaling=0.5) if dora else d2surgery.LoRA(A=A, B=B, scaling=0.5)
        )
    d2surgery.save(d2surgery.from_adapters(made), tmp_path / "out", format="lycoris")
    wanted = {
        name: (layer.weight.double() + made[name].delta(layer.weight.double())) for name, layer in modules.items()
    }
    wrapper, _ = create_lycoris_from_weights(1.0, str(tmp_path / "out" / "lora.safetensors"), net)
    wrapper.apply_to()
    for module in wrapper.loras:
        name = module.lora_name.removeprefix("lycoris_")
        merged = module.get_merged_weight()[0].detach()
        np.testing.assert_allclose(merged.numpy(), wanted[name].detach().numpy(), atol=2e-6)
    assert len(wrapper.loras) == len(modules)


# MLX-LM ----------------------------------------------------------------------------------------------------------


def fused(model: Any) -> dict[str, Any]:
    """MLX-LM's own fuse."""
    from mlx.utils import tree_flatten, tree_unflatten

    model.update_modules(tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]))
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def by_mlx(base: Path, directory: Path, keys: list[str], dora: bool) -> dict[str, Any]:
    """Trained, here: randomised, saved as its trainer does, and fused."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.random.seed(1)
    model, _ = load_model(base)
    config = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, config, use_dora=dora)
    adapter = {}
    for name, value in tree_flatten(model.parameters()):
        if name.endswith((".lora_a", ".lora_b")):
            adapter[name] = 0.1 * mx.random.normal(value.shape)
        elif name.endswith(".m"):
            adapter[name] = value * (1 + 0.1 * mx.random.normal(value.shape))
    model.load_weights(list(adapter.items()), strict=False)
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), adapter)
    said = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": config, "model": "a/b"}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return fused(model)


@needs("mlx_lm")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", [["self_attn.q_proj", "mlp.down_proj"], ["self_attn.q_proj", "model.embed_tokens"]])
def test_an_adapter_of_mlx_merges_as_mlx_fuses_it_and_passes_the_audit(
    tmp_path: Path, tied: bool, dora: bool, keys: list[str]
) -> None:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama(tied=tied).save_pretrained(base)
    theirs = by_mlx(base, adapter, keys, dora)
    d2surgery.merge(base, adapter, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), value, atol=2e-7, err_msg=name)
    (tmp_path / "fused").mkdir()
    mx.save_safetensors(str(tmp_path / "fused" / "model.safetensors"), {n: mx.array(v) for n, v in theirs.items()})
    (tmp_path / "fused" / "config.json").write_text((base / "config.json").read_text())
    assert d2surgery.audit(base, adapter, tmp_path / "fused", files=False).verdict == "pass"
    d2surgery.save(d2surgery.load(adapter), tmp_path / "again", format="mlx")
    again = fused(load_adapters(load_model(base)[0], str(tmp_path / "again")))
    assert all(np.array_equal(value, theirs[name]) for name, value in again.items())


@needs("mlx_lm")
@pytest.mark.parametrize("leaves", [["gate_proj", "up_proj", "down_proj"], ["up_proj"]])
@pytest.mark.parametrize("mixture", [qwen3_moe, mixtral])
def test_experts_of_mlx_merge_as_mlx_fuses_them(tmp_path: Path, mixture: Any, leaves: list[str]) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base, block = tmp_path / "base", "mlp" if mixture is qwen3_moe else "block_sparse_moe"
    mixture().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config = {"num_experts": 4, "rope_theta": 10000.0} | config  # as mlx-lm wants it
    (base / "config.json").write_text(json.dumps(config))
    theirs = by_mlx(base, tmp_path / "adapter", [f"{block}.switch_mlp.{leaf}" for leaf in leaves], False)
    d2surgery.merge(base, tmp_path / "adapter", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if mixture is mixtral else {}
    compared = 0
    for name, stacked in theirs.items():
        root, _, leaf = name.removesuffix(".weight").partition(".switch_mlp.")
        for expert, value in enumerate(stacked if leaf else ()):
            merged = ours[f"{root}.experts.{expert}.{names.get(leaf, leaf)}.weight"]
            np.testing.assert_allclose(merged.numpy(), value, atol=2e-7)
            compared += 1
    assert compared == 2 * 3 * 4
    d2surgery.save(opened(tmp_path / "adapter", base), tmp_path / "again", format="mlx")
    again = fused(load_adapters(load_model(base)[0], str(tmp_path / "again")))
    assert all(np.allclose(value, theirs[name], atol=2e-7) for name, value in again.items())


@needs("mlx")
def test_an_archive_of_mlx_is_read(tmp_path: Path) -> None:
    import mlx.core as mx

    arrays = {f"model.layers.0.q.{leaf}": mx.random.normal(shape) for leaf, shape in
              (("lora_a", (8, 4)), ("lora_b", (4, 6)))}  # fmt: skip
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        stored = {name: value.astype(dtype) for name, value in arrays.items()}
        mx.savez(str(tmp_path / "adapters.npz"), **stored)
        adapter = d2surgery.load(tmp_path, scale=1.0)["model.layers.0.q"]
        for slot, leaf in (("A", "lora_a"), ("B", "lora_b")):
            theirs = np.array(stored[f"model.layers.0.q.{leaf}"].astype(mx.float32)).T
            assert np.array_equal(adapter.slots()[slot].float().numpy(), theirs)


# diffusers -------------------------------------------------------------------------------------------------------


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip


def adapted(dora: bool, alpha: float = 8.0) -> Any:
    from peft import LoraConfig

    model = unet()
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v", "conv1", "proj_in"], use_dora=dora,
                        rank_pattern={"to_v": 2}, init_lora_weights=False)  # fmt: skip
    model.add_adapter(config)
    return model, config


def merged_by_peft(model: Any) -> dict[str, Tensor]:
    """Module -> W' of the adapted modules."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            found[name] = module.base_layer.weight.detach().clone()
            module.unmerge()
    return found


@needs("diffusers")
@pytest.mark.parametrize("dora", [False, True])
def test_a_unets_adapter_that_diffusers_saves_has_the_weights_that_peft_merges(tmp_path: Path, dora: bool) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    model, config = adapted(dora)
    state = get_peft_model_state_dict(model)
    said = {"unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path, unet_lora_layers=state, **said)
    checkpoint = d2surgery.load(tmp_path)
    assert [p for p in checkpoint.layout.problems if p.severity != "info"] == []
    assert (checkpoint.layout.format, checkpoint.layout.kinds) == ("diffusers", ["dora" if dora else "lora"])
    base, merged = {f"unet.{n}": m for n, m in unet().named_modules()}, merged_by_peft(model)
    assert {f"unet.{name}" for name in merged} == set(checkpoint.layout.adapters)
    for name, adapter in checkpoint.items():
        W0 = base[name].weight.detach().flatten(1).double()
        wanted = merged[name.removeprefix("unet.")].flatten(1)
        np.testing.assert_allclose((W0 + adapter.delta(W0)).numpy(), wanted.numpy(), atol=2e-6, err_msg=name)


@needs("diffusers")
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_what_is_written_here(tmp_path: Path, dora: bool) -> None:
    from peft.utils import get_peft_model_state_dict

    model, config = adapted(dora)
    tensors = {f"unet.{key}": value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
    said = {
        f"unet.{key}": value for key, value in config.to_dict().items() if isinstance(value, str | int | float | dict)
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    d2surgery.save(d2surgery.load(tmp_path / "x.safetensors"), tmp_path / "out", format="diffusers")
    again = unet()
    again.load_lora_adapter(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    wanted = merged_by_peft(model)
    found = merged_by_peft(again)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), atol=1e-6, err_msg=name)


@needs("diffusers")
@pytest.mark.parametrize("dora", [False, True])
def test_a_unets_adapter_merges_as_diffusers_fuses_it_and_passes_the_audit(tmp_path: Path, dora: bool) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    unet().save_pretrained(tmp_path / "unet")
    model, config = adapted(dora)
    said = {"unet_lora_layers": get_peft_model_state_dict(model), "unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path / "adapter", **said)
    fused = unet()
    fused.load_lora_adapter(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    fused.fuse_lora()
    theirs = {name.replace(".base_layer", ""): tensor.contiguous() for name, tensor in fused.state_dict().items()
              if "lora_" not in name}  # fmt: skip
    d2surgery.merge(tmp_path / "unet", tmp_path / "adapter", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), value.numpy(), atol=1e-6, err_msg=name)
    (tmp_path / "fused").mkdir()
    save_file(theirs, tmp_path / "fused" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_text((tmp_path / "unet" / "config.json").read_text())
    assert d2surgery.audit(tmp_path / "unet", tmp_path / "adapter", tmp_path / "fused", files=False).verdict == "pass"


@needs("diffusers", "lycoris")
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris_on_a_unet_merges_and_is_convolutions_where_the_base_has_them(tmp_path: Path, algo: str) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    net = unet()
    net.save_pretrained(tmp_path / "unet")
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": []})
    sizes = {"linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 2, "conv_alpha": 1.0}
    wrapper = create_lycoris(net, 1.0, algo=algo, **sizes)
    wrapper.apply_to()
    for parameter in wrapper.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tensors = {key: value.detach().clone() for key, value in wrapper.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_network_module": "lycoris.kohya"})
    d2surgery.merge(tmp_path / "unet", tmp_path / "x.safetensors", tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    names = {name.replace(".", "_"): name for name, _ in net.named_modules()}
    for module in wrapper.loras:
        W0 = module.org_module[0].weight.detach()
        delta = module.get_diff_weight()[0] if algo == "lora" else module.get_weight(W0.shape)  # which scales once
        found = ours[f"{names[module.lora_name.removeprefix('lycoris_')]}.weight"]
        np.testing.assert_allclose(found.numpy(), (W0 + delta.detach()).numpy(), atol=1e-6)
    checkpoint = opened(tmp_path / "x.safetensors", tmp_path / "unet")
    convolutions = {name for name, entry in checkpoint.layout.adapters.items() if entry.stored == "conv"}
    assert convolutions == {name for name in checkpoint.layout.adapters if ours[f"{name}.weight"].dim() == 4}
    d2surgery.save(checkpoint, tmp_path / "kohya", format="kohya")
    d2surgery.merge(tmp_path / "unet", tmp_path / "kohya", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(value, ours[name], atol=1e-6) for name, value in again.items())


# gguf ------------------------------------------------------------------------------------------------------------


@needs("gguf")
@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_written_by_its_own_package_is_read(tmp_path: Path, type: str) -> None:
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, type)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    arrays = {"lora_a": toy_llama.numbers(32, 64, seed=1), "lora_b": toy_llama.numbers(64, 32, seed=2)}
    stored = {leaf: gguf.quants.quantize(array, kind) for leaf, array in arrays.items()}
    for leaf, array in stored.items():
        writer.add_tensor(f"blk.1.attn_q.weight.{leaf}", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = d2surgery.load(tmp_path)
    adapter = checkpoint["model.layers.1.self_attn.q_proj"]
    assert (checkpoint.layout.problems, adapter.scaling) == ((), 0.5)
    for slot, leaf in (("A", "lora_a"), ("B", "lora_b")):
        theirs = gguf.quants.dequantize(stored[leaf], kind)
        assert np.array_equal(adapter.slots()[slot].float().numpy(), theirs)


@needs("gguf")
def test_gguf_reads_what_is_written_here_and_llama_cpps_own_permutation_is_ours(tmp_path: Path) -> None:
    import gguf

    adapter = toy_llama.toy()
    base = toy_llama.save_base(adapter, tmp_path / "base")
    d2surgery.save(opened(toy_llama.mlx(adapter, tmp_path / "mlx"), base), tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    theirs = {tensor.name: tensor.data for tensor in reader.tensors}
    q = "model.layers.0.self_attn.q_proj"
    B = adapter.B[q]
    permuted = B.reshape(4, 2, len(B) // 4 // 2, B.shape[1]).swapaxes(1, 2).reshape(B.shape)  # LlamaModel.permute
    assert np.array_equal(theirs["blk.0.attn_q.weight.lora_b"], permuted)
    assert np.array_equal(theirs["blk.0.attn_q.weight.lora_a"], adapter.A[q])
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == adapter.scaling * 4


# PEFT ------------------------------------------------------------------------------------------------------------


def test_peft_loads_the_serving_safe_form(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "down_proj"],
                             rank_pattern={"down_proj": 6}, init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path / "peft")
    d2surgery.save(d2surgery.load(tmp_path / "peft"), tmp_path / "out", format="peft-serving")
    back = d2surgery.load(tmp_path / "out")
    assert max(differences(d2surgery.load(tmp_path / "peft"), back).values()) < 1e-6
    assert {(entry.rank, entry.scaling) for entry in back.layout.adapters.values()} == {(8, 1.0)}
    ids = torch.tensor([[1, 2, 3]])
    fresh = llama()
    fresh.load_state_dict({k.replace("base_model.model.", "").replace(".base_layer", ""): v
                           for k, v in model.state_dict().items() if "lora_" not in k})  # fmt: skip
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_real_adapter_goes_through_every_format(published: Path, tmp_path: Path) -> None:
    """PEFT → kohya → diffusers → MLX → GGUF → PEFT."""
    checkpoint = first = d2surgery.load(published / "gemma270m-aowei")
    model = {"model_type": "gemma3_text"}
    for form in ("kohya", "diffusers", "mlx", "gguf", "peft"):
        checkpoint = Checkpoint(with_base(checkpoint.layout, {}, model))
        d2surgery.save(checkpoint, tmp_path / form, format=form)
        checkpoint = d2surgery.load(tmp_path / form)
    assert set(differences(first, checkpoint).values()) == {0.0}
