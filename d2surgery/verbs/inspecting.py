"""`d2surgery.inspect`: what an adapter is, from its header alone unless values are asked for. No torch without them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2surgery.errors import Problem
from d2surgery.formats import open_layout
from d2surgery.formats.layout import Layout
from d2surgery.surveying.order import in_order
from d2surgery.tables import Tabular

Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Inspection(Tabular):
    """What an adapter's file says, a row per module; `problems` is everything wrong with it."""

    layout: Layout
    numbers: Mapping[str, Mapping[str, Any]] | None = None
    """Module -> norms and ranks of its update, where they were asked for."""

    def __repr__(self) -> str:
        return f"Inspection{repr(self.layout).removeprefix('Layout')}"

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(self.layout.problems)

    def rows(self) -> Sequence[dict[str, Any]]:
        found = [
            {"module": a.module, "kind": a.kind, "rank": a.rank, "scaling": a.scaling, "out_features": a.out_features,
             "in_features": a.in_features, "dtype": a.dtype, "experts": a.experts}
            for a in self.layout.adapters.values()
        ]  # fmt: skip
        if self.numbers is None:
            return found
        names = list(dict.fromkeys(name for values in self.numbers.values() for name in values))
        return [row | {name: self.numbers.get(str(row["module"]), {}).get(name) for name in names} for row in found]


def inspect(
    adapter: Path, *, numbers: bool = False, scale: float | None = None, alpha: float | None = None
) -> Inspection:
    """What an adapter is: kinds, ranks, scalings, dtypes, problems. numbers: also norms and ranks, which reads values.

    Problems are told, not raised; raises D2SurgeryError only for a file that cannot be read at all.
    """
    layout = open_layout(os.fspath(adapter), scale=scale, alpha=alpha)
    layout = replace(layout, adapters=in_order(layout.adapters))
    if not numbers:
        return Inspection(layout=layout)
    from d2surgery.surveying.numbers import read_numbers  # torch, and only here

    values, problems = read_numbers(layout)
    return Inspection(layout=replace(layout, problems=(*layout.problems, *problems)), numbers=values)
