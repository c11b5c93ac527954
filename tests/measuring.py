"""Small bases and adapters on disk, of every kind, for the tests of what measures show."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2surgery import KINDS, About, Adapter, from_adapters, save

TYPES = {"self_attn.q_proj": (20, 16), "mlp.down_proj": (16, 24)}
RANK = 4


def modules(layers: int) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in TYPES.items()}


def write_base(directory: Path, layers: int = 3) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{m}.weight": torch.randn(s, generator=generator) for m, s in modules(layers).items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def write_adapter(
    directory: Path, kind: str = "lora", layers: int = 3, seed: int = 0, names: Sequence[str] | None = None
) -> Path:
    """Trained-like: every slot away from its start. `names` replaces the modules' names, in order."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(1)
    adapters: dict[str, Adapter] = {}
    for at, shape in enumerate(modules(layers).values()):
        weight = torch.randn(shape, generator=base)
        fresh = KINDS[kind].init(weight, rank=RANK, scaling=2.0, generator=generator)
        moved: dict[str, Any] = {slot: _moved(slot, tensor, generator) for slot, tensor in fresh.slots().items()}
        name = list(names)[at] if names else list(modules(layers))[at]
        adapters[name] = replace(fresh, **moved)
    save(from_adapters(adapters, About(base_model="org/base")), directory)
    return directory


def _moved(slot: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    return tensor * (1 + 0.02 * noise) if slot == "magnitude" else tensor + 0.05 * noise
