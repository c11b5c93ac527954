"""The kinds whose update is a thin product, one formula: W' = base_gain ⊙ W0 + update_gain ⊙ P·Q per vector."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from d2surgery.adapters.adapter import Adapter, OverTiles, Part, Prepared, learns
from d2surgery.adapters.forwards import (
    Axis,
    Gain,
    at_least_float32,
    gained,
    no_autocast,
    rows_first,
    thin_linear,
    thin_product,
)
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.vectors import (
    Gains,
    Triple,
    Weight,
    doubtful,
    norms_by_qr,
    product_like,
    refuse_zero_norms,
    row_squares,
    row_sums,
    squared_norms,
    sum_norm,
    triple_of_cancelling_rows,
    triple_of_rows,
)
from d2surgery.errors import refuse


class Thin(Adapter):
    """The kinds whose update is a thin product; each gives its factors and, if it normalises, its gains."""

    @abstractmethod
    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(P, Q) with ΔW = P·Q, the scaling folded in."""

    @property
    def _norm_learns(self) -> bool:
        """Whether the gradient goes through the norm of w + u."""
        return False

    @property
    def sets_norm(self) -> bool:
        """Whether ‖w'‖ is the target, of a kind that normalises."""
        return True

    def _target(self, base_squares: Float64[Tensor, " vectors"]) -> Float[Tensor, " vectors"]:
        """The norm each vector w + u is brought to, where ‖w‖² is this."""
        raise NotImplementedError

    @property
    def _extra(self) -> int:
        """By how much more than that gain the update is multiplied."""
        return 0

    @property
    def first_order(self) -> int:
        return 1 + self._extra

    def _gains(self, triple: Triple) -> Gains:
        gain = self._target(triple.base) / sum_norm(triple)
        return Gains(gain - 1, gain + self._extra)

    def gains(self, base_weight: Weight) -> Gains:
        """Of every vector of the whole base weight, of a kind that normalises. Raises ZERO_NORM."""
        triple = self.triple(base_weight)
        refuse_zero_norms(triple, self._target(triple.base), self.along)
        return self._gains(triple)

    def update(self) -> LowRank:
        return LowRank(*self._factors(torch.float64))

    @torch.no_grad()
    def triple(self, base_weight: Weight, along: Axis | None = None) -> Triple:
        along = along or self.along or "out_features"
        W, P, Q = rows_first(at_least_float32(base_weight), *self._factors(torch.float64), along)
        triple = triple_of_rows(W, P, Q)
        bad = doubtful(triple)
        if bad.numel() == 0:
            return triple
        exact = triple_of_cancelling_rows(W[bad], P[bad], Q)
        return Triple(*(sums.index_copy(0, bad, better) for sums, better in zip(triple, exact, strict=True)))

    def delta(self, base_weight: Weight, triple: Triple | None = None) -> Weight:
        if self.normalises and triple is None:
            factors = self._factors(torch.float64)
            triple = self._training_triple(base_weight, *factors) if learns(self) else self.triple(base_weight)
        W, P, Q = rows_first(base_weight, *self._factors(torch.float64), self.along or "out_features")
        with no_autocast(W):
            if triple is None or not self.normalises:
                delta = product_like(W, P.to(W.dtype), Q.to(W.dtype))
            else:
                refuse_zero_norms(triple, self._target(triple.base), self.along)
                delta = _combine(W, P, Q, self._gains(triple))
        return delta.T if self.along == "in_features" else delta

    def forward(
        self,
        x: Float[Tensor, "*batch in_features"],
        base_weight: Weight,
        bias: Float[Tensor, " out_features"] | None = None,
        update_input: Float[Tensor, "*batch in_features"] | None = None,
        base_squares: Float64[Tensor, " vectors"] | None = None,
    ) -> Float[Tensor, "*batch out_features"]:
        """Thin: out axis y = a⊙(W0·x) + b⊙P(Q·u), in axis y = W0(a⊙x) + P(Q(b⊙u)), u the update's input.

        A vector without length stays zero here: whether it should have had one is asked when merging, not in each
        step.
        """
        P, Q = self._factors(torch.promote_types(x.dtype, torch.float32))
        gain = self._gain(base_weight, base_squares)
        y = thin_linear(x, base_weight, P, Q, gain=gain, update_input=update_input)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def prepared(
        self, base_weight: Weight, dtype: torch.dtype, base_squares: Float64[Tensor, " vectors"] | None = None
    ) -> Prepared:
        P, Q = self._factors(torch.promote_types(dtype, torch.float32))
        gain, a, axis = self._gain(base_weight, base_squares), None, self._axis
        if gain is not None:
            with no_autocast(base_weight):
                a, b, *_ = gained(base_weight, P, Q, gain)
            P, Q = (b[:, None] * P, Q) if axis == "out_features" else (P, b * Q)
        P, Q = P.to(dtype), Q.to(dtype)

        def forward(x: Tensor, W: Tensor) -> Tensor:
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            with no_autocast(x):
                return thin_product(rows, rows, W, P, Q, a, axis)[0].view(*x.shape[:-1], len(W))

        return forward

    def over_tiles(self, dtype: torch.dtype, strength: float = 1.0) -> "Streamed":
        return Streamed(self, dtype, strength)

    @property
    def _axis(self) -> Axis:
        return self.along or "out_features"

    def _gain(self, base_weight: Weight, base_squares: Tensor | None) -> Gain | None:
        if not self.normalises:
            return None
        squares = squared_norms(base_weight, self._axis) if base_squares is None else base_squares
        return Gain(self._target(squares), squares, self._axis, self._extra, self._norm_learns)

    def _training_triple(self, W: Tensor, P: Tensor, Q: Tensor) -> Triple:
        """As `triple`, differentiable where the norm is: by the Gram matrix, since QR has no gradient at P = 0."""
        W, P, Q = rows_first(at_least_float32(W), P, Q, self._axis)
        with no_autocast(W), torch.set_grad_enabled(self._norm_learns):
            cross = (P.T * (Q.to(W.dtype) @ W.T)).sum(0)
            return Triple(row_sums(W * W), cross, ((P @ (Q @ Q.T)) * P).sum(1))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OneProduct(Thin):
    """ΔW = s·B·A."""

    A: Float[Tensor, "rank in_features"]
    B: Float[Tensor, "out_features rank"]

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.scaling * self.B.to(dtype), self.A.to(dtype)


