"""DoRA: base plus update, each vector brought to a length that is learnt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from d2surgery.adapters.adapter import kaiming, zeros
from d2surgery.adapters.forwards import Axis, at_least_float32
from d2surgery.adapters.thin import OneProduct
from d2surgery.adapters.vectors import Weight, row_sums


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DoRA(OneProduct):
    """W' = m ⊙ V/‖V‖, V = W0 + s·B·A, norms along `along`  (arXiv:2402.09353).

    The norm is a constant to the gradient (section 4.3). A vector with ‖V‖ = 0 keeps W' = 0 if its m = 0 and is
    ZERO_NORM otherwise; PEFT has no epsilon and gives NaN.
    """

    kind: ClassVar[str] = "dora"
    magnitude: Float[Tensor, " vectors"]
    along: Axis = "out_features"

    @classmethod
    def init(
        cls,
        base_weight: Weight,
        *,
        rank: int,
        scaling: float,
        along: Axis = "out_features",
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DoRA":
        """A Kaiming-uniform, B = 0, m = ‖W0‖ along the axis."""
        rows = base_weight if along == "out_features" else base_weight.T
        return cls(
            A=kaiming(base_weight, rank, dtype, generator),
            B=zeros(base_weight, rank, dtype),
            magnitude=row_sums(at_least_float32(rows).square()).sqrt().to(dtype),
            scaling=scaling,
            along=along,
        )

    def _target(self, base_squares: Tensor) -> Tensor:
        return self.magnitude
