"""The block of a weight on which the cause of a difference is looked for, and what an adapter makes of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, Triple
from d2surgery.auditing.diagnosis import Diagnosis, diagnose, rows_moved
from d2surgery.auditing.faults import Case
from d2surgery.auditing.pairing import Pair
from d2surgery.auditing.replay import Tally, read_part, read_tile
from d2surgery.header import BITS
from d2surgery.merging.job import Job
from d2surgery.merging.tiles import TILE, part_of
from d2surgery.sites import Patch
from d2surgery.tensors import DTYPES, as_bytes

_ENTRIES = 1 << 18  # enough to tell a fault of which rounding leaves a few hundredths
_HEAD = 128  # a block begins at a multiple of this many rows, so that it holds whole attention heads


def diagnosis_of(job: Job, tally: Tally, before: Diagnosis) -> Diagnosis:
    """Of the module whose sums these are, on a block that holds its first mismatch."""
    assert tally.first is not None
    pair, patch, element = tally.first
    assert pair.output.site is not None
    rows, columns = slice(patch.start, patch.stop), slice(0, pair.output.site.matrix[1])
    row, column = divmod(element, columns.stop)
    flat = Block(job, pair, patch, _about(row, rows, columns), columns)
    tall = Block(job, pair, patch, rows, _about(column, columns, rows))
    block = tall if job.merger.crosses_tiles(patch) else flat
    found = diagnose(block.case(), block.merged(), before)
    if found.residual_rank is None:
        return found
    block = flat if patch.transposed else tall  # of every out_feature: rows may have come from anywhere
    return rows_moved(block.case(), block.merged()) or found


def _about(place: int, all_: slice, others: slice) -> slice:
    """About `_ENTRIES` entries of a matrix: those rows of `all_`, or columns, around `place`."""
    count = max(_ENTRIES // max(others.stop - others.start, 1) // _HEAD * _HEAD, _HEAD)
    first = all_.start + (place - all_.start) // _HEAD * _HEAD
    first = max(min(first, all_.stop - count), all_.start)
    return slice(first, min(first + count, all_.stop))


@dataclass(frozen=True)
class Block:
    """Some rows and columns of a stored tensor that one adapter patches; it holds whole vectors that this normalises.

    Its matrices are (out_features, in_features).
    """

    job: Job
    pair: Pair
    patch: Patch
    rows: slice
    columns: slice

    def case(self) -> Case:
        base = self._joined([weight for _, weight in self._base(self.rows, self.columns)])
        return Case(
            module=self.patch.module,
            base=base,
            adapter=self.job.merger.adapter(self.patch),
            part=self.part,
            triple=self.triple,
            strength=self.job.strength,
            entry=self.job.layout.adapters[self.patch.module],
            adapter_config=self.job.layout.config,
            base_config=self.job.base.config,
            dtype=DTYPES[self.pair.info.dtype],
        )

    def merged(self) -> Tensor:
        """The merged weight, as stored."""
        width = self._width
        row_bytes = width * BITS[self.pair.info.dtype] // 8
        parts = []
        for part in _cuts(self.rows, width):
            buffer = torch.empty((part.stop - part.start) * row_bytes, dtype=torch.uint8)
            read_part(self.pair, part.start * row_bytes, as_bytes(buffer))
            matrix = buffer.view(DTYPES[self.pair.info.dtype]).view(-1, width)[:, self.columns]
            parts.append((matrix.T if self.patch.transposed else matrix).clone())
        return self._joined(parts)

    def part(self, adapter: Adapter) -> Adapter:
        """What of the whole weight's adapter lands here."""
        return self._part(adapter, self.rows, self.columns)

    def triple(self, adapter: Adapter) -> Triple | None:
        """Of the vectors that the adapter normalises, where they reach beyond the block; else None."""
        if not adapter.normalises:
            return None
        in_a_row = (adapter.along == "out_features") != self.patch.transposed
        rows = self.rows if in_a_row else slice(self.patch.start, self.patch.stop)
        columns = slice(0, self._width) if in_a_row else self.columns
        if (rows, columns) == (self.rows, self.columns):
            return None
        triples = [
            self._part(adapter, part, columns).triple(weight, adapter.along)
            for part, weight in self._base(rows, columns)
        ]
        if in_a_row:
            return Triple(*map(torch.cat, zip(*triples, strict=True)))
        return reduce(Triple.plus, triples)

    @property
    def _width(self) -> int:
        assert self.pair.output.site is not None
        return self.pair.output.site.matrix[1]

    def _base(self, rows: slice, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """W0 by ranges of whole stored rows: one in memory at a time."""
        merger = self.job.merger
        for part in _cuts(rows, self._width):
            tile = part_of(self.pair.output, self.patch, part.start, part.stop)
            weight = merger.base_weight(tile, read_tile(merger, tile))
            yield part, (weight[columns] if self.patch.transposed else weight[:, columns]).clone()

    def _part(self, adapter: Adapter, rows: slice, columns: slice) -> Adapter:
        within = slice(rows.start - self.patch.start, rows.stop - self.patch.start)
        return adapter.take(out=columns, in_=within) if self.patch.transposed else adapter.take(out=within, in_=columns)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1 if self.patch.transposed else 0)


def _cuts(rows: slice, width: int) -> Iterator[slice]:
    step = max(TILE // max(width, 1), 1)
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))
