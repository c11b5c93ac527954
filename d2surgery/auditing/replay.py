"""One pass over base and merged side by side: the merge again, tile by tile, by the recipe that gives the file's bits.

The recipe that fitted last is tried first, so a file made by one merger costs one merge and one comparison. Where no
recipe gives every bit, the nearest is what the file is measured against.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.auditing.pairing import Pair
from d2surgery.auditing.recipes import OURS, RECIPES, Operands, Recipe
from d2surgery.files.header import BITS
from d2surgery.files.tensors import DTYPES, as_bytes, let_go, read_into
from d2surgery.machine import workers
from d2surgery.measures.fidelity import Comparison, Survival, bits, compare, measured
from d2surgery.merging.tiles import Steps, Tile, TileMerger, all_finite, cuts, part_of
from d2surgery.placement.site import Patch

WHOLE = 1 << 24  # entries: the largest weight held whole, for recipes that normalise across tiles
_SAMPLE = 64  # rows on which recipes are told apart


class Made(NamedTuple):
    """A tile as our merge makes it, and the file's elements, both flat; of a patched one what it was made from."""

    ours: Tensor
    merged: Tensor
    base_weight: Tensor | None = None  # (out_features, in_features), in the dtype of the work, as delta
    delta: Tensor | None = None


@dataclass
class Tally:
    """Sums of one module so far."""

    survival: Survival = field(default_factory=Survival)
    comparison: Comparison = field(default_factory=Comparison)
    recipes: set[str] = field(default_factory=set)  # that its tiles were compared with
    nearest: Recipe | None = None  # when no recipe gave every bit of a tile
    first: tuple[Pair, Patch, int] | None = None  # the first mismatched element
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

    def run(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> None:
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

    def _add(self, pair: Pair, found: Found) -> None:
        self.tensors[pair.name] = found
        for module, tally in found.modules.items():
            self.modules[module] = self.modules[module].plus(tally) if module in self.modules else tally


@dataclass
class Pass:
    """The comparison of one pair, tile by tile."""

    merger: TileMerger
    kinds: dict[str, str]
    recipes: tuple[Recipe, ...]
    pair: Pair
    favourite: Recipe | None  # that fitted last
    found: Found = field(default_factory=Found)
    whole: tuple[Patch, str, Tensor] | None = None  # what a recipe made of a whole patch
    tall: tuple[Patch, Tensor, Tensor] | None = None  # some columns of a patch, of base and merged

    def run(self, steps: Steps) -> Found:
        for tile, stored in steps:
            self._compare(tile, self._make(tile, stored))
        self.whole = self.tall = None
        return self.found

    def _make(self, tile: Tile, stored: Tensor) -> Made:
        """Our merge of a tile, in memory of this thread."""
        first, nbytes = _share(self.pair, tile)
        merged = self.merger.workspace.take("merged", nbytes, torch.uint8)
        read_part(self.pair, first, as_bytes(merged))
        merged = merged.view(DTYPES[self.pair.info.dtype])
        if tile.patch is None:
            return Made(self.merger.merge(tile, stored).reshape(-1).view(merged.dtype), merged)
        working = self.merger.base_weight(tile, stored)
        base_weight = self._space("base_weight", working).copy_(working)
        effective = self.merger.effective(tile, working)
        ours = self.merger.finish(tile, effective, stored).reshape(-1)
        return Made(ours, merged, base_weight, effective.sub_(base_weight))

    def _compare(self, tile: Tile, made: Made) -> None:
        ours, merged, base_weight, delta = made
        pair, patch = self.pair, tile.patch
        if patch is None or base_weight is None or delta is None:
            site = pair.output.site
            if self._note(tile, ours, merged) is not None and site is not None and site.bias is not None:
                within = self._rounding_only(site.bias, tile, ours, merged)
                self.found.rounding = within and self.found.rounding is not False
            return
        tally = self.found.modules.setdefault(patch.module, Tally()) if pair.status != "tied" else Tally()
        wanted = self._wanted(tally, tile, base_weight, ours, merged)
        if pair.status != "tied":
            base, change = (base_weight.T, delta.T) if patch.transposed else (base_weight, delta)
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
        first = self._note(tile, wanted, merged)
        if first is not None and tally.first is None:
            tally.first = (pair, patch, first)

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

    def _wanted(self, tally: Tally, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor) -> Tensor:
        """What the right recipe makes of the tile: `merged` itself where one gives every bit, else the nearest's."""
        patch = tile.patch
        assert patch is not None
        if tally.nearest is None:
            bank = self._bank(patch)
            few = cache(lambda recipe: self._few(recipe, tile, base_weight, ours, merged))
            # Products of other shapes than the whole may differ in their last bits, of which 16 bits show few.
            share = (1 / 8 if merged.itemsize > 2 else 1 / 64) if self.merger.crosses_tiles(patch) else 0
            for recipe in bank:
                if recipe.name == OURS or _differing(*few(recipe)) <= share:
                    made = self._made(recipe, tile, base_weight, ours, tile.last - tile.first)
                    if made is not None and _equal(made, merged):
                        self.favourite = recipe
                        tally.recipes.add(recipe.name)
                        return merged
            # Ours stands for all that are as near: it can be had tile by tile.
            tally.nearest = min(bank, key=lambda recipe: _distance(*few(recipe)) * (1 + 0.01 * (recipe.name != OURS)))
        tally.recipes.add(tally.nearest.name)
        made = self._made(tally.nearest, tile, base_weight, ours, tile.last - tile.first)
        return ours if made is None else made

    def _bank(self, patch: Patch) -> list[Recipe]:
        """The recipes of this kind, the one that fitted last first."""
        fitting = [recipe for recipe in self.recipes if recipe.fits(self.kinds[patch.module])]
        if self.merger.strength != 1:
            fitting = [recipe for recipe in fitting if recipe.name == OURS]
        return sorted(fitting, key=lambda recipe: recipe is not self.favourite)

    def _few(
        self, recipe: Recipe, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A few vectors as the recipe makes them, and as they are in the file."""
        patch, opened = tile.patch, tile.opened
        assert patch is not None
        assert opened is not None
        if not self.merger.crosses_tiles(patch):
            made = self._made(recipe, tile, base_weight, ours, min(_SAMPLE, tile.last - tile.first))
            assert made is not None
            return made, merged[: made.numel()]
        columns = slice(0, min(_SAMPLE, width_of(self.pair)))
        if self.tall is None or self.tall[0] != patch:
            rows = slice(patch.start, patch.stop)
            base = base_part(self.merger, self.pair, patch, rows, columns).to(DTYPES[self.pair.output.info.dtype])
            self.tall = patch, base, merged_part(self.pair, patch, rows, columns)
        _, base, there = self.tall
        adapter = opened.adapter.take(**{"out" if patch.transposed else "in_": columns})
        return recipe.merge(Operands(base, adapter, DTYPES[self.pair.info.dtype])), there

    def _made(self, recipe: Recipe, tile: Tile, base_weight: Tensor, ours: Tensor, count: int) -> Tensor | None:
        """The first `count` stored rows of the tile, flat; None where the recipe cannot be had tile by tile."""
        patch = tile.patch
        assert patch is not None
        if recipe.name == OURS:
            width = ours.numel() // (tile.last - tile.first)
            return ours[: count * width]
        first = tile.first - patch.start
        if self.merger.crosses_tiles(patch):
            whole = self._made_whole(recipe, tile)
            return None if whole is None else whole[first : first + count].reshape(-1)
        part = slice(first, first + count)
        assert tile.opened is not None
        adapter = tile.opened.adapter.take(**{"in_" if patch.transposed else "out": part})
        base = base_weight[:, :count] if patch.transposed else base_weight[:count]
        made = recipe.merge(
            Operands(base.to(DTYPES[self.pair.output.info.dtype]), adapter, DTYPES[self.pair.info.dtype])
        )
        return (made.T if patch.transposed else made).reshape(-1)

    def _made_whole(self, recipe: Recipe, tile: Tile) -> Tensor | None:
        """What the recipe makes of the whole patch, as stored; kept while its tiles pass by."""
        patch = tile.patch
        assert patch is not None
        assert tile.opened is not None
        rows, columns = slice(patch.start, patch.stop), slice(0, width_of(self.pair))
        if (patch.stop - patch.start) * columns.stop > WHOLE:
            return None
        if self.whole is None or self.whole[:2] != (patch, recipe.name):
            base = base_part(self.merger, self.pair, patch, rows, columns).to(DTYPES[self.pair.output.info.dtype])
            made = recipe.merge(Operands(base, tile.opened.adapter, DTYPES[self.pair.info.dtype]))
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
        at = tile.start * 8 // BITS[self.pair.output.info.dtype] + int(different.to(torch.uint8).argmax())
        self.found.first = at if self.found.first is None else self.found.first
        return at


def base_part(merger: TileMerger, pair: Pair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """W0 of some stored rows and columns, (out_features, in_features) in the dtype of the work."""
    merger = merger.apart()
    whole = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=pair.output.work_dtype)
    for first, last in cuts(rows.start, rows.stop, width_of(pair)):
        tile = part_of(pair.output, patch, first, last)
        weight = merger.base_weight(tile, merger.read(tile))
        whole[first - rows.start : last - rows.start] = (weight.T if patch.transposed else weight)[:, columns]
    return whole.T if patch.transposed else whole


def merged_part(pair: Pair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """The same part of the merged weight, as stored."""
    width, dtype = width_of(pair), DTYPES[pair.info.dtype]
    whole = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
    for first, last in cuts(rows.start, rows.stop, width):
        values = torch.empty(last - first, width, dtype=dtype)
        read_part(pair, first * width * dtype.itemsize, as_bytes(values))
        whole[first - rows.start : last - rows.start] = values[:, columns]
    return whole.T if patch.transposed else whole


def width_of(pair: Pair) -> int:
    """Stored columns."""
    assert pair.output.site is not None
    return pair.output.site.matrix[1]


def read_part(pair: Pair, start: int, target: memoryview) -> None:
    """Bytes of the merged tensor from a position within it."""
    fd = os.open(pair.info.file, os.O_RDONLY)
    try:
        read_into(fd, target, pair.info.start + start)
        let_go(fd, pair.info.start + start, len(target))
    finally:
        os.close(fd)


def _share(pair: Pair, tile: Tile) -> tuple[int, int]:
    """Where the tile's elements are in the merged tensor: first byte and number of bytes."""
    source, own = BITS[pair.output.info.dtype], BITS[pair.info.dtype]
    return tile.start * own // source, tile.nbytes * own // source


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
