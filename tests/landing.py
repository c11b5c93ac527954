"""Where adapters land, asked with names and shapes alone."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from conftest import LORA, SIZES

from d2surgery import formats
from d2surgery.files.header import Header, TensorInfo
from d2surgery.placement.sites import Landing, sites

Shapes = Mapping[str, tuple[int, ...]]
NOWHERE = Path("/nowhere")  # whoever reads data here fails


def pair(module: str, out: int = 4, in_: int = 6) -> dict[str, tuple[int, ...]]:
    return {f"base_model.model.{module}.lora_A.weight": (2, in_), f"base_model.model.{module}.lora_B.weight": (out, 2)}


def header(shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> Header:
    infos = {}
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "F32")
        infos[name] = TensorInfo(NOWHERE, dtype, tuple(shape), 0, prod(shape) * SIZES[dtype])
    return Header((NOWHERE / "adapter_model.safetensors",), infos, {})


def place(shapes: Shapes, base: Shapes, config: Any = (), base_config: Any = (), **dtypes: str) -> Landing:
    targets = {"target_modules": r".*", "trainable_token_indices": [0, 1], "peft_version": "0.21.2"}
    full = {**LORA, **targets, **dict(config)}
    layout = formats.layout(header(shapes), full)
    assert [p for p in layout.problems if p.severity == "error"] == [], "the adapter file itself is in order"
    return sites(layout, header(base, dtypes), dict(base_config))
