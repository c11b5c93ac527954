"""One tensor of the merged checkpoint, tile by tile: what is read, what is computed, in which dtype.

The tile grid depends on shapes alone, so the result does not depend on the memory given. Where an adapter normalises
vectors that no single tile holds, its tiles come twice: once to sum each vector's triple, once to merge.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter, DualLoRA, Streamed
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError, refuse
from d2surgery.header import BITS, FLOATS, TensorInfo
from d2surgery.merging.writer import Entry
from d2surgery.sites import Patch, Site
from d2surgery.tensors import DTYPES, as_bytes, read_into, rounded

TILE = 1 << 20  # entries; 4 MB in float32, small enough for the cache
_LEAST_ROWS = 4  # products of one to three rows take other code paths in the linear-algebra library


class Output(NamedTuple):
    """One tensor of the merged checkpoint: from which stored bytes, with which site, in which dtype."""

    name: str
    info: TensorInfo
    dtype: str
    site: Site | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.site.shape if self.site else self.info.shape

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.dtype, self.shape, prod(self.shape) * BITS[self.dtype] // 8)

    @property
    def copied(self) -> bool:
        return self.site is None and self.dtype == self.info.dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """One precision above the output: float32 for 16-bit outputs, float64 for float32 and float64 ones."""
        wide = self.dtype in ("F32", "F64") or self.info.dtype == "F64"
        return torch.float64 if wide else torch.float32


class Tile(NamedTuple):
    """A byte range of an output's source. With a patch: whole rows first..last of the stored matrix."""

    output: Output
    start: int
    nbytes: int
    first: int = 0
    last: int = 0
    patch: Patch | None = None
    measure: bool = False  # only sum the triples


