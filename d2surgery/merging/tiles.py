"""One tensor of the merged checkpoint, tile by tile: what is read, what is computed, in which dtype.

The tile grid depends on shapes alone, so the result does not depend on the memory given. Where an adapter normalises
vectors that no single tile holds, the tiles are read twice: once to sum each vector's triple, once to merge.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import isfinite, prod
from threading import Event, Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.adapter import OverTiles, Part
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import D2SurgeryError, refuse
from d2surgery.files.header import BITS, FLOATS, TensorInfo
from d2surgery.files.tensors import DTYPES, Workspace, as_bytes, read_into, rounded
from d2surgery.files.writer import Entry
from d2surgery.machine import ahead
from d2surgery.placement.site import Patch, Site

TILE = 1 << 19  # entries; with what is computed from them, small enough for the cache that cores share
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
    opened: "Opened | None" = None

    @property
    def written(self) -> int:
        """Bytes in the output."""
        return self.nbytes * BITS[self.output.dtype] // BITS[self.output.info.dtype]


class Opened(NamedTuple):
    """The adapter of a patch, and what its tiles share."""

    adapter: Adapter
    streamed: OverTiles


Steps = Iterator[tuple[Tile, Tensor]]
"""The tiles of an output, each with the bytes read, which the next step overwrites."""
Result = TypeVar("Result")


@dataclass
class TileMerger:
    """Reads and merges tiles, each thread in memory of its own."""

    checkpoint: Checkpoint
    strength: float
    device: torch.device
    workspace: Workspace = field(default_factory=Workspace)

    def apart(self) -> "TileMerger":
        """The same with memory of its own: what this one has read and made stays as it is."""
        return replace(self, workspace=Workspace())

    @property
    def grid(self) -> int:
        """Entries per tile: with the shapes, all that decides the grid."""
        return TILE

    def over(
        self, work: Sequence[tuple[Output, Callable[[Steps], Result]]], threads: int, progress: Callable[[int], None]
    ) -> Iterator[Result]:
        """What each function makes of the tiles of its output, in order. Each thread does one output from end to end.

        An output's bytes are hashed one after another, so it is what cores can share; and a tile stays in one core's
        cache. progress(bytes of the outputs done) is called by one thread at a time.
        """
        lock, stopping, done = Lock(), Event(), 0

        def steps(output: Output) -> Steps:
            nonlocal done
            for tile in self.tiles(output):
                if stopping.is_set():
                    return
                yield tile, self.read(tile)
                with lock:
                    done += tile.written
                    progress(done)

        def one(item: tuple[Output, Callable[[Steps], Result]]) -> Result:
            output, function = item
            return function(steps(output))

        with closing(ahead(one, work, threads, in_hand=len(work), stopping=stopping)) as results:
            yield from results

    def tiles(self, output: Output) -> Iterator[Tile]:
        """The tiles of an output, in order, each patch's adapter opened when its first tile is due."""
        for _, part in groupby(tiles(output), lambda tile: tile.patch):
            yield from self._opened(list(part))

    def read(self, tile: Tile) -> Tensor:
        """The tile's bytes, until this thread's next one."""
        info = tile.output.info
        buffer = self.workspace.take("read", tile.nbytes, torch.uint8)
        target = as_bytes(buffer)
        if info.file == self.checkpoint.layout.path and self.checkpoint.in_memory:
            site = tile.output.site
            key = site.replacement if site else None
            assert key is not None
            whole = as_bytes(self.checkpoint.tensor(key).contiguous())
            target[:] = whole[tile.start : tile.start + tile.nbytes]
            return buffer
        fd = os.open(info.file, os.O_RDONLY)
        try:
            read_into(fd, target, info.start + tile.start)
        finally:
            os.close(fd)
        return buffer

    def merge(self, tile: Tile, raw: Tensor) -> Tensor:
        """The tile's elements as they will be written, made of the bytes read. May overwrite them."""
        if tile.output.copied:
            return raw
        stored = raw.view(DTYPES[tile.output.info.dtype])
        if tile.output.info.dtype not in FLOATS:
            return stored
        if tile.patch is None:
            return self.finish(tile, self._values(tile, raw), raw)
        return self.finish(tile, self.effective(tile, self.base_weight(tile, raw)), raw)

    def finish(self, tile: Tile, effective: Tensor, raw: Tensor) -> Tensor:
        """The effective weight as it will be written: its bias added, rounded once. May overwrite the bytes read."""
        transposed = tile.patch is not None and tile.patch.transposed
        values = (effective.T if transposed else effective).reshape(-1)
        site = tile.output.site
        if site is not None and site.bias is not None:
            values = values + self.bias(site.bias, tile, values)
        result = self._rounded_into(raw, values, DTYPES[tile.output.dtype])
        if site is not None or tile.output.dtype != tile.output.info.dtype:
            self._check_finite(tile, values, result)
        return result

    def delta(self, tile: Tile, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The tile's base weight as an (out_features, in_features) matrix, and strength·delta."""
        base_weight = self.base_weight(tile, raw)
        return base_weight, self._patched(tile, base_weight, over=False)

    def base_weight(self, tile: Tile, raw: Tensor) -> Tensor:
        """The tile as an (out_features, in_features) matrix in the dtype of the work, until this thread's next one."""
        assert tile.patch is not None
        matrix = self._values(tile, raw).view(tile.last - tile.first, -1)
        return matrix.T if tile.patch.transposed else matrix

    def effective(self, tile: Tile, base_weight: Tensor) -> Tensor:
        """W0 + strength·delta before rounding, written over the base weight."""
        return self._patched(tile, base_weight, over=True)

    def adapter(self, patch: Patch) -> Adapter:
        """The adapter of the whole patch."""
        return self.checkpoint.adapter(patch.module, patch.expert).take(out=slice(*patch.out)).to(self.device)

    def crosses_tiles(self, patch: Patch) -> bool:
        """Whether its adapter normalises vectors that lie across rows of the stored tensor."""
        axis = self.checkpoint.layout.adapters[patch.module].axis
        return axis is not None and (axis == "out_features") == patch.transposed

    def _working_copy(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tile in the dtype of the work; on a CPU always in the same memory, which costs no page faults."""
        if self.device.type != "cpu":
            return stored.to(self.device, dtype)
        return self.workspace.take("working", stored.numel(), dtype).copy_(stored)

    def _rounded_into(self, raw: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded once; over the bytes that were read where it fits, since nobody needs them any more."""
        if values.numel() * dtype.itemsize > raw.numel():
            wider = rounded(values, dtype).cpu()
            return wider.clone() if wider is values else wider  # the next tile needs the workspace
        once = rounded(values, dtype) if values.dtype == torch.float64 else values  # copy_ rounds float32 once
        return raw[: values.numel() * dtype.itemsize].view(dtype).copy_(once)

    def _values(self, tile: Tile, raw: Tensor) -> Tensor:
        stored = raw.view(DTYPES[tile.output.info.dtype])
        return self._with_rows(tile, self._working_copy(stored, tile.output.work_dtype))

    def _patched(self, tile: Tile, base_weight: Tensor, *, over: bool) -> Tensor:
        """strength·delta or, over the base weight, their sum."""
        patch, opened = tile.patch, tile.opened
        assert patch is not None
        assert opened is not None
        adapter, streamed = opened
        part = _part(tile, patch)
        try:
            return streamed.merged(base_weight, **part) if over else streamed.delta(base_weight, **part)
        except D2SurgeryError as error:
            rows_are_vectors = (adapter.along == "out_features") is not patch.transposed
            counting = f", counting from row {tile.first} of {tile.output.name}" if rows_are_vectors else ""
            where = f"{patch.module}{counting}"
            raise D2SurgeryError(*(replace(problem, module=where) for problem in error.problems)) from None

    def _opened(self, patch_tiles: list[Tile]) -> list[Tile]:
        """All tiles of a patch with its adapter; where its vectors lie across tiles, with their sums over all."""
        output, patch = patch_tiles[0].output, patch_tiles[0].patch
        if patch is None:
            return patch_tiles
        adapter = self.adapter(patch)
        streamed = adapter.over_tiles(output.work_dtype, self.strength)
        if len(patch_tiles) > 1 and self.crosses_tiles(patch):
            streamed.sum_over(lambda: ((self.base_weight(t, self.read(t)), _part(t, patch)) for t in patch_tiles))
        return [tile._replace(opened=Opened(adapter, streamed)) for tile in patch_tiles]

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


def tiles(output: Output) -> Iterator[Tile]:
    """The grid: fixed by shapes. Patches cover whole rows; what no patch covers is cut by bytes."""
    if output.site is None or not output.site.patches:
        yield from _plain(output, 0, output.info.nbytes)
        return
    rows, _ = output.site.matrix
    row_bytes = output.info.nbytes // rows
    done = 0
    for patch in output.site.patches:
        yield from _plain(output, done * row_bytes, patch.start * row_bytes)
        for first, last in cuts(patch.start, patch.stop, row_bytes * 8 // BITS[output.info.dtype]):
            yield Tile(output, first * row_bytes, (last - first) * row_bytes, first, last, patch)
        done = patch.stop
    yield from _plain(output, done * row_bytes, output.info.nbytes)


def _plain(output: Output, begin: int, end: int) -> Iterator[Tile]:
    """Tiles without a patch, from byte to byte."""
    step = TILE * BITS[output.info.dtype] // 8
    for start in range(begin, end, step):
        yield Tile(output, start, min(step, end - start))


def part_of(output: Output, patch: Patch, first: int, last: int) -> Tile:
    """Whole rows of a patch as one tile."""
    row_bytes = output.info.nbytes // (output.site.matrix[0] if output.site else 1)
    return Tile(output, first * row_bytes, (last - first) * row_bytes, first, last, patch)


def _part(tile: Tile, patch: Patch) -> Part:
    """Which features of the patch's adapter the tile holds."""
    held = slice(tile.first - patch.start, tile.last - patch.start)
    return {"in_": held} if patch.transposed else {"out": held}


def cuts(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about TILE entries; a short last range joins its neighbour."""
    step = max(TILE // max(width, 1), _LEAST_ROWS)
    while start < stop:
        last = stop if stop - start <= step * 3 // 2 else start + step
        yield start, last
        start = last


def all_finite(values: Tensor) -> bool:
    """The extremes of a tensor with NaN are NaN; looking at them is thirty times faster than at every element."""
    return not values.numel() or all(map(isfinite, torch.aminmax(values)))
