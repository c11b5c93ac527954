"""Modules that learnt nothing: what the factors show without a base."""

from collections.abc import Iterator, Sequence

import torch

from d2surgery.adapters import Adapter
from d2surgery.checkpoint import Checkpoint
from d2surgery.errors import Problem
from d2surgery.formats.layout import Layout
from d2surgery.kinds import TABLE

_ROWS = 64  # of a dense delta that are looked at together
_SHOWN = 3


def zero_updates(checkpoint: Checkpoint) -> list[str]:
    """The modules whose update is zero: exactly, in every expert, and without a bias that is added.

    A kind with a magnitude may move the base all the same; only the base tells. Raises SCALING_UNKNOWN for a scaling
    that is unknown.
    """
    return [module for module in checkpoint.layout.adapters if _is_zero(checkpoint, module)]


def zero_problems(checkpoint: Checkpoint) -> Iterator[Problem]:
    """What to say of them: a warning ZERO_UPDATE, or nothing."""
    yield from problems_of_zeros(checkpoint.layout, zero_updates(checkpoint))


def problems_of_zeros(layout: Layout, found: Sequence[str]) -> Iterator[Problem]:
    """The same, of modules that are known to be zero."""
    if not found:
        return
    every = len(layout.adapters)
    message = f"{len(found)} of {every} modules are zero" if every > 1 else "its one module is zero"
    magnitudes = any(TABLE[layout.adapters[module].kind].vectors for module in found)
    if magnitudes:
        message += "; their magnitudes alone may differ from the base"
    elif len(found) == every and not (layout.replacements or layout.rows):
        message += ": merged, it is the base again"
    names = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    file = layout.path.name
    yield Problem(code="ZERO_UPDATE", severity="warning", message=message, file=file, module=names)


def _is_zero(checkpoint: Checkpoint, module: str) -> bool:
    entry = checkpoint.layout.adapters[module]
    if "bias" in entry.slots and bool(checkpoint.bias(module).any()):
        return False
    return all(_gives_nothing(checkpoint.adapter(module, expert)) for expert in range(entry.experts))


@torch.no_grad()
def _gives_nothing(adapter: Adapter) -> bool:
    """Of a thin update by its factors: each column of one is zero or the row of the other that it meets."""
    update = adapter.update()
    if update is not None:
        return not bool((update.P.ne(0).any(0) & update.Q.ne(0).any(1)).any())
    starts = range(0, adapter.out_features, _ROWS)
    tiles = (adapter.take(out=slice(start, start + _ROWS)) for start in starts)
    return not any(bool(tile.delta(torch.zeros(tile.out_features, tile.in_features)).any()) for tile in tiles)
