"""What differs from the nearest recipe (strays), summed up: by row, by column, and by size of the element."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log2
from types import EllipsisType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2surgery.measures.fidelity import MANTISSA, SPARSE, bits, count, differing, exponents, halfway, pieces, spacing

SIZES = 256  # of an element, eight equal ones to an octave
_CLASSES = 24  # of the ratio of delta to the spacing
EVERY = 8  # of the rows or columns of a piece in which nothing strays, and of such tiles, one counts for so many
_OF_STRAYS = ("strays", "base", "delta", "up", "dE", "dD", "d", "dd")
SUMS = (*_OF_STRAYS, "expected", "count", "EE", "DD")  # the last three of all elements


class Tile(NamedTuple):
    """Some rows and columns of a weight (out_features, in_features), in the dtype of the work but `wanted`, `there`."""

    base: Tensor
    delta: Tensor
    wanted: Tensor
    there: Tensor
    rows: slice
    columns: slice

    @property
    def dtype(self) -> torch.dtype:
        return self.there.dtype


@dataclass
class Marks:
    """Sums over the strays of one patch, per row, per column and per size of the element."""

    rows: Tensor  # (sums, out_features) in float64
    columns: Tensor  # (sums, in_features)
    sizes: Tensor = field(default_factory=lambda: torch.zeros(3, SIZES, dtype=torch.float64))  # count, strays, expected
    classes: list[tuple[slice, Tensor, Tensor]] = field(default_factory=list)  # rows or columns, elements, strays
    far: int = 0  # strays off by more than one unit in the last place and what 16-bit products lose
    zeros: int = 0  # strays that are zero
    fine: bool = False  # stored in more than 16 bits

    @classmethod
    def of(cls, out_features: int, in_features: int) -> "Marks":
        rows, columns = (torch.zeros(len(SUMS), size, dtype=torch.float64) for size in (out_features, in_features))
        return cls(rows, columns)

    @property
    def strays(self) -> int:
        return int(self.rows[SUMS.index("strays")].sum())

    @property
    def elements(self) -> int:
        return int(self.rows[SUMS.index("count")].sum())

    def add(self, tile: Tile, weight: float = 1.0) -> None:
        """The strays of a tile: what differs, but where other sums of the same terms round it so. Of a tile that has
        none `weight` says for how many it counts, for those that are left out."""
        self.fine = tile.there.itemsize > 2
        size = float(torch.linalg.vector_norm(tile.delta, dim=-1).norm()) / max(tile.delta.numel(), 1) ** 0.5
        for piece in _pieces(tile):
            self._add(piece, size, weight)

    def _add(self, tile: Tile, size: float, weight: float) -> None:
        """`size`: the root mean square of delta. Where nothing strays, some rows or columns are counted for all."""
        expected, other = tile.wanted.to(tile.base.dtype), differing(tile.wanted, tile.there)
        squares, changes = _by_part(expected.square()), _by_part(tile.delta.square())
        for dim, into in enumerate(self._sums(tile)):
            many = 1.0 if dim == _dim(tile) else weight
            into[SUMS.index("count")] += many * expected.shape[1 - dim]
            into[SUMS.index("EE")] += many * squares[dim]
            into[SUMS.index("DD")] += many * changes[dim]
        everything, any_stray = slice(None), bool(other.any())
        some = everything if any_stray else slice(None, None, EVERY)
        where = (everything, some) if _dim(tile) else (some, everything)
        across, down = changes[0].sqrt(), changes[1].sqrt() / (float(changes[0].sum()) ** 0.5 or 1.0)
        usual, unit = across[where[0], None] * down[where[1]], exponents(tile.base[where], expected[where], tile.dtype)
        kind = _kind(usual.add_(tile.delta[where].abs()), unit, tile.dtype)
        bins = _octave(expected[where], -24, SIZES, parts=8).mul_(_CLASSES).add_(kind)
        elements = _counted(bins) * (weight * expected.numel() / max(bins.numel(), 1))
        strays = torch.zeros_like(elements)
        if any_stray:
            at = _gathered(other)
            stray, terms = self._strays(other[at], tile.base[at], tile.delta[at], expected[at], tile.there[at], size)
            strays = _counted(bins[at][stray])
            # As likely is each to stray as those of its class in the tile.
            share = strays.sum(0) / elements.sum(0).clamp(min=1)
            likely = _by_part(torch.from_numpy(np.take(share.to(expected.dtype).numpy(), kind.numpy(), mode="clip")))
            for dim, into in enumerate(self._sums(tile)):
                into[: len(_OF_STRAYS)] += _summed(terms, at, dim, expected.shape)
                into[SUMS.index("expected")] += likely[dim]
            self.sizes[2] += elements @ share
        self.sizes[:2] += torch.stack((elements.sum(1), strays.sum(1)))
        self.classes.append(((tile.rows, tile.columns)[_dim(tile)], elements.sum(0), strays.sum(0)))

    def _sums(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Of the tile's rows, and of its columns."""
        return self.rows[:, tile.rows], self.columns[:, tile.columns]

    def _strays(
        self, other: Tensor, base: Tensor, delta: Tensor, expected: Tensor, there: Tensor, size: float
    ) -> tuple[Tensor, Tensor]:
        """Which they are, and their terms (sums of strays, …), 0 for what is none."""
        d, unit = there.to(base.dtype) - expected, spacing(base, expected, there.dtype)
        stray = other & ~halfway(base, delta, expected, d, size)
        if self.fine:
            stray &= d.abs() > 8 * unit + 4e-6 * size
        d.mul_(stray)
        self.far += count(d.abs() > delta.abs().mul_(1 / 64).add_(unit, alpha=1.5).add_(size / 256))
        self.zeros += count(stray & (there == 0))
        of_base, of_delta = d * expected, d * delta
        ways = (stray.to(d.dtype), of_base.sign(), of_delta.sign(), d.sign())
        return stray, torch.stack((*ways, of_base, of_delta, d, d.square()))

    def evened(self, along_rows: bool) -> None:
        """What is expected of each tile, as in the whole; rows of tiles that were left out are as large as the others
        of their kind."""
        count = torch.stack([of_class for _, of_class, _ in self.classes]).sum(0)
        strays = torch.stack([of_class for _, _, of_class in self.classes]).sum(0)
        share = strays / count.clamp(min=1)
        sums, across = (self.rows, self.columns) if along_rows else (self.columns, self.rows)
        left = sums[SUMS.index("count")] == 0
        for name in ("EE", "DD") if bool(left.any()) else ():
            of_all, of_others = (float(those[SUMS.index(name)].sum()) for those in (across, sums))
            sums[SUMS.index(name), left] = (of_all - of_others) / int(left.sum())
        sums[SUMS.index("count")], across[SUMS.index("count")] = across.shape[1], sums.shape[1]
        for where, of_class, own in self.classes:
            sums[SUMS.index("expected"), where] *= float((share * of_class).sum()) / max(float(own.sum()), 1e-300)
        self.classes.clear()


