"""The parameters of a stored model by their names in the model, each as the matrices that adapters change."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from d2surgery.errors import Problems
from d2surgery.files.base import BaseWeights
from d2surgery.placement.names import Names, Place
from d2surgery.placement.orientation import TRANSPOSED_EXPERTS, stored_in_out
from d2surgery.placement.ties import find_tie

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor on disk, seen as a matrix of `of` rows."""

    tensor: str
    start: int
    stop: int
    of: int


@dataclass(frozen=True)
class Matrix:
    """A weight as (out_features, in_features): rows that follow each other in pieces, or all of it turned round."""

    weights: BaseWeights
    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    turned: bool = False

    def rows(self, part: slice) -> "Tensor":
        """Rows in the stored dtype, and only these read where it is not turned."""
        import torch  # names and shapes do not need it

        if self.turned:
            return self._whole[part]
        found: list[Tensor] = []
        offset = 0
        for piece in self.pieces:
            start, stop = max(part.start - offset, 0), min(part.stop - offset, piece.stop - piece.start)
            if start < stop or not found:
                found.append(self._read(piece, start, max(start, stop)))
            offset += piece.stop - piece.start
        return found[0] if len(found) == 1 else torch.cat(found)

    @cached_property
    def _whole(self) -> "Tensor":
        (piece,) = self.pieces
        return self._read(piece, 0, piece.stop - piece.start).T.contiguous()

    def _read(self, piece: Piece, start: int, stop: int) -> "Tensor":
        return self.weights.rows(piece.tensor, piece.start + start, piece.start + stop, of=piece.of)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: one matrix, or one per expert. A vector is a matrix of one column."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    matrices: tuple[Matrix, ...]
    experts: bool = False

    def tensor(self) -> "Tensor":
        """All of it, as stored; experts that lie apart are stacked."""
        import torch

        first = self.matrices[0]
        names = {piece.tensor for matrix in self.matrices for piece in matrix.pieces}
        if len(names) == 1 and first.weights.header.tensors[first.pieces[0].tensor].shape == self.shape:
            return first.weights[names.pop()]
        return torch.stack([m.rows(slice(0, m.shape[0])) for m in self.matrices]).reshape(self.shape)


def parameters(weights: BaseWeights) -> dict[str, Parameter]:
    """By name in the model, in the order of the file. What transformers makes of a tensor in ways that no adapter
    follows has the tensor's own name."""
    names = Names(weights.header, weights.config, find_tie(weights.header, weights.config), Problems())
    found: dict[str, Parameter] = {}
    for name, parts in names.parts.items():
        places = names.find(name)
        tensors = [part.tensor for part in parts]
        if not places or {place.tensor for place in places} != set(tensors):
            found |= {tensor: _parameter(weights, tensor, [Place(tensor, (0, None), 0)]) for tensor in tensors}
        else:
            found[name] = _parameter(weights, name, places)
    return found


def _parameter(weights: BaseWeights, name: str, places: list[Place]) -> Parameter:
    info = weights.header.tensors[places[0].tensor]
    shape = info.shape
    if len(shape) == 3 and not name.endswith(".weight") and ".experts." in name and len(places) == 1:
        return Parameter(name, shape, info.dtype, tuple(_stacked(weights, places[0], shape)), experts=True)
    experts = tuple(_joined(weights, name, list(each)) for _, each in groupby(places, lambda place: place.expert))
    apart = len(experts) > 1 or (len(places) > 1 and ".experts." in name)
    if len(places) > 1:
        shape = (len(experts), *experts[0].shape) if apart else experts[0].shape
    elif places[0].rows is not None:
        shape = (places[0].rows[1] - places[0].rows[0], *shape[1:])
    return Parameter(name, shape, info.dtype, experts, experts=apart)


def _stacked(weights: BaseWeights, place: Place, shape: tuple[int, ...]) -> Iterator[Matrix]:
    """All experts in one tensor, (E, out, in) or (E, in, out)."""
    experts, rows, columns = shape
    turned = bool(place.turned) or weights.config.get("model_type") in TRANSPOSED_EXPERTS
    for expert in range(experts):
        piece = Piece(place.tensor, expert * rows, (expert + 1) * rows, experts * rows)
        yield Matrix(weights, (piece,), (columns, rows) if turned else (rows, columns), turned)


def _joined(weights: BaseWeights, name: str, places: list[Place]) -> Matrix:
    pieces: list[Piece] = []
    width = 1
    for place in places:
        shape = weights.header.tensors[place.tensor].shape or (1,)
        start, stop = place.rows or (0, shape[0])
        pieces.append(Piece(place.tensor, start, stop, shape[0]))
        width = prod(shape[1:])
    rows = sum(piece.stop - piece.start for piece in pieces)
    linear = len(places) == 1 and name.endswith(".weight") and len(shape) == 2 and places[0].rows is None
    turned = linear and bool(places[0].turned or stored_in_out(weights.header, weights.config, places[0].tensor))
    return Matrix(weights, tuple(pieces), (width, rows) if turned else (rows, width), turned)
