"""The four kinds of adapter as values: each one says what it adds to a base weight.

A base weight W0 is (out_features, in_features). Every kind defines one effective weight W'; its delta is W' − W0.
Three kinds have a thin update ΔW = P·Q and are one formula, per vector v along an axis (`Gains`):
W' = base_gain ⊙ W0 + update_gain ⊙ ΔW.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.forwards import (
    Axis as Axis,  # one word for the axis, here for those who know adapters only
)
from d2surgery.forwards import (
    Straight,
    at_least_float32,
    no_autocast,
    signed,
    signed_linear,
    straight_through,
    sums,
    thin_linear,
)
from d2surgery.lowrank import LowRank

Weight = Float[Tensor, "out_features in_features"]

CANCELLED = 1e-12
"""‖w+u‖² below this share of ‖w‖² + ‖u‖² is rounding: the vector counts as zero."""
SUSPICIOUS = 0.1
"""Below this share, float32 sums are repeated in float64."""
BLOCK = 32
FORMED = 1 << 18
"""Entries of Dual LoRA's delta formed at once: 2 MB in float64."""


class Triple(NamedTuple):
    """Per vector along an axis, in float64: ‖w‖², <w,u>, ‖u‖², w of the base weight and u of the update."""

    base: Float64[Tensor, " vectors"]
    cross: Float64[Tensor, " vectors"]
    update: Float64[Tensor, " vectors"]

    def plus(self, other: "Triple") -> "Triple":
        """The triple of two disjoint tiles of the same vectors."""
        return Triple(self.base + other.base, self.cross + other.cross, self.update + other.update)


class Gains(NamedTuple):
    """Per vector, in float64: W' = (1 + base_excess)·w + update_gain·u. The excess is kept to spare 1 + tiny − 1."""

    base_excess: Float64[Tensor, " vectors"]
    update_gain: Float64[Tensor, " vectors"]


Some = TypeVar("Some", bound="Adapter")


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter(ABC):
    """What was learnt for one module. A value: no method changes it. Construction raises SHAPE_UNEXPECTED."""

    kind: ClassVar[str]
    dimensions: ClassVar[dict[str, list[str]]] = {}
    """The names of each slot's dimensions, read from its annotation: shapes are said once."""
    scaling: float | Float[Tensor, ""]
    """A tensor only while training warms it up: torch.compile takes a number for a constant."""

    def __init_subclass__(cls) -> None:
        annotations = inspect.get_annotations(cls).items()
        own = {name: hint.dim_str.split() for name, hint in annotations if hasattr(hint, "dim_str")}
        cls.dimensions = cls.dimensions | own

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            check_shapes(self)

    @classmethod
    @abstractmethod
    def init(
        cls,
        base_weight: Weight,
        *,
        rank: int,
        scaling: float,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Adapter":
        """What training starts from, on `base_weight`'s device; other fields by dataclasses.replace."""

    @property
    def along(self) -> Axis | None:
        """The axis whose vectors the kind normalises; None if it has none."""
        return None

    @property
    def normalises(self) -> bool:
        """Whether the delta of a part needs the triple of the whole vectors."""
        return False

    @property
    def out_features(self) -> int:
        return next(_sizes(self, "out_features"))

    @property
    def in_features(self) -> int:
        return next(_sizes(self, "in_features"))

    def slots(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.dimensions}

    def to(self: Some, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Some:
        return _with(self, {name: slot.to(device=device, dtype=dtype) for name, slot in self.slots().items()})

    def take(self: Some, *, out: slice = slice(None), in_: slice = slice(None)) -> Some:
        """The adapter of the sub-matrix W0[out, in_]."""
        chosen = {"out_features": out, "in_features": in_}
        parts = {
            name: tuple(chosen.get(_resolve(self, dim), slice(None)) for dim in dims)
            for name, dims in self.dimensions.items()
        }
        return _with(self, {name: getattr(self, name)[part] for name, part in parts.items()})

    @abstractmethod
    def update(self) -> LowRank | None:
        """ΔW in float64, before any normalisation; None if it has no thin form."""

    @abstractmethod
    def triple(self, base_weight: Weight, along: Axis | None = None) -> Triple:
        """Sums over the entries of `base_weight` only, so the triples of disjoint tiles add up to that of the whole.

        `along` is the adapter's own axis by default, else "out_features". Not differentiable.
        """

    @abstractmethod
    def delta(self, base_weight: Weight, triple: Triple | None = None) -> Weight:
        """W' − W0 in `base_weight`'s dtype, differentiable in every slot.

        For a tile of a kind that `normalises`, `triple` is the triple of the whole vectors the tile's entries belong
        to (a constant to the gradient). Raises ZERO_NORM where a vector without length would have to be rescaled.
        """

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "*batch in_features"],
        base_weight: Weight,
        bias: Float[Tensor, " out_features"] | None = None,
        update_input: Float[Tensor, "*batch in_features"] | None = None,
        base_squares: Float64[Tensor, " vectors"] | None = None,
    ) -> Float[Tensor, "*batch out_features"]:
        """F.linear(x, W0 + delta, bias), W0 a constant to the gradient. Products run in the dtype of x, or autocast's.

        `update_input` (dropout) is what the update sees instead of x: W0 always sees x, where in PEFT's DoRA the
        dropped-out input also reaches W0, through its rescaling. `base_squares` is `squared_norms` of W0 along the
        adapter's axis, which never change.
        """


