"""One weight as the causes of a difference are looked for in it, and one hypothesis about it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2surgery.adapters import Adapter
from d2surgery.adapters.vectors import Triple
from d2surgery.formats.layout import AdapterLayout


@dataclass(frozen=True)
class Case:
    """One weight, or a block of it, laid out (out_features, in_features), in the dtype of the work."""

    module: str
    base: Tensor
    adapter: Adapter  # of the whole weight
    part: Callable[[Adapter], Adapter]  # what of such an adapter lands in the block
    triple: Callable[[Adapter], Triple | None]  # of vectors that reach beyond the block; None: there are none
    strength: float
    entry: AdapterLayout
    base_config: Mapping[str, Any]
    dtype: torch.dtype  # of the merged file
    repacked: Adapter | None = None  # where experts share factors: the same with its columns taken in the other order
    others: Mapping[str, Callable[[], Adapter]] = field(default_factory=dict)  # in words -> that of another place
    ranks: frozenset[int] = frozenset()  # of the file's modules

    @cached_property
    def delta(self) -> Tensor:
        return self.delta_of(self.adapter)

    @cached_property
    def right(self) -> Tensor:
        """The weight that a right merge rounds."""
        return self.base + self.delta

    def delta_of(self, adapter: Adapter) -> Tensor:
        return self.whole(adapter) * self.strength

    def whole(self, adapter: Adapter) -> Tensor:
        """Its delta at strength 1."""
        return self.part(adapter).delta(self.base, self.triple(adapter))

    def with_(self, adapter: Adapter) -> Tensor:
        return self.base + self.delta_of(adapter)


class Named(NamedTuple):
    """One hypothesis about a weight: its code, in words what was done, and the effective weight that it would give."""

    code: str
    what: str
    weight: Callable[[], Tensor]


Fault = Callable[[Case], Iterator[Named]]
