"""One pass over base and merged side by side: the merge again, tile by tile, by the recipe that gives the file's bits.

Where no recipe gives every bit (`matching`), the nearest is what the file is measured against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from d2surgery.auditing.matching import Matcher, equal
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.recipes import RECIPES, Recipe
from d2surgery.auditing.strays import EVERY, Marks
from d2surgery.auditing.strays import Tile as Marked
from d2surgery.auditing.tally import Found, Made, Mismatch, Tally
from d2surgery.files.header import BITS, TensorInfo
from d2surgery.files.tensors import DTYPES, as_bytes, read_part
from d2surgery.machine import workers
from d2surgery.measures.fidelity import Comparison, compare, differing, measured
from d2surgery.merging.tiles import AdaptedTile, Steps, Tile, TileMerger, all_finite, row_ranges
from d2surgery.placement.site import Patch

ALIKE = 8  # modules that no recipe fits, after which the nearest to them is taken for that to all


@dataclass
class Replay:
    """What a pass over pairs found."""

    merger: TileMerger
    names: frozenset[str] = frozenset(recipe.name for recipe in RECIPES)
    modules: dict[str, Tally] = field(default_factory=dict)
    tensors: dict[str, Found] = field(default_factory=dict)
    before: Mapping[str, Tally] | None = None  # of a pass before; what differs is now looked at for structure
    also: tuple[str, ...] = ()  # recipes that give the bits of the first module, too, in the rows that were compared

    def run(self, pairs: Sequence[TensorPair], progress: Callable[[int, int], None]) -> None:
        """Compare every pair; progress(done, total) in bytes of the merge as ours would be.

        Several at once, but of several recipes one pair with an adapter before all others: what fits it is tried first.
        Where none fits it, nor any of some more, and one is the nearest to all of these, no other is tried on the rest:
        one merger treats all modules alike.
        """
        total = sum(pair.output.entry.nbytes for pair in pairs)
        patched = [pair for pair in pairs if pair.output.site and pair.output.site.patches]
        first, some = patched[:1], patched[1 :: max(len(patched) // ALIKE, 1)]
        favourite, names, done = None, self.names, 0
        found: dict[str, Found] = {}

        def advance(nbytes: int) -> None:
            progress(done + nbytes, total)

        rest = [pair for pair in pairs if pair not in first and pair not in some]
        for part in (first, some, rest) if len(names) > 1 else (pairs,):
            passed, favourite = self._pass(part, names, favourite, curious=part is first, progress=advance)
            found |= passed
            done += sum(pair.output.entry.nbytes for pair in part)
            nearest = {tally.nearest for result in found.values() for tally in result.modules.values()}
            if len(found) >= ALIKE and len(nearest) == 1 and (one_of_all := nearest.pop()) is not None:
                names = frozenset((one_of_all.name,))
        for pair in pairs:
            self._add(pair, found[pair.name])

    def _pass(
        self,
        part: Sequence[TensorPair],
        names: frozenset[str],
        favourite: Recipe | None,
        *,
        curious: bool,
        progress: Callable[[int], None],
    ) -> tuple[dict[str, Found], Recipe | None]:
        """What is found of these pairs, and what to try first on the next; in memory that ends with it."""
        merger = self.merger.apart()
        matchers = [Matcher(merger, names, pair, favourite, curious=curious) for pair in part]
        work = [(one.pair.output, Pass(merger, one, one.pair, self.before).run) for one in matchers]
        results = merger.over(work, workers(), progress)
        found = {pair.name: result for pair, result in zip(part, results, strict=True)}
        self.also = self.also or next((one.also for one in matchers if one.also), ())
        return found, matchers[-1].favourite if matchers else favourite

    def _add(self, pair: TensorPair, found: Found) -> None:
        self.tensors[pair.name] = found
        for module, tally in found.modules.items():
            self.modules[module] = self.modules[module].plus(tally) if module in self.modules else tally


@dataclass
class Pass:
    """The comparison of one pair, tile by tile."""

    merger: TileMerger
    matcher: Matcher
    pair: TensorPair
    before: Mapping[str, Tally] | None
    found: Found = field(default_factory=Found)

    def run(self, steps: Steps) -> Found:
        weights = cache(self._weights)
        for tile, stored in steps:
            if not isinstance(tile, AdaptedTile):
                self._compare(tile, stored, self._read(self.pair.info, tile, "merged"))
                continue
            if weight := weights(tile.patch).get(tile.first, 1.0):
                made = self._made(tile, stored, self._read(self.pair.info, tile, "merged"))
                self._compare_adapted(made, weight)
            if self.before is not None and tile.last == tile.patch.stop:
                self._marks(tile.patch).evened(along_rows=not tile.patch.transposed)
        for tally in self.found.modules.values():
            tally.clean = tally.clean if tally.comparison.mismatched else {}
        self.matcher.forget()
        return self.found

    def _weights(self, patch: Patch) -> dict[int, float]:
        """By first row: for how many a tile counts that the nearest recipe gives to the bit; 0 where another does."""
        if self.before is None:
            return {}
        tally, width = self.before[patch.module], self.pair.output.matrix[1]
        clean = {*tally.clean.get((self.pair.name, tally.nearest.name if tally.nearest else ""), ())}
        sizes = {first: last - first for first, last in row_ranges(patch.start, patch.stop, width) if first in clean}
        looked = list(sizes)[::EVERY]
        weight = sum(sizes.values()) / max(sum(sizes[first] for first in looked), 1)
        return dict.fromkeys(sizes, 0.0) | dict.fromkeys(looked, weight)

    def _read(self, info: TensorInfo, tile: Tile, purpose: str) -> Tensor:
        """The tile's elements in a tensor of the merged file, flat, in memory of this thread."""
        source, own = BITS[self.pair.output.info.dtype], BITS[info.dtype]
        elements = self.merger.workspace.take(purpose, tile.nbytes * own // source, torch.uint8)
        read_part(info, tile.start * own // source, as_bytes(elements), once=True)
        return elements.view(DTYPES[info.dtype])

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
        if added := self.pair.info.added or self.pair.output.info.added:  # which cost one of the two its last bits
            ours, merged = ((values.float() + added) - added for values in (ours, merged))
        if self._note(tile, ours, merged) is not None and site is not None and site.bias is not None:
            within = self._rounding_only(site.bias, tile, ours, merged)
            self.found.rounding = within and self.found.rounding is not False

    def _loaded_through(self, tile: Tile, stored: Tensor, merged: Tensor) -> frozenset[torch.dtype]:
        """Through which 16-bit dtypes the base's values could have gone to these."""
        source = self.pair.output.stored_dtype
        if not (source.is_floating_point and merged.is_floating_point()) or self.pair.output.site is not None:
            return self.found.through
        values, few = stored.view(source), slice(0, 4096)
        kept = source == merged.dtype and equal(values, merged)  # then a cast shows in some, where it shows at all
        parts = (few,) if kept else (few, slice(None))
        return frozenset(
            low
            for low in self.found.through
            if low != source and all(equal(values[part].to(low).to(merged.dtype), merged[part]) for part in parts)
        )

    def _compare_adapted(self, made: Made, weight: float) -> None:
        pair, patch, merged = self.pair, made.tile.patch, made.merged
        if pair.status == "tied":  # its module is judged where it is not tied
            if pair.twin is None or not equal(self._read(pair.twin, made.tile, "twin"), merged):
                self._note(made.tile, self.matcher.wanted(Tally(), made), merged)
            return
        tally = self.found.modules.setdefault(patch.module, Tally())
        wanted = self.matcher.wanted(tally, made)
        base, change = (m.T if patch.transposed else m for m in (made.base_weight, made.delta))
        there = merged.view(base.shape)
        if self.before is not None:
            self._mark(made.tile, change, *self._beside(tally, base, wanted.view(base.shape), there), weight)
            return
        survival = measured(base, change, there, self._space("change", base))
        tally.survival += survival
        recipe = tally.nearest or self.matcher.favourite
        if wanted is merged:
            sums = Comparison(elements=survival.elements, e_delta=survival.inner, ee=survival.applied_squared)
        else:
            base, stored, there = self._beside(tally, base, wanted.view(base.shape), there)
            sums = compare(base, change, stored, there, sqrt(survival.delta_squared / max(survival.elements, 1)))
        tally.comparison += sums
        if not sums.mismatched and recipe is not None:
            tally.clean.setdefault((pair.name, recipe.name), []).append(made.tile.first)
        elif sums.mismatched:
            self._differs(tally, made, wanted, sums)

    def _differs(self, tally: Tally, made: Made, wanted: Tensor, sums: Comparison) -> None:
        """Count what differs in a tile of a module, and where it first does."""
        finite = isfinite(sums.ee + sums.dd) or all_finite(made.merged)
        tally.finite &= finite
        self.found.finite &= finite
        self.found.mismatched += sums.mismatched
        if tally.first is None:
            at = made.tile.element + int(differing(wanted, made.merged).numpy().argmax())
            tally.first = Mismatch(self.pair, made.tile.patch, at)
            self.found.first = at if self.found.first is None else self.found.first

    def _beside(self, tally: Tally, base: Tensor, wanted: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The base as the nearest recipe holds it; wanted and there in units of the grid, where both lie on it."""
        grid, both = tally.grid, (wanted, there)
        if grid is not None and all(torch.equal(values.to(grid).to(values.dtype), values) for values in both):
            wanted, there = wanted.to(grid), there.to(grid)
        return tally.held.base(base, self.pair), wanted, there

    def _mark(
        self, tile: AdaptedTile, change: Tensor, base: Tensor, wanted: Tensor, there: Tensor, weight: float
    ) -> None:
        patch, tiles = tile.patch, slice(tile.first - tile.patch.start, tile.last - tile.patch.start)
        if patch.transposed:
            base, change, wanted, there = (m.T for m in (base, change, wanted, there))
        where = (slice(None), tiles) if patch.transposed else (tiles, slice(None))
        self._marks(patch).add(Marked(base, change, wanted, there, *where), weight)

    def _marks(self, patch: Patch) -> Marks:
        size = (patch.stop - patch.start, self.pair.output.matrix[1])
        marks = self.found.modules[patch.module].marks
        return marks.setdefault((self.pair.name, patch), Marks.of(*(size[::-1] if patch.transposed else size)))

    def _rounding_only(self, module: str, tile: Tile, wanted: Tensor, merged: Tensor) -> bool:
        """Whether base + s·bias differs by no more than rounding a product and a sum."""
        right = wanted.double()
        size = right.abs() + self.merger.bias(module, tile, right).abs()
        return bool(((merged.double() - right).abs() <= 2 * torch.finfo(merged.dtype).eps * size).all())

    def _space(self, purpose: str, like: Tensor) -> Tensor:
        """Memory of this thread in the shape and layout of another matrix."""
        flat = self.merger.workspace.take(purpose, like.numel(), like.dtype)
        return flat.view(like.T.shape).T if like.stride(0) < like.stride(1) else flat.view(like.shape)

    def _note(self, tile: Tile, wanted: Tensor, merged: Tensor) -> int | None:
        """Count mismatched elements; where in the tensor the tile's first is."""
        if equal(wanted, merged):
            return None
        different = differing(wanted, merged).numpy()
        self.found.mismatched += int(np.count_nonzero(different))
        if merged.is_floating_point():
            self.found.finite &= all_finite(merged)
        at = tile.element + int(different.argmax())
        self.found.first = at if self.found.first is None else self.found.first
        return at
