"""LoRA: a product of two thin factors."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from d2surgery.adapters.adapter import kaiming, zeros
from d2surgery.adapters.thin import OneProduct
from d2surgery.adapters.vectors import Weight


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoRA(OneProduct):
    """W' = W0 + s·B·A  (arXiv:2106.09685; rsLoRA arXiv:2312.03732 is a choice of s)."""

    kind: ClassVar[str] = "lora"

    @classmethod
    def init(
        cls,
        base_weight: Weight,
        *,
        rank: int,
        scaling: float,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LoRA":
        """A Kaiming-uniform with a = √5, that is U(−1/√in, 1/√in); B = 0."""
        A = kaiming(base_weight, rank, dtype, generator)
        return cls(A=A, B=zeros(base_weight, rank, dtype), scaling=scaling)
