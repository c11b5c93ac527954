"""Dual LoRA: one product gives sizes, another signs; no thin update."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor
from torch.nn import functional as F

from d2surgery.adapters.adapter import Adapter, OverTiles, Prepared, learns, normal
from d2surgery.adapters.forwards import (
    Axis,
    Straight,
    at_least_float32,
    no_autocast,
    rounds_away,
    signed,
    signed_linear,
    signed_weight,
    straight_through,
)
from d2surgery.adapters.vectors import Triple, Weight, is_transposed, product_like, row_sums

START = 0.01
"""By what share of the base weight the start moves it at full scaling, in Frobenius norm."""
FORMED = 1 << 18
"""Entries of Dual LoRA's delta formed at once: 2 MB in float64."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DualLoRA(Adapter):
    """W' = W0 + s·ReLU(B·A) ⊙ sign(D·C), sign(z) = +1 for z > 0, else −1  (arXiv:2512.03402).

    `ste` is the gradient through the sign z = D·C: "clip" clip(dL/dsign, −1, 1), "mask" dL/dsign·1[|z| ≤ 1],
    "identity" dL/dsign. It changes no value.
    """

    kind: ClassVar[str] = "duallora"
    A: Float[Tensor, "rank1 in_features"]
    B: Float[Tensor, "out_features rank1"]
    C: Float[Tensor, "rank2 in_features"]
    D: Float[Tensor, "out_features rank2"]
    ste: Straight = "clip"

    @classmethod
    def init(
        cls,
        base_weight: Weight,
        *,
        rank: int,
        scaling: float,
        sigma: float | None = None,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DualLoRA":
        """Both groups of this rank, all four N(0, sigma²): zero would stop ReLU's gradient. The delta is not zero;
        training multiplies the scaling by a warm-up factor that starts at 0. Without a sigma the delta is about START
        of the base weight then: ‖s·ReLU(BA)‖ = |s|·σ²·√(r/2) per entry, against the base's root mean square."""
        rows, columns = base_weight.shape
        sigma = _sigma_for(base_weight, rank, scaling) if sigma is None else sigma
        A, C = (normal(base_weight, (rank, columns), sigma, dtype, generator) for _ in "AC")
        B, D = (normal(base_weight, (rows, rank), sigma, dtype, generator) for _ in "BD")
        return cls(A=A, B=B, C=C, D=D, scaling=scaling)

    def update(self) -> None:
        return None

    @torch.no_grad()
    def triple(self, base_weight: Weight, along: Axis | None = None) -> Triple:
        W, U = at_least_float32(base_weight), self.delta(at_least_float32(base_weight))
        W, U = (W, U) if along != "in_features" else (W.T, U.T)
        return Triple(row_sums(W * W), row_sums(W * U), row_sums(U * U))

    def delta(self, base_weight: Weight, triple: Triple | None = None) -> Weight:
        """As every delta. D·C is formed in float64: a sign that flips is not a rounding error."""
        if not learns(self):
            return Formed(self, base_weight.dtype).delta(base_weight)
        B = (self._size * self.B.double()).to(base_weight.dtype)
        with no_autocast(base_weight):
            size = product_like(base_weight, B, self.A.to(base_weight.dtype)).relu_()
            z = product_like(base_weight, self.D.double(), self.C.double())
        sign: Tensor = _Sign.apply(z, self.ste)  # type: ignore[no-untyped-call]
        return size * (-sign if self._negative else sign).to(size.dtype)

    @property
    def _negative(self) -> bool:
        """Whether s·ReLU(B·A) is no ReLU(s·B·A)."""
        return not isinstance(self.scaling, Tensor) and self.scaling < 0

    @property
    def _size(self) -> float | Tensor:
        return -self.scaling if self._negative else self.scaling

    def over_tiles(self, dtype: torch.dtype, strength: float = 1.0) -> "Formed":
        return Formed(self, dtype, strength)

    def forward(
        self,
        x: Float[Tensor, "*batch in_features"],
        base_weight: Weight,
        bias: Float[Tensor, " out_features"] | None = None,
        update_input: Float[Tensor, "*batch in_features"] | None = None,
        base_squares: Float64[Tensor, " vectors"] | None = None,
    ) -> Float[Tensor, "*batch out_features"]:
        """Forms W' tile by tile: there is no thin form. Signs are those of float32 products of float32 slots."""
        B, A, D, C = self._wide(x.dtype)
        y = signed_linear(x, base_weight, B, A, D, C, straight=self.ste, update_input=update_input)
        if self._negative:  # W0 − u = 2·W0 − (W0 + u)
            y = 2 * F.linear(x, base_weight.to(x.dtype)) - y
        return y if bias is None else y + bias.to(y.dtype)

    prepares_weight: ClassVar[bool] = True

    @torch.no_grad()
    def prepared(
        self, base_weight: Weight, dtype: torch.dtype, base_squares: Float64[Tensor, " vectors"] | None = None
    ) -> Prepared:
        """W' in float32 and float64; in 16 bits the delta alone, beside W0."""
        formed = signed_weight(base_weight, *self._wide(dtype), dtype, negative=self._negative)
        if rounds_away(dtype):
            return lambda x, W: F.linear(x.to(dtype), W.to(dtype)) + F.linear(x.to(dtype), formed)
        return lambda x, W: F.linear(x.to(dtype), formed)

    def _wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B, with the size of the scaling, A, D and C, in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self._size * self.B.double()).to(wide), self.A.to(wide), self.D.to(wide), self.C.to(wide)


