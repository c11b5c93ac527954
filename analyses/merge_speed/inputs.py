"""Writes a synthetic Llama-shaped checkpoint in bfloat16 and one adapter of each kind on all its linear modules."""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from d2surgery import KINDS, About, from_adapters, save

INIT, SCALING, TAU, MAGNITUDE_CHANGE = 0.02, 2.0, 0.5, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", type=json.loads, required=True, help="fields of a Llama config.json")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.shape, arguments.rank, torch.Generator().manual_seed(arguments.seed))


def write(directory: Path, shape: dict[str, int], rank: int, generator: torch.Generator) -> None:
    """base/ and one directory per kind; prints the sha256 of every weight file as JSON."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * INIT

    linear = linear_shapes(shape)
    weights = {f"{module}.weight": normal(*size).bfloat16() for module, size in linear.items()}
    norms = {module: weights[f"{module}.weight"].float().norm(dim=1) for module in linear}
    weights["model.embed_tokens.weight"] = normal(shape["vocab_size"], shape["hidden_size"]).bfloat16()
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(shape["hidden_size"], dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(shape["hidden_size"], dtype=torch.bfloat16)
    base = directory / "base"
    base.mkdir(parents=True)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(shape | LLAMA))
    del weights

    for kind, cls in KINDS.items():
        adapters = {}
        for module, (out_features, in_features) in linear.items():
            r = rank // 2 if kind == "duallora" else rank
            first, second = ((normal(r, in_features), normal(out_features, r)) for _ in range(2))
            slots = dict(zip(SLOTS[kind], (*first, *second), strict=False))
            if kind == "dora":
                slots["magnitude"] = norms[module] * (1 + MAGNITUDE_CHANGE / INIT * normal(out_features))
            adapters[module] = cls(scaling=SCALING, **slots, **({"tau": TAU} if kind == "d2lora" else {}))
        save(from_adapters(adapters, About(base_model="synthetic", task="CAUSAL_LM")), directory / kind)
    files = sorted(directory.rglob("*.safetensors"))
    print(json.dumps({f"{path.parent.name}/{path.name}": sha256(path) for path in files}))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}
SLOTS = {
    "lora": ("A", "B"),
    "dora": ("A", "B"),
    "duallora": ("A", "B", "C", "D"),
    "d2lora": ("A_plus", "B_plus", "A_minus", "B_minus"),
}


def linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear module."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query, key = (shape[f"num_{name}_heads"] * shape["head_dim"] for name in ("attention", "key_value"))
    sizes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(shape["num_hidden_layers"])
    return {f"model.layers.{layer}.{module}": size for layer in layers for module, size in sizes.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
