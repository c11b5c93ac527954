"""One tensor of the merged checkpoint, tile by tile: what is read, what is computed, in which dtype.

The tile grid depends on shapes alone, so the result does not depend on the memory given. Where an adapter normalises
vectors that no single tile holds, the tiles are read twice: once to sum each vector's triple, once to merge.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
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
from d2surgery.files.tensors import DTYPES, Workspace, as_bytes, read_part, rounded
from d2surgery.files.writer import Entry
from d2surgery.machine import ahead
from d2surgery.placement.site import Patch, Site

TILE_ENTRIES = 1 << 19  # with what is computed from them, small enough for the cache that cores share
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
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns, as patches count them."""
        return (self.site or Site(source=None, shape=self.shape)).matrix

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.dtype, self.shape, prod(self.shape) * BITS[self.dtype] // 8)

    @property
    def copied(self) -> bool:
        return self.site is None and self.dtype == self.info.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the bytes it is made from."""
        return DTYPES[self.info.dtype]

    @property
    def work_dtype(self) -> torch.dtype:
        """One precision above the output: float32 for 16-bit outputs, float64 for float32 and float64 ones."""
        wide = self.dtype in ("F32", "F64") or self.info.dtype == "F64"
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class Tile:
    """Bytes of an output's source, from position `start` within it."""

    output: Output
    start: int
    nbytes: int

    @property
    def element(self) -> int:
        """The position of its first element within the tensor."""
        return self.start * 8 // BITS[self.output.info.dtype]

    @property
    def written(self) -> int:
        """Bytes in the output."""
        return self.nbytes * BITS[self.output.dtype] // BITS[self.output.info.dtype]