class Formed(OverTiles):
    """Dual LoRA, which has no thin update.

    In blocks of entries as they lie in memory, small enough for the cache: fresh memory costs more than the arithmetic.
    """

    def __init__(self, adapter: DualLoRA, dtype: torch.dtype, strength: float = 1.0) -> None:
        self.strength = -strength if adapter._negative else strength
        self.B, self.A = (adapter._size * adapter.B.double()).to(dtype), adapter.A.to(dtype)
        self.D, self.C = adapter.D.double(), adapter.C.double()
        self._memory = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def delta(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        result = torch.empty_like(tile)
        for block, delta in self._blocks(result, out, in_):
            block.copy_(delta)
        return result

    @torch.no_grad()
    def merged(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        for block, delta in self._blocks(tile, out, in_):
            block += delta
        return tile

    def _blocks(self, tile: Tensor, out: slice, in_: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the tile as it lies in memory, and what is to be added to each."""
        B, A, D, C = self.B[out], self.A[:, in_], self.D[out], self.C[:, in_]
        if is_transposed(tile):
            tile, B, A, D, C = tile.T, A.T, B.T, C.T, D.T
        step = min(max(FORMED // tile.shape[1], 1), tile.shape[0])
        if self._memory[0].shape != (step, tile.shape[1]):
            self._memory = tile.new_empty(step, tile.shape[1]), D.new_empty(step, tile.shape[1])
        with no_autocast(tile):
            for start in range(0, tile.shape[0], step):
                rows = slice(start, min(start + step, tile.shape[0]))
                size, z = (memory[: rows.stop - start] for memory in self._memory)
                torch.mm(B[rows], A, out=size)
                torch.mm(D[rows], C, out=z)
                delta = signed(size.relu_(), z)
                yield tile[rows], delta if self.strength == 1 else delta.mul_(self.strength)


def _sigma_for(W: Tensor, rank: int, scaling: float) -> float:
    if W.is_meta:  # a process of FSDP that is sent its slots
        return 1.0
    size = START * float(W.detach().double().square().mean().sqrt())
    return float((size / (abs(scaling) * (rank / 2) ** 0.5)) ** 0.5) if size and scaling else 0.02


class _Sign(torch.autograd.Function):
    """+1 where z > 0, else −1, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, ste: Straight) -> Tensor:
        ctx.ste = ste
        ctx.save_for_backward(z)
        return signed(torch.ones_like(z), z.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,), (grad,) = ctx.saved_tensors, grads
        return straight_through(grad, z, ctx.ste), None
