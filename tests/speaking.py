"""A small model that reads bytes, with an adapter of any kind and their merge: for the tests of what models say."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from kinds import make
from models import byte_tokenizer, llama, scatter

from d2surgery import About, from_adapters, merge, save

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 258}


class Speaker(NamedTuple):
    base: Path
    adapter: Path
    merged: Path


def build(folder: Path, kind: str, dtype: str) -> Speaker:
    """Base and merge stored in the dtype, "BF16" or "F32"; ‖update‖ is 2 % of ‖W0‖ in every linear layer."""
    here = Speaker(folder / "base", folder / "adapter", folder / "merged")
    torch.manual_seed(0)
    model = llama(**SIZES, initializer_range=0.15)
    scatter(model)
    model.to(torch.bfloat16 if dtype == "BF16" else torch.float32).save_pretrained(here.base)
    byte_tokenizer().save_pretrained(here.base)
    weights = {k: v for k, v in model.state_dict().items() if k.endswith("_proj.weight")}
    adapters = {
        name.removesuffix(".weight"): make(kind, weight.float(), size=0.02, seed=seed).to(dtype=torch.float32)
        for seed, (name, weight) in enumerate(weights.items())
    }
    save(from_adapters(adapters, About(task="CAUSAL_LM")), here.adapter)
    merge(here.base, here.adapter, here.merged)
    return here