@dataclass(frozen=True)
class AdaptedTile(Tile):
    """Whole rows of a patch, first..last of the stored matrix, and the adapter of the patch, which its tiles share."""

    first: int
    last: int
    patch: Patch
    adapter: Adapter
    engine: OverTiles

    @property
    def part(self) -> Part:
        """Which features of the adapter the tile holds."""
        held = slice(self.first - self.patch.start, self.last - self.patch.start)
        return {"in_": held} if self.patch.transposed else {"out": held}

    def matrix(self, values: Tensor) -> Tensor:
        """Its values, flat in the order of the file, as an (out_features, in_features) matrix in the same memory."""
        rows = values.view(self.last - self.first, -1)
        return rows.T if self.patch.transposed else rows

    def flat(self, matrix: Tensor) -> Tensor:
        """Such a matrix in the order of the file."""
        return (matrix.T if self.patch.transposed else matrix).reshape(-1)


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
        return TILE_ENTRIES

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
        for patch, begin, end in _spans(output):
            yield from _plain(output, begin, end) if patch is None else self._adapted(output, patch)

    def read(self, tile: Tile) -> Tensor:
        """The tile's bytes, until this thread's next one."""
        buffer = self.workspace.take("read", tile.nbytes, torch.uint8)
        site = tile.output.site
        if site is not None and site.replacement and self.checkpoint.in_memory:
            whole = as_bytes(self.checkpoint.tensor(site.replacement).contiguous())
            as_bytes(buffer)[:] = whole[tile.start : tile.start + tile.nbytes]
        else:
            read_part(tile.output.info, tile.start, as_bytes(buffer))
        return buffer

    def merge(self, tile: Tile, raw: Tensor) -> Tensor:
        """The tile's elements as they will be written, made of the bytes read. May overwrite them."""
        if tile.output.copied:
            return raw
        if tile.output.info.dtype not in FLOATS:
            return raw.view(tile.output.stored_dtype)
        if isinstance(tile, AdaptedTile):
            return self.finish(tile, tile.flat(self.effective(tile, self.base_weight(tile, raw))), raw)
        return self.finish(tile, self.values(tile, raw), raw)

    def finish(self, tile: Tile, values: Tensor, raw: Tensor) -> Tensor:
        """The values before rounding as they will be written: their bias added, rounded once. May overwrite `raw`."""
        site = tile.output.site
        if site is not None and site.bias is not None:
            values = values + self.bias(site.bias, tile, values)
        result = self._rounded_into(raw, values, DTYPES[tile.output.dtype])
        if site is not None or tile.output.dtype != tile.output.info.dtype:
            self._check_finite(tile, values, result)
        return result

    def values(self, tile: Tile, raw: Tensor) -> Tensor:
        """What adapters see as the base, flat, in the dtype of the work, until this thread's next tile."""
        working = self._working_copy(raw.view(tile.output.stored_dtype), tile.output.work_dtype)
        return self._with_rows(tile, working)

    def base_weight(self, tile: AdaptedTile, raw: Tensor) -> Tensor:
        """The same as an (out_features, in_features) matrix."""
        return tile.matrix(self.values(tile, raw))

    def delta(self, tile: AdaptedTile, base_weight: Tensor) -> Tensor:
        """strength·delta."""
        with _placed(tile):
            return tile.engine.delta(base_weight, **tile.part)

    def effective(self, tile: AdaptedTile, base_weight: Tensor) -> Tensor:
        """W0 + strength·delta before rounding, written over the base weight."""
        with _placed(tile):
            return tile.engine.merged(base_weight, **tile.part)

    def adapter(self, patch: Patch) -> Adapter:
        """The adapter of the whole patch."""
        return self.checkpoint.adapter(patch.module, patch.expert).take(out=slice(*patch.out)).to(self.device)

    def first_rows(self, output: Output, entries: int) -> AdaptedTile | None:
        """About so many entries where an output's first patch begins; None where its vectors lie across tiles."""
        patch = output.site.patches[0] if output.site and output.site.patches else None
        if patch is None or self.crosses_tiles(patch):
            return None
        adapter = self.adapter(patch)
        last = min(patch.stop, patch.start + max(entries // output.matrix[1], _LEAST_ROWS))
        where = _bytes_of(output, patch.start, last)
        engine = adapter.over_tiles(output.work_dtype, self.strength)
        return AdaptedTile(output, *where, patch.start, last, patch, adapter, engine)

    def crosses_tiles(self, patch: Patch) -> bool:
        """Whether its adapter normalises vectors that lie across rows of the stored tensor."""
        axis = self.checkpoint.layout.adapters[patch.module].axis
        return axis is not None and (axis == "out_features") == patch.transposed

    def _adapted(self, output: Output, patch: Patch) -> list[AdaptedTile]:
        """All tiles of a patch with its adapter; where its vectors lie across tiles, with their sums over all."""
        adapter = self.adapter(patch)
        engine = adapter.over_tiles(output.work_dtype, self.strength)
        tiles = [
            AdaptedTile(output, *_bytes_of(output, first, last), first, last, patch, adapter, engine)
            for first, last in row_ranges(patch.start, patch.stop, output.matrix[1])
        ]
        if len(tiles) > 1 and self.crosses_tiles(patch):
            engine.sum_over(lambda: ((self.base_weight(tile, self.read(tile)), tile.part) for tile in tiles))
        return tiles

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

    def bias(self, module: str, tile: Tile, values: Tensor) -> Tensor:
        """What the module's own bias adds to the values of a tile."""
        scaling = self.checkpoint.layout.adapters[module].scaling
        assert scaling is not None
        first = tile.element
        bias = self.checkpoint.bias(module).to(values.device, torch.float64) * (scaling * self.strength)
        return bias[first : first + values.numel()].to(values.dtype)

    def _with_rows(self, tile: Tile, values: Tensor) -> Tensor:
        """With trained rows put in; a tile need not begin or end at a row."""
        rows = tile.output.site.rows if tile.output.site else None
        if rows is None:
            return values
        trained = self.checkpoint.tensor(rows.key).to(values.device, values.dtype).flatten(1)
        first = tile.element
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


@contextmanager
def _placed(tile: AdaptedTile) -> Iterator[None]:
    """A refused vector is counted within the tile: say where the tile is."""
    try:
        yield
    except D2SurgeryError as error:
        rows_are_vectors = (tile.adapter.along == "out_features") is not tile.patch.transposed
        counting = f", counting from row {tile.first} of {tile.output.name}" if rows_are_vectors else ""
        where = f"{tile.patch.module}{counting}"
        raise D2SurgeryError(*(replace(problem, module=where) for problem in error.problems)) from None


# The grid --------------------------------------------------------------------------------------------------------


def grid(output: Output) -> Iterator[Tile]:
    """All tiles: fixed by shapes. Patches cover whole rows; what no patch covers is cut by bytes."""
    for patch, begin, end in _spans(output):
        if patch is None:
            yield from _plain(output, begin, end)
        else:
            for rows in row_ranges(patch.start, patch.stop, output.matrix[1]):
                yield row_tile(output, *rows)


def _spans(output: Output) -> Iterator[tuple[Patch | None, int, int]]:
    """The bytes of each patch, and of what lies between patches, in order."""
    done = 0
    for patch in output.site.patches if output.site else ():
        begin, size = _bytes_of(output, patch.start, patch.stop)
        if begin > done:
            yield None, done, begin
        yield patch, begin, begin + size
        done = begin + size
    if done < output.info.nbytes:
        yield None, done, output.info.nbytes


def _plain(output: Output, begin: int, end: int) -> Iterator[Tile]:
    """Tiles of what no patch covers, from byte to byte."""
    step = TILE_ENTRIES * BITS[output.info.dtype] // 8
    for start in range(begin, end, step):
        yield Tile(output, start, min(step, end - start))


def row_tile(output: Output, first: int, last: int) -> Tile:
    """Rows first..last of the stored matrix."""
    return Tile(output, *_bytes_of(output, first, last))


def _bytes_of(output: Output, first: int, last: int) -> tuple[int, int]:
    """Where these rows begin in the source, and how many bytes they are."""
    row_bytes = output.info.nbytes // output.matrix[0]
    return first * row_bytes, (last - first) * row_bytes


def row_ranges(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows start..stop in ranges of about TILE_ENTRIES entries; a short last range joins its neighbour."""
    step = max(TILE_ENTRIES // max(width, 1), _LEAST_ROWS)
    while start < stop:
        last = stop if stop - start <= step * 3 // 2 else start + step
        yield start, last
        start = last


def all_finite(values: Tensor) -> bool:
    """The extremes of a tensor with NaN are NaN; looking at them is thirty times faster than at every element."""
    return not values.numel() or all(map(isfinite, torch.aminmax(values)))
