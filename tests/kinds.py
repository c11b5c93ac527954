"""Adapters of the four kinds for tests of the measures, and their effective weights by hand in numpy's float64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2surgery.adapters import Adapter, D2LoRA, DoRA, DualLoRA, LoRA
from d2surgery.adapters.forwards import Axis

KINDS_AND_AXES: list[tuple[str, Axis]] = [
    ("lora", "out_features"),
    ("dora", "out_features"),
    ("dora", "in_features"),
    ("d2lora", "out_features"),
    ("d2lora", "in_features"),
    ("projected", "in_features"),
    ("duallora", "out_features"),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def make(
    kind: str, W: Tensor, axis: Axis = "out_features", *, rank: int = 3, size: float = 0.01, gain: float = 0.002,
    seed: int = 0,
) -> Adapter:  # fmt: skip
    """An adapter with ‖update‖ = size·‖W‖ (Dual LoRA: about), DoRA's magnitudes off by N(0, gain²)."""
    out, in_ = W.shape
    B, A = normal(out, rank, seed=seed), normal(rank, in_, seed=seed + 1)
    D, C = normal(out, rank, seed=seed + 2), normal(rank, in_, seed=seed + 3)
    scaling = size * float(W.double().norm() / (B @ A).norm())
    if kind == "lora":
        return LoRA(A=A, B=B, scaling=scaling)
    if kind == "dora":
        norms = (W.double() + scaling * B @ A).norm(dim=1 if axis == "out_features" else 0)
        magnitude = norms * (1 + gain * normal(len(norms), seed=seed + 4))
        return DoRA(A=A, B=B, scaling=scaling, magnitude=magnitude, along=axis)
    if kind == "duallora":
        return DualLoRA(A=A, B=B, C=C, D=D, scaling=scaling)
    form: Any = "projected" if kind == "projected" else "projected_plus_update"
    return D2LoRA(A_plus=A, B_plus=B, A_minus=C, B_minus=D, scaling=scaling, along=axis, form=form)


def effective(adapter: Adapter, W: Tensor) -> Any:
    """W' by the formulas of docs/mathematics.md#the-four-kinds, in the precision of numpy's long double."""
    base = W.double().numpy().astype(np.longdouble)
    slots = {name: slot.double().numpy().astype(np.longdouble) for name, slot in adapter.slots().items()}
    s = np.longdouble(adapter.scaling)

    def norms(matrix: Any) -> Any:
        return np.sqrt((matrix**2).sum(axis=1 if adapter.along == "out_features" else 0, keepdims=True))

    if isinstance(adapter, DualLoRA):
        size = np.maximum(slots["B"] @ slots["A"], 0)
        return base + s * size * np.where(slots["D"] @ slots["C"] > 0, 1, -1)
    if isinstance(adapter, D2LoRA):
        update = s * (slots["B_plus"] @ slots["A_plus"] - adapter.tau * (slots["B_minus"] @ slots["A_minus"]))
        star = (base + update) * (norms(base) / norms(base + update))
        return {"projected": star, "update": base + update}.get(adapter.form, star + update)
    whole = base + s * (slots["B"] @ slots["A"])
    if isinstance(adapter, DoRA):
        magnitude = slots["magnitude"]
        column = magnitude[:, None] if adapter.along == "out_features" else magnitude[None]
        return column * whole / norms(whole)
    return whole
