"""How much of a delta outlives rounding to the output dtype."""

from dataclasses import astuple, dataclass
from math import nan, sqrt
from operator import add

import torch
from torch import Tensor

from d2surgery.tensors import rounded

LOW_GAIN = 0.95  # below it a right merge has visibly lost part of the adapter (MATH, section 4)


@dataclass(frozen=True)
class Survival:
    """Sums over entries, additive over tiles. applied = round(W0 + delta) − W0."""

    elements: int = 0
    changed: int = 0  # entries whose stored value differs from the base's
    delta_squared: float = 0.0  # ‖delta‖²
    applied_squared: float = 0.0  # ‖applied‖²
    inner: float = 0.0  # <applied, delta>
    error_squared: float = 0.0  # ‖applied − delta‖², summed by itself: the difference of sums would cancel

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(*map(add, astuple(self), astuple(other)))

    @property
    def gain(self) -> float:
        """<applied, delta>/‖delta‖²: 1 when rounding loses nothing of the delta; nan for a zero delta."""
        return self.inner / self.delta_squared if self.delta_squared else nan

    @property
    def relative_error(self) -> float:
        """‖applied − delta‖/‖delta‖; nan for a zero delta."""
        return sqrt(self.error_squared / self.delta_squared) if self.delta_squared else nan

    @property
    def cosine(self) -> float:
        """Of applied and delta, −1 to 1; nan when either is zero."""
        norms = sqrt(self.delta_squared * self.applied_squared)
        return self.inner / norms if norms else nan

    @property
    def changed_share(self) -> float:
        """Share of entries whose stored value changed, 0 to 1. Alarming and harmless: judge by the gain."""
        return self.changed / self.elements if self.elements else nan


def survival(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Survival:
    """Of one tile. `base` and `delta` in the dtype of the computation; `base` is taken as stored in `dtype`."""
    applied = rounded(base + delta, dtype).to(base.dtype) - rounded(base, dtype).to(base.dtype)
    return Survival(
        elements=base.numel(),
        changed=int(torch.count_nonzero(applied)),
        delta_squared=_dot(delta, delta),
        applied_squared=_dot(applied, applied),
        inner=_dot(applied, delta),
        error_squared=_dot(error := applied - delta, error),
    )


def _dot(a: Tensor, b: Tensor) -> float:
    """Products in the tile's dtype, row sums in it, their sum in float64."""
    return float((a * b).sum(dim=-1).sum(dtype=torch.float64))
