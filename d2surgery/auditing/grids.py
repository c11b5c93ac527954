"""Quantised tensors of a merged checkpoint: made again where their quantiser is known, and measured on the grid.

A right merge on a grid is Ŵ = W0 + delta + n, n the error of the grid (docs/mathematics.md#on-a-grid).

- Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and MLX's: the merge of each recipe, rounded to the dtype in which the quantiser was
  given it, is quantised again. The same blocks are a replay.
- All are measured with the sums of `Comparison`: E is that merge quantised, or W0 + delta where no quantiser is known;
  and the instrument is delta less, in every row, its part along W0. A quantiser chooses its scales by the weights, so n
  has a part along W0, and none along what is random beside it.
- What is left of Ŵ − W0 beside delta is compared with the noise that steps as wide as the stored scales make.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.pefts import Operands
from d2surgery.auditing.recipes import OURS, Recipe, bank
from d2surgery.files.grids import FLOAT, quantized, quantizes, steps
from d2surgery.files.header import Grid
from d2surgery.files.tensors import as_bytes, read_part, rounded
from d2surgery.machine import workers
from d2surgery.measures.fidelity import Comparison, Survival, measured, regress
from d2surgery.merging.tiles import AdaptedTile, Steps, Tile, TileMerger
from d2surgery.placement.site import Patch

FEW = 1 / 64  # of the numbers, where another library's sums lie on the other side of a step
_SOME = 8  # modules on which it is found how the file was made
_TRIED = 3  # of them, that nothing fits
_ENTRIES = 1 << 14  # of each
_PART = 256  # the fewest numbers whose noise is looked at by itself
_LOW = (torch.bfloat16, torch.float16)


class How(NamedTuple):
    """How a quantiser's input was made: merged by a recipe in one dtype, and converted to another."""

    recipe: Recipe
    dtype: torch.dtype
    then: torch.dtype

    @property
    def words(self) -> str:
        names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.then))
        return f"{self.recipe.name} in {', then '.join(names)}"


@dataclass(frozen=True)
class Sums:
    """Of one module, or of a tensor that no adapter touches, so far; they add up."""

    survival: Survival = field(default_factory=Survival)
    wanted: Comparison = field(default_factory=Comparison)  # beside E
    held: Comparison = field(default_factory=Comparison)  # beside W0 + delta
    kept: float = 0.0  # <round(W0 + delta) − W0, instrument>, rounded to the base's 16 bits
    size: float = 0.0  # ‖Ŵ‖²
    twice: int = 0  # numbers of the base that stand in their 32 before, of `looked`: many where it lies on a grid
    looked: int = 0
    floor: float = 0.0  # Σ step²/12: what errors as wide as the steps add up to
    worst: float = 0.0  # of some rows: ‖Ŵ − W0 − delta‖ in units of the noise
    beyond: int = 0  # numbers more than a step from E
    is_base: bool = True  # every one is the base's, quantised likewise
    known: bool = True  # the quantiser
    finite: bool = True

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.survival + other.survival,
            self.wanted + other.wanted,
            self.held + other.held,
            self.kept + other.kept,
            self.size + other.size,
            self.twice + other.twice,
            self.looked + other.looked,
            self.floor + other.floor,
            max(self.worst, other.worst),
            self.beyond + other.beyond,
            self.is_base and other.is_base,
            self.known and other.known,
            self.finite and other.finite,
        )

    @property
    def replayed(self) -> bool:
        return self.known and not self.wanted.mismatched

    @property
    def excess(self) -> float:
        """What no strength of delta explains of Ŵ − W0, in units of the noise."""
        s = self.survival
        along = s.inner**2 / s.delta_squared if s.delta_squared else 0.0
        return sqrt(max(s.applied_squared - along, 0.0) / max(self.floor, 1e-300))

    @property
    def noise(self) -> float:
        """The noise of the grid in units of delta: ‖n‖/‖delta‖."""
        return sqrt(self.floor / self.survival.delta_squared) if self.survival.delta_squared else nan

    @property
    def least(self) -> float:
        """The strength that 16 bits before the grid leave of a right merge: 1 unless delta is below their rounding."""
        return min(self.kept / self.held.e_delta, 1.0) if self.held.e_delta and not self.known else 1.0

    @property
    def attenuated(self) -> bool:
        """Whether the base lies on a grid, so that a right merge may lose part of delta there."""
        of_a_grid = self.twice > 0.2 * self.looked  # of Gaussian numbers in bfloat16 0.03, of 64 levels 0.3
        return of_a_grid or self.excess < 0.5 or (self.known and self.wanted.e_delta < 0.98 * self.held.e_delta)


