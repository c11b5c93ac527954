"""One small Llama and one adapter of it, written by hand as every format has it: the same effective weights in all.

4 query heads on 2 key-value heads of 8, so q_proj is square and a wrong axis or order does not show in its shape.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

Array = npt.NDArray[np.float32]
HEADS, KV_HEADS, HIDDEN, RANK, SCALING = 4, 2, 32, 4, 0.5
SHAPES = {  # module -> (out, in)
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
}  # fmt: skip
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": 20,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": 8, "hidden_act": "silu",
}  # fmt: skip


def numbers(*shape: int, seed: int, size: float = 0.1) -> Array:
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@dataclass(frozen=True)
class Toy:
    """Factors by module, and magnitudes where it is DoRA."""

    A: Mapping[str, Array]
    B: Mapping[str, Array]
    W: Mapping[str, Array]
    m: Mapping[str, Array] = field(default_factory=dict)
    scaling: float = SCALING

    def effective(self, module: str, along: str = "out") -> npt.NDArray[np.float64]:
        """By the formula, in float64."""
        W, A, B = (t[module].astype(np.float64) for t in (self.W, self.A, self.B))
        whole = W + self.scaling * B @ A
        if module not in self.m:
            return whole
        m = self.m[module].astype(np.float64)
        norms = np.linalg.norm(whole, axis=1 if along == "out" else 0, keepdims=True)
        return np.asarray(whole * (m.reshape(norms.shape) / norms))


def toy(dora: bool = False, along: str = "out") -> Toy:
    A, B, W, m = {}, {}, {}, {}
    for at, name in enumerate(ADAPTED):
        (out, inside), module = SHAPES[name], f"model.layers.0.{name}"
        A[module], B[module] = numbers(RANK, inside, seed=at), numbers(out, RANK, seed=10 + at)
        W[module] = numbers(out, inside, seed=20 + at, size=0.2)
        if dora:
            norm = np.linalg.norm(W[module], axis=1 if along == "out" else 0)
            m[module] = (norm * (1 + numbers(*norm.shape, seed=30 + at))).astype(np.float32)
    return Toy(A, B, W, m)


def save_base(adapter: Toy, directory: Path) -> Path:
    directory.mkdir()
    tensors = {
        f"model.layers.0.{name}.weight": numbers(*shape, seed=at) for at, (name, shape) in enumerate(SHAPES.items())
    }
    tensors |= {f"{module}.weight": weight for module, weight in adapter.W.items()}
    tensors |= {f"model.layers.0.{norm}.weight": np.ones(HIDDEN, np.float32)
                for norm in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    tensors |= {"model.norm.weight": np.ones(HIDDEN, np.float32)}
    tensors |= {f"{name}.weight": numbers(20, HIDDEN, seed=50) for name in ("model.embed_tokens", "lm_head")}
    save(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def save(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    made = {
        name: t if isinstance(t, Tensor) else torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone().contiguous() for name, t in made.items()}, path, metadata=dict(metadata or {}))
    return path


# A file of each format --------------------------------------------------------------------------------------------


def flat(module: str) -> str:
    return "lora_te_" + module.removeprefix("model.").replace(".", "_")


def kohya(t: Toy, directory: Path) -> Path:
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"{flat(module)}.lora_down.weight": t.A[module], f"{flat(module)}.lora_up.weight": t.B[module],
                    f"{flat(module)}.alpha": torch.tensor(t.scaling * RANK)}  # fmt: skip
        if module in t.m:
            tensors[f"{flat(module)}.dora_scale"] = t.m[module].reshape(-1, 1)
    return save(tensors, directory / "any name.safetensors", {"ss_network_module": "networks.lora"})


def per_input(t: Toy, directory: Path) -> Path:
    """LyCORIS's before December 2024, and OneTrainer's."""
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"{flat(module)}.lora_down.weight": t.A[module], f"{flat(module)}.lora_up.weight": t.B[module],
                    f"{flat(module)}.alpha": torch.tensor(t.scaling * RANK),
                    f"{flat(module)}.dora_scale": t.m[module].reshape(1, -1)}  # fmt: skip
    return save(tensors, directory / "any name.safetensors")


def diffusers(t: Toy, directory: Path) -> Path:
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"{module}.lora_A.weight": t.A[module], f"{module}.lora_B.weight": t.B[module]}
        tensors |= {f"{module}.lora_magnitude_vector": t.m[module]} if t.m else {}
    config = {"r": RANK, "lora_alpha": t.scaling * RANK, "peft_type": "LORA", "use_dora": bool(t.m)}
    return save(tensors, directory / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(config)})


def mlx(t: Toy, directory: Path, **parameters: Any) -> Path:
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"{module}.lora_a": t.A[module].T, f"{module}.lora_b": t.B[module].T}
        tensors |= {f"{module}.m": t.m[module]} if t.m else {}
    save(tensors, directory / "adapters.safetensors")
    found = {"rank": RANK, "scale": t.scaling, "dropout": 0.0} | parameters
    config = {
        "fine_tune_type": "dora" if t.m else "lora",
        "num_layers": 1,
        "lora_parameters": found,
        "model": "org/base",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def mlx_old(t: Toy, directory: Path) -> Path:
    """Before June 2024: an archive, and an alpha beside the scale."""
    mlx(t, directory, scale=t.scaling / 2, alpha=2.0 * RANK)
    arrays: dict[str, Any] = {f"{module}.{leaf}": factor.T for module in t.A
              for leaf, factor in (("lora_a", t.A[module]), ("lora_b", t.B[module]))}  # fmt: skip
    (directory / "adapters.safetensors").unlink()
    stored: Any = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    np.savez(directory / "adapters.npz", **stored)
    return directory


def gguf(t: Toy, directory: Path, alpha: float | None = None) -> Path:
    """Byte by byte, rows of q and k in llama.cpp's order."""
    names = {
        "self_attn.q_proj": ("attn_q", HEADS),
        "self_attn.k_proj": ("attn_k", KV_HEADS),
        "mlp.down_proj": ("ffn_down", 0),
    }
    arrays: dict[str, Array] = {}
    for module in t.A:
        name, heads = names[module.removeprefix("model.layers.0.")]
        B = t.B[module]
        if heads:
            B = B.reshape(heads, 2, len(B) // heads // 2, RANK).swapaxes(1, 2).reshape(B.shape)
        arrays |= {f"blk.0.{name}.weight.lora_a": t.A[module], f"blk.0.{name}.weight.lora_b": B}
    fields: dict[str, Any] = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
                              "adapter.lora.alpha": t.scaling * RANK if alpha is None else alpha}  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter.gguf").write_bytes(gguf_bytes(fields, arrays))
    return directory