class _Thin(Adapter):
    """The kinds whose update is a thin product; each gives its factors and, if it normalises, its gains."""

    @abstractmethod
    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(P, Q) with ΔW = P·Q, the scaling folded in."""

    @property
    def _norm_learns(self) -> bool:
        """Whether the gradient goes through the norm of w + u."""
        return False

    def _target(self, triple: Triple) -> Tensor:
        """The norm each vector w + u is brought to."""
        raise NotImplementedError

    def _gains(self, triple: Triple) -> Gains:
        raise NotImplementedError

    def update(self) -> LowRank:
        return LowRank(*self._factors(torch.float64))

    @torch.no_grad()
    def triple(self, base_weight: Weight, along: Axis | None = None) -> Triple:
        along = along or self.along or "out_features"
        W, P, Q = _rows_first(at_least_float32(base_weight), *self._factors(torch.float64), along)
        triple = _triple(W, P, Q)
        doubtful = _doubtful(triple)
        if W.dtype == torch.float64 or doubtful.numel() == 0:
            return triple
        exact = _triple(W[doubtful].double(), P[doubtful], Q)
        return Triple(*(sums.index_copy(0, doubtful, better) for sums, better in zip(triple, exact, strict=True)))

    def delta(self, base_weight: Weight, triple: Triple | None = None) -> Weight:
        if self.normalises and triple is None:
            factors = self._factors(torch.float64)
            triple = self._training_triple(base_weight, *factors) if _learns(self) else self.triple(base_weight)
        W, P, Q = _rows_first(base_weight, *self._factors(torch.float64), self.along or "out_features")
        with no_autocast(W):
            if triple is None or not self.normalises:
                delta = _product_like(W, P.to(W.dtype), Q.to(W.dtype))
            else:
                _refuse_zero_norms(triple, self._target(triple), self.along)
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
        if not self.normalises:
            y = thin_linear(x, base_weight, P, Q, update_input=update_input)
        else:
            gains = self._gains(self._training_triple(base_weight, P, Q, base_squares))
            a, b = (1 + gains.base_excess).to(P.dtype), gains.update_gain.to(P.dtype)
            P, Q = (b[:, None] * P, Q) if self.along == "out_features" else (P, b * Q)
            y = thin_linear(x, base_weight, P, Q, gain=a, along=self.along or "out_features", update_input=update_input)
        return y if bias is None else y + bias.to(y.dtype)

    def _training_triple(self, base_weight: Weight, P: Tensor, Q: Tensor, base_squares: Tensor | None = None) -> Triple:
        """As `triple`, without a look at the data, and differentiable where the kind's norm is."""
        along = self.along or "out_features"
        squares = squared_norms(base_weight, along) if base_squares is None else base_squares
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._norm_learns):
            return Triple(squares, *sums(*_rows_first(base_weight, P, Q, along)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair(_Thin):
    """ΔW = s·B·A."""

    A: Float[Tensor, "rank in_features"]
    B: Float[Tensor, "out_features rank"]

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.scaling * self.B.to(dtype), self.A.to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRA(_Pair):
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
        A = _kaiming(base_weight, rank, dtype, generator)
        return cls(A=A, B=_zeros(base_weight, rank, dtype), scaling=scaling)


@dataclass(frozen=True, kw_only=True, eq=False)
class DoRA(_Pair):
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
            A=_kaiming(base_weight, rank, dtype, generator),
            B=_zeros(base_weight, rank, dtype),
            magnitude=_row_sums(at_least_float32(rows).square()).sqrt().to(dtype),
            scaling=scaling,
            along=along,
        )

    @property
    def normalises(self) -> bool:
        return True

    def _target(self, triple: Triple) -> Tensor:
        return self.magnitude.double()

    def _gains(self, triple: Triple) -> Gains:
        """g = m/‖V‖ for both."""
        gain = self._target(triple) / _sum_norm(triple)
        return Gains(gain - 1, gain)


Form = Literal["projected_plus_update", "projected", "update"]


@dataclass(frozen=True, kw_only=True, eq=False)
class D2LoRA(_Thin):
    """Ŵ = W* + ΔW, W* = c ⊙ (W0 + ΔW), c = ‖W0‖/‖W0 + ΔW‖, ΔW = s·(B₊A₊ − τ·B₋A₋)  (arXiv:2602.14728).

    `form` "projected" is W* alone, "update" W0 + ΔW. A zero vector of W0 has c = 0, so Ŵ = ΔW there; ‖W0 + ΔW‖ = 0
    under a non-zero vector of W0 is ZERO_NORM. `detach_norm` makes c a constant to the gradient. Where the branches
    nearly cancel, a delta in float32 errs by 1e-7 of the branches, not of their sum; `update()` does not.
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
            A_plus=_kaiming(base_weight, rank, dtype, generator),
            B_plus=_zeros(base_weight, rank, dtype),
            A_minus=_normal(base_weight, (rank, base_weight.shape[1]), sigma, dtype, generator),
            B_minus=_zeros(base_weight, rank, dtype),
            scaling=scaling,
        )

    @property
    def normalises(self) -> bool:
        return self.form != "update"

    @property
    def _norm_learns(self) -> bool:
        return not self.detach_norm

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        P = torch.cat([self.scaling * self.B_plus.to(dtype), -self.scaling * self.tau * self.B_minus.to(dtype)], 1)
        return P, torch.cat([self.A_plus.to(dtype), self.A_minus.to(dtype)], 0)

    def _target(self, triple: Triple) -> Tensor:
        return triple.base.sqrt()

    def _gains(self, triple: Triple) -> Gains:
        """c − 1 = (‖w‖² − ‖w+u‖²)/(‖w+u‖(‖w+u‖ + ‖w‖)), without cancellation since the numerator is −2<w,u> − ‖u‖²."""
        norm = _sum_norm(triple)
        excess = -(2 * triple.cross + triple.update) / (norm * (norm + self._target(triple)))
        return Gains(excess, excess + (2 if self.form == "projected_plus_update" else 1))


@dataclass(frozen=True, kw_only=True, eq=False)
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
        sigma: float = 0.02,
        generator: Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "DualLoRA":
        """Both groups of this rank, all four N(0, sigma²): zero would stop ReLU's gradient. The delta is not zero;
        training multiplies the scaling by a warm-up factor that starts at 0."""
        rows, columns = base_weight.shape
        A, C = (_normal(base_weight, (rank, columns), sigma, dtype, generator) for _ in "AC")
        B, D = (_normal(base_weight, (rows, rank), sigma, dtype, generator) for _ in "BD")
        return cls(A=A, B=B, C=C, D=D, scaling=scaling)

    def update(self) -> None:
        return None

    @torch.no_grad()
    def triple(self, base_weight: Weight, along: Axis | None = None) -> Triple:
        W, U = at_least_float32(base_weight), self.delta(at_least_float32(base_weight))
        W, U = (W, U) if along != "in_features" else (W.T, U.T)
        return Triple(_row_sums(W * W), _row_sums(W * U), _row_sums(U * U))

    def delta(self, base_weight: Weight, triple: Triple | None = None) -> Weight:
        """As every delta. D·C is formed in float64: a sign that flips is not a rounding error."""
        if not _learns(self):
            return Formed(self, base_weight.dtype).delta(base_weight)
        B = (self.scaling * self.B.double()).to(base_weight.dtype)
        with no_autocast(base_weight):
            size = _product_like(base_weight, B, self.A.to(base_weight.dtype)).relu_()
            z = _product_like(base_weight, self.D.double(), self.C.double())
        sign: Tensor = _Sign.apply(z, self.ste)  # type: ignore[no-untyped-call]
        return size * sign.to(size.dtype)

    def forward(
        self,
        x: Float[Tensor, "*batch in_features"],
        base_weight: Weight,
        bias: Float[Tensor, " out_features"] | None = None,
        update_input: Float[Tensor, "*batch in_features"] | None = None,
        base_squares: Float64[Tensor, " vectors"] | None = None,
    ) -> Float[Tensor, "*batch out_features"]:
        """Forms W' tile by tile: there is no thin form. Signs are those of float32 products of float32 slots."""
        wide = torch.promote_types(x.dtype, torch.float32)
        B, A, D, C = (slot.to(wide) for slot in (self.scaling * self.B.double(), self.A, self.D, self.C))
        y = signed_linear(x, base_weight, B, A, D, C, straight=self.ste, update_input=update_input)
        return y if bias is None else y + bias.to(y.dtype)


def gains_of(adapter: Adapter, triple: Triple) -> tuple[Gains, Tensor | None]:
    """The gains of a kind with a thin update, and ‖w'‖ per vector where the kind itself sets it (float64).

    Raises ZERO_NORM, and USAGE for Dual LoRA.
    """
    if not isinstance(adapter, _Thin):
        raise refuse("USAGE", "it has no thin update", got=adapter.kind)
    if not adapter.normalises:
        return Gains(torch.zeros_like(triple.base), torch.ones_like(triple.base)), None
    target = adapter._target(triple)
    _refuse_zero_norms(triple, target, adapter.along)
    keeps = not (isinstance(adapter, D2LoRA) and adapter.form == "projected_plus_update")
    return adapter._gains(triple), target.abs() if keeps else None


class Streamed:
    """A kind with a thin update, over the tiles of one base weight: `strength` times `take(tile).delta(tile, triple)`,
    with all that the tiles share computed once: the factors in the tiles' dtype, ‖u‖², the gains.

    A tile is a range of one axis and the whole of the other. Where it holds whole vectors, or the kind normalises none,
    `delta` and `merged` may come at once; otherwise after every tile has been added. Not differentiable.
    """

    def __init__(self, adapter: Adapter, dtype: torch.dtype, strength: float = 1.0) -> None:
        if not isinstance(adapter, _Thin):
            raise refuse("USAGE", "it has no thin update", got=adapter.kind)
        self.adapter = adapter
        self.dtype = dtype
        self.strength = strength
        P, Q = adapter._factors(torch.float64)
        self.P, self.Q = (P, Q) if adapter.along != "in_features" else (Q.T, P.T)
        self.Q_low = self.Q.to(dtype)
        self.added = False
        self.gains: _Gained | None = None  # of all vectors
        if adapter.normalises:
            self.norms = _norms_by_qr(self.P, self.Q)
            self.base = torch.zeros_like(self.norms)
            self.products = torch.zeros_like(self.P.T)  # Q·Wᵀ, summed over tiles
        else:
            self.gains = _Gained(None, None, (strength * self.P).to(dtype))

    def add(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> None:
        """Add a tile to the sums of its vectors."""
        W, vectors, others = self._rows_first(tile, out, in_)
        self.base[vectors] += _row_squares(W)
        self.products[:, vectors] += self.Q_low[:, others] @ W.T
        self.added = True

    def doubtful(self) -> Tensor:
        """The vectors whose norm nearly cancels: sums of float32 products do not hold it."""
        return _doubtful(self._triple(slice(None)))

    def forget(self, vectors: Tensor) -> None:
        """Begin their sums again."""
        self.base[vectors] = 0
        self.products[:, vectors] = 0

    def add_exactly(self, tile: Weight, vectors: Tensor, *, out: slice = slice(None), in_: slice = slice(None)) -> None:
        """Add a tile to the sums of some vectors that it crosses, in float64."""
        W, _, others = self._rows_first(tile, out, in_)
        W = W[vectors].double()
        self.base[vectors] += (W * W).sum(1)
        self.products[:, vectors] += self.Q[:, others] @ W.T

    def delta(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile's strength·delta, laid out as the tile. Raises ZERO_NORM, counting vectors within the tile."""
        W, vectors, others = self._rows_first(tile, out, in_)
        excess, _, P = self._gains(W, vectors, out, in_)
        if excess is None:
            delta = _product_like(W, P, self.Q_low[:, others])
        else:
            delta = (W * excess[:, None]).addmm_(P, self.Q_low[:, others])
        return delta.T if self.adapter.along == "in_features" else delta

    def merged(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile + strength·delta, written over the tile."""
        W, vectors, others = self._rows_first(tile, out, in_)
        _, scale, P = self._gains(W, vectors, out, in_)
        if scale is None:
            W += _product_like(W, P, self.Q_low[:, others])  # not addmm_: a product that is rounded, as PEFT's
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
        self.base[vectors] = _row_squares(W)
        self.products[:, vectors] = self.Q_low @ W.T
        bad = _doubtful(self._triple(vectors))
        exact = W[bad].double()
        self.base[vectors].index_copy_(0, bad, (exact * exact).sum(1))  # a view: it writes through
        self.products[:, vectors].index_copy_(1, bad, self.Q @ exact.T)
        return self._gained(self.adapter.take(out=out, in_=in_), vectors)

    def _gained(self, adapter: Adapter, vectors: slice) -> "_Gained":
        gains, _ = gains_of(adapter, self._triple(vectors))
        excess = self.strength * gains.base_excess
        P = self.strength * gains.update_gain[:, None] * self.P[vectors]
        return _Gained(excess.to(self.dtype), (1 + excess).to(self.dtype), P.to(self.dtype))


class Formed:
    """Dual LoRA, which has no thin update, over the tiles of one base weight: `Streamed`'s methods.

    In blocks of entries as they lie in memory, small enough for the cache: fresh memory costs more than the arithmetic.
    """

    def __init__(self, adapter: DualLoRA, dtype: torch.dtype, strength: float = 1.0) -> None:
        self.strength = strength
        self.B, self.A = (adapter.scaling * adapter.B.double()).to(dtype), adapter.A.to(dtype)
        self.D, self.C = adapter.D.double(), adapter.C.double()
        self._memory = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def delta(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile's strength·delta, laid out as the tile."""
        result = torch.empty_like(tile)
        for block, delta in self._blocks(result, out, in_):
            block.copy_(delta)
        return result

    @torch.no_grad()
    def merged(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile + strength·delta, written over the tile."""
        for block, delta in self._blocks(tile, out, in_):
            block += delta
        return tile

    def _blocks(self, tile: Tensor, out: slice, in_: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the tile as it lies in memory, and what is to be added to each."""
        B, A, D, C = self.B[out], self.A[:, in_], self.D[out], self.C[:, in_]
        if _is_transposed(tile):
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


class _Gained(NamedTuple):
    """W' = scale ⊙ W + P·Q per vector, scale = 1 + excess; None for a kind that does not rescale."""

    excess: Tensor | None
    scale: Tensor | None
    P: Tensor

    def take(self, vectors: slice) -> "_Gained":
        excess, scale = (None if gain is None else gain[vectors] for gain in (self.excess, self.scale))
        return _Gained(excess, scale, self.P[vectors])


def squared_norms(base_weight: Weight, along: Axis) -> Float64[Tensor, " vectors"]:
    """‖w‖² of every vector along the axis."""
    return _row_sums(at_least_float32(base_weight if along == "out_features" else base_weight.T).square())


KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LoRA, DoRA, DualLoRA, D2LoRA)}


def check_shapes(adapter: Adapter) -> None:
    """Every slot has the dimensions its annotation names, equal names equal sizes; every choice is one of its words."""
    sizes: dict[str, int] = {}
    problems = []
    for name, words in adapter.dimensions.items():
        dims = [_resolve(adapter, word) for word in words]
        got = tuple(getattr(adapter, name).shape)
        wanted = f"({', '.join(dims)}) = ({', '.join(str(sizes.get(dim, dim)) for dim in dims)})"
        if len(got) != len(dims) or [sizes.setdefault(*pair) for pair in zip(dims, got, strict=True)] != list(got):
            message = f"{name} does not fit."
            problems.append(Problem(code="SHAPE_UNEXPECTED", message=message, wanted=wanted, got=str(got)))
    for field in fields(adapter):
        value, choices = getattr(adapter, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            message = f"No such {field.name}."
            problems.append(Problem(code="BAD_CONFIG", message=message, wanted=" or ".join(choices), got=repr(value)))
    raise_errors(problems)


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


def _with(adapter: Some, slots: dict[str, Tensor]) -> Some:
    return replace(adapter, **slots)


def _resolve(adapter: Adapter, dim: str) -> str:
    return adapter.along if dim == "vectors" and adapter.along else dim


def _sizes(adapter: Adapter, axis: Axis) -> Iterator[int]:
    for name, dims in adapter.dimensions.items():
        if axis in dims:
            yield getattr(adapter, name).shape[dims.index(axis)]


def _learns(adapter: Adapter) -> bool:
    return torch.is_grad_enabled() and any(slot.requires_grad for slot in adapter.slots().values())


def _rows_first(W: Tensor, P: Tensor, Q: Tensor, along: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """The same matrices with the kept axis first: what holds for rows holds for the columns of the transpose."""
    return (W, P, Q) if along == "out_features" else (W.T, Q.T, P.T)


def _triple(W: Tensor, P: Tensor, Q: Tensor) -> Triple:
    """Per row: ‖w_i‖², <w_i,u_i> = Σ_k P_ik (Q·Wᵀ)_ki, ‖u_i‖². Products in W's dtype, sums in float64."""
    with no_autocast(W):
        cross = (P.T * (Q.to(W.dtype) @ W.T)).sum(0)
        return Triple(_row_sums(W * W), cross, _norms_by_qr(P, Q))


def _norms_by_qr(P: Tensor, Q: Tensor) -> Tensor:
    """‖u_i‖² = ‖R·P_iᵀ‖² with Qᵀ = (orthonormal)·R: exact also where the branches of an update nearly cancel."""
    R: Tensor = torch.linalg.qr(Q.T, mode="r").R
    return (R @ P.T).square().sum(0)


def _row_sums(values: Tensor) -> Tensor:
    """Float64 sums over dim 1: blocks of 32 in the dtype of the values, then blocks in float64 (error about 1e-8)."""
    if values.dtype == torch.float64:
        return values.sum(1)
    if _is_transposed(values):  # summing its rows as columns is 20 times faster
        return _blocked_sums(values.T, 0)
    return _blocked_sums(values, 1)


def _row_squares(W: Tensor) -> Tensor:
    """‖w‖² per row in float64, as `_row_sums(W * W)`: of contiguous rows in one pass, without the squares."""
    if W.dtype == torch.float64 or _is_transposed(W):
        return _row_sums(W * W)
    body, tail = torch.split(W, [W.shape[1] // BLOCK * BLOCK, W.shape[1] % BLOCK], 1)
    norms: Tensor = torch.linalg.vector_norm(torch.unflatten(body, 1, (-1, BLOCK)), dim=2)
    return norms.double().square().sum(1) + tail.double().square().sum(1)


def _blocked_sums(values: Tensor, dim: int) -> Tensor:
    blocks, rest = divmod(values.shape[dim], BLOCK)
    body, tail = torch.split(values, [blocks * BLOCK, rest], dim)
    sums: Tensor = torch.unflatten(body, dim, (blocks, BLOCK)).sum(dim + 1).double().sum(dim)
    return sums + tail.double().sum(dim)


def _sum_squares(triple: Triple) -> Tensor:
    """‖w+u‖²."""
    return triple.base + 2 * triple.cross + triple.update


def _sum_norm(triple: Triple) -> Tensor:
    """‖w+u‖, with 1 in place of zero: any finite gain leaves a zero vector zero."""
    return torch.where(_is_zero(triple), 1, _sum_squares(triple)).sqrt()


def _is_zero(triple: Triple) -> Tensor:
    return _sum_squares(triple) <= CANCELLED * (triple.base + triple.update)


def _doubtful(triple: Triple) -> Tensor:
    return (_sum_squares(triple) < SUSPICIOUS * (triple.base + triple.update)).nonzero()[:, 0]


def _refuse_zero_norms(triple: Triple, target: Tensor, along: Axis | None) -> None:
    bad = (_is_zero(triple) & (target != 0)).nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise refuse("ZERO_NORM", f"Vectors of length zero along {along}: {shown}.", wanted="a direction to rescale")


def _combine(W: Tensor, P: Tensor, Q: Tensor, gains: Gains) -> Tensor:
    """base_excess ⊙ W + update_gain ⊙ P·Q per row: the gain goes into the thin factor, so two passes over W."""
    result = W * gains.base_excess[:, None].to(W.dtype)
    return result.addmm_((gains.update_gain[:, None] * P).to(W.dtype), Q.to(W.dtype))


def _product_like(W: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """P·Q, lying in memory as W does: adding two layouts is slow."""
    return (Q.T @ P.T).T if _is_transposed(W) else P @ Q


def _is_transposed(W: Tensor) -> bool:
    return W.stride(0) < W.stride(1)


def _kaiming(W: Tensor, rank: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    bound = 1 / math.sqrt(W.shape[1])
    return torch.empty(rank, W.shape[1], dtype=dtype, device=W.device).uniform_(-bound, bound, generator=generator)


def _zeros(W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(W.shape[0], rank, dtype=dtype, device=W.device)


def _normal(W: Tensor, shape: tuple[int, int], sigma: float, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=W.device).normal_(0, sigma, generator=generator)
