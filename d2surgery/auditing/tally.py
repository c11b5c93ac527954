"""What the audit's pass over base and merged side by side adds up."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import Recipe
from d2surgery.auditing.strays import Marks
from d2surgery.measures.fidelity import Comparison, Survival
from d2surgery.merging.tiles import AdaptedTile
from d2surgery.placement.site import Patch

LOW = (torch.bfloat16, torch.float16)


class Made(NamedTuple):
    """An adapted tile as our merge makes it, what it is made from, and what the file has."""

    tile: AdaptedTile
    ours: Tensor  # flat, in the dtype of the file
    merged: Tensor  # flat, as stored
    base_weight: Tensor  # (out_features, in_features), in the dtype of the work, as delta
    delta: Tensor


class Mismatch(NamedTuple):
    """An element, by its position in the tensor, that is not as a patch should have left it."""

    pair: TensorPair
    patch: Patch
    element: int


class Held(NamedTuple):
    """How a recipe holds base and adapter while it merges onto a grid (None: the file's own)."""

    recipe: Recipe | None
    grid: torch.dtype | None

    def base(self, base_weight: Tensor, pair: TensorPair) -> Tensor:
        """W0 in the dtype of the work, as loaded."""
        stored = pair.output.stored_dtype
        load = self.recipe.load(stored, self.grid or pair.dtype) if self.recipe else stored
        return base_weight if load == stored else base_weight.to(load).to(base_weight.dtype)

    def adapter(self, adapter: Adapter, pair: TensorPair) -> Adapter:
        """As rounded."""
        if self.recipe is None:
            return adapter
        none = torch.empty(0, dtype=pair.output.stored_dtype)
        return self.recipe.seen(Operands(none, adapter, self.grid or pair.dtype)).adapter


@dataclass
class Tally:
    """Sums of one module so far."""

    survival: Survival = field(default_factory=Survival)
    comparison: Comparison = field(default_factory=Comparison)
    recipes: set[str] = field(default_factory=set)  # that its tiles were compared with
    nearest: Recipe | None = None  # when no recipe gave every bit of a tile
    load: torch.dtype | None = None  # what the recipe of its first tile holds the base in
    grid: torch.dtype | None = None  # coarser than the file's, on which all values of its first tile lie
    first: Mismatch | None = None
    finite: bool = True
    clean: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # by tensor and recipe that gives every bit:
    # the first rows of these tiles, where any is given by none
    marks: dict[tuple[str, Patch], Marks] = field(default_factory=dict)  # by tensor and patch, where they are asked for

    @property
    def held(self) -> Held:
        """By the nearest recipe."""
        return Held(self.nearest, self.grid)

    def plus(self, other: "Tally") -> "Tally":
        """The sums of two tensors of one module."""
        return Tally(
            self.survival + other.survival,
            self.comparison + other.comparison,
            self.recipes | other.recipes,
            self.nearest or other.nearest,
            self.load or other.load,
            self.grid or other.grid,
            self.first or other.first,
            self.finite and other.finite,
            self.clean | other.clean,
            self.marks | other.marks,
        )


@dataclass
class Found:
    """What a pass over one pair found."""

    modules: dict[str, Tally] = field(default_factory=dict)
    mismatched: int = 0  # elements
    first: int | None = None  # mismatched element
    finite: bool = True
    rounding: bool | None = None  # whether an added bias differs by no more; None where it does not differ
    through: frozenset[torch.dtype] = frozenset(LOW)  # dtypes to which the base may have been rounded before