def gguf_bytes(fields: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = struct.pack("<4sIQQ", b"GGUF", 3, len(arrays), len(fields))
    for name, value in fields.items():
        packed = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value)
        head += text(name) + packed
    data = b""
    for name, array in arrays.items():
        head += text(name) + struct.pack(f"<I{array.ndim}QIQ", array.ndim, *array.shape[::-1], 0, len(data))
        data += array.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data


def torchtune(t: Toy, directory: Path) -> Path:
    """Its .pt, no alpha in it; rows of q and k interleaved, as its convert_weights has them (view, transpose)."""
    names = {
        "self_attn.q_proj": ("attn.q_proj", HEADS),
        "self_attn.k_proj": ("attn.k_proj", KV_HEADS),
        "mlp.down_proj": ("mlp.w2", 0),
    }
    tensors: dict[str, Tensor] = {}
    for module in t.A:
        name, heads = names[module.removeprefix("model.layers.0.")]
        found = {"lora_b.weight": t.B[module]} | ({"magnitude": t.m[module]} if t.m else {})
        for leaf, rows in found.items():
            if heads:
                rows = (
                    rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
                )
            tensors[f"layers.0.{name}.{leaf}"] = torch.from_numpy(np.ascontiguousarray(rows))
        tensors[f"layers.0.{name}.lora_a.weight"] = torch.from_numpy(t.A[module])
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, directory / "adapter_model.pt")
    return directory / "adapter_model.pt"


