"""A fifth kind, in one module: LoRA with a learnt length per output, w' = scale · ‖w‖ · (w + u)/‖w + u‖ per row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d2surgery import adapters, kinds
from d2surgery.adapters.adapter import kaiming, zeros
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.thin import OneProduct

ROW = kinds.Kind(
    title="scaled LoRA",
    groups={"update": kinds.Group("A", "B")},
    vectors=("scale",),
    axis=lambda settings: "out_features",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(OneProduct):
    kind: ClassVar[str] = "scaled"
    scale: Float[Tensor, " out_features"]

    @classmethod
    def init(cls, base_weight: Tensor, *, rank: int, scaling: float, generator: Any = None, dtype: Any = torch.float32):  # type: ignore[no-untyped-def]
        return cls(
            A=kaiming(base_weight, rank, dtype, generator),
            B=zeros(base_weight, rank, dtype),
            scale=torch.ones(base_weight.shape[0], dtype=dtype),
            scaling=scaling,
        )

    @property
    def along(self) -> Axis:
        return "out_features"

    def _target(self, base_squares: Tensor) -> Tensor:
        return self.scale * base_squares.sqrt()


def register(monkeypatch: Any) -> None:
    monkeypatch.setitem(kinds.TABLE, "scaled", ROW)
    monkeypatch.setitem(adapters.KINDS, "scaled", Scaled)
