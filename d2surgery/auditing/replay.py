"""One pass over base and merged side by side: the merge again, tile by tile, by the recipe that gives the file's bits.

The recipe that fitted last is tried first, so a file made by one merger costs one merge and one comparison. Where no
recipe gives every bit, the nearest is what the file is measured against.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import OURS, RECIPES, Recipe, bank
from d2surgery.auditing.structure import Marks
from d2surgery.auditing.structure import Tile as Marked
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
LOW = (torch.bfloat16, torch.float16)
_SAMPLE = 16  # rows on which recipes are told apart, spread over a tile: damage is seldom in all of them
_NEARER = 1.5  # by as much another recipe must be nearer than ours
_TRIED = 3  # recipes that agree there and are tried on the whole tile


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


@dataclass
class Replay:
    """What a pass over pairs found."""

    merger: TileMerger
    kinds: dict[str, str]  # module -> kind
    names: frozenset[str] = frozenset(recipe.name for recipe in RECIPES)
    modules: dict[str, Tally] = field(default_factory=dict)
    tensors: dict[str, Found] = field(default_factory=dict)
    marking: bool = False  # what differs is looked at for structure

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
            passes = [Pass(self.merger, self.kinds, self.names, pair, favourite, self.marking) for pair in part]
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
    names: frozenset[str]  # of recipes that are tried
    pair: TensorPair
    favourite: Recipe | None  # that fitted last
    marking: bool
    found: Found = field(default_factory=Found)
    whole: tuple[Patch, str, Tensor] | None = None  # what a recipe made of a whole patch
    tall: tuple[Patch, Tensor, Tensor] | None = None  # some columns of a patch, of base and merged

    def run(self, steps: Steps) -> Found:
        for tile, stored in steps:
            merged = self._merged(tile)
            if isinstance(tile, AdaptedTile):
                self._compare_adapted(self._made(tile, stored, merged))
            else:
                self._compare(tile, stored, merged)
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

    def _compare(self, tile: Tile, stored: Tensor, merged: Tensor) -> None:
        """Of a tensor that no adapter patches."""
        self.found.through &= self._loaded_through(tile, stored, merged)
        ours, site = self.merger.merge(tile, stored).reshape(-1).view(merged.dtype), self.pair.output.site
        if self._note(tile, ours, merged) is not None and site is not None and site.bias is not None:
            within = self._rounding_only(site.bias, tile, ours, merged)
            self.found.rounding = within and self.found.rounding is not False

    def _loaded_through(self, tile: Tile, stored: Tensor, merged: Tensor) -> frozenset[torch.dtype]:
        """Through which 16-bit dtypes the base's values could have gone to these."""
        source = self.pair.output.stored_dtype
        if not (source.is_floating_point and merged.is_floating_point()) or self.pair.output.site is not None:
            return self.found.through
        values, few = stored.view(source), slice(0, 4096)
        return frozenset(
            low
            for low in self.found.through
            if low != source
            and all(_equal(values[part].to(low).to(merged.dtype), merged[part]) for part in (few, slice(None)))
        )

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
        if wanted is merged and not self.marking:
            tally.comparison += Comparison(
                elements=survival.elements, e_delta=survival.inner, ee=survival.applied_squared
            )
            return
        self._beside(tally, made.tile, base, change, wanted.view(base.shape), there)
        tally.finite &= all_finite(merged)
        element = self._note(made.tile, wanted, merged)
        if element is not None and tally.first is None:
            tally.first = Mismatch(pair, patch, element)

    def _beside(
        self, tally: Tally, tile: AdaptedTile, base: Tensor, change: Tensor, wanted: Tensor, there: Tensor
    ) -> None:
        """In units of the grid, where both lie on it, and from the base as the nearest recipe holds it."""
        grid = tally.grid or there.dtype
        if all(torch.equal(values.to(grid).to(values.dtype), values) for values in (wanted, there)):
            wanted, there = wanted.to(grid), there.to(grid)
        base = tally.held.base(base, self.pair)
        if not self.marking:
            tally.comparison += compare(base, change, wanted, there)
            return
        patch, tiles = tile.patch, slice(tile.first - tile.patch.start, tile.last - tile.patch.start)
        if patch.transposed:
            base, change, wanted, there = (m.T for m in (base, change, wanted, there))
        size = (patch.stop - patch.start, self.pair.output.matrix[1])
        marks = tally.marks.setdefault((self.pair.name, patch), Marks.of(*(size[::-1] if patch.transposed else size)))
        where = (slice(None), tiles) if patch.transposed else (tiles, slice(None))
        marks.add(Marked(base, change, wanted, there, *where))
        if tile.last == patch.stop:
            marks.evened(along_rows=not patch.transposed)

    def _load(self, recipe: Recipe, tally: Tally) -> torch.dtype:
        """What a recipe holds the base in."""
        return recipe.load(self.pair.output.stored_dtype, tally.grid or self.pair.dtype)

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
        if tally.nearest is None:
            if tally.grid is None:
                tally.grid = grid_of(made.merged)
            sample = cache(lambda recipe: self._sample(recipe, made, tally.grid))
            if (fitting := self._fitting(made, tally, sample)) is not None:
                self.favourite = fitting
                tally.recipes.add(fitting.name)
                tally.load = tally.load or self._load(fitting, tally)
                return made.merged
            # What is far from all is measured from ours, which can be had tile by tile.
            near = self._near(made, tally, sample)
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
        if ours.name == OURS and not made.tile.patch.transposed and _distance(*sample(ours)) > size:
            return (ours,)
        return everything

    def _fitting(self, made: Made, tally: Tally, sample: Callable[[Recipe], tuple[Tensor, Tensor]]) -> Recipe | None:
        """The first recipe that gives every bit of the tile."""
        for recipe in self._candidates(made, tally, sample):
            again = self._by(recipe, made, tally.grid)
            if again is not None and _equal(again, made.merged):
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
        off = {recipe: _differing(*sample(recipe)) for recipe in self._near(made, tally, sample)}
        near = sorted((recipe for recipe in off if off[recipe] <= share and recipe is not known), key=off.__getitem__)
        yield from near[:_TRIED]

    def _bank(self, patch: Patch, grid: torch.dtype | None) -> tuple[Recipe, ...]:
        """The recipes of this kind."""
        fitting = bank(self.kinds[patch.module], self.pair.output.stored_dtype, grid or self.pair.dtype)
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


def _distance(made: Tensor, merged: Tensor) -> float:
    """‖made − merged‖ of the median vector: where no recipe fits, counting would prefer one that rounds coarsely, and
    the mean what happens to be near in a damaged row."""
    return float((made.double() - merged.double()).nan_to_num(inf).norm(dim=1).median())


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


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bytes; compared as large integers where they lie so, which is faster."""
    first, second = (values.reshape(-1).view(torch.uint8) for values in (a, b))
    if first.numel() % 8 == first.storage_offset() % 8 == second.storage_offset() % 8 == 0:
        first, second = first.view(torch.int64), second.view(torch.int64)
    return torch.equal(first, second)
