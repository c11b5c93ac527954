"""Which recipe gives a tile of the merged file, bit for bit; or which comes nearest.

The recipe that fitted last is tried first, so a file made by one merger costs one merge and one comparison.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import inf

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import OURS, Recipe, bank
from d2surgery.auditing.tally import Made, Tally
from d2surgery.files.tensors import read_rows
from d2surgery.measures.fidelity import bits, ulps
from d2surgery.merging.tiles import AdaptedTile, TileMerger, row_ranges, row_tile
from d2surgery.placement.site import Patch

WHOLE = 1 << 24  # entries: the largest weight held whole, for recipes that normalise across tiles
_SAMPLE = 16  # rows on which recipes are told apart, spread over a tile: damage is seldom in all of them
_NEARER = 1.5  # by as much another recipe must be nearer than ours
_MORE = 1 / 4  # and in so many more of the vectors than it is farther in, so that it is not by chance
_TRIED = 3  # recipes that agree there and are tried on the whole tile


@dataclass
class Matcher:
    """Of one pair, tile by tile."""

    merger: TileMerger
    names: frozenset[str]  # of recipes that are tried
    pair: TensorPair
    favourite: Recipe | None  # that fitted last
    curious: bool = False  # whether others, too, give the bits of its first tile
    also: tuple[str, ...] = ()  # these, by the rows of a sample
    whole: tuple[Patch, str, Tensor] | None = None  # what a recipe made of a whole patch
    tall: tuple[Patch, Tensor, Tensor] | None = None  # some columns of a patch, of base and merged

    def forget(self) -> None:
        """What is kept while the tiles of one patch pass by."""
        self.whole = self.tall = None

    def wanted(self, tally: Tally, made: Made) -> Tensor:
        """What the right recipe makes of the tile: `merged` itself where one gives every bit, else the nearest's."""
        if tally.nearest is None:
            if tally.grid is None:
                tally.grid = grid_of(made.merged)
            sample = cache(lambda recipe: self._sample(recipe, made, tally.grid))
            if (fitting := self._fitting(made, tally, sample)) is not None:
                self.favourite = fitting
                if self.curious:
                    others = (recipe for recipe in self._bank(made.tile.patch, tally.grid) if recipe is not fitting)
                    self.also = tuple(recipe.name for recipe in others if not _differing(*sample(recipe)))
                    self.curious = False
                tally.recipes.add(fitting.name)
                tally.load = tally.load or self._load(fitting, tally)
                return made.merged
            # What is far from all is measured from ours, which can be had tile by tile.
            first, *rest = self._near(made, tally, sample)
            near = [first, *(each for each in rest if _nearer(sample(each), sample(first)) > _MORE)]
            off = {recipe: _distance(*sample(recipe)) * (1 if recipe.name == OURS else _NEARER) for recipe in near}
            tally.nearest = min(near, key=off.__getitem__)
            tally.load = tally.load or self._load(tally.nearest, tally)
        tally.recipes.add(tally.nearest.name)
        again = self._by(tally.nearest, made, tally.grid)
        return made.ours if again is None else again

    def _near(self, made: Made, tally: Tally, sample: Callable[[Recipe], tuple[Tensor, Tensor]]) -> tuple[Recipe, ...]:
        """Recipes that may be the nearest: the one that fitted last where a sample has its bits, ours where the file is
        further off than any recipe, else all."""
        everything = self._bank(made.tile.patch, tally.grid)
        known = self.favourite
        if known in everything and not _differing(*sample(known)):
            return (known,)
        ours = everything[0]
        size = torch.finfo(tally.grid or made.merged.dtype).eps * float(made.base_weight.norm(dim=1).median())
        size = 1.5 * size + float(made.delta.norm(dim=1).median()) / 16
        if "magnitude" in self.merger.checkpoint.layout.adapters[made.tile.patch.module].slots:
            size += float(made.base_weight.norm(dim=1).median()) / 256  # magnitudes in 16 bits
        if ours.name == OURS and not made.tile.patch.transposed and _distance(*sample(ours)) > size:
            return (ours,)
        return everything

    def _fitting(self, made: Made, tally: Tally, sample: Callable[[Recipe], tuple[Tensor, Tensor]]) -> Recipe | None:
        """The first recipe that gives every bit of the tile."""
        for recipe in self._candidates(made, tally, sample):
            again = self._by(recipe, made, tally.grid)
            if again is not None and equal(again, made.merged):
                return recipe
        return None

    def _candidates(
        self, made: Made, tally: Tally, sample: Callable[[Recipe], tuple[Tensor, Tensor]]
    ) -> Iterator[Recipe]:
        """Ours, and those of which a sample agrees: the one that fitted last, then the nearest few.

        Products of other shapes than the whole may differ in their last bits, of which 16 bits show few.
        """
        share = 1 / 8 if made.merged.itemsize > 2 and tally.grid in (None, made.merged.dtype) else 1 / 64
        known = self.favourite
        if known is not None and (known.name == OURS or _differing(*sample(known)) <= share):
            yield known
        nearest = self._near(made, tally, sample)
        alone = nearest[0] if len(nearest) == 1 and _by_units(*sample(nearest[0])) else None
        if alone is not None and _by_units(self._by(alone, made, tally.grid), made.merged):
            nearest = self._bank(made.tile.patch, tally.grid)
        off = {recipe: _differing(*sample(recipe)) for recipe in nearest}
        near = sorted((recipe for recipe in off if off[recipe] <= share and recipe is not known), key=off.__getitem__)
        yield from near[:_TRIED]

    def _bank(self, patch: Patch, grid: torch.dtype | None) -> tuple[Recipe, ...]:
        """The recipes of this kind."""
        entry = self.merger.checkpoint.layout.adapters[patch.module]
        fitting = bank(entry.kind, entry.axis, self.pair.output.stored_dtype, grid or self.pair.dtype)
        if self.merger.strength != 1:
            fitting = fitting[:1]
        return tuple(recipe for recipe in fitting if recipe.name in self.names) or fitting[:1]

    def _sample(self, recipe: Recipe, made: Made, grid: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """A few vectors as the recipe makes them, and as they are in the file: (vectors, entries)."""
        tile, pair = made.tile, self.pair
        if not self.merger.crosses_tiles(tile.patch):
            step = max((tile.last - tile.first) // _SAMPLE, 1)
            there = made.merged.view(tile.last - tile.first, -1)[::step]
            return self._rows_by(recipe, made, step, grid), there
        patch, columns = tile.patch, slice(0, pair.output.matrix[1], max(pair.output.matrix[1] // _SAMPLE, 1))
        if self.tall is None or self.tall[0] != patch:
            rows_of_patch = slice(patch.start, patch.stop)
            base = base_part(self.merger, pair, patch, rows_of_patch, columns).to(pair.output.stored_dtype)
            self.tall = patch, base, merged_part(pair, patch, rows_of_patch, columns)
        _, base, there = self.tall
        adapter = tile.adapter.take(**{"out" if patch.transposed else "in_": columns})
        made_of_it = self._merge(recipe, base, adapter, grid)
        return (made_of_it, there) if patch.transposed else (made_of_it.T, there.T)

    def _by(self, recipe: Recipe, made: Made, grid: torch.dtype | None) -> Tensor | None:
        """The tile as the recipe makes it, flat; None where that cannot be had tile by tile."""
        tile = made.tile
        if recipe.name == OURS and grid is None:
            return made.ours
        if not self.merger.crosses_tiles(tile.patch):
            return self._rows_by(recipe, made, 1, grid).reshape(-1)
        whole = self._whole_by(recipe, tile, grid)
        first = tile.patch.start
        return None if whole is None else whole[tile.first - first : tile.last - first].reshape(-1)

    def _rows_by(self, recipe: Recipe, made: Made, step: int, grid: torch.dtype | None) -> Tensor:
        """Every so many stored rows of the tile, where its vectors lie in rows."""
        tile = made.tile
        if recipe.name == OURS and grid is None:
            return made.ours.view(tile.last - tile.first, -1)[::step]
        held = slice(tile.first - tile.patch.start, tile.last - tile.patch.start, step)
        adapter = tile.adapter.take(**{"in_" if tile.patch.transposed else "out": held})
        base = made.base_weight[:, ::step] if tile.patch.transposed else made.base_weight[::step]
        rows = self._merge(recipe, base.to(self.pair.output.stored_dtype), adapter, grid)
        return rows.T if tile.patch.transposed else rows

    def _whole_by(self, recipe: Recipe, tile: AdaptedTile, grid: torch.dtype | None) -> Tensor | None:
        """The whole patch as stored, kept while its tiles pass by; None where it is too large."""
        patch, pair = tile.patch, self.pair
        rows, columns = slice(patch.start, patch.stop), slice(0, pair.output.matrix[1])
        if (patch.stop - patch.start) * columns.stop > WHOLE:
            return None
        if self.whole is None or self.whole[:2] != (patch, recipe.name):
            base = base_part(self.merger, pair, patch, rows, columns).to(pair.output.stored_dtype)
            made = self._merge(recipe, base, tile.adapter, grid)
            self.whole = (patch, recipe.name, (made.T if patch.transposed else made).contiguous())
        return self.whole[2]

    def _merge(self, recipe: Recipe, base: Tensor, adapter: Adapter, grid: torch.dtype | None) -> Tensor:
        """As the recipe merges onto a coarser grid, then stored as the file is."""
        return recipe.merge(Operands(base, adapter, grid or self.pair.dtype)).to(self.pair.dtype)

    def _load(self, recipe: Recipe, tally: Tally) -> torch.dtype:
        """What a recipe holds the base in."""
        return recipe.load(self.pair.output.stored_dtype, tally.grid or self.pair.dtype)


def base_part(merger: TileMerger, pair: TensorPair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """W0 of some stored rows and columns, (out_features, in_features) in the dtype of the work."""
    merger, width = merger.apart(), pair.output.matrix[1]
    whole = torch.empty(rows.stop - rows.start, len(range(width)[columns]), dtype=pair.output.work_dtype)
    for first, last in row_ranges(rows.start, rows.stop, width):
        tile = row_tile(pair.output, first, last)
        values = merger.values(tile, merger.read(tile)).view(last - first, width)
        whole[first - rows.start : last - rows.start] = values[:, columns]
    return whole.T if patch.transposed else whole


def merged_part(pair: TensorPair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """The same part of the merged weight, as stored."""
    count, width = pair.output.matrix
    whole = torch.empty(rows.stop - rows.start, len(range(width)[columns]), dtype=pair.dtype)
    for first, last in row_ranges(rows.start, rows.stop, width):
        whole[first - rows.start : last - rows.start] = read_rows(pair.info, first, last, of=count)[:, columns]
    return whole.T if patch.transposed else whole


def _differing(made: Tensor, merged: Tensor) -> float:
    """The share of elements that differ."""
    return int(torch.count_nonzero(bits(made) != bits(merged))) / max(made.numel(), 1)


def _by_units(made: Tensor | None, merged: Tensor) -> bool:
    """Whether what differs does by units in the last place, as by a recipe that sums in another order."""
    return made is not None and int(ulps(made, merged).max()) <= 1


def _distances(made: Tensor, merged: Tensor) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm((made.double() - merged.double()).nan_to_num(inf), dim=1)
    return distances


def _distance(made: Tensor, merged: Tensor) -> float:
    """‖made − merged‖ of the median vector: where no recipe fits, counting would prefer one that rounds coarsely, and
    the mean what happens to be near in a damaged row."""
    return float(_distances(made, merged).median())


def _nearer(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The share of vectors in which the one is nearer, less that of those in which the other is."""
    ours, theirs = _distances(*one), _distances(*other)
    return float(((_NEARER * ours < theirs).double() - (_NEARER * theirs < ours).double()).mean())


def grid_of(merged: Tensor) -> torch.dtype | None:
    """A 16-bit dtype that holds every value of a wider one, or of another, as it would be written; else None."""
    for grid in (torch.bfloat16, torch.float16):
        least = (
            2.0**-16 if grid == torch.bfloat16 and merged.dtype == torch.float16 else 0.0
        )  # float16's own grid there
        if grid != merged.dtype and (merged.itemsize > 2 or least):
            some = merged[:: max(merged.numel() // 4096, 1)]
            if all(
                bool(((part.to(grid).to(part.dtype) == part) | (part.abs() < least)).all()) for part in (some, merged)
            ):
                return grid if bool(some.any()) else None
    return None


def equal(a: Tensor, b: Tensor) -> bool:
    """The same bytes; compared as large integers where they lie so, which is faster."""
    first, second = (values.reshape(-1).view(torch.uint8) for values in (a, b))
    if first.numel() % 8 == first.storage_offset() % 8 == second.storage_offset() % 8 == 0:
        first, second = first.view(torch.int64), second.view(torch.int64)
    return torch.equal(first, second)
