"""Does this adapter fit this base? All that names and shapes can say of a merge, without torch and without a tensor."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Unpack

from d2surgery.errors import Problem, raise_errors, refuse
from d2surgery.files.base import BaseWeights
from d2surgery.files.header import TensorInfo
from d2surgery.formats import open_layout, with_base
from d2surgery.formats.layout import Layout, Reading
from d2surgery.placement.promises import broken_promises
from d2surgery.placement.site import is_head
from d2surgery.placement.sites import Landing, sites


@dataclass(frozen=True)
class Fit:
    """An adapter and the base it fits. `problems` are warnings and information: an error raises."""

    layout: Layout
    base: BaseWeights
    landing: Landing
    strength: float
    problems: tuple[Problem, ...]

    @property
    def computed(self) -> Mapping[str, TensorInfo]:
        """The base's tensors from which outputs are computed, not copied, in the order in which they are read."""
        names = [name for name, site in self.landing.sites.items() if site.source == name and site.replacement is None]
        tensors = self.base.header.tensors
        return {name: tensors[name] for name in sorted(names, key=lambda n: (tensors[n].file, tensors[n].start))}


def fit(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    strength: float = 1.0,
    *,
    dequantized: bool = False,
    **reading: Unpack[Reading],
) -> Fit:
    """Where every tensor of the adapter lands. dequantized: see `BaseWeights`.

    Raises D2SurgeryError with every misfit at once.
    """
    if not isfinite(strength):
        raise refuse("STRENGTH", "not a number to multiply with", wanted="finite", got=str(strength))
    layout = open_layout(adapter, **reading)
    weights = BaseWeights(base, dequantized=dequantized)
    layout = with_base(layout, weights.header.tensors, weights.config)
    landing = sites(layout, weights.header, weights.config)
    problems = [
        *weights.header.problems,
        *layout.problems,
        *landing.problems,
        *broken_promises(layout, weights.header, landing),
    ]
    if strength != 1 and (layout.replacements or layout.rows):
        names = ", ".join([*layout.replacements, *layout.rows][:3])
        problems.append(
            Problem(code="STRENGTH", message="replaced weights", wanted="1", got=f"{strength}", module=names)
        )
    problems += _unconsumed(layout, landing)
    raise_errors(problems)
    if strength == 0:  # the base, bit for bit
        landing = replace(landing, sites={}, untied=False)
    return Fit(layout, weights, landing, strength, tuple(problems))


def new_labels(layout: Layout) -> int | None:
    """The classes of a classification head that the adapter brings; None when it brings none."""
    heads = [key for name, key in layout.replacements.items() if name.endswith(".weight") and is_head(name)]
    return layout.header.tensors[heads[0]].shape[0] if heads else None


def _unconsumed(layout: Layout, landing: Landing) -> Iterator[Problem]:
    """Conservation: what no site uses and no problem names would be lost silently. Here it is named."""
    modules = {patch.module for site in landing.sites.values() for patch in site.patches}
    used = {key for module in modules for slot, key in layout.adapters[module].keys.items() if slot != "bias"}
    used |= {layout.adapters[site.bias].slots["bias"].key for site in landing.sites.values() if site.bias}
    used |= {site.replacement for site in landing.sites.values() if site.replacement}
    used |= {site.rows.key for site in landing.sites.values() if site.rows}
    used |= {key for module in modules for key in layout.adapters[module].numbers}
    used |= {key for _, key in landing.twins} | set(layout.superseded)
    if not any(problem.severity == "error" for problem in (*layout.problems, *landing.problems)):
        for key in sorted(layout.header.tensors.keys() - used):
            yield Problem(code="UNKNOWN_TENSOR", message="no place in the base takes it", module=key)
