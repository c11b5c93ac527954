"""D2-LoRA: two signed products, projected to the base's norms and added once more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from d2surgery.adapters.adapter import kaiming, normal, zeros
from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.thin import Thin
from d2surgery.adapters.vectors import Gains, Triple, Weight, sum_norm
from d2surgery.kinds import Form


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class D2LoRA(Thin):
    """Ŵ = W* + ΔW, W* = c ⊙ (W0 + ΔW), c = ‖W0‖/‖W0 + ΔW‖, ΔW = s·(B₊A₊ − τ·B₋A₋)  (arXiv:2602.14728).

    `form` "projected" is W* alone, "update" W0 + ΔW. A zero vector of W0 has c = 0, so Ŵ = ΔW there; ‖W0 + ΔW‖ = 0
    under a non-zero vector of W0 is ZERO_NORM. `detach_norm` makes c a constant to the gradient, `detach_minus` B₋·A₋.
    Where the branches nearly cancel, a delta in float32 errs by 1e-7 of the branches, not of their sum; `update()` does
    not.
    """

    kind: ClassVar[str] = "d2lora"
    A_plus: Float[Tensor, "rank_plus in_features"]
    B_plus: Float[Tensor, "out_features rank_plus"]
    A_minus: Float[Tensor, "rank_minus in_features"]
    B_minus: Float[Tensor, "out_features rank_minus"]
    tau: float = 0.5
    along: Axis = "in_features"
    form: Form = "projected_plus_update"
    detach_norm: bool = False
    detach_minus: bool = False

    @classmethod
    def init(
        cls,
        base_weight: Weight,
        *,
        rank: int,
        scaling: float,
        sigma: float = 0.02,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "D2LoRA":
        """A₊ Kaiming-uniform, A₋ N(0, sigma²), B₊ = B₋ = 0: Ŵ = W0."""
        return cls(
            A_plus=kaiming(base_weight, rank, dtype, generator),
            B_plus=zeros(base_weight, rank, dtype),
            A_minus=normal(base_weight, (rank, base_weight.shape[1]), sigma, dtype, generator),
            B_minus=zeros(base_weight, rank, dtype),
            scaling=scaling,
        )

    @property
    def sets_norm(self) -> bool:
        return self.form != "projected_plus_update"

    @property
    def _norm_learns(self) -> bool:
        return not self.detach_norm

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("A_minus", "B_minus") if self.detach_minus else ()

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.A_minus, self.B_minus
        A, B = (A.detach(), B.detach()) if self.detach_minus else (A, B)
        P = torch.cat([self.scaling * self.B_plus.to(dtype), -self.scaling * self.tau * B.to(dtype)], 1)
        return P, torch.cat([self.A_plus.to(dtype), A.to(dtype)], 0)

    def _target(self, base_squares: Tensor) -> Tensor:
        return base_squares.sqrt()

    @property
    def _extra(self) -> int:
        return 1 if self.form == "projected_plus_update" else 0

    def _gains(self, triple: Triple) -> Gains:
        """c − 1 = (‖w‖² − ‖w+u‖²)/(‖w+u‖(‖w+u‖ + ‖w‖)), without cancellation since the numerator is −2<w,u> − ‖u‖²."""
        norm = sum_norm(triple)
        excess = -(2 * triple.cross + triple.update) / (norm * (norm + self._target(triple.base)))
        return Gains(excess, excess + (1 + self._extra))