def gains_of(adapter: Adapter, triple: Triple) -> tuple[Gains, Tensor | None]:
    """The gains of a kind with a thin update, and ‖w'‖ per vector where the kind itself sets it (float64).

    Raises ZERO_NORM, and USAGE for Dual LoRA.
    """
    if not isinstance(adapter, Thin):
        raise refuse("USAGE", "it has no thin update", got=adapter.kind)
    if not adapter.normalises:
        return Gains(torch.zeros_like(triple.base), torch.ones_like(triple.base)), None
    target = adapter._target(triple.base).double()
    refuse_zero_norms(triple, target, adapter.along)
    return adapter._gains(triple), target.abs() if adapter.sets_norm else None


class Streamed(OverTiles):
    """`strength` times `take(tile).delta(tile, triple)`; shared: the factors in the tiles' dtype, ‖u‖², the gains."""

    def __init__(self, adapter: Thin, dtype: torch.dtype, strength: float = 1.0) -> None:
        self.adapter = adapter
        self.dtype = dtype
        self.strength = strength
        P, Q = adapter._factors(torch.float64)
        self.P, self.Q = (P, Q) if adapter.along != "in_features" else (Q.T, P.T)
        self.Q_low = self.Q.to(dtype)
        self.added = False
        self.gains: _Gained | None = None  # of all vectors
        if adapter.normalises:
            self.norms = norms_by_qr(self.P, self.Q)
            self.base = torch.zeros_like(self.norms)
            self.products = torch.zeros_like(self.P.T)  # Q·Wᵀ, summed over tiles
        else:
            self.gains = _Gained(None, None, (strength * self.P).to(dtype))

    def sum_over(self, tiles: Callable[[], Iterator[tuple[Weight, Part]]]) -> None:
        """Again, in float64, of vectors whose norm nearly cancels: sums of float32 products do not hold it."""
        for tile, part in tiles():
            self.add(tile, **part)
        bad = doubtful(self._triple(slice(None)))
        if len(bad):
            parts = (self._rows_first(tile, part.get("out", slice(None)), part.get("in_", slice(None)))
                     for tile, part in tiles())  # fmt: skip
            self._sum_exactly(bad, ((W[bad], others) for W, _, others in parts))

    def add(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> None:
        """Add a tile to the sums of its vectors."""
        W, vectors, others = self._rows_first(tile, out, in_)
        self.base[vectors] += row_squares(W)
        self.products[:, vectors] += self.Q_low[:, others] @ W.T
        self.added = True

    def _sum_exactly(self, bad: Tensor, parts: Iterator[tuple[Tensor, slice]]) -> None:
        """The sums of some vectors over their parts, as `triple_of_cancelling_rows`."""
        P, squares = self.P[bad], torch.zeros_like(self.base[bad])
        products = torch.zeros_like(self.products[:, bad])
        for part, others in parts:
            W, Q = part.double(), self.Q[:, others]
            squares += (W + P @ Q).square().sum(1)
            products += Q @ W.T
        self.products[:, bad] = products
        self.base[bad] = squares - 2 * (P.T * products).sum(0) - self.norms[bad]

    def delta(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        W, vectors, others = self._rows_first(tile, out, in_)
        excess, _, P = self._gains(W, vectors, out, in_)
        if excess is None:
            delta = product_like(W, P, self.Q_low[:, others])
        else:
            delta = (W * excess[:, None]).addmm_(P, self.Q_low[:, others])
        return delta.T if self.adapter.along == "in_features" else delta

    def merged(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        W, vectors, others = self._rows_first(tile, out, in_)
        _, scale, P = self._gains(W, vectors, out, in_)
        if scale is None:
            W += product_like(W, P, self.Q_low[:, others])  # not addmm_: a product that is rounded, as PEFT's
        else:
            W.mul_(scale[:, None]).addmm_(P, self.Q_low[:, others])
        return tile

    def _rows_first(self, tile: Tensor, out: slice, in_: slice) -> tuple[Tensor, slice, slice]:
        return (tile, out, in_) if self.adapter.along != "in_features" else (tile.T, in_, out)

    def _triple(self, vectors: slice) -> Triple:
        cross = (self.P[vectors].T * self.products[:, vectors]).sum(0)
        return Triple(self.base[vectors], cross, self.norms[vectors])

    def _gains(self, W: Tensor, vectors: slice, out: slice, in_: slice) -> "_Gained":
        """Those of the tile's vectors, whose sums are taken now if no tile was added."""
        if self.added:
            self.gains = self.gains or self._gained(self.adapter, slice(None))
        if self.gains is not None:
            return self.gains.take(vectors)
        self.base[vectors] = row_squares(W)
        self.products[:, vectors] = self.Q_low @ W.T
        bad = doubtful(self._triple(vectors))
        if len(bad):
            self._sum_exactly(bad + (vectors.start or 0), iter([(W[bad], slice(None))]))
        return self._gained(self.adapter.take(out=out, in_=in_), vectors)

    def _gained(self, adapter: Adapter, vectors: slice) -> "_Gained":
        gains, _ = gains_of(adapter, self._triple(vectors))
        excess = self.strength * gains.base_excess
        P = self.strength * gains.update_gain[:, None] * self.P[vectors]
        return _Gained(excess.to(self.dtype), (1 + excess).to(self.dtype), P.to(self.dtype))


class _Gained(NamedTuple):
    """W' = scale ⊙ W + P·Q per vector, scale = 1 + excess; None for a kind that does not rescale."""

    excess: Tensor | None
    scale: Tensor | None
    P: Tensor

    def take(self, vectors: slice) -> "_Gained":
        excess, scale = (None if gain is None else gain[vectors] for gain in (self.excess, self.scale))
        return _Gained(excess, scale, self.P[vectors])


def _combine(W: Tensor, P: Tensor, Q: Tensor, gains: Gains) -> Tensor:
    """base_excess ⊙ W + update_gain ⊙ P·Q per row: the gain goes into the thin factor, so two passes over W."""
    result = W * gains.base_excess[:, None].to(W.dtype)
    return result.addmm_((gains.update_gain[:, None] * P).to(W.dtype), Q.to(W.dtype))