@dataclass
class OnGrids:
    """What a pass over quantised tensors found."""

    modules: dict[str, Sums] = field(default_factory=dict)
    tensors: dict[str, Sums] = field(default_factory=dict)  # by name, of all
    hows: dict[str, How] = field(default_factory=dict)  # by kind of adapter


def measure(
    merger: TileMerger, pairs: Sequence[TensorPair], progress: Callable[[int, int], None] = lambda done, total: None
) -> OnGrids:
    """Every quantised tensor beside base and adapter, tile by tile. progress(done, total): bytes.

    Raises D2SurgeryError NO_GGUF where the package that reads the blocks is not there.
    """
    found = OnGrids(hows=_hows(merger.apart(), pairs))
    total = sum(pair.output.entry.nbytes for pair in pairs)
    threads = merger.apart()
    work = [(pair.output, _Pass(threads, pair, found.hows).run) for pair in pairs]
    results = threads.over(work, workers(), lambda done: progress(done, total))
    for pair, (modules, tensor) in zip(pairs, results, strict=True):
        found.tensors[pair.name] = tensor
        for module, sums in modules.items():
            found.modules[module] = found.modules[module] + sums if module in found.modules else sums
    return found


def grid_of(pair: TensorPair) -> Grid:
    """Of a quantised tensor."""
    assert pair.info.grid is not None
    return pair.info.grid


# How it was made --------------------------------------------------------------------------------------------------


