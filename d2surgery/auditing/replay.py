"""One pass over base and merged side by side: the merge again, tile by tile, by the recipe that gives the file's bits.

The recipe that fitted last is tried first, so a file made by one merger costs one merge and one comparison. Where no
recipe gives every bit, the nearest is what the file is measured against.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.auditing.pairing import Pair
from d2surgery.auditing.recipes import OURS, RECIPES, Operands, Recipe
from d2surgery.header import BITS
from d2surgery.measures.fidelity import Comparison, Survival, bits, compare, measured
from d2surgery.merging.tiles import Tile, TileMerger, all_finite, cuts, part_of, tiles
from d2surgery.sites import Patch
from d2surgery.tensors import DTYPES, as_bytes, let_go, read_into
from d2surgery.threads import pipeline

WHOLE = 1 << 24  # entries: the largest weight held whole, for recipes that normalise across tiles
_SAMPLE = 64  # rows on which recipes are told apart
_BUFFERS = 3
_ALIGNED = 64


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


@dataclass
class Replay:
    """What a pass over pairs found."""

    merger: TileMerger
    kinds: dict[str, str]  # module -> kind
    recipes: tuple[Recipe, ...] = RECIPES
    modules: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    mismatched: Counter[str] = field(default_factory=Counter)  # tensor -> elements
    first: dict[str, int] = field(default_factory=dict)  # tensor -> element
    finite: defaultdict[str, bool] = field(default_factory=lambda: defaultdict(lambda: True))
    rounding: defaultdict[str, bool] = field(default_factory=lambda: defaultdict(lambda: True))  # of added biases
    favourite: Recipe | None = None
    current: Pair | None = None
    whole: tuple[Patch, str, Tensor] | None = None  # what a recipe made of a whole patch
    tall: tuple[tuple[str, Patch], Tensor, Tensor] | None = None  # some columns of a patch, of base and merged
    spaces: list[Tensor] = field(default_factory=lambda: [torch.empty(0)] * 2)

    def run(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> None:
        """Compare every pair; progress(done, total) in bytes of the merged file."""
        grid = [(pair, tile) for pair in pairs for tile in tiles(pair.output)]
        total = sum(_share(pair, tile)[1] for pair, tile in grid)
        largest = max((_places(pair, tile)[-1] for pair, tile in grid), default=0)
        done = 0

        def compare(step: tuple[Pair, Tile], made: Made) -> None:
            nonlocal done
            pair, tile = step
            if pair is not self.current:
                self.current, self.whole = pair, None
            self._compare(pair, tile, made)
            done += made.merged.nbytes
            progress(done, total)

        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(_BUFFERS)]
        with closing(self.merger.tiles(pair.output for pair in pairs)) as opened:
            queue = zip((pair for pair, _ in grid), opened, strict=True)
            pipeline(queue, self._read, self._make, compare, buffers)

    def _read(self, step: tuple[Pair, Tile], buffer: Tensor) -> None:
        pair, tile = step
        self.merger.read(tile, buffer)
        start, nbytes = _share(pair, tile)
        at = _places(pair, tile)[0]
        read_part(pair, start, as_bytes(buffer[at : at + nbytes]))

    def _make(self, step: tuple[Pair, Tile], buffer: Tensor) -> Made:
        """Our merge of a tile, all of it in the buffer's memory."""
        pair, tile = step
        first, second, third, end = _places(pair, tile)
        merged = buffer[first : first + _share(pair, tile)[1]].view(DTYPES[pair.info.dtype])
        stored = buffer[: tile.nbytes]
        if tile.patch is None:
            return Made(self.merger.merge(tile, stored).reshape(-1).view(merged.dtype), merged)
        working = self.merger.base_weight(tile, buffer)
        base_weight = _laid_out(buffer[second:third].view(working.dtype), working).copy_(working)
        effective = self.merger.effective(tile, working)
        delta = torch.sub(effective, base_weight, out=_laid_out(buffer[third:end].view(working.dtype), working))
        return Made(self.merger.finish(tile, effective, stored).reshape(-1), merged, base_weight, delta)

    def _compare(self, pair: Pair, tile: Tile, made: Made) -> None:
        ours, merged, base_weight, delta = made
        patch = tile.patch
        if patch is None or base_weight is None or delta is None:
            site = pair.output.site
            if self._note(pair, tile, ours, merged) and site is not None and site.bias is not None:
                self.rounding[pair.name] &= self._rounding_only(site.bias, tile, ours, merged)
            return
        tally = self.modules[patch.module] if pair.status != "tied" else Tally()
        wanted = self._wanted(tally, pair, tile, base_weight, ours, merged)
        if pair.status != "tied":
            base, change = (base_weight.T, delta.T) if patch.transposed else (base_weight, delta)
            there = merged.view(base.shape)
            survival = measured(base, change, there, (self._space(0, base), self._space(1, base)))
            tally.survival += survival
            if wanted is merged:
                tally.comparison += Comparison(
                    elements=survival.elements, e_delta=survival.inner, ee=survival.applied_squared
                )
                return
            tally.comparison += compare(base, change, wanted.view(base.shape), there)
            tally.finite &= all_finite(merged)
        if self._note(pair, tile, wanted, merged) and tally.first is None:
            tally.first = (pair, patch, self.first[pair.name])

    def _rounding_only(self, module: str, tile: Tile, wanted: Tensor, merged: Tensor) -> bool:
        """Whether base + s·bias differs by no more than rounding a product and a sum."""
        right = wanted.double()
        size = right.abs() + self.merger.bias(module, tile, right).abs()
        return bool(((merged.double() - right).abs() <= 2 * torch.finfo(merged.dtype).eps * size).all())

    def _space(self, which: int, like: Tensor) -> Tensor:
        """Memory of the shape and layout of another matrix, the same at every call."""
        space = self.spaces[which]
        if space.dtype != like.dtype or space.numel() < like.numel():
            space = self.spaces[which] = torch.empty(like.numel(), dtype=like.dtype)
        return _laid_out(space, like)

    # Recipes -----------------------------------------------------------------------------------------------------

    def _wanted(
        self, tally: Tally, pair: Pair, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor
    ) -> Tensor:
        """What the right recipe makes of the tile: `merged` itself where one gives every bit, else the nearest's."""
        patch = tile.patch
        assert patch is not None
        if tally.nearest is None:
            bank = self._bank(patch)
            few = cache(lambda recipe: self._few(recipe, pair, tile, base_weight, ours, merged))
            # Products of other shapes than the whole may differ in their last bits, of which 16 bits show few.
            share = (1 / 8 if merged.itemsize > 2 else 1 / 64) if self.merger.crosses_tiles(patch) else 0
            for recipe in bank:
                if recipe.name == OURS or _differing(*few(recipe)) <= share:
                    made = self._made(recipe, pair, tile, base_weight, ours, tile.last - tile.first)
                    if made is not None and _equal(made, merged):
                        self.favourite = recipe
                        tally.recipes.add(recipe.name)
                        return merged
            # Ours stands for all that are as near: it can be had tile by tile.
            tally.nearest = min(bank, key=lambda recipe: _distance(*few(recipe)) * (1 + 0.01 * (recipe.name != OURS)))
        tally.recipes.add(tally.nearest.name)
        made = self._made(tally.nearest, pair, tile, base_weight, ours, tile.last - tile.first)
        return ours if made is None else made

    def _bank(self, patch: Patch) -> list[Recipe]:
        """The recipes of this kind, the one that fitted last first."""
        fitting = [recipe for recipe in self.recipes if self.kinds[patch.module] in recipe.kinds]
        if self.merger.strength != 1:
            fitting = [recipe for recipe in fitting if recipe.name == OURS]
        return sorted(fitting, key=lambda recipe: recipe is not self.favourite)

    def _few(
        self, recipe: Recipe, pair: Pair, tile: Tile, base_weight: Tensor, ours: Tensor, merged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A few vectors as the recipe makes them, and as they are in the file."""
        patch, opened = tile.patch, tile.opened
        assert patch is not None
        assert opened is not None
        if not self.merger.crosses_tiles(patch):
            made = self._made(recipe, pair, tile, base_weight, ours, min(_SAMPLE, tile.last - tile.first))
            assert made is not None
            return made, merged[: made.numel()]
        columns = slice(0, min(_SAMPLE, width_of(pair)))
        if self.tall is None or self.tall[0] != (pair.name, patch):
            rows = slice(patch.start, patch.stop)
            base = base_part(self.merger, pair, patch, rows, columns).to(DTYPES[pair.output.info.dtype])
            self.tall = (pair.name, patch), base, merged_part(pair, patch, rows, columns)
        _, base, there = self.tall
        adapter = opened.adapter.take(**{"out" if patch.transposed else "in_": columns})
        return recipe.merge(Operands(base, adapter, DTYPES[pair.info.dtype])), there

    def _made(
        self, recipe: Recipe, pair: Pair, tile: Tile, base_weight: Tensor, ours: Tensor, count: int
    ) -> Tensor | None:
        """The first `count` stored rows of the tile, flat; None where the recipe cannot be had tile by tile."""
        patch = tile.patch
        assert patch is not None
        if recipe.name == OURS:
            width = ours.numel() // (tile.last - tile.first)
            return ours[: count * width]
        first = tile.first - patch.start
        if self.merger.crosses_tiles(patch):
            whole = self._made_whole(recipe, pair, tile)
            return None if whole is None else whole[first : first + count].reshape(-1)
        part = slice(first, first + count)
        assert tile.opened is not None
        adapter = tile.opened.adapter.take(**{"in_" if patch.transposed else "out": part})
        base = base_weight[:, :count] if patch.transposed else base_weight[:count]
        made = recipe.merge(Operands(base.to(DTYPES[pair.output.info.dtype]), adapter, DTYPES[pair.info.dtype]))
        return (made.T if patch.transposed else made).reshape(-1)

    def _made_whole(self, recipe: Recipe, pair: Pair, tile: Tile) -> Tensor | None:
        """What the recipe makes of the whole patch, as stored; kept while its tiles pass by."""
        patch = tile.patch
        assert patch is not None
        assert tile.opened is not None
        rows, columns = slice(patch.start, patch.stop), slice(0, width_of(pair))
        if (patch.stop - patch.start) * columns.stop > WHOLE:
            return None
        if self.whole is None or self.whole[:2] != (patch, recipe.name):
            base = base_part(self.merger, pair, patch, rows, columns).to(DTYPES[pair.output.info.dtype])
            made = recipe.merge(Operands(base, tile.opened.adapter, DTYPES[pair.info.dtype]))
            self.whole = (patch, recipe.name, (made.T if patch.transposed else made).contiguous())
        return self.whole[2]

    def _note(self, pair: Pair, tile: Tile, wanted: Tensor, merged: Tensor) -> int:
        """Count mismatched elements; remember the first."""
        if _equal(wanted, merged):
            return 0
        different = bits(wanted) != bits(merged)
        count = int(torch.count_nonzero(different))
        if count and pair.name not in self.first:
            at = int(different.to(torch.uint8).argmax())
            self.first[pair.name] = tile.start * 8 // BITS[pair.output.info.dtype] + at
        self.mismatched[pair.name] += count
        if merged.is_floating_point():
            self.finite[pair.name] &= all_finite(merged)
        return count


def read_tile(merger: TileMerger, tile: Tile) -> Tensor:
    """The tile's bytes in memory of their own."""
    buffer = torch.empty(tile.nbytes, dtype=torch.uint8)
    merger.read(tile, buffer)
    return buffer


def base_part(merger: TileMerger, pair: Pair, patch: Patch, rows: slice, columns: slice) -> Tensor:
    """W0 of some stored rows and columns, (out_features, in_features) in the dtype of the work."""
    whole = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=pair.output.work_dtype)
    for first, last in cuts(rows.start, rows.stop, width_of(pair)):
        tile = part_of(pair.output, patch, first, last)
        weight = merger.base_weight(tile, read_tile(merger, tile))
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


def _places(pair: Pair, tile: Tile) -> tuple[int, int, int, int]:
    """Where in a buffer, after the stored tile, lie the file's elements, W0 and delta, and where they end."""
    entries = tile.nbytes * 8 // BITS[pair.output.info.dtype] if tile.patch else 0
    merged = _aligned(tile.nbytes)
    base_weight = _aligned(merged + _share(pair, tile)[1])
    delta = _aligned(base_weight + entries * pair.output.work_dtype.itemsize)
    return merged, base_weight, delta, delta + delta - base_weight


def _laid_out(memory: Tensor, like: Tensor) -> Tensor:
    """Flat memory in the shape and layout of a matrix."""
    flat = memory[: like.numel()]
    return flat.view(like.T.shape).T if like.stride(0) < like.stride(1) else flat.view(like.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


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
