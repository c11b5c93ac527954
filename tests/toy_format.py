"""A format, in one module: `<module>/down` (in, r), `<module>/up` (out, r) and `<module>/alpha`, a stored number."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2surgery import formats
from d2surgery.files.header import Header
from d2surgery.formats.format import Holding, Values, as_read
from d2surgery.formats.layout import AdapterLayout, Layout, Slot, Stored

NAME = "toy"
TITLE, READS = "a toy", "LoRA"
with_base = as_read


def recognise(header: Header, config: Mapping[str, Any] | None) -> str:
    return "keys end in /down" if any(key.endswith("/down") for key in header.tensors) else ""


def layout(header: Header, config: Mapping[str, Any] | None, values: Values) -> Layout:
    adapters = {}
    for key in header.tensors:
        module, _, part = key.rpartition("/")
        if part == "down":
            (inside, rank), (out, _) = header.tensors[key].shape, header.tensors[f"{module}/up"].shape
            adapters[module] = AdapterLayout(
                module=module,
                kind="lora",
                stored="linear",
                slots={"A": Slot(key, transposed=True), "B": Slot(f"{module}/up")},
                ranks={"update": rank},
                out_features=out,
                in_features=inside,
                dtype=header.tensors[key].dtype,
                scaling=values(f"{module}/alpha")[0] / rank,
                numbers=(f"{module}/alpha",),
            )
    return Layout(path=header.files[0], format=NAME, header=header, adapters=adapters)


def holds(kind: str) -> frozenset[Stored]:
    return frozenset(("linear",)) if kind == "lora" else frozenset()


def write(checkpoint: Holding, directory: Path) -> None:
    tensors = {}
    for module, entry in checkpoint.layout.adapters.items():
        adapter = checkpoint.adapter(module)
        tensors[f"{module}/down"] = adapter.slots()["A"].T.contiguous()
        tensors[f"{module}/up"] = adapter.slots()["B"]
        tensors[f"{module}/alpha"] = torch.tensor(float(adapter.scaling) * entry.ranks["update"])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")


def register(monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "FORMATS", (sys.modules[__name__], *formats.FORMATS))
