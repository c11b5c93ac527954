"""One pass over base and merged side by side: the merge again, tile by tile, by the recipe that gives the file's bits.

The recipe that fitted last is tried first, so a file made by one merger costs one merge and one comparison. Where no
recipe gives every bit, the nearest is what the file is measured against.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.recipes import OURS, RECIPES, Operands, Recipe
from d2surgery.files.header import BITS
from d2surgery.files.tensors import as_bytes, read_part, read_rows
from d2surgery.machine import workers
from d2surgery.measures.fidelity import Comparison, Survival, bits, compare, measured
from d2surgery.merging.tiles import (
    AdaptedTile,
    Steps,
    Tile,
    TileMerger,
    all_finite,
    row_ranges,
    row_tile,
)
from d2surgery.placement.site import Patch

WHOLE = 1 << 24  # entries: the largest weight held whole, for recipes that normalise across tiles
_SAMPLE = 64  # rows on which recipes are told apart


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


@dataclass
class Tally:
    """Sums of one module so far."""

    survival: Survival = field(default_factory=Survival)
    comparison: Comparison = field(default_factory=Comparison)
    recipes: set[str] = field(default_factory=set)  # that its tiles were compared with
    nearest: Recipe | None = None  # when no recipe gave every bit of a tile
    first: Mismatch | None = None
    finite: bool = True

    def plus(self, other: "Tally") -> "Tally":
        """The sums of two tensors of one module."""
        return Tally(
            self.survival + other.survival,
            self.comparison + other.comparison,
            self.recipes | other.recipes,
            self.nearest or other.nearest,
            self.first or other.first,
            self.finite and other.finite,
        )


@dataclass
class Found:
    """What a pass over one pair found."""

    modules: dict[str, Tally] = field(default_factory=dict)
    mismatched: int = 0  # elements
    first: int | None = None  # mismatched element
    finite: bool = True
    rounding: bool | None = None  # whether an added bias differs by no more; None where it does not differ


@dataclass
class Replay:
    """What a pass over pairs found."""

    merger: TileMerger
    kinds: dict[str, str]  # module -> kind
    recipes: tuple[Recipe, ...] = RECIPES
    modules: dict[str, Tally] = field(default_factory=dict)
    tensors: dict[str, Found] = field(default_factory=dict)

    def run(self, pairs: Sequence[TensorPair], progress: Callable[[int, int], None]) -> None:
        """Compare every pair; progress(done, total) in bytes of the merge as ours would be.

        Several at once, but one with an adapter before all others: the recipe that fits it is tried first on them.
        """
        total = sum(pair.output.entry.nbytes for pair in pairs)
        first = [pair for pair in pairs if pair.output.site and pair.output.site.patches][:1]
        favourite, done = None, 0

        def advance(nbytes: int) -> None:
            progress(done + nbytes, total)

        for part in (first, [pair for pair in pairs if pair not in first]):
            passes = [Pass(self.merger, self.kinds, self.recipes, pair, favourite) for pair in part]
            work = [(one.pair.output, one.run) for one in passes]
            for one, found in zip(passes, self.merger.over(work, workers(), advance), strict=True):
                self._add(one.pair, found)
                favourite = one.favourite
            done += sum(pair.output.entry.nbytes for pair in part)

    def _add(self, pair: TensorPair, found: Found) -> None:
        self.tensors[pair.name] = found
        for module, tally in found.modules.items():
            self.modules[module] = self.modules[module].plus(tally) if module in self.modules else tally


@dataclass
class Pass:
    """The comparison of one pair, tile by tile."""

    merger: TileMerger
    kinds: dict[str, str]
    recipes: tuple[Recipe, ...]
    pair: TensorPair
    favourite: Recipe | None  # that fitted last
    found: Found = field(default_factory=Found)
    whole: tuple[Patch, str, Tensor] | None = None  # what a recipe made of a whole patch
    tall: tuple[Patch, Tensor, Tensor] | None = None  # some columns of a patch, of base and merged

    def run(self, steps: Steps) -> Found:
        for tile, stored in steps:
            merged = self._merged(tile)
            if isinstance(tile, AdaptedTile):
                self._compare_adapted(self._made(tile, stored, merged))
            else:
                self._compare(tile, self.merger.merge(tile, stored).reshape(-1).view(merged.dtype), merged)
        self.whole = self.tall = None
        return self.found

    def _merged(self, tile: Tile) -> Tensor:
        """The tile's elements in the merged file, flat, in memory of this thread."""
        source, own = BITS[self.pair.output.info.dtype], BITS[self.pair.info.dtype]
        merged = self.merger.workspace.take("merged", tile.nbytes * own // source, torch.uint8)
        read_part(self.pair.info, tile.start * own // source, as_bytes(merged), once=True)
        return merged.view(self.pair.dtype)

    def _made(self, tile: AdaptedTile, stored: Tensor, merged: Tensor) -> Made:
        """Our merge of a tile, in memory of this thread."""
        working = self.merger.base_weight(tile, stored)
        base_weight = self._space("base_weight", working).copy_(working)
        effective = self.merger.effective(tile, working)
        ours = self.merger.finish(tile, tile.flat(effective), stored).reshape(-1)
        return Made(tile, ours, merged, base_weight, effective.sub_(base_weight))

    def _compare(self, tile: Tile, ours: Tensor, merged: Tensor) -> None:
        """Of a tensor that no adapter patches."""
        site = self.pair.output.site
        if self._note(tile, ours, merged) is not None and site is not None and site.bias is not None:
            within = self._rounding_only(site.bias, tile, ours, merged)
            self.found.rounding = within and self.found.rounding is not False

    def _compare_adapted(self, made: Made) -> None:
        pair, patch, merged = self.pair, made.tile.patch, made.merged
        if pair.status == "tied":  # its module is judged where it is not tied
            self._note(made.tile, self._wanted(Tally(), made), merged)
            return
        tally = self.found.modules.setdefault(patch.module, Tally())
        wanted = self._wanted(tally, made)
        base, change = (m.T if patch.transposed else m for m in (made.base_weight, made.delta))
        there = merged.view(base.shape)
        survival = measured(base, change, there, (self._space("change", base), self._space("product", base)))
        tally.survival += survival
        if wanted is merged:
            tally.comparison += Comparison(
                elements=survival.elements, e_delta=survival.inner, ee=survival.applied_squared
            )
            return
        tally.comparison += compare(base, change, wanted.view(base.shape), there)
        tally.finite &= all_finite(merged)
        element = self._note(made.tile, wanted, merged)
        if element is not None and tally.first is None:
            tally.first = Mismatch(pair, patch, element)

    def _rounding_only(self, module: str, tile: Tile, wanted: Tensor, merged: Tensor) -> bool:
        """Whether base + s·bias differs by no more than rounding a product and a sum."""
        right = wanted.double()
        size = right.abs() + self.merger.bias(module, tile, right).abs()
        return bool(((merged.double() - right).abs() <= 2 * torch.finfo(merged.dtype).eps * size).all())

    def _space(self, purpose: str, like: Tensor) -> Tensor:
        """Memory of this thread in the shape and layout of another matrix."""
        flat = self.merger.workspace.take(purpose, like.numel(), like.dtype)
        return flat.view(like.T.shape).T if like.stride(0) < like.stride(1) else flat.view(like.shape)

    # Recipes -----------------------------------------------------------------------------------------------------

    def _wanted(self, tally: Tally, made: Made) -> Tensor:
        """What the right recipe makes of the tile: `merged` itself where one gives every bit, else the nearest's."""
        merged, patch = made.merged, made.tile.patch
        if tally.nearest is None:
            bank = self._bank(patch)
            few = cache(lambda recipe: self._few(recipe, made))
            # Products of other shapes than the whole may differ in their last bits, of which 16 bits show few.
            crosses = self.merger.crosses_tiles(patch)
            share = (1 / 8 if merged.itemsize > 2 else 1 / 64) if crosses else 0
            for recipe in bank:
                if recipe.name == OURS or _differing(*few(recipe)) <= share:
                    again = self._by(recipe, made)
                    if again is not None and _equal(again, merged):
                        self.favourite = recipe
                        tally.recipes.add(recipe.name)
                        return merged
            # Where several are about as near, ours is taken: it can be had tile by tile.
            tally.nearest = min(bank, key=lambda recipe: _distance(*few(recipe)) * (1 + 0.01 * (recipe.name != OURS)))
        tally.recipes.add(tally.nearest.name)
        again = self._by(tally.nearest, made)
        return made.ours if again is None else again

    def _bank(self, patch: Patch) -> list[Recipe]:
        """The recipes of this kind, the one that fitted last first."""
        fitting = [recipe for recipe in self.recipes if recipe.fits(self.kinds[patch.module])]
        if self.merger.strength != 1:
            fitting = [recipe for recipe in fitting if recipe.name == OURS]
        return sorted(fitting, key=lambda recipe: recipe is not self.favourite)

    def _few(self, recipe: Recipe, made: Made) -> tuple[Tensor, Tensor]:
        """A few vectors as the recipe makes them, and as they are in the file."""
        tile, pair = made.tile, self.pair
        if not self.merger.crosses_tiles(tile.patch):
            rows = self._rows_by(recipe, made, min(_SAMPLE, tile.last - tile.first))
            return rows, made.merged[: rows.numel()]
        patch, columns = tile.patch, slice(0, min(_SAMPLE, pair.output.matrix[1]))
        if self.tall is None or self.tall[0] != patch:
            rows_of_patch = slice(patch.start, patch.stop)
            base = base_part(self.merger, pair, patch, rows_of_patch, columns).to(pair.output.stored_dtype)
            self.tall = patch, base, merged_part(pair, patch, rows_of_patch, columns)
        _, base, there = self.tall
        adapter = tile.adapter.take(**{"out" if patch.transposed else "in_": columns})
        return recipe.merge(Operands(base, adapter, pair.dtype)), there

    def _by(self, recipe: Recipe, made: Made) -> Tensor | None:
        """The tile as the recipe makes it, flat; None where that cannot be had tile by tile."""
        tile = made.tile
        if recipe.name == OURS:
            return made.ours
        if not self.merger.crosses_tiles(tile.patch):
            return self._rows_by(recipe, made, tile.last - tile.first)
        whole = self._whole_by(recipe, tile)
        first = tile.patch.start
        return None if whole is None else whole[tile.first - first : tile.last - first].reshape(-1)

    def _rows_by(self, recipe: Recipe, made: Made, count: int) -> Tensor:
        """The first `count` stored rows of the tile, flat, where its vectors lie in rows."""
        tile = made.tile
        if recipe.name == OURS:
            return made.ours[: count * self.pair.output.matrix[1]]
        first = tile.first - tile.patch.start
        adapter = tile.adapter.take(**{"in_" if tile.patch.transposed else "out": slice(first, first + count)})
        base = made.base_weight[:, :count] if tile.patch.transposed else made.base_weight[:count]
        return tile.flat(recipe.merge(Operands(base.to(self.pair.output.stored_dtype), adapter, self.pair.dtype)))

    def _whole_by(self, recipe: Recipe, tile: AdaptedTile) -> Tensor | None:
        """The whole patch as stored, kept while its tiles pass by; None where it is too large."""
        patch, pair = tile.patch, self.pair
        rows, columns = slice(patch.start, patch.stop), slice(0, pair.output.matrix[1])
        if (patch.stop - patch.start) * columns.stop > WHOLE:
            return None
        if self.whole is None or self.whole[:2] != (patch, recipe.name):
            base = base_part(self.merger, pair, patch, rows, columns).to(pair.output.stored_dtype)
            made = recipe.merge(Operands(base, tile.adapter, pair.dtype))
            self.whole = (patch, recipe.name, (made.T if patch.transposed else made).contiguous())
        return self.whole[2]

    def _note(self, tile: Tile, wanted: Tensor, merged: Tensor) -> int | None:
        """Count mismatched elements; where in the tensor the tile's first is."""
        if _equal(wanted, merged):
            return None
        different = bits(wanted) != bits(merged)
        count = int(torch.count_nonzero(different))
        self.found.mismatched += count
        if merged.is_floating_point():
            self.found.finite &= all_finite(merged)
        if not count:
            return None
        at = tile.element + int(different.to(torch.uint8).argmax())
        self.found.first = at if self.found.first is None else self.found.first
        return at


def base_part(merger: TileMerger, pair: TensorPair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """W0 of some stored rows and columns, (out_features, in_features) in the dtype of the work."""
    merger, width = merger.apart(), pair.output.matrix[1]
    whole = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=pair.output.work_dtype)
    for first, last in row_ranges(rows.start, rows.stop, width):
        tile = row_tile(pair.output, first, last)
        values = merger.values(tile, merger.read(tile)).view(last - first, width)
        whole[first - rows.start : last - rows.start] = values[:, columns]
    return whole.T if patch.transposed else whole


def merged_part(pair: TensorPair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """The same part of the merged weight, as stored."""
    count, width = pair.output.matrix
    whole = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=pair.dtype)
    for first, last in row_ranges(rows.start, rows.stop, width):
        whole[first - rows.start : last - rows.start] = read_rows(pair.info, first, last, of=count)[:, columns]
    return whole.T if patch.transposed else whole


def _differing(made: Tensor, merged: Tensor) -> float:
    """The share of elements that differ."""
    return int(torch.count_nonzero(bits(made) != bits(merged))) / max(made.numel(), 1)


def _distance(made: Tensor, merged: Tensor) -> float:
    """‖made − merged‖: where no recipe fits, counting would prefer one that rounds coarsely."""
    return float((made.double() - merged.double()).nan_to_num(inf).norm())


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bytes; compared as large integers where they lie so, which is faster."""
    first, second = (values.reshape(-1).view(torch.uint8) for values in (a, b))
    if first.numel() % 8 == first.storage_offset() % 8 == second.storage_offset() % 8 == 0:
        first, second = first.view(torch.int64), second.view(torch.int64)
    return torch.equal(first, second)