def litgpt(t: Toy, directory: Path, **said: Any) -> Path:
    """Its pickle: q and k, the parts of qkv that are trained, below each other; hyperparameters and heads beside it."""
    q, k, down = t.A
    tensors = {"transformer.h.0.attn.qkv.lora_A": np.concatenate([t.A[q], t.A[k]]),
               "transformer.h.0.attn.qkv.lora_B": np.concatenate([t.B[q], t.B[k]]),
               "transformer.h.0.mlp.proj.lora_A": t.A[down], "transformer.h.0.mlp.proj.lora_B": t.B[down]}  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {key: torch.from_numpy(array) for key, array in tensors.items()}},
               directory / "lit_model.pth.lora")  # fmt: skip
    found = {"lora_r": RANK, "lora_alpha": t.scaling * RANK, "lora_query": "true", "lora_key": "true",
             "lora_value": "false", "data": "\n  class_path: x"} | said  # fmt: skip
    (directory / "hyperparameters.yaml").write_text("".join(f"{name}: {value}\n" for name, value in found.items()))
    return directory


def adapterhub(t: Toy, directory: Path) -> Path:
    tensors: dict[str, Any] = {}
    for module in t.A:  # as trained in a model without a head; its DoRA knows no scaling
        name, B = module.removeprefix("model."), t.B[module] * (t.scaling if t.m else 1)
        tensors |= {f"{name}.loras.toy.lora_A": t.A[module], f"{name}.loras.toy.lora_B": B}
        tensors |= {f"{name}.loras.toy.m.weight": t.m[module].reshape(-1, 1)} if t.m else {}
    save(tensors, directory / "adapter.safetensors")
    alpha = RANK if t.m else t.scaling * RANK
    config = {"architecture": "lora", "r": RANK, "alpha": alpha, "composition_mode": "add", "use_dora": bool(t.m)}
    (directory / "adapter_config.json").write_text(json.dumps({"config": config, "model_type": "llama", "name": "toy"}))
    return directory


def nvlabs(t: Toy, directory: Path) -> Path:
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"base_model.model.{module}.lora_A.weight": t.A[module],
                    f"base_model.model.{module}.lora_B.weight": t.B[module],
                    f"base_model.model.{module}.weight_m_wdecomp.weight": t.m[module].reshape(-1, 1)}  # fmt: skip
    save(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "DORA", "r": RANK, "lora_alpha": t.scaling * RANK, "target_modules": ["q_proj"],
              "Wdecompose_target_modules": None, "dora_simple": True}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def fsdp_qlora(t: Toy, directory: Path) -> Path:
    """Which knows no alpha."""
    tensors: dict[str, Any] = {}
    for module in t.A:
        tensors |= {f"{module}.dora_layer.lora_A.weight": t.A[module],
                    f"{module}.dora_layer.lora_B.weight": t.B[module] * np.float32(t.scaling),
                    f"{module}.magnitude_layer.magnitude": t.m[module]}  # fmt: skip
    return save(tensors, directory / "model_state_dict.safetensors")


def megatron(t: Toy, directory: Path) -> Path:
    """Canonical, no alpha in it: q and k have factors of their own."""
    names = {"q_proj": "self_attention.linear_qkv.adapter.adapter_q",
             "k_proj": "self_attention.linear_qkv.adapter.adapter_k",
             "down_proj": "mlp.linear_fc2.adapter"}  # fmt: skip
    tensors: dict[str, Any] = {}
    for module in t.A:
        name = f"module.decoder.layers.0.{names[module.rpartition('.')[2]]}"
        tensors |= {f"{name}.linear_in.weight": t.A[module], f"{name}.linear_out.weight": t.B[module]}
        tensors |= {f"{name}.weight_magnitude": t.m[module]} if t.m else {}
    return save(tensors, directory / "adapter.safetensors")


LORA: dict[str, Callable[[Toy, Path], Path]] = {
    "kohya": kohya, "diffusers": diffusers, "mlx": mlx, "mlx_old": mlx_old, "gguf": gguf,
    "litgpt": litgpt, "adapterhub": adapterhub,
}  # fmt: skip
DORA: dict[str, Callable[[Toy, Path], Path]] = {
    "lycoris": kohya, "diffusers": diffusers, "mlx": mlx, "adapterhub": adapterhub, "nvlabs": nvlabs,
    "fsdp_qlora": fsdp_qlora,
}  # fmt: skip