@dataclass
class TileMerger:
    """Reads and merges tiles, one output after the other; keeps the adapter in use."""

    checkpoint: Checkpoint
    strength: float
    device: torch.device
    current: tuple[Patch, Adapter, Streamed | None] | None = None  # the adapter in use, and where
    workspace: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def grid(self) -> int:
        """Entries per tile: with the shapes, all that decides the grid."""
        return TILE

    def tiles(self, output: Output) -> Iterator[Tile]:
        """The tiles of an output in the order in which they must be merged."""
        patches = output.site.patches if output.site else ()
        return tiles(output, any(self.crosses_tiles(patch) for patch in patches))

    def read(self, tile: Tile, buffer: Tensor) -> None:
        """Fill the buffer with the tile's bytes."""
        info = tile.output.info
        target = as_bytes(buffer[: tile.nbytes])
        if info.file == self.checkpoint.layout.path and self.checkpoint.in_memory:
            site = tile.output.site
            key = site.replacement if site else None
            assert key is not None
            whole = as_bytes(self.checkpoint.tensor(key).contiguous())
            target[:] = whole[tile.start : tile.start + tile.nbytes]
            return
        fd = os.open(info.file, os.O_RDONLY)
        try:
            read_into(fd, target, info.start + tile.start)
        finally:
            os.close(fd)

    def merge(self, tile: Tile, buffer: Tensor) -> Tensor | None:
        """The tile's elements as they will be written; None for a tile that only measures. May overwrite the buffer."""
        raw = buffer[: tile.nbytes]
        if tile.output.copied:
            return raw
        stored = raw.view(DTYPES[tile.output.info.dtype])
        if tile.output.info.dtype not in FLOATS:
            return stored
        if tile.patch is None:
            return self.finish(tile, self._values(tile, raw), raw)
        effective = self.effective(tile, self.base_weight(tile, raw))
        return None if effective is None else self.finish(tile, effective, raw)

    def finish(self, tile: Tile, effective: Tensor, buffer: Tensor) -> Tensor:
        """The effective weight as it will be written: its bias added, rounded once. May overwrite the buffer."""
        transposed = tile.patch is not None and tile.patch.transposed
        values = (effective.T if transposed else effective).reshape(-1)
        site = tile.output.site
        if site is not None and site.bias is not None:
            values = values + self.bias(site.bias, tile, values)
        result = self._rounded_into(buffer[: tile.nbytes], values, DTYPES[tile.output.dtype])
        if site is not None or tile.output.dtype != tile.output.info.dtype:
            self._check_finite(tile, values, result)
        return result

    def delta(self, tile: Tile, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tile's base weight as an (out_features, in_features) matrix, and strength·delta."""
        base_weight = self.base_weight(tile, buffer)
        return base_weight, self._patched(tile, base_weight, over=False)

    def base_weight(self, tile: Tile, buffer: Tensor) -> Tensor:
        """The tile as an (out_features, in_features) matrix in the dtype of the work; the next one lies over it."""
        assert tile.patch is not None
        matrix = self._values(tile, buffer).view(tile.last - tile.first, -1)
        return matrix.T if tile.patch.transposed else matrix

    def effective(self, tile: Tile, base_weight: Tensor) -> Tensor | None:
        """W0 + strength·delta before rounding, written over the base weight; None for a tile that only measures."""
        return self._patched(tile, base_weight, over=True)

    def adapter(self, tile: Tile) -> Adapter:
        """The adapter of the whole patch that the tile is part of."""
        assert tile.patch is not None
        return self._adapter(tile, tile.patch)[0]

    def begin(self) -> None:
        """Forget the sums of the output in use: its tiles are about to come again."""
        self.current = None

    def crosses_tiles(self, patch: Patch) -> bool:
        """Whether its adapter normalises vectors that lie across rows of the stored tensor."""
        adapter = self.checkpoint.layout.adapters[patch.module]
        normalises = adapter.kind == "dora" or (adapter.kind == "d2lora" and adapter.form != "update")
        return normalises and (adapter.along == "out_features") == patch.transposed

    def _working_copy(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tile in the dtype of the work; on a CPU always in the same memory, which costs no page faults."""
        if self.device.type != "cpu":
            return stored.to(self.device, dtype)
        if self.workspace.dtype != dtype or self.workspace.numel() < stored.numel():
            self.workspace = torch.empty(stored.numel(), dtype=dtype)
        return self.workspace[: stored.numel()].copy_(stored)

    def _rounded_into(self, raw: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded once; over the bytes that were read where it fits, since nobody needs them any more."""
        if values.numel() * dtype.itemsize > raw.numel():
            wider = rounded(values, dtype).cpu()
            return wider.clone() if wider is values else wider  # the next tile needs the workspace
        once = rounded(values, dtype) if values.dtype == torch.float64 else values  # copy_ rounds float32 once
        return raw[: values.numel() * dtype.itemsize].view(dtype).copy_(once)

    def _values(self, tile: Tile, buffer: Tensor) -> Tensor:
        stored = buffer[: tile.nbytes].view(DTYPES[tile.output.info.dtype])
        return self._with_rows(tile, self._working_copy(stored, tile.output.work_dtype))

    def _patched(self, tile: Tile, base_weight: Tensor, *, over: bool) -> Tensor | None:
        """strength·delta or, over the base weight, their sum; None when the tile only adds to its vectors' triples."""
        patch = tile.patch
        assert patch is not None
        adapter, streamed = self._adapter(tile, patch)
        rows = slice(tile.first - patch.start, tile.last - patch.start)
        part = {"in_": rows} if patch.transposed else {"out": rows}
        if streamed is None:
            delta = adapter.take(**part).delta(base_weight)
            delta = delta if self.strength == 1 else delta.mul_(self.strength)
            return delta.add_(base_weight) if over else delta
        if tile.measure:
            streamed.add(base_weight, **part)
            return None
        try:
            self._settle(tile, patch, streamed)
            return streamed.merged(base_weight, **part) if over else streamed.delta(base_weight, **part)
        except D2SurgeryError as error:
            rows_are_vectors = (adapter.along == "out_features") is not patch.transposed
            counting = f", counting from row {tile.first} of {tile.output.name}" if rows_are_vectors else ""
            where = f"{patch.module}{counting}"
            raise D2SurgeryError(*(replace(problem, module=where) for problem in error.problems)) from None

    def _adapter(self, tile: Tile, patch: Patch) -> tuple[Adapter, Streamed | None]:
        if self.current is None or self.current[0] != patch:
            adapter = self.checkpoint.adapter(patch.module, patch.expert).take(out=slice(*patch.out)).to(self.device)
            formed = isinstance(adapter, DualLoRA)  # it has no thin update to stream
            streamed = None if formed else Streamed(adapter, tile.output.work_dtype, self.strength)
            self.current = (patch, adapter, streamed)
        return self.current[1:]

    def _settle(self, tile: Tile, patch: Patch, streamed: Streamed) -> None:
        """Before the first delta after measuring: add the vectors whose norm nearly cancels again, in float64."""
        if not streamed.added or streamed.gains is not None:
            return
        doubtful = streamed.doubtful()
        streamed.forget(doubtful)
        for other in self.tiles(tile.output) if len(doubtful) else ():
            if other.patch == patch and other.measure:
                buffer = torch.empty(other.nbytes, dtype=torch.uint8)
                self.read(other, buffer)
                values = buffer.view(DTYPES[other.output.info.dtype]).to(self.device, torch.float64)
                values = self._with_rows(other, values)
                matrix = values.view(other.last - other.first, -1)
                rows = slice(other.first - patch.start, other.last - patch.start)
                if patch.transposed:
                    streamed.add_exactly(matrix.T, doubtful, in_=rows)
                else:
                    streamed.add_exactly(matrix, doubtful, out=rows)

    def bias(self, module: str, tile: Tile, values: Tensor) -> Tensor:
        """What the module's own bias adds to the values of a tile."""
        scaling = self.checkpoint.layout.adapters[module].scaling
        assert scaling is not None
        first = tile.start * 8 // BITS[tile.output.info.dtype]
        bias = self.checkpoint.bias(module).to(values.device, torch.float64) * (scaling * self.strength)
        return bias[first : first + values.numel()].to(values.dtype)

    def _with_rows(self, tile: Tile, values: Tensor) -> Tensor:
        """What adapters see as the base: trained rows put in; a tile need not begin or end at a row."""
        rows = tile.output.site.rows if tile.output.site else None
        if rows is None:
            return values
        trained = self.checkpoint.tensor(rows.key).to(values.device, values.dtype).flatten(1)
        first = tile.start * 8 // BITS[tile.output.info.dtype]
        width = trained.shape[1]
        for number, row in enumerate(rows.indices):
            low, high = max(row * width, first), min((row + 1) * width, first + values.numel())
            if low < high:
                values[low - first : high - first] = trained[number, low - row * width : high - row * width]
        return values

    def _check_finite(self, tile: Tile, values: Tensor, result: Tensor) -> None:
        if all_finite(result):
            return
        overflow = all_finite(values)  # the adapter is known to be finite
        if tile.output.site is None and not overflow:
            return  # as it was in the base
        message = f"a merged value overflows {tile.output.dtype}" if overflow else "the base holds NaN or infinity"
        raise refuse("NOT_FINITE", message, module=tile.output.name)


def tiles(output: Output, twice: bool) -> Iterator[Tile]:
    """The grid: fixed by shapes. Patches cover whole rows; what no patch covers is cut by bytes."""
    if output.site is None or not output.site.patches:
        step = TILE * BITS[output.info.dtype] // 8
        for start in range(0, output.info.nbytes, step):
            yield Tile(output, start, min(step, output.info.nbytes - start))
        return
    rows, _ = output.site.matrix
    row_bytes = output.info.nbytes // rows
    for patch in output.site.patches:
        cuts = list(_cuts(patch.start, patch.stop, row_bytes * 8 // BITS[output.info.dtype]))
        for measure in (True, False) if twice and len(cuts) > 1 else (False,):
            for first, last in cuts:
                yield Tile(output, first * row_bytes, (last - first) * row_bytes, first, last, patch, measure)


def part_of(output: Output, patch: Patch, first: int, last: int) -> Tile:
    """Whole rows of a patch as one tile."""
    row_bytes = output.info.nbytes // (output.site.matrix[0] if output.site else 1)
    return Tile(output, first * row_bytes, (last - first) * row_bytes, first, last, patch)


def _cuts(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about TILE entries; a short last range joins its neighbour."""
    step = max(TILE // max(width, 1), _LEAST_ROWS)
    while start < stop:
        last = stop if stop - start <= step * 3 // 2 else start + step
        yield start, last
        start = last


def all_finite(values: Tensor) -> bool:
    """The extremes of a tensor with NaN are NaN; looking at them is thirty times faster than at every element."""
    return not values.numel() or all(map(isfinite, torch.aminmax(values)))