_At = tuple[Tensor, Tensor] | EllipsisType


def _pieces(tile: Tile) -> Iterator[Tile]:
    """Some rows or columns at a time: what is made of them stays in the cache."""
    dim = _dim(tile)
    first = (tile.rows, tile.columns)[dim].start
    for base, delta, wanted, there in pieces(dim, tile.base, tile.delta, tile.wanted, tile.there):
        last = first + base.shape[dim]
        rows, columns = (tile.rows, slice(first, last)) if dim else (slice(first, last), tile.columns)
        yield Tile(base, delta, wanted, there, rows, columns)
        first = last


def _dim(tile: Tile) -> int:
    """Whether the tile is some rows of its weight (0) or some columns."""
    return int(tile.rows == slice(None))


def _gathered(other: Tensor) -> _At:
    """The rows and columns of few elements; all where they are more, which are sooner looked at than gathered."""
    if count(other) >= SPARSE * other.numel():
        return ...
    flat = torch.from_numpy(np.flatnonzero(other.numpy()))
    return flat // other.shape[1], flat % other.shape[1]


def _summed(terms: Tensor, at: _At, dim: int, shape: torch.Size) -> Tensor:
    """Sums of terms (terms, …) by row (dim 0) or column, in float64."""
    if isinstance(at, EllipsisType):
        return terms.sum(2 - dim).double()
    return torch.zeros(len(terms), shape[dim], dtype=torch.float64).index_add_(1, at[dim], terms.double())


def _by_part(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums by row and by column."""
    return values.sum(1), values.sum(0)


def _counted(bins: Tensor) -> Tensor:
    return torch.bincount(bins.flatten(), minlength=_CLASSES * SIZES).view(SIZES, _CLASSES).double()


def _kind(size: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """The class of each element: the octave of delta, as it is and as it is usual in its row and column together
    (`size`), over the spacing of the stored numbers, whose exponent `unit` is."""
    octaves = (bits(size) - unit) >> MANTISSA[size.itemsize]
    return octaves.add_(16 - round(log2(torch.finfo(dtype).eps))).clamp_(0, _CLASSES - 1).short()


def _octave(values: Tensor, lowest: int, count: int, parts: int) -> Tensor:
    """In which of `parts` (a power of two of equal ones) of which octave above 2**lowest a size lies, from 0 to
    count − 1."""
    mantissa, fine = MANTISSA[values.itemsize], parts.bit_length() - 1
    bias = int(bits(torch.ones((), dtype=values.dtype))) >> mantissa
    size = bits(values) & torch.iinfo(bits(values).dtype).max
    return (size >> (mantissa - fine)).sub_(parts * (bias + lowest)).clamp_(0, count - 1).short()
