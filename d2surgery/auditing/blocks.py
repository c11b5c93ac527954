"""The block of a weight on which the cause of a difference is looked for, and what an adapter makes of it."""

from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import starmap

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.vectors import Triple
from d2surgery.auditing.case import Case
from d2surgery.auditing.diagnosis import Diagnosis, diagnose, rows_moved
from d2surgery.auditing.matching import base_part, merged_part
from d2surgery.auditing.orders import is_fused, other_places
from d2surgery.auditing.pairing import TensorPair
from d2surgery.auditing.tally import Held, Tally
from d2surgery.checkpoint import Checkpoint
from d2surgery.formats.layout import Packing, with_expert_layout
from d2surgery.merging.prepared import Prepared
from d2surgery.merging.tiles import row_ranges
from d2surgery.placement.site import Patch

_ENTRIES = 1 << 18  # enough to tell a fault of which rounding leaves a few hundredths
_HEAD = 128  # a block begins at a multiple of this many rows, so that it holds whole attention heads


def diagnosis_of(prepared: Prepared, tally: Tally, before: Diagnosis) -> Diagnosis:
    """Of a module some of whose elements are mismatched, on a block that holds the first."""
    flat, tall = _blocks(prepared, tally)
    patch = flat.patch
    block = tall if prepared.merger.crosses_tiles(patch) or is_fused(patch.module) else flat
    found = diagnose(block.case(), block.merged(), before)
    if found.residual_rank is None:
        return found
    block = flat if patch.transposed else tall  # of every out_feature: rows may have come from anywhere
    return rows_moved(block.case(), block.merged()) or found


def block_of(prepared: Prepared, tally: Tally) -> "Block":
    """Some whole vectors about the first mismatched element."""
    flat, tall = _blocks(prepared, tally)
    return tall if prepared.merger.crosses_tiles(flat.patch) else flat


def _blocks(prepared: Prepared, tally: Tally) -> tuple["Block", "Block"]:
    """Some rows of the stored tensor, and some columns."""
    assert tally.first is not None
    pair, patch, element = tally.first
    rows, columns = slice(patch.start, patch.stop), slice(0, pair.output.matrix[1])
    row, column = divmod(element, columns.stop)
    held = tally.held
    flat = Block(prepared, pair, patch, _about(row, rows, columns), columns, held)
    return flat, Block(prepared, pair, patch, rows, _about(column, columns, rows), held)


def _about(place: int, all_: slice, others: slice) -> slice:
    """About `_ENTRIES` entries of a matrix: those rows of `all_`, or columns, around `place`."""
    count = max(_ENTRIES // max(others.stop - others.start, 1) // _HEAD * _HEAD, _HEAD)
    first = all_.start + (place - all_.start) // _HEAD * _HEAD
    first = max(min(first, all_.stop - count), all_.start)
    return slice(first, min(first + count, all_.stop))


@dataclass(frozen=True)
class Block:
    """Some rows and columns of a stored tensor, under the patch of one adapter.

    Its matrices are (out_features, in_features). Of vectors that reach beyond it, `triple` has the sums.
    """

    prepared: Prepared
    pair: TensorPair
    patch: Patch
    rows: slice
    columns: slice
    held: Held  # how the nearest recipe holds base and adapter

    def case(self) -> Case:
        fit = self.prepared.fit
        return Case(
            module=self.patch.module,
            base=self._base(self.rows, self.columns),
            adapter=self.held.adapter(self.prepared.merger.adapter(self.patch), self.pair),
            part=self.part,
            triple=self.triple,
            strength=fit.strength,
            entry=fit.layout.adapters[self.patch.module],
            base_config=fit.base.config,
            dtype=self.held.grid or self.pair.dtype,
            repacked=self._repacked(),
            others={where: partial(self._other, patch) for where, patch in other_places(fit.layout, self.patch)},
            ranks=frozenset(entry.rank for entry in fit.layout.adapters.values() if entry.rank),
        )

    def merged(self) -> Tensor:
        """As stored; where it lies on a coarser grid, in that dtype."""
        stored = merged_part(self.pair, self.patch, self.rows, self.columns)
        coarse = stored.to(self.held.grid or stored.dtype)
        return coarse if torch.equal(coarse.to(stored.dtype), stored) else stored

    def part(self, adapter: Adapter) -> Adapter:
        """What of the whole weight's adapter lands here."""
        return self._part(adapter, self.rows, self.columns)

    def triple(self, adapter: Adapter) -> Triple | None:
        """Of the vectors that the adapter normalises, where they reach beyond the block; else None."""
        if not adapter.normalises:
            return None
        in_a_row = (adapter.along == "out_features") != self.patch.transposed
        rows = self.rows if in_a_row else slice(self.patch.start, self.patch.stop)
        columns = slice(0, self.pair.output.matrix[1]) if in_a_row else self.columns
        if (rows, columns) == (self.rows, self.columns):
            return None
        triples = [
            self._part(adapter, part, columns).triple(self._base(part, columns), adapter.along)
            for part in starmap(slice, row_ranges(rows.start, rows.stop, self.pair.output.matrix[1]))
        ]
        if in_a_row:
            return Triple(*map(torch.cat, zip(*triples, strict=True)))
        return reduce(Triple.plus, triples)

    def _repacked(self) -> Adapter | None:
        merger = self.prepared.merger
        layout = merger.checkpoint.layout
        if layout.adapters[self.patch.module].experts == 1:
            return None
        other: Packing = "interleaved" if layout.adapters[self.patch.module].packed == "grouped" else "grouped"
        return replace(merger, checkpoint=Checkpoint(with_expert_layout(layout, other))).adapter(self.patch)

    def _other(self, patch: Patch) -> Adapter:
        return self.held.adapter(self.prepared.merger.adapter(patch), self.pair)

    def _base(self, rows: slice, columns: slice) -> Tensor:
        return self.held.base(base_part(self.prepared.merger, self.pair, self.patch, rows, columns), self.pair)

    def _part(self, adapter: Adapter, rows: slice, columns: slice) -> Adapter:
        within = slice(rows.start - self.patch.start, rows.stop - self.patch.start)
        return adapter.take(out=columns, in_=within) if self.patch.transposed else adapter.take(out=within, in_=columns)
