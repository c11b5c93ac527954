"""Writers make an adapter module by module: nothing of it is held when the next one is due."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_llama import CONFIG

import d2surgery
from d2surgery import formats
from d2surgery.adapters import Adapter, LoRA
from d2surgery.checkpoint import Checkpoint
from d2surgery.formats.layout import About

MODULES = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(12) for leaf in "qo"]


class Counted:
    """A checkpoint that counts which factors are still held."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.layout, self.most = checkpoint, checkpoint.layout, 0
        self.held = weakref.WeakSet[torch.Tensor]()

    def tensor(self, key: str) -> torch.Tensor:
        return self.checkpoint.tensor(key)

    def bias(self, module: str) -> torch.Tensor:
        return self.checkpoint.bias(module)

    def adapter(self, module: str, expert: int = 0) -> Adapter:
        made: Any = self.checkpoint.adapter(module, expert)
        fresh = LoRA(A=made.A.clone(), B=made.B.clone(), scaling=made.scaling)
        self.held.add(fresh.A)
        self.most = max(self.most, len(self.held))
        return fresh


@pytest.mark.parametrize("format", ["kohya", "lycoris", "diffusers", "comfyui", "mlx", "gguf", "peft-serving", "peft"])
def test_a_writer_holds_a_few_modules_at_a_time(tmp_path: Path, format: str) -> None:
    names = MODULES
    if format == "comfyui":
        names = [f"single_transformer_blocks.{n}.proj_{leaf}" for n in range(12) for leaf in ("mlp", "out")]
    made = {name: LoRA(A=torch.randn(4, 32), B=torch.randn(32, 4), scaling=0.5) for name in names}
    holding = Counted(d2surgery.from_adapters(made, About(model=CONFIG)))
    formats.write(holding, tmp_path / "out", format)
    assert holding.most <= 2
    assert set(d2surgery.load(tmp_path / "out").layout.adapters) >= set(made)
