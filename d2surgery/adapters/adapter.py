"""What an adapter is: the interface of every kind, and the shapes its slots must have."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, get_args, get_origin

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from d2surgery.adapters.forwards import Axis
from d2surgery.adapters.lowrank import LowRank
from d2surgery.adapters.vectors import Triple, Weight
from d2surgery.errors import Problem, raise_errors
from d2surgery.kinds import TABLE

Some = TypeVar("Some", bound="Adapter")
Prepared = Callable[[Tensor, Tensor], Tensor]
"""(x, W0) -> F.linear(x, W0 + delta), with all that does not depend on x computed before."""


class Part(TypedDict, total=False):
    """Which features of the whole weight a tile holds; all, where an axis is left out."""

    out: slice
    in_: slice


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        ranks = "+".join(str(getattr(self, group.down).shape[0]) for group in TABLE[self.kind].groups.values())
        said = "".join(f", {name} {value}" for name, value in self.settings.items())
        size = f"{self.in_features} → {self.out_features}, rank {ranks}, scaling {float(self.scaling):.4g}"
        return f"{type(self).__name__}({size}{said}, {str(next(iter(self.slots().values())).dtype)[6:]})"

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
    def settings(self) -> dict[str, Any]:
        """What decides the values beside the slots and the scaling."""
        return {name: getattr(self, name) for name in TABLE[self.kind].settings}

    @property
    def normalises(self) -> bool:
        """Whether the delta of a part needs the triple of the whole vectors."""
        return TABLE[self.kind].axis(self.settings) is not None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Slots that no gradient reaches."""
        return ()

    @property
    def first_order(self) -> int:
        """How often a small ΔW at right angles to W0 is in W' − W0."""
        return 1

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
    def over_tiles(self, dtype: torch.dtype, strength: float = 1.0) -> "OverTiles":
        """The same delta over the tiles of one base weight, computed in `dtype`, times `strength`."""

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

    prepares_weight: ClassVar[bool] = False
    """Whether what `prepared` keeps is as large as the weight."""

    def prepared(
        self, base_weight: Weight, dtype: torch.dtype, base_squares: Float64[Tensor, " vectors"] | None = None
    ) -> Prepared:
        """The forward over this very base weight, products in `dtype`, without gradients to the slots."""
        return lambda x, W: self.forward(x, W, None, None, base_squares)


class OverTiles(ABC):
    """An adapter over the tiles of one base weight, with all that the tiles share computed once. Not differentiable.

    A tile is a range of one axis and the whole of the other. Where it holds whole vectors, or the kind normalises none,
    `delta` and `merged` may come at once; otherwise after `sum_over` all tiles.
    """

    def sum_over(self, tiles: Callable[[], Iterator[tuple[Weight, Part]]]) -> None:  # noqa: B027
        """Take the sums of vectors that lie across tiles; `tiles()` gives them all, as often as it is asked."""

    @abstractmethod
    def delta(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile's strength·delta, laid out as the tile. Raises ZERO_NORM, counting vectors within the tile."""

    @abstractmethod
    def merged(self, tile: Weight, *, out: slice = slice(None), in_: slice = slice(None)) -> Weight:
        """The tile + strength·delta, written over the tile. Raises as `delta`."""


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


def _with(adapter: Some, slots: dict[str, Tensor]) -> Some:
    """With other tensors, whose shapes are known to fit: `dataclasses.replace` checks them, at ten times the cost."""
    made = copy(adapter)
    for name, slot in slots.items():
        object.__setattr__(made, name, slot)
    return made


def _resolve(adapter: Adapter, dim: str) -> str:
    return adapter.along if dim == "vectors" and adapter.along else dim


def _sizes(adapter: Adapter, axis: Axis) -> Iterator[int]:
    for name, dims in adapter.dimensions.items():
        if axis in dims:
            yield getattr(adapter, name).shape[dims.index(axis)]


def learns(adapter: Adapter) -> bool:
    return torch.is_grad_enabled() and any(slot.requires_grad for slot in adapter.slots().values())


def kaiming(W: Tensor, rank: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    bound = 1 / math.sqrt(W.shape[1])
    return torch.empty(rank, W.shape[1], dtype=dtype, device=W.device).uniform_(-bound, bound, generator=generator)


def zeros(W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(W.shape[0], rank, dtype=dtype, device=W.device)


def normal(W: Tensor, shape: tuple[int, int], sigma: float, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=W.device).normal_(0, sigma, generator=generator)
