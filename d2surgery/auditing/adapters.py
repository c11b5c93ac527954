"""Which of several adapters was merged: the one whose merge the weights of one module are nearest to."""

import os
from collections.abc import Sequence

from d2surgery.auditing.grids import Sums, measure
from d2surgery.auditing.pairing import pair_up
from d2surgery.auditing.replay import Replay
from d2surgery.errors import D2SurgeryError, Problem
from d2surgery.files.base import BaseWeights
from d2surgery.formats.layout import Reading
from d2surgery.machine import one_thread
from d2surgery.merging.prepared import prepare
from d2surgery.placement.fit import Fit, fit

Directory = str | os.PathLike[str]
_SOME = 8  # quantised tensors: one alone may hide the delta


def nearest(
    base: Directory,
    adapters: Sequence[Directory],
    merged: BaseWeights,
    strength: float,
    reading: Reading,
) -> tuple[Directory, list[Problem]]:
    """The adapter to audit, and a note that it is one of several.

    Raises D2SurgeryError: what every one of them is refused for, or USAGE for none at all.
    """
    refused: list[Problem] = []
    distances: dict[Directory, float] = {}
    for adapter in adapters:
        try:
            distances[adapter] = _distance(fit(base, adapter, strength, dequantized=True, **reading), merged)
        except D2SurgeryError as error:
            refused += error.problems
    if not distances:
        raise D2SurgeryError(*refused or [Problem(code="USAGE", message="an audit needs an adapter")])
    found = min(distances, key=lambda adapter: distances[adapter])
    message = f"of {len(adapters)} adapters the merged weights are nearest to this one"
    return found, [Problem(code="NEAREST_ADAPTER", severity="info", message=message, got=str(found))]


def _distance(fitted: Fit, merged: BaseWeights) -> float:
    """The share of elements that no recipe gives, in the smallest adapted tensor of the merged file; of quantised ones
    in some, and how far they are from lying along the delta."""
    prepared = prepare(fitted, None, "cpu")
    patched = [pair for pair in pair_up(prepared, merged).pairs if pair.output.site and pair.output.site.patches]
    if not patched:
        return 1.0
    if on_a_grid := [pair for pair in patched if pair.info.grid][:_SOME]:
        with one_thread():
            sums = sum(measure(prepared.merger, on_a_grid).modules.values(), Sums())
        return sums.wanted.mismatched / max(sums.wanted.elements, 1) + 1 - sums.survival.cosine
    smallest = min(patched, key=lambda pair: pair.info.nbytes)
    replay = Replay(prepared.merger)
    with one_thread():
        replay.run((smallest,), lambda done, total: None)
    found = [replay.modules[name].comparison for name in smallest.modules if name in replay.modules]
    return sum(one.mismatched for one in found) / max(sum(one.elements for one in found), 1)