def _hows(merger: TileMerger, pairs: Sequence[TensorPair]) -> dict[str, How]:
    """By kind of adapter: what gives most of some modules, or ours."""
    found: dict[str, How] = {}
    samples: dict[str, list[TensorPair]] = {}
    for pair in pairs:
        if pair.output.site and pair.output.site.patches and pair.status != "tied" and quantizes(grid_of(pair)):
            samples.setdefault(_kind(merger, pair.output.site.patches[0]), []).append(pair)
    for kind, those in samples.items():
        if (how := _how(merger, those[:: -(-len(those) // _SOME)])) is not None:
            found[kind] = how
    return found


def _how(merger: TileMerger, pairs: Sequence[TensorPair]) -> How | None:
    """What gives the most of these, else the usual; after some that nothing gives no more are tried."""
    usual: How | None = None
    fitting: dict[How, int] = {}  # numbers off
    tried = 0
    for pair in pairs:
        tile = merger.first_rows(pair.output, _ENTRIES)
        if tile is None or (tried == _TRIED and not fitting):
            continue
        tried += 1
        base, there = merger.base_weight(tile, merger.read(tile)).clone(), _stored(pair, tile)
        off: dict[How, int] = {}
        for how in fitting or _ways(merger, pair, tile):
            made = quantized(_made(merger, pair, tile, base, how), grid_of(pair))
            off[how] = fitting.get(how, 0) + int(torch.count_nonzero(made != there))
        if not fitting:
            usual = next(iter(off))
            fitting = {how: count for how, count in off.items() if count <= FEW * there.numel()}
        elif min(off.values()) - min(fitting.values()) <= FEW * there.numel():  # else this module is another's
            fitting = off
    return min(fitting, key=lambda how: fitting[how]) if fitting else usual


def _kind(merger: TileMerger, patch: Patch) -> str:
    return merger.checkpoint.layout.adapters[patch.module].kind


def _ways(merger: TileMerger, pair: TensorPair, tile: AdaptedTile) -> Iterator[How]:
    """The usual first: in the base's dtype, straight to the grid."""
    grid, stored = grid_of(pair), pair.output.stored_dtype
    entry = merger.checkpoint.layout.adapters[tile.patch.module]
    own = FLOAT[grid.scales.dtype] if grid.scales else None
    dtypes = [own] if own else sorted(FLOAT.values(), key=lambda dtype: dtype != stored)
    for dtype in dtypes:
        for recipe in bank(entry.kind, entry.axis, stored, dtype)[: 1 if merger.strength != 1 else None]:
            for then in dict.fromkeys((dtype, *(() if own else _LOW))):
                yield How(recipe, dtype, then)


def _made(merger: TileMerger, pair: TensorPair, tile: AdaptedTile, base: Tensor, how: How) -> Tensor:
    """A tile as it was given to the quantiser, flat; base: (out_features, in_features) in the dtype of the work."""
    if how.recipe.name == OURS or merger.crosses_tiles(tile.patch):
        made = rounded(merger.effective(tile, base.clone()), how.dtype)
    else:
        adapter = tile.adapter.take(**tile.part)
        made = how.recipe.merge(Operands(base.to(pair.output.stored_dtype), adapter, how.dtype)).to(how.dtype)
    return tile.flat(made).to(how.then)


def _stored(pair: TensorPair, tile: Tile) -> Tensor:
    """The tile's numbers in the merged file, flat."""
    values = torch.empty(tile.nbytes // pair.output.stored_dtype.itemsize)
    read_part(pair.info, 4 * tile.element, as_bytes(values))
    return values


# The pass ---------------------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """Of one pair."""

    merger: TileMerger
    pair: TensorPair
    hows: Mapping[str, How]

    def run(self, tiles: Steps) -> tuple[dict[str, Sums], Sums]:
        """By module, and of all."""
        modules: dict[str, Sums] = {}
        plain = {then: Sums() for then in ((None, *_LOW) if quantizes(grid_of(self.pair)) else (None,))}
        adapted = Sums()
        for tile, raw in tiles:
            there = _stored(self.pair, tile)
            if isinstance(tile, AdaptedTile):
                sums = self._adapted(tile, raw, there)
                adapted += sums
                if self.pair.status != "tied":
                    module = tile.patch.module
                    modules[module] = modules[module] + sums if module in modules else sums
                continue
            base = self.merger.values(tile, raw)
            plain = {then: sums + self._plain(base, then, there) for then, sums in plain.items()}
            plain = dict([min(plain.items(), key=lambda item: item[1].wanted.mismatched)])
        return modules, adapted + next(iter(plain.values()))

    def _plain(self, base: Tensor, then: torch.dtype | None, there: Tensor) -> Sums:
        """Where no adapter is, `base` is all that should be there."""
        grid = grid_of(self.pair)
        known, size = quantizes(grid), gcd(base.numel(), 4096)
        stored = base.to(self.pair.output.stored_dtype)
        if grid.scales:
            stored = stored.to(FLOAT[grid.scales.dtype])
        wanted = quantized(stored.to(then or stored.dtype), grid) if known else base.float()
        width = size if size >= _PART else base.numel()
        return self._sums(base, torch.zeros_like(base), wanted, there, width, known=known)

    def _adapted(self, tile: AdaptedTile, raw: Tensor, there: Tensor) -> Sums:
        grid, base = grid_of(self.pair), self.merger.base_weight(tile, raw).clone()
        change, flat = tile.flat(self.merger.delta(tile, base)), tile.flat(base)
        how = self.hows.get(_kind(self.merger, tile.patch))
        known = quantizes(grid) and how is not None
        is_base = False
        wanted = (flat + change).float()
        if known and how is not None:
            wanted = quantized(_made(self.merger, self.pair, tile, base, how), grid)
            kept = flat.to(how.dtype).to(how.then)
            is_base = not torch.equal(wanted, there) and torch.equal(quantized(kept, grid), there)
        sums = self._sums(flat, change, wanted, there, self.pair.output.matrix[1], known=known)
        return replace(sums, is_base=is_base)

    def _sums(self, base: Tensor, change: Tensor, wanted: Tensor, there: Tensor, width: int, *, known: bool) -> Sums:
        base, change, wanted, there = (values.reshape(-1, width) for values in (base, change, wanted, there))
        if not torch.isfinite(there).all():
            return Sums(finite=False, known=known)
        step = steps(there, grid_of(self.pair))
        size = there.numel() // max(step.numel(), 1)
        noise = step.double().square().mul_(size / 12)
        aside = _beside(change, base)
        off = (there - base - change).double().square().sum(1) if width >= _PART else torch.zeros(1)
        rows = noise.reshape(len(there), -1).sum(1) if width >= _PART else torch.ones(1)
        apart = ((there - wanted).abs().reshape(-1, size) > 1.05 * step) if known else torch.zeros(0)
        some = base.reshape(-1, 32)[:: max(base.numel() // (32 * _PART), 1)].sort(1).values
        right, stored = base + change, self.pair.output.stored_dtype
        low = rounded(right, stored).to(base.dtype) if stored.itemsize == 2 else right
        return Sums(
            measured(base, change, there),
            regress(base, aside, wanted, there),
            regress(base, aside, right.float(), there),
            float((low.sub(base).mul_(aside)).sum(dtype=torch.float64)),
            float(there.double().square().sum()),
            int(torch.count_nonzero(some.diff(dim=1) == 0)),
            some.numel(),
            float(noise.sum()),
            sqrt(float((off / rows.clamp(min=1e-300)).max())),
            int(torch.count_nonzero(apart)),
            known=known,
        )


def _beside(change: Tensor, base: Tensor) -> Tensor:
    """delta less its part along W0, row by row."""
    share = (change * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True).clamp(min=1e-30)
    return change - share * base
